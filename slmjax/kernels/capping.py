"""The soft-cap of Gemma-2 (arXiv:2408.00118, section 2): c tanh(x / c) keeps scores within c."""

import jax
import jax.numpy as jnp


def cap(x: jax.Array, limit: float | None) -> jax.Array:
  """`limit * tanh(x / limit)`; `x` itself without a limit."""
  return x if limit is None else limit * jnp.tanh(x / limit)


def slope(capped: jax.Array, limit: float) -> jax.Array:
  """The derivative of `cap` by its input, from its output."""
  return 1.0 - jnp.square(capped / limit)
