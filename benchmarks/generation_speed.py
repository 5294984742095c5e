"""Cached greedy generation beside transformers: the same Llama of 135M parameters (SmolLM2-135M's
dimensions, random weights), float32, CPU, in turn, each in a process of its own.

  pip install -r requirements-dev.txt
  python -m benchmarks.generation_speed [--rounds=3] [--batch=1] [--prompt=128] [--tokens=64]

Prefill is the time to the first new token, decoding that of all the others. Best of all rounds:
what else runs on the machine can only make it slower. `equal` is the share of new tokens that both
chose alike; `first call` has the compilation in it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
WEIGHTS = "model.safetensors"
DIMENSIONS: dict[str, Any] = dict(
  vocab_size=49152,
  hidden_size=576,
  num_hidden_layers=30,
  num_attention_heads=9,
  num_key_value_heads=3,
  intermediate_size=1536,
  max_position_embeddings=2048,
  rms_norm_eps=1e-5,
  tie_word_embeddings=True,
)
THETA = 10_000.0


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  add = parser.add_argument
  add("--rounds", type=int, default=3, help="processes of each kind (3)")
  add("--repeats", type=int, default=3, help="measurements in a process (3)")
  add("--batch", type=int, action="append", help="prompts at once; repeatable (1 and 4)")
  add("--prompt", type=int, action="append", help="tokens of a prompt; repeatable (128 and 512)")
  add("--tokens", type=int, default=64, help="new tokens (64)")
  add("--child", choices=CHILDREN, help=argparse.SUPPRESS)
  add("--folder", type=Path, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.child:
    continues = CHILDREN[args.child](args.folder)
    (batch,), (prompt,) = args.batch, args.prompt
    print(json.dumps(_measured(continues, batch, prompt, args.tokens, args.repeats)))
    return
  print(
    f"{'batch':>5} {'prompt':>6} {'what':12} {'prefill tokens/s':>17} {'decode tokens/s':>16} "
    f"{'first call s':>12}"
  )
  with tempfile.TemporaryDirectory() as folder:
    _make_weights(Path(folder))
    for batch in args.batch or (1, 4):
      for prompt in args.prompt or (128, 512):
        flags = [f"--batch={batch}", f"--prompt={prompt}", f"--tokens={args.tokens}"]
        flags += [f"--folder={folder}", f"--repeats={args.repeats}"]
        _row(batch, prompt, args.tokens, args.rounds, flags)


def _row(batch: int, prompt: int, tokens: int, rounds: int, flags: list[str]) -> None:
  results: dict[str, list[dict]] = {name: [] for name in CHILDREN}
  for _ in range(rounds):
    for name, measured in results.items():
      measured.append(_child(name, flags))
  for name, measured in results.items():
    prefill, total, first = (min(r[part] for r in measured) for part in ("prefill", "all", "first"))
    print(
      f"{batch:>5} {prompt:>6} {name:12} {batch * prompt / prefill:>17,.0f} "
      f"{batch * (tokens - 1) / (total - prefill):>16,.1f} {first:>12.1f}",
      flush=True,
    )
  drawn = [np.asarray(measured[0]["tokens"]) for measured in results.values()]
  print(f"{'':12} equal {np.mean(drawn[0] == drawn[1]):.3f}")


def _child(name: str, flags: list[str]) -> dict[str, Any]:
  command = [sys.executable, "-m", "benchmarks.generation_speed", f"--child={name}", *flags]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
  return json.loads(done.stdout.splitlines()[-1])


Continues = Callable[[np.ndarray, int], list[list[int]]]


def _measured(
  continues: Continues, batch: int, prompt: int, tokens: int, repeats: int
) -> dict[str, Any]:
  """The least seconds for the first new token and for all; and of the first call for all."""
  ids = np.random.default_rng(0).integers(0, DIMENSIONS["vocab_size"], (batch, prompt))
  seconds, first = {}, 0.0
  for count in (1, tokens):
    begin = time.perf_counter()
    drawn = continues(ids, count)
    first, seconds[count] = time.perf_counter() - begin, math.inf
    for _ in range(repeats):
      begin = time.perf_counter()
      drawn = continues(ids, count)
      seconds[count] = min(seconds[count], time.perf_counter() - begin)
  return {"prefill": seconds[1], "all": seconds[tokens], "first": first, "tokens": drawn}


def _make_weights(folder: Path) -> None:
  from safetensors.numpy import save_file

  rng = np.random.default_rng(0)
  d, h = DIMENSIONS["hidden_size"], 64
  wide, narrow = DIMENSIONS["num_attention_heads"] * h, DIMENSIONS["num_key_value_heads"] * h
  ffn = DIMENSIONS["intermediate_size"]
  shapes = {"model.embed_tokens.weight": (DIMENSIONS["vocab_size"], d), "model.norm.weight": (d,)}
  for i in range(DIMENSIONS["num_hidden_layers"]):
    layer = f"model.layers.{i}"
    for name, shape in {
      "self_attn.q_proj": (wide, d),
      "self_attn.k_proj": (narrow, d),
      "self_attn.v_proj": (narrow, d),
      "self_attn.o_proj": (d, wide),
      "mlp.gate_proj": (ffn, d),
      "mlp.up_proj": (ffn, d),
      "mlp.down_proj": (d, ffn),
      "input_layernorm": (d,),
      "post_attention_layernorm": (d,),
    }.items():
      shapes[f"{layer}.{name}.weight"] = shape
  weights = {
    name: np.ones(shape, np.float32)
    if len(shape) == 1
    else rng.standard_normal(shape, np.float32) * np.float32(0.05)
    for name, shape in shapes.items()
  }
  save_file(weights, folder / WEIGHTS, {"format": "pt"})
  config = DIMENSIONS | dict(model_type="llama", architectures=["LlamaForCausalLM"])
  config |= dict(rope_parameters=dict(rope_type="default", rope_theta=THETA))
  (folder / "config.json").write_text(json.dumps(config))


def run_slmjax(folder: Path) -> Continues:
  import jax
  from safetensors.numpy import load_file

  from slmjax import checkpoint, families, sharding
  from slmjax.architecture import normal
  from slmjax.config import ComputeConfig
  from slmjax.generate import Sampling, generate
  from slmjax.model.decoder import Decoder
  from slmjax.resolve import resolve_model
  from slmjax.sharding import Specs

  c = DIMENSIONS
  model_config = resolve_model(
    families.llama(
      vocab_size=c["vocab_size"],
      width=c["hidden_size"],
      layers=c["num_hidden_layers"],
      heads=c["num_attention_heads"],
      kv_heads=c["num_key_value_heads"],
      ffn=c["intermediate_size"],
      max_length=c["max_position_embeddings"],
      tied=True,
      eps=c["rms_norm_eps"],
      init=normal(0.02),
    )
  )
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    compute = ComputeConfig("float32", "float32", "none", "auto", "auto")
    abstract = sharding.with_mesh(
      jax.eval_shape(lambda: Decoder(model_config, compute, Specs.of_mesh(), jax.random.key(0))),
      mesh,
    )
    weights = load_file(folder / WEIGHTS)
    names = {
      "attention/q_DNH": "self_attn.q_proj",
      "attention/k_DKH": "self_attn.k_proj",
      "attention/v_DKH": "self_attn.v_proj",
      "attention/out_NHD": "self_attn.o_proj",
      "ffn/gate_DF": "mlp.gate_proj",
      "ffn/up_DF": "mlp.up_proj",
      "ffn/down_FD": "mlp.down_proj",
      "attention_norm/scale_D": "input_layernorm",
      "ffn_norm/scale_D": "post_attention_layernorm",
    }
    whole = {"embed_VE": "model.embed_tokens.weight", "final_norm/scale_D": "model.norm.weight"}
    leaves = []
    for name, leaf in checkpoint.by_name(abstract).items():
      if name in whole:
        array = weights[whole[name]]
      else:
        theirs = names[name.removeprefix("segments/0/")]
        layers = range(c["num_hidden_layers"])
        array = np.stack([weights[f"model.layers.{i}.{theirs}.weight"].T for i in layers])
      leaves.append(jax.device_put(array.reshape(leaf.shape), leaf.sharding))
    model = jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0)

  def continues(ids: np.ndarray, tokens: int) -> list[list[int]]:
    with jax.set_mesh(mesh):
      return generate(
        model, ids.tolist(), tokens, rope_theta=THETA, stop_ids=(), sampling=greedy, seed=0
      )

  return continues


def run_transformers(folder: Path) -> Continues:
  import torch
  from transformers import AutoModelForCausalLM

  torch.set_num_threads(THREADS)
  model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

  def continues(ids: np.ndarray, tokens: int) -> list[list[int]]:
    inputs = torch.from_numpy(ids)
    with torch.inference_mode():
      drawn = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
      )
    return drawn[:, ids.shape[1] :].tolist()

  return continues


CHILDREN: dict[str, Callable[[Path], Continues]] = {
  "slmjax": run_slmjax,
  "transformers": run_transformers,
}

if __name__ == "__main__":
  main()
