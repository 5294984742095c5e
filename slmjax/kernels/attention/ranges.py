"""Which run of blocks each block sees, and where in it every pair of positions is visible.

I query blocks of Q positions, J key blocks of P positions; X own blocks and Y other ones: queries
and keys, or the other way round.
"""

import jax
import jax.numpy as jnp


def whole_blocks(
  q_segments_IQ: jax.Array,
  kv_segments_JP: jax.Array,
  q_start: jax.Array,
  window: jax.Array | None,
) -> jax.Array:
  """bool[I, J]: whether every query of one block sees every key of the other. Exact.

  See `api.attention_and_logsumexp` for `q_start` and `window`.
  """
  (I, Q), (J, P) = q_segments_IQ.shape, kv_segments_JP.shape
  first_query_I1 = (q_start + jnp.arange(I) * Q)[:, None]
  first_key_J = jnp.arange(J) * P
  whole_IJ = first_key_J + P - 1 <= first_query_I1
  if window is not None:
    whole_IJ &= first_key_J > first_query_I1 + Q - 1 - window
  ids_I1, ids_J = q_segments_IQ[:, :1], kv_segments_JP[:, 0]
  same_I1 = (q_segments_IQ == ids_I1).all(axis=1, keepdims=True) & (ids_I1 > 0)
  same_J = (kv_segments_JP == ids_J[:, None]).all(axis=1)
  return whole_IJ & same_I1 & same_J & (ids_I1 == ids_J)


def bounds(visible_XY: jax.Array, whole_XY: jax.Array) -> jax.Array:
  """int32[X, 4]: first, whole, whole_end and end. Each own block sees others in [first, end), and
  all of those in [whole, whole_end), the first run of them, which is empty if there is none.

  Where ids do not ascend, [first, end) may have blocks that are not seen, and the rest of it some
  that are whole.
  """
  Y = visible_XY.shape[1]
  index_Y = jnp.arange(Y)

  def first(found_XY: jax.Array) -> jax.Array:
    return jnp.where(found_XY, index_Y, Y).min(axis=1)

  end_X = jnp.where(visible_XY, index_Y + 1, 0).max(axis=1)
  whole_X = jnp.minimum(first(whole_XY), end_X)
  whole_end_X = first(~whole_XY & (index_Y >= whole_X[:, None]))
  of_X = (jnp.minimum(first(visible_XY), end_X), whole_X, jnp.minimum(whole_end_X, end_X), end_X)
  return jnp.stack(of_X, axis=1).astype(jnp.int32)
