"""Which blocks of keys hold something that a block of queries sees, and in what order to go there.

I query blocks of Q positions, J key blocks of P positions, B rows; X own blocks and Y other ones:
queries and keys, or the other way round; Z steps.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# What a step is: bits of `Steps.kind_Z`.
FIRST = 1  # the first step of its own block
LAST = 2  # the last step of its own block
SEES = 4  # there is something to compute, not only an empty block to finish


class Steps(NamedTuple):
  """A walk over pairs of blocks, `total` steps long; what comes after them means nothing."""

  own_row_Z: jax.Array
  own_Z: jax.Array
  other_row_Z: jax.Array
  other_Z: jax.Array
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


def steps(visible_BXY: jax.Array) -> Steps:
  """The visible pairs in the order of their own blocks, each own block's in one run.

  An own block that sees nothing gets one step, to write its zeros. That step names the other block
  of the step before it, which is there already, so that nothing is fetched for it.
  """
  X, Y = visible_BXY.shape[1:]
  empty_BX1 = ~visible_BXY.any(axis=2, keepdims=True)
  walked = (visible_BXY | (empty_BX1 & (jnp.arange(Y) == 0))).reshape(-1)
  sees = visible_BXY.reshape(-1)
  order_Z = jnp.argsort(~walked, stable=True).astype(jnp.int32)
  total = walked.sum(dtype=jnp.int32)

  index_Z = jnp.arange(order_Z.size, dtype=jnp.int32)
  sees_Z = sees[order_Z] & (index_Z < total)
  owner_Z = order_Z // Y
  changes_Z = owner_Z[1:] != owner_Z[:-1]
  first_Z = jnp.concatenate([jnp.ones(1, bool), changes_Z])
  last_Z = jnp.concatenate([changes_Z, jnp.ones(1, bool)]) | (index_Z == total - 1)
  # Of each step the nearest one before it that sees something; 0 where there is none.
  source_Z = order_Z[jax.lax.cummax(jnp.where(sees_Z, index_Z, 0))]
  kind_Z = jnp.where(first_Z, FIRST, 0) | jnp.where(last_Z, LAST, 0) | jnp.where(sees_Z, SEES, 0)
  return Steps(
    own_row_Z=owner_Z // X,
    own_Z=owner_Z % X,
    other_row_Z=source_Z // (X * Y),
    other_Z=source_Z % Y,
    kind_Z=kind_Z.astype(jnp.int32),
    total=total,
  )
