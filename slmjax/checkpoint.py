"""Checkpoints: the only file that imports Orbax.

RUN/checkpoints/STEP holds three items: `model` (the parameters), `optimizer` (the rest of the
state) and `meta` (JSON: step, resolved config, fingerprints of the stores, ledger, versions).
A checkpoint appears under its final name only when it is whole.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from slmjax.errors import UserError
from slmjax.state import TrainState

FOLDER = "checkpoints"


class CheckpointError(UserError):
  """A checkpoint that is missing, broken or of another run. One line: what, where, what to do."""


class Checkpointer:
  """Saves and restores the checkpoints of one run folder."""

  def __init__(self, run: Path, keep: int, keep_steps: Collection[int]):
    """Keeps the newest `keep` checkpoints, and those of `keep_steps` for good."""
    self._folder = run.absolute() / FOLDER
    options = ocp.CheckpointManagerOptions(
      preservation_policy=policies.AnyPreservationPolicy(
        [policies.LatestN(keep), policies.CustomSteps(sorted(keep_steps))]
      ),
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(self._folder, options=options)

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Copies the state off the devices, then writes in the background."""
    saved = self._manager.save(
      step,
      args=ocp.args.Composite(
        model=ocp.args.StandardSave(by_name(state.model)),
        optimizer=ocp.args.StandardSave(by_name(_without_model(state))),
        meta=ocp.args.JsonSave(meta),
      ),
      force=True,  # the loop decides when to save, not Orbax
    )
    if not saved:
      raise CheckpointError(f"{self._folder}/{step}: Orbax declined to save this step")

  def meta(self, step: int) -> dict[str, Any]:
    """The `meta` item of a step."""
    with _readable(self._folder / str(step)):
      return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))[
        "meta"
      ]

  def restore(self, step: int, abstract: TrainState) -> TrainState:
    """The state of a step, laid out as `abstract` (with shardings on a concrete mesh) says."""
    rest = _without_model(abstract)
    items = ocp.args.Composite(
      model=ocp.args.StandardRestore(by_name(abstract.model)),
      optimizer=ocp.args.StandardRestore(by_name(rest)),
    )
    with _readable(self._folder / str(step)):
      items = self._manager.restore(step, args=items)
    model = _like(abstract.model, items["model"])
    return dataclasses.replace(abstract, model=model, **_like(rest, items["optimizer"]))

  def wait(self) -> None:
    """Blocks until all saves are on disk; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def steps_in(run: Path) -> list[int]:
  """The steps of the complete checkpoints in a run folder, ascending."""
  folder = run.absolute() / FOLDER
  if not folder.is_dir():
    return []
  return sorted(int(child.name) for child in folder.iterdir() if child.name.isdigit())


def chosen_step(run: Path, step: int | None) -> int:
  """A step that has a checkpoint: the one asked for, or the newest.

  Raises:
    CheckpointError: there is none, or not of that step.
  """
  steps = steps_in(run)
  if not steps:
    raise CheckpointError(
      f"{run} holds no checkpoint; name the run's folder (--workdir of the training) or that of "
      "an imported model"
    )
  if step is None:
    return steps[-1]
  if step not in steps:
    raise CheckpointError(
      f"{run} has no checkpoint of step {step}; it has {', '.join(map(str, steps))}"
    )
  return step


def read_meta(run: Path, step: int) -> dict[str, Any]:
  """The `meta` item of a step."""
  path = run.absolute() / FOLDER / str(step)
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader, _readable(path):
    return reader.restore(path / "meta")


def read_model(run: Path, step: int, abstract_model: Any) -> Any:
  """The parameters alone, laid out as `abstract_model` says: for evaluation and generation."""
  path = run.absolute() / FOLDER / str(step)
  with ocp.StandardCheckpointer() as reader, _readable(path):
    arrays = reader.restore(path / "model", by_name(abstract_model))
  return _like(abstract_model, arrays)


@dataclasses.dataclass(frozen=True)
class LazyArray:
  """An array that is made when its turn to be written comes."""

  shape: tuple[int, ...]
  dtype: np.dtype
  make: Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def nbytes(self) -> int:
    return self.size * self.dtype.itemsize


class _OneAtATime(ocp.type_handlers.NumpyHandler):
  """Makes, writes and forgets one array after the other."""

  async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
    for value, info, arg in zip(values, infos, args, strict=True):
      for written in await super().serialize([value.make()], [info], [arg]):
        written.result()
    return []


def write_imported(
  run: Path, step: int, arrays: Mapping[str, LazyArray], meta: dict[str, Any]
) -> None:
  """A checkpoint of parameters alone, by name, that came from elsewhere. At no time is more than
  one of them in memory."""
  path = run.absolute() / FOLDER / str(step)
  registry = ocp.type_handlers.create_type_handler_registry(
    (LazyArray, _OneAtATime(deepcopy_host_arrays=False)),
    (jax.Array, ocp.type_handlers.ArrayHandler()),  # without it Orbax warns
  )
  handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
  # Chunks small enough that encoding one does not matter.
  chunks = {name: ocp.SaveArgs(chunk_byte_size=64 << 20) for name in arrays}
  with ocp.Checkpointer(handler) as writer:
    writer.save(path / "model", args=ocp.args.PyTreeSave(dict(arrays), save_args=chunks))
  with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as writer:
    writer.save(path / "meta", args=ocp.args.JsonSave(meta))


def read_array(run: Path, step: int, name: str) -> np.ndarray:
  """One of a checkpoint's parameters, by name, on the host."""
  path = run.absolute() / FOLDER / str(step)
  args = ocp.args.PyTreeRestore(
    item={name: 0},
    restore_args={name: ocp.RestoreArgs(restore_type=np.ndarray)},
    partial_restore=True,
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, _readable(path):
    return reader.restore(path / "model", args=args)[name]


def by_name(tree: Any) -> dict[str, Any]:
  """The arrays of a tree by plain names such as `segments/0/attention/q_DNH`: what is on disk does
  not depend on how a library lays out its containers."""
  named = {}
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    parts = [
      str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", None)))) for key in path
    ]
    if parts[-1] == "value":  # what an nnx.Param holds
      parts.pop()
    named["/".join(parts)] = leaf
  return named


def _like(tree: Any, named: dict[str, Any]) -> Any:
  """The named arrays in the structure of `tree`."""
  return jax.tree.unflatten(jax.tree.structure(tree), [named[name] for name in by_name(tree)])


def _without_model(state: TrainState) -> dict[str, Any]:
  return {"step": state.step, "optimizer": state.optimizer, "skipped": state.skipped}


@contextlib.contextmanager
def _readable(checkpoint: Path) -> Iterator[None]:
  """Turns what reading a broken or foreign checkpoint raises into one line."""
  try:
    yield
  except Exception as error:  # damaged array data reach us from Orbax as a bare Exception
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise CheckpointError(
      f"{checkpoint} cannot be read ({reason}); remove that folder to use an earlier step"
    ) from error


def versions() -> dict[str, str]:
  """Versions of what a checkpoint's bits may depend on."""
  packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
  found = {name: importlib.metadata.version(name) for name in packages}
  return {"python": platform.python_version(), "platform": jax.default_backend(), **found}
