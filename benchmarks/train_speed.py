"""Training speed and memory of configs/fox1.py:tiny beside the same model in plain PyTorch, and the
loader's packed tokens per second. Each runs in a process of its own, in turn, on the same batches.

  pip install -r requirements-bench.txt
  python -m benchmarks.train_speed [--rounds=3] [--seconds=10]

Peak memory is the process's resident set at its highest, less what it was before the model was
made. Batches are random tokens with documents of 300 on average; the loader reads a real store.
"""

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from configs import fox1
from slmjax.config import Config
from slmjax.data.loader import row_arrays
from slmjax.resolve import resolve

EOS = 1


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--seconds", type=float, default=10.0)
  parser.add_argument("--child", choices=CHILDREN, help=argparse.SUPPRESS)
  parser.add_argument("--stage", type=int, default=0, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    print(json.dumps(CHILDREN[args.child](args.stage, args.seconds)))
    return
  config = tiny()
  print(f"{'stage':10} {'what':10} {'tokens/s':>10} {'of rounds':>20} {'memory MiB':>11}")
  for index, stage in enumerate(config.stages[:2]):
    for child in CHILDREN:
      results = [_measure(child, index, args.seconds) for _ in range(args.rounds)]
      speeds = sorted(r["tokens_per_second"] for r in results)
      spread = f"{speeds[0]:,.0f} to {speeds[-1]:,.0f}"
      memory = max(r["peak_bytes"] for r in results) / 2**20
      median = statistics.median(speeds)
      print(
        f"{stage.name:10} {child:10} {median:>10,.0f} {spread:>20} {memory:>11,.0f}", flush=True
      )


def tiny() -> Config:
  return resolve(fox1.get_config("tiny"))


def rows(config: Config, stage_index: int) -> dict[str, np.ndarray]:
  """Arrays [B, S] of one batch."""
  stage = config.stages[stage_index]
  rng = np.random.default_rng(0)
  spans = rng.integers(4, config.model.vocab_size, (stage.rows, stage.row_length + 1))
  spans[rng.random(spans.shape) < 1 / 300] = EOS
  made = [row_arrays(span[None].astype(np.int32), EOS, stage.isolate_documents) for span in spans]
  return {name: np.stack([row[name] for row in made]) for name in made[0]}


def _measure(child: str, stage: int, seconds: float) -> dict[str, Any]:
  flags = [f"--child={child}", f"--stage={stage}", f"--seconds={seconds}"]
  command = [sys.executable, "-m", "benchmarks.train_speed", *flags]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


def _timed(step: Callable[[], None], tokens: int, seconds: float) -> float:
  """Tokens per second after two steps of warm-up."""
  for _ in range(2):
    step()
  begin, steps = time.perf_counter(), 0
  while time.perf_counter() - begin < seconds or steps < 2:
    step()
    steps += 1
  return steps * tokens / (time.perf_counter() - begin)


def _resident() -> int:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_slmjax(stage_index: int, seconds: float) -> dict[str, Any]:
  import jax

  from slmjax import sharding, train
  from slmjax.data.loader import Batch
  from slmjax.state import init_state

  config = tiny()
  stage = config.stages[stage_index]
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    before = _resident()
    step_fn = train.compile_step(config, stage_index, mesh)
    state = jax.jit(functools.partial(init_state, config))()
    placement = sharding.batch_sharding(mesh)
    passes = stage.microbatches(1)
    arrays = rows(config, stage_index)
    batch = Batch(
      **{
        name: jax.device_put(x.reshape(passes, -1, x.shape[-1]), placement)
        for name, x in arrays.items()
      }
    )

    def step() -> None:
      nonlocal state
      state, metrics = step_fn(state, batch)
      float(metrics.loss_sum)

    speed = _timed(step, stage.batch_tokens, seconds)
  return {"tokens_per_second": speed, "peak_bytes": _resident() - before}


def run_torch(stage_index: int, seconds: float) -> dict[str, Any]:
  import torch

  from benchmarks.torch_model import Decoder

  config = tiny()
  stage, settings = config.stages[stage_index], config.optimizer
  before = _resident()
  assert stage.rope_theta is not None
  model = Decoder(config.model, stage.rope_theta)
  optimizer = torch.optim.AdamW(
    model.parameters(),
    lr=stage.learning_rate.peak,
    betas=(settings.beta1, settings.beta2),
    eps=settings.eps,
    weight_decay=settings.weight_decay,
    fused=True,
  )
  arrays = rows(config, stage_index)
  names = ("tokens", "targets", "segments", "positions")
  tensors = {name: torch.from_numpy(arrays[name]).long() for name in names}
  micro = stage.microbatch_rows

  def step() -> None:
    optimizer.zero_grad()
    for first in range(0, stage.rows, micro):
      part = [tensors[name][first : first + micro] for name in names]
      (model.loss(*part, z_loss=settings.z_loss) * micro / stage.rows).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
    optimizer.step()

  speed = _timed(step, stage.batch_tokens, seconds)
  return {"tokens_per_second": speed, "peak_bytes": _resident() - before}


def run_loader(stage_index: int, seconds: float) -> dict[str, Any]:
  import jax

  from slmjax import sharding
  from slmjax.data.loader import Loader
  from slmjax.data.plan import Plan, demand
  from slmjax.data.store import TokenizerFacts, TokenStore
  from slmjax.data.store_writer import StoreWriter

  config = tiny()
  stage = config.stages[stage_index]
  rng = np.random.default_rng(0)
  with tempfile.TemporaryDirectory() as folder:
    facts = TokenizerFacts("", config.model.vocab_size, 2, EOS, 3, 0, normalisation={})
    stores = {}
    for name, takes in demand(config).items():
      path = Path(folder) / name / "train"
      with StoreWriter(path, source=name, split="train", tokenizer=facts) as writer:
        for _ in range(sum(takes) // 300 + 2):
          writer.add(rng.integers(4, config.model.vocab_size, 300), 1000)
      stores[name] = TokenStore.open(path)
    mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
    with jax.set_mesh(mesh):
      plan = Plan(config, {name: store.tokens for name, store in stores.items()})
      loader = Loader(config, plan, stores, mesh)
      before = _resident()
      begin, steps = time.perf_counter(), 0
      while time.perf_counter() - begin < seconds:
        for batch in loader.batches(config.boundaries[stage_index]):
          jax.block_until_ready(batch.tokens)
          steps += 1
      speed = steps * stage.batch_tokens / (time.perf_counter() - begin)
  return {"tokens_per_second": speed, "peak_bytes": _resident() - before}


CHILDREN: dict[str, Callable[[int, float], dict[str, Any]]] = {
  "slmjax": run_slmjax,
  "torch": run_torch,
  "loader": run_loader,
}

if __name__ == "__main__":
  main()
