"""Varying types inside a manual island.

Under `jax.shard_map` every array's type says over which mesh axes it varies, and a loop's carry
must enter with the type that it leaves with. Kernels know no axis name, so they copy the axes from
their arguments.
"""

import jax
import jax.numpy as jnp
import jax.typing


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
  """The mesh axes over which any of the arrays varies; none outside a manual island."""
  types = [jax.typeof(x).manual_axis_type for x in arrays]
  return frozenset().union(*(t.varying for t in types))


def vary_over(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  """`x`, typed as varying over (at least) `axes`. Its transpose sums cotangents over the new ones,
  so that gradients of an argument shared by devices come out whole."""
  missing = tuple(sorted(axes - varying_axes(x)))
  return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike, like: jax.Array) -> jax.Array:
  """Zeros that vary over the axes over which `like` varies: to start a loop's carry with."""
  return vary_over(jnp.zeros(shape, dtype), varying_axes(like))


def on_first(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """`x` on the first device along `axes`, zeros on the others: to add partial sums to, that a
  `psum` over `axes` makes whole."""
  first = jnp.asarray(True)
  for axis in axes:
    first &= jax.lax.axis_index(axis) == 0
  return jnp.where(first, x, jnp.zeros((), x.dtype))
