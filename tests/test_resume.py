"""Stopping and resuming is invisible: losses and weights are those of an uninterrupted run."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slmjax import checkpoint, sharding, train
from slmjax.config import Config
from slmjax.metrics import Reporter
from slmjax.resolve import resolve
from slmjax.state import TrainState, abstract_state
from tests import small

pytestmark = pytest.mark.medium

STEPS = 18
TIMED = ("tokens_per_second", "utilisation")


def losses(run: Path) -> list[dict[str, Any]]:
  """What metrics.jsonl says of each step, but for the clock."""
  lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
  return [{k: v for k, v in line.items() if k not in TIMED} for line in lines]


def evaluations(run: Path) -> list[Any]:
  return [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]


def final_state(config: Config, run: Path) -> list[np.ndarray]:
  mesh = sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    abstract: TrainState = sharding.with_mesh(abstract_state(config), mesh)
    checkpointer = checkpoint.Checkpointer(run, 2, config.boundaries)
    state = checkpointer.restore(config.steps, abstract)
    checkpointer.close()
  return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def assert_same_run(config: Config, one: Path, other: Path) -> None:
  assert losses(one) == losses(other)
  assert evaluations(one) == evaluations(other)
  for a, b in zip(final_state(config, one), final_state(config, other), strict=True):
    np.testing.assert_array_equal(a, b)
  ledgers = [checkpoint.read_meta(run, config.steps)["ledger"] for run in (one, other)]
  assert ledgers[0] == ledgers[1]


@pytest.fixture(scope="module")
def one_device() -> Any:
  """`train.run` on one of the eight virtual devices, each stage compiled once for all tests."""
  compiled: dict[int, Any] = {}
  original = train.compile_step

  def compile_once(config: Config, index: int, mesh: Any) -> Any:
    if index not in compiled:
      compiled[index] = original(config, index, mesh)
    return compiled[index]

  patch = pytest.MonkeyPatch()
  patch.setattr(train, "compile_step", compile_once)
  patch.setattr(train, "make_mesh", lambda _: sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]))
  yield
  patch.undo()


@pytest.fixture(scope="module")
def uninterrupted(
  one_device: None, text_store: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
  folder = tmp_path_factory.mktemp("uninterrupted")
  assert train.run(small.config(text_store), folder) == 0
  return folder


def test_metrics_name_every_step_once(uninterrupted: Path) -> None:
  lines = losses(uninterrupted)
  assert [line["step"] for line in lines] == list(range(STEPS))
  assert [line["stage"] for line in lines] == ["general"] * 8 + ["curated"] * 6 + ["instruct"] * 4
  assert lines[-1]["loss"] < lines[0]["loss"]
  assert [e["step"] for e in evaluations(uninterrupted)] == [5, 8, 10, 14, 15, 18]


def test_stage_ends_are_kept(uninterrupted: Path) -> None:
  assert checkpoint.steps_in(uninterrupted) == [8, 14, 15, 18]  # and the newest two


@pytest.mark.parametrize("stop_after", range(1, STEPS))
def test_sigterm_after_any_step(
  uninterrupted: Path,
  text_store: str,
  tmp_path: Path,
  monkeypatch: pytest.MonkeyPatch,
  stop_after: int,
) -> None:
  config = small.config(text_store)
  push = Reporter.push

  def interrupt(self: Reporter, step: int, metrics: Any) -> None:
    push(self, step, metrics)
    if step == stop_after - 1:
      signal.raise_signal(signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(Reporter, "push", interrupt)
    assert train.run(config, tmp_path) == 128 + signal.SIGTERM
  assert checkpoint.steps_in(tmp_path)[-1] == stop_after
  assert train.run(config, tmp_path) == 0
  assert_same_run(config, uninterrupted, tmp_path)


def command(module: list[str], text_store: str, run: Path, *flags: str) -> list[str]:
  recipe = ["--config=tests/curriculum.py", f"--config.data.store={text_store}"]
  return [sys.executable, "-m", *module, *recipe, f"--workdir={run}", *flags]


def environment(devices: int = 1) -> dict[str, str]:
  """For a real process with so many devices, which compiles as the tests themselves do."""
  count = "--xla_force_host_platform_device_count="
  flags = re.sub(rf"{count}\d+", f"{count}{devices}", os.environ["XLA_FLAGS"])
  return {**os.environ, "XLA_FLAGS": flags}


def test_real_processes_killed_again_and_again(
  uninterrupted: Path, text_store: str, tmp_path: Path
) -> None:
  """Killed without warning in each stage and around each boundary, and stopped once politely."""
  kills = [(0, 9), (4, 9), (7, 9), (9, 9), (13, 9), (14, 15), (16, 9)]
  for step, number in kills:
    interrupted = subprocess.run(
      command(["tests.interrupted", str(step), str(number)], text_store, tmp_path),
      env=environment(),
      capture_output=True,
      text=True,
      check=False,
    )
    expected = -signal.SIGKILL if number == signal.SIGKILL else 128 + number
    assert interrupted.returncode == expected, interrupted.stderr
  subprocess.run(command(["slmjax.main"], text_store, tmp_path), env=environment(), check=True)
  assert_same_run(small.config(text_store), uninterrupted, tmp_path)


def test_another_recipe_is_refused_with_the_difference(
  uninterrupted: Path, text_store: str
) -> None:
  raw = small.raw_config(text_store)
  raw.optimizer.weight_decay = 0.2
  with pytest.raises(checkpoint.CheckpointError, match=r"weight_decay: 0\.1 -> 0\.2"):
    train.run(resolve(raw), uninterrupted)


def test_other_data_is_refused_with_the_difference(
  uninterrupted: Path, text_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  stores = train.open_stores

  def changed(config: Config, split: str) -> Any:
    found = stores(config, split)
    found["docs"].fingerprint = "0" * 64
    return found

  monkeypatch.setattr(train, "open_stores", changed)
  with pytest.raises(checkpoint.CheckpointError, match=r"data\.docs\.train: '\w+' -> '0000"):
    train.run(small.config(text_store), uninterrupted)


def test_what_may_change_between_starts(uninterrupted: Path, text_store: str) -> None:
  raw = small.raw_config(text_store)
  raw.checkpoint.every_steps = 7
  raw.eval.every_steps = 9
  raw.compute.remat = "block"
  raw.stages[0].microbatch_rows = 4
  assert train.run(resolve(raw), uninterrupted) == 0  # complete: nothing is left to do
