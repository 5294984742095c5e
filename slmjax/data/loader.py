"""The loader: rows of the plan, read from the stores, batched and prefetched by Grain.

There is no iterator state: `batches(first_step)` starts anywhere, and a batch depends only on the
config, the stores and the step. Each process reads the rows that its devices hold.

Letters: A microbatches, B rows of a microbatch, S positions.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import jax
import numpy as np

from slmjax.config import Config, StageConfig
from slmjax.data.plan import Plan
from slmjax.data.store import TokenStore
from slmjax.sharding import batch_sharding, data_shards, local_rows

PREFETCH_STEPS = 4
READ_THREADS = 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
  """One step's rows: arrays [A, B, S], int32 but for the weights. One microbatch: [B, S].

  Attributes:
    tokens: what the model reads.
    targets: what it is to predict: the next token of the source.
    segments: ids 1, 2, ... along each row; attention stays inside one. 0 is padding.
    positions: each token's place in its segment.
    weights: float32, 1 where the target counts in the loss and 0 where it does not.
  """

  tokens: jax.Array
  targets: jax.Array
  segments: jax.Array
  positions: jax.Array
  weights: jax.Array


class Loader:
  """Batches of a run, for the devices of this process."""

  def __init__(
    self, config: Config, plan: Plan, stores: Mapping[str, TokenStore], mesh: jax.sharding.Mesh
  ):
    self._config = config
    self._plan = plan
    self._stores = stores
    self._sharding = batch_sharding(mesh)
    self._data_shards = data_shards(mesh)

  def batches(self, first_step: int) -> Iterator[Batch]:
    """The batches of the steps from `first_step` to the end of its stage."""
    index = self._config.stage_index(first_step)
    stage = self._config.stages[index]
    begin, end = self._config.boundaries[index], self._config.boundaries[index + 1]
    passes = stage.microbatches(self._data_shards)
    rows = stage.rows // passes
    mine = local_rows(self._sharding, rows)

    def read(microbatch: int) -> dict[str, np.ndarray]:
      return self._read(index, microbatch * rows + mine)

    steps: Iterator[dict[str, np.ndarray]] = iter(
      grain.MapDataset.range((first_step - begin) * passes, (end - begin) * passes)
      .map(read)
      .batch(passes)
      .to_iter_dataset(
        grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=PREFETCH_STEPS)
      )
    )
    for local in steps:
      yield Batch(**{name: self._place(x, rows, mine) for name, x in local.items()})

  def _read(self, index: int, rows: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays [rows, S] of some rows of a stage."""
    stage = self._config.stages[index]
    plan = self._plan.rows(index, rows)
    arrays = []
    for source, starts in zip(plan.sources, plan.starts, strict=True):
      share = self._plan.shares[index][source]
      store = self._stores[share.source]
      spans = np.stack([read_span(store, int(start), share.chunk) for start in starts])
      arrays.append(row_arrays(spans, store.eos_id, stage.isolate_documents))
    return {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}

  def _place(self, local_ARS: np.ndarray, rows: int, mine: np.ndarray) -> jax.Array:
    """The global array [A, B, S] of which this process has the rows `mine`."""
    passes, _, length = local_ARS.shape
    shape = (passes, rows, length)

    def pick(index: tuple[slice, ...] | None) -> np.ndarray:
      assert index is not None  # every process holds a part of every batch
      wanted = np.arange(*index[1].indices(rows))
      return local_ARS[index[0], np.searchsorted(mine, wanted)][..., index[2]]

    return jax.make_array_from_callback(shape, self._sharding, pick)


def read_span(store: TokenStore, start: int, length: int) -> np.ndarray:
  """Tokens [start - 1, start + length): a chunk and the token before it.

  Before the first token of a store stands an EOS, as before every other document.
  """
  if start:
    return store.read(start - 1, length + 1)
  return np.concatenate([np.array([store.eos_id], np.int32), store.read(0, length)])


def row_arrays(spans_CL: np.ndarray, eos_id: int, isolate_documents: bool) -> dict[str, np.ndarray]:
  """The arrays of one row made of C chunks, from their tokens with the one before: [C, L + 1].

  A segment begins with every chunk and, if documents are isolated, with every EOS that is read:
  the EOS that closes one document opens the next, whose first token it predicts.
  """
  tokens_CL, targets_CL = spans_CL[:, :-1], spans_CL[:, 1:]
  begins_CL = tokens_CL == eos_id if isolate_documents else np.zeros(tokens_CL.shape, bool)
  begins_CL[:, 0] = True
  begins = begins_CL.ravel()
  index = np.arange(begins.size, dtype=np.int32)
  return {
    "tokens": tokens_CL.ravel(),
    "targets": targets_CL.ravel(),
    "segments": np.cumsum(begins, dtype=np.int32),
    "positions": index - np.maximum.accumulate(np.where(begins, index, 0)),
    "weights": np.ones(begins.size, np.float32),
  }


def abstract_batch(
  stage: StageConfig, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
) -> Batch:
  """The shapes, types and shardings of a stage's batches on a mesh, for tracing and compiling."""
  passes = stage.microbatches(data_shards(mesh))
  shape = (passes, stage.rows // passes, stage.row_length)
  sharding = batch_sharding(mesh)
  ids: Any = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
  return Batch(ids, ids, ids, ids, ids.update(dtype=np.float32))
