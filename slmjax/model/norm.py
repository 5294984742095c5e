"""Normalisation layers."""

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.model import weights
from slmjax.sharding import Specs


class RMSNorm(nnx.Module):
  """Root mean square norm (arXiv 1910.07467), as Llama computes it: in float32, cast, times w."""

  def __init__(self, width: int, eps: float, specs: Specs, dtype: jnp.dtype):
    self.eps = eps
    self.scale_D = weights.ones((width,), specs.norm_D, dtype)

  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    x32_BSD = x_BSD.astype(jnp.float32)
    mean_BS1 = jnp.mean(jnp.square(x32_BSD), axis=-1, keepdims=True)
    normed_BSD = (x32_BSD * jax.lax.rsqrt(mean_BS1 + self.eps)).astype(x_BSD.dtype)
    # The product in float32, so that the scale's gradient is summed over all tokens in float32.
    return (normed_BSD * self.scale_D[...].astype(jnp.float32)).astype(x_BSD.dtype)
