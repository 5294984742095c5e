"""Which blocks of keys hold something that a block of queries sees, and in what order to go there.

I query blocks of Q positions, J key blocks of P positions, B rows; Z steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# What a step is: bits of `Steps.kind_Z`.
FIRST = 1  # the first step of its block of queries
LAST = 2  # the last step of its block of queries
SEES = 4  # there is something to compute, not only an empty block to finish
FIRST_OF_ROW = 8
LAST_OF_ROW = 16


class Steps(NamedTuple):
  """A walk over pairs of blocks, `total` steps long; what comes after them means nothing."""

  row_Z: jax.Array
  query_block_Z: jax.Array
  key_row_Z: jax.Array
  key_block_Z: jax.Array
  kind_Z: jax.Array
  total: jax.Array


def visible_blocks(
  q_segments_IQ: jax.Array,
  kv_segments_JP: jax.Array,
  q_start: jax.Array,
  window: jax.Array | None,
) -> jax.Array:
  """bool[I, J]: whether the block of keys may hold a key that the block of queries sees.

  That is: not all of it after the last query, nor out of the first query's window, and with segment
  ids that overlap those of the queries. Ids that ascend along the row make this exact; any others
  only say yes more often. See `api.attention` for `q_start` and `window`.
  """
  (I, Q), (J, P) = q_segments_IQ.shape, kv_segments_JP.shape
  last_position_I = q_start + (jnp.arange(I) + 1) * Q - 1
  reach_IJ = jnp.arange(J) * P <= last_position_I[:, None]
  if window is not None:
    first_key_I = last_position_I - Q + 2 - window
    reach_IJ &= (jnp.arange(J) + 1) * P > first_key_I[:, None]
  q_low_I, q_high_I = _extremes(q_segments_IQ)
  kv_low_J, kv_high_J = _extremes(kv_segments_JP)
  return reach_IJ & (q_low_I[:, None] <= kv_high_J) & (kv_low_J <= q_high_I[:, None])


def _extremes(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest nonzero id along the last axis; nothing overlaps a block of zeros."""
  nonzero = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
  return nonzero.min(axis=-1), segments.max(axis=-1)


def steps(visible_BIJ: jax.Array) -> Steps:
  """The visible pairs in the order of rows and their blocks of queries.

  A block of queries that sees nothing gets one step, to write its zeros. That step names the block
  of keys of the step before it, which is there already, so that nothing is fetched for it.
  """
  I, J = visible_BIJ.shape[1:]
  empty_BI1 = ~visible_BIJ.any(axis=2, keepdims=True)
  walked = (visible_BIJ | (empty_BI1 & (jnp.arange(J) == 0))).reshape(-1)
  sees = visible_BIJ.reshape(-1)
  order_Z = jnp.argsort(~walked, stable=True).astype(jnp.int32)
  total = walked.sum(dtype=jnp.int32)

  index_Z = jnp.arange(order_Z.size, dtype=jnp.int32)
  sees_Z = sees[order_Z] & (index_Z < total)
  block_Z = order_Z // J
  # Of each step the nearest one before it that sees something; 0 where there is none.
  source_Z = order_Z[jax.lax.cummax(jnp.where(sees_Z, index_Z, 0))]
  first_Z, last_Z = _ends(block_Z, index_Z == total - 1)
  first_of_row_Z, last_of_row_Z = _ends(block_Z // I, index_Z == total - 1)
  kinds = (
    (FIRST, first_Z),
    (LAST, last_Z),
    (SEES, sees_Z),
    (FIRST_OF_ROW, first_of_row_Z),
    (LAST_OF_ROW, last_of_row_Z),
  )
  kind_Z = sum(jnp.where(is_Z, bit, 0) for bit, is_Z in kinds)
  return Steps(
    row_Z=block_Z // I,
    query_block_Z=block_Z % I,
    key_row_Z=source_Z // (I * J),
    key_block_Z=source_Z % J,
    kind_Z=jnp.asarray(kind_Z, jnp.int32),
    total=total,
  )


def _ends(group_Z: jax.Array, final_Z: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Where a run of equal groups begins and ends; the final step ends its run."""
  changes_Z = group_Z[1:] != group_Z[:-1]
  yes = jnp.ones(1, bool)
  return jnp.concatenate([yes, changes_Z]), jnp.concatenate([changes_Z, yes]) | final_Z
