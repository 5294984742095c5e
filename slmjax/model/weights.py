"""How parameters are made: sharded from birth, so that no device ever holds a whole model."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.sharding import WeightSpec

Make = Callable[[tuple[int, ...], jax.P, jnp.dtype], nnx.Param]


def normal(
  key: jax.Array, shape: tuple[int, ...], spec: WeightSpec, std: float, dtype: jnp.dtype
) -> nnx.Param:
  """N(0, std), drawn in float32. The same numbers on every mesh."""
  draw = jax.random.normal(key, shape, jnp.float32, out_sharding=spec.stored)
  return nnx.Param((std * draw).astype(dtype))


def ones(shape: tuple[int, ...], spec: jax.P, dtype: jnp.dtype) -> nnx.Param:
  return nnx.Param(jnp.ones(shape, dtype, out_sharding=spec))


def zeros(shape: tuple[int, ...], spec: jax.P, dtype: jnp.dtype) -> nnx.Param:
  return nnx.Param(jnp.zeros(shape, dtype, out_sharding=spec))
