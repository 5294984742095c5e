"""A run: start-up in a fixed order, then one visible loop over the stages.

Start-up: open the stores, lay the plan, then (1) resume if the run folder has a checkpoint of this
very run, (2) else start fresh. A folder with another run's checkpoint is refused.
"""

import contextlib
import dataclasses
import functools
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from slmjax import checkpoint, probe, resolve, sharding
from slmjax.config import Config, ConfigError, StageConfig, differences, identity, to_dict, to_json
from slmjax.data import ledger, tokenizer_files
from slmjax.data.loader import Loader, abstract_batch
from slmjax.data.plan import Plan
from slmjax.data.store import TokenStore
from slmjax.durable import write_atomically
from slmjax.evaluate import Evaluator
from slmjax.loaded import tokenizer_meta
from slmjax.metrics import Reporter
from slmjax.state import TrainState, abstract_state, enter_stage, init_state
from slmjax.step import train_step


def run(config: Config, folder: Path) -> int:
  """Trains, or goes on training, in a run folder until the last step or a stop signal.

  Returns:
    An exit code: 0 when the run is complete, 128 + the signal's number when it was stopped by one.

  Raises:
    UserError: config, stores or checkpoint do not fit together, or a step was not finite.
  """
  with Stop() as stop, jax.set_mesh(make_mesh(config)), contextlib.ExitStack() as resources:
    return _Run(config, folder, stop, resources).train()


def make_mesh(config: Config) -> jax.sharding.Mesh:
  return sharding.make_mesh(resolve.resolve_mesh(config, jax.device_count()))


class Stop:
  """Turns SIGTERM and SIGINT into a request that the loop honours between two steps."""

  def __init__(self) -> None:
    self.signal: int | None = None
    self._previous: dict[int, Any] = {}

  def __enter__(self) -> "Stop":
    # With several processes jax.distributed watches SIGTERM, so that all stop at the same step; an
    # interrupt that one of them gets alone must not make it stop where the others go on.
    for number in (signal.SIGINT, signal.SIGTERM) if jax.process_count() == 1 else ():
      self._previous[number] = signal.signal(number, self._request)
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _request(self, number: int, _: FrameType | None) -> None:
    self.signal = number

  def requested(self, step: int) -> bool:
    """Whether to stop after `step` steps; the same answer in every process."""
    if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
      self.signal = signal.SIGTERM
    return self.signal is not None


class _Run:
  """What the loop needs at hand. One instance per call of `run`."""

  def __init__(self, config: Config, folder: Path, stop: Stop, resources: contextlib.ExitStack):
    """`resources` closes, however the run ends, what is opened here."""
    self.config = config
    self.stop = stop
    self.mesh = jax.sharding.get_mesh()
    self.stores = open_stores(config, "train")
    self.heldout = open_stores(config, "heldout")
    self.plan = Plan(config, {name: store.tokens for name, store in self.stores.items()})
    self.loader = Loader(config, self.plan, self.stores, self.mesh)
    self.evaluator = Evaluator(config.eval.rows, config.eval.row_length)
    primary = jax.process_index() == 0
    if primary:
      folder.mkdir(parents=True, exist_ok=True)
    multihost_utils.sync_global_devices("run folder")
    self.checkpointer = checkpoint.Checkpointer(
      folder, config.checkpoint.keep, config.boundaries[1:]
    )
    resources.callback(self.checkpointer.close)
    self.meta = {
      "config": to_dict(config),
      "fingerprints": _fingerprints(self.stores, self.heldout),
      "tokenizer": tokenizer_meta(self.stores),
      "versions": checkpoint.versions(),
    }
    probe.check(config.model, config.compute, probe.shapes_of(config))
    self.first_step = self._start()
    if primary:
      write_atomically(folder / "config.json", to_json(config).encode())
      tokenizer = next(iter(self.stores.values())).tokenizer_path
      if tokenizer_files.find(folder) is None:
        tokenizer_files.copy(tokenizer, folder)
    self.reporter = Reporter(folder, config, self.first_step, writes=primary)
    resources.callback(self.reporter.close)

  def train(self) -> int:
    config, reporter, step = self.config, self.reporter, self.first_step
    state = self._state
    reporter.say(f"{config.name}: {_where(self.mesh)}; peak of {reporter.peak_source}")
    if step:
      reporter.say(f"resuming after step {step}")
    for change in self._other_versions:
      reporter.say(f"{change}: losses may differ in their last bits from an uninterrupted run")
    while step < config.steps:
      index = config.stage_index(step)
      stage = config.stages[index]
      if step == config.boundaries[index]:
        state = enter_stage(config, stage, state)
      step_fn = self._compile(index)
      reporter.start_clock()
      for batch in self.loader.batches(step):
        state, metrics = step_fn(state, batch)
        reporter.push(step, metrics)
        step += 1
        stage_ends = step == config.boundaries[index + 1]
        stopping = self.stop.requested(step)
        if stage_ends or step % config.eval.every_steps == 0:
          reporter.flush()
          reporter.evaluation(step, stage.name, self._evaluate(state, stage))
          reporter.start_clock()
        if stage_ends or stopping or step % config.checkpoint.every_steps == 0:
          reporter.flush()  # a step that was not finite ends the run before it can be saved
          self._save(step, state)
          reporter.start_clock()
        if stopping:
          break
      if self.stop.signal is not None:
        break
    reporter.flush()
    self.checkpointer.wait()
    if step < config.steps:
      assert self.stop.signal is not None
      name = signal.Signals(self.stop.signal).name
      reporter.say(f"stopped by {name} after step {step}, which is saved; the same command resumes")
      return 128 + self.stop.signal
    reporter.say(f"complete: {step} steps, {config.tokens_before(step):,} tokens")
    return 0

  def _start(self) -> int:
    """Resumes from the newest checkpoint, or starts fresh; returns the steps that are done."""
    step = self.checkpointer.latest_step()
    self._other_versions: list[str] = []
    if step is None:
      self._state: TrainState = jax.jit(functools.partial(init_state, self.config))()
      self._ledger, self._ledger_step = ledger.between(self.config, self.plan, self.stores, 0, 0), 0
      return 0
    saved = self.checkpointer.meta(step)
    check_same_run(saved, self.meta, self.config)
    self._other_versions = differences(saved["versions"], self.meta["versions"], "versions")
    abstract = sharding.with_mesh(abstract_state(self.config), self.mesh)
    self._state = self.checkpointer.restore(step, abstract)
    self._ledger = tuple(ledger.Entry(**entry) for entry in saved["ledger"])
    self._ledger_step = step
    return step

  def _compile(self, index: int) -> Any:
    begin = time.perf_counter()
    compiled = compile_step(self.config, index, self.mesh)
    memory = compiled.memory_analysis()
    need = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    self.reporter.say(
      f"stage {self.config.stages[index].name}: compiled in {time.perf_counter() - begin:.1f} s, "
      f"{need / 2**20:,.0f} MiB per device"
    )
    return compiled

  def _evaluate(self, state: TrainState, stage: StageConfig) -> dict[str, Any]:
    limit = self.config.eval.tokens_per_source
    return {
      name: self.evaluator.store(
        state.model, store, limit, stage.rope_theta, stage.isolate_documents
      )
      for name, store in self.heldout.items()
    }

  def _save(self, step: int, state: TrainState) -> None:
    since = ledger.between(self.config, self.plan, self.stores, self._ledger_step, step)
    self._ledger, self._ledger_step = ledger.add(self._ledger, since), step
    entries = [dataclasses.asdict(entry) for entry in self._ledger]
    self.checkpointer.save(step, state, {"step": step, **self.meta, "ledger": entries})


def compile_step(config: Config, stage_index: int, mesh: jax.sharding.Mesh) -> Any:
  """The compiled train step of a stage for a mesh, which must have been entered. The state that
  goes in is given up: its memory holds the one that comes out."""
  step = functools.partial(train_step, config=config, stage_index=stage_index)
  state = sharding.with_mesh(abstract_state(config), mesh)
  batch = abstract_batch(config.stages[stage_index], mesh)
  return jax.jit(step, donate_argnums=0).lower(state, batch).compile()


def open_stores(config: Config, split: str) -> dict[str, TokenStore]:
  """The token stores of all sources, checked against the model and one another."""
  root = Path(config.data.store)
  stores = {name: TokenStore.open(root / name / split) for name in config.data.sources}
  for name, store in stores.items():
    if store.vocab_size > config.model.vocab_size:
      raise ConfigError(
        f"{store.path}: the tokenizer has {store.vocab_size} pieces, more than "
        f"config.model.vocab_size {config.model.vocab_size}"
      )
    first, facts = next(iter(stores.items())), tokenizer_meta({name: store})
    if facts != tokenizer_meta({first[0]: first[1]}):
      raise ConfigError(
        f"{store.path} and {first[1].path} differ in tokenizer or add_bos; tokenize them alike"
      )
  return stores


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any], config: Config) -> None:
  """Refuses to resume a checkpoint of another recipe or other data.

  Raises:
    CheckpointError: with every difference.
  """
  recipe = differences(identity(resolve.resolve(saved["config"])), identity(config))
  data = differences(saved["fingerprints"], current["fingerprints"], "data")
  if recipe or data:
    raise checkpoint.CheckpointError(
      f"the checkpoint of step {saved['step']} belongs to another run: "
      f"{'; '.join([*recipe, *data])} (saved -> now). Use a new --workdir, or undo the change"
    )


def _fingerprints(*splits: Mapping[str, TokenStore]) -> dict[str, dict[str, str]]:
  return {
    name: {store[name].split: store[name].fingerprint for store in splits} for name in splits[0]
  }


def _where(mesh: jax.sharding.Mesh) -> str:
  shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  kind = mesh.devices.flat[0].device_kind
  return f"{mesh.size} {kind} device(s) ({shape}), {jax.process_count()} process(es)"
