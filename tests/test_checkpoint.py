"""Checkpoints on disk: names, and one clear line for what is broken."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from slmjax import checkpoint, sharding
from slmjax.config import Config
from slmjax.state import TrainState, abstract_state, init_state
from tests import small


@pytest.fixture(scope="module")
def config() -> Config:
  return small.config()


@pytest.fixture(scope="module")
def state(config: Config) -> TrainState:
  with jax.set_mesh(mesh()):
    return jax.jit(lambda: init_state(config))()


def mesh() -> jax.sharding.Mesh:
  return sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])


def save(run: Path, state: TrainState, *steps: int) -> None:
  checkpointer = checkpoint.Checkpointer(run, keep=2, keep_steps=[1])
  for step in steps:
    checkpointer.save(step, state, {"step": step})
  checkpointer.wait()
  checkpointer.close()


def restore(run: Path, step: int, config: Config) -> TrainState:
  with jax.set_mesh(mesh()):
    abstract = sharding.with_mesh(abstract_state(config), mesh())
    checkpointer = checkpoint.Checkpointer(run, keep=2, keep_steps=[1])
    try:
      return checkpointer.restore(step, abstract)
    finally:
      checkpointer.close()


def test_round_trip_and_names(tmp_path: Path, state: TrainState, config: Config) -> None:
  save(tmp_path, state, 3)
  for a, b in zip(
    jax.tree.leaves(restore(tmp_path, 3, config)), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  names = checkpoint.by_name(state.model)
  assert {"embed_VE", "segments/0/attention/q_DNH", "segments/0/ffn_norm/scale_D"} < set(names)
  assert len(names) == len(jax.tree.leaves(state.model))
  assert checkpoint.read_meta(tmp_path, 3) == {"step": 3}


def test_keeps_the_newest_and_the_chosen(tmp_path: Path, state: TrainState) -> None:
  save(tmp_path, state, 1, 2, 3, 4)
  assert checkpoint.steps_in(tmp_path) == [1, 3, 4]


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path, state: TrainState) -> None:
  save(tmp_path, state, 3)
  folder = tmp_path / checkpoint.FOLDER
  shutil.copytree(folder / "3", folder / "5.orbax-checkpoint-tmp-1")
  assert checkpoint.steps_in(tmp_path) == [3]
  checkpointer = checkpoint.Checkpointer(tmp_path, keep=2, keep_steps=[])
  assert checkpointer.latest_step() == 3
  checkpointer.close()


@pytest.mark.parametrize("damage", ["array data", "all data", "structure"])
def test_a_broken_checkpoint_is_one_line(
  tmp_path: Path, state: TrainState, config: Config, damage: str
) -> None:
  save(tmp_path, state, 3)
  item = tmp_path / checkpoint.FOLDER / "3" / "model"
  if damage == "all data":
    shutil.rmtree(item)
  elif damage == "structure":
    (item / "_METADATA").write_text("{")
  else:
    (largest,) = sorted(item.rglob("d/*"), key=lambda f: f.stat().st_size)[-1:]
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
  with pytest.raises(checkpoint.CheckpointError, match=r"3 cannot be read \(.+\); remove") as error:
    restore(tmp_path, 3, config)
  assert "\n" not in str(error.value)
