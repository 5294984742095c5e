"""What the implementations of the online softmax (FlashAttention-2, arXiv:2307.08691) share.

B rows, S query positions, N query heads, U width of values.
"""

import jax
import jax.numpy as jnp

# Scores of invisible pairs. Finite, so that a query of which nothing is visible yet has differences
# of scores that are numbers; far below any real score, so that its exponential is exactly zero.
HIDDEN = -1e30


def delta(o_BSNU: jax.Array, do_BSNU: jax.Array, dlse_BSN: jax.Array) -> jax.Array:
  """What the gradient of a query's scores has in common, float32 [B, S, N] (or any leading axes).

  The gradient of score j is weight j times (do . v_j - do . o + dlse): the output forgets a shift
  of all scores, the log-sum-exp follows it.
  """
  products = o_BSNU.astype(jnp.float32) * do_BSNU.astype(jnp.float32)
  return products.sum(axis=-1) - dlse_BSN
