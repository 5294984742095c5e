"""Normalisation layers.

Letters: B rows, S positions, D model width, N heads, H head width, R width of a latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.model import weights
from slmjax.model_config import NormConfig
from slmjax.sharding import Specs


def _normalised(x: jax.Array, kind: str, eps: float, axes: tuple[int, ...]) -> jax.Array:
  """x over its root mean square, or standardised; float32."""
  x32 = x.astype(jnp.float32)
  if kind == "layer":
    x32 = x32 - jnp.mean(x32, axis=axes, keepdims=True)
  mean = jnp.mean(jnp.square(x32), axis=axes, keepdims=True)
  return x32 * jax.lax.rsqrt(mean + eps)


def _scaled(normed32: jax.Array, scale: jax.Array, kind: str, dtype: jnp.dtype) -> jax.Array:
  """Times the scale, in float32, so that the scale's gradient is summed over all tokens in float32;
  as `kind` has it, rounded to `dtype` before (Llama) or not (Gemma, LayerNorm)."""
  if kind == "rms_one_plus":
    return normed32 * (1.0 + scale.astype(jnp.float32))
  if kind == "rms":
    normed32 = normed32.astype(dtype).astype(jnp.float32)
  return normed32 * scale.astype(jnp.float32)


def _first_scale(kind: str) -> weights.Make:
  return weights.zeros if kind == "rms_one_plus" else weights.ones


class Norm(nnx.Module):
  """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) over the model width."""

  def __init__(self, config: NormConfig, width: int, specs: Specs, dtype: jnp.dtype):
    self.config = config
    if config.scale:
      self.scale_D = _first_scale(config.kind)((width,), specs.norm_D, dtype)
    if config.bias:
      self.bias_D = weights.zeros((width,), specs.norm_D, dtype)

  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    kind = self.config.kind
    y_BSD = _normalised(x_BSD, kind, self.config.eps, (-1,))
    if self.config.scale:
      y_BSD = _scaled(y_BSD, self.scale_D[...], kind, x_BSD.dtype)
    if self.config.bias:
      y_BSD = y_BSD + self.bias_D[...].astype(jnp.float32)
    return y_BSD.astype(x_BSD.dtype)


class HeadNorm(nnx.Module):
  """RMSNorm of each head of queries or keys by itself, one scale for all heads (OpenELM, Qwen3)."""

  def __init__(self, config: NormConfig, width: int, specs: Specs, dtype: jnp.dtype):
    self.config = config
    self.scale_H = _first_scale(config.kind)((width,), specs.norm_D, dtype)

  def __call__(self, x_BSNH: jax.Array) -> jax.Array:
    kind = self.config.kind
    y_BSNH = _normalised(x_BSNH, kind, self.config.eps, (-1,))
    return _scaled(y_BSNH, self.scale_H[...], kind, x_BSNH.dtype).astype(x_BSNH.dtype)


class AllHeadsNorm(nnx.Module):
  """RMSNorm over all heads of queries or keys together (OLMo 2)."""

  def __init__(self, config: NormConfig, shape: tuple[int, int], spec: jax.P, dtype: jnp.dtype):
    self.config = config
    self.scale_NH = _first_scale(config.kind)(shape, spec, dtype)

  def __call__(self, x_BSNH: jax.Array) -> jax.Array:
    kind = self.config.kind
    y_BSNH = _normalised(x_BSNH, kind, self.config.eps, (-2, -1))
    return _scaled(y_BSNH, self.scale_NH[...], kind, x_BSNH.dtype).astype(x_BSNH.dtype)


class LatentNorm(nnx.Module):
  """RMSNorm of a latent vector [B, S, R]."""

  def __init__(self, width: int, eps: float, specs: Specs, dtype: jnp.dtype):
    self.eps = eps
    self.scale_R = weights.ones((width,), specs.norm_D, dtype)

  def __call__(self, x_BSR: jax.Array) -> jax.Array:
    y_BSR = _normalised(x_BSR, "rms", self.eps, (-1,))
    return _scaled(y_BSR, self.scale_R[...], "rms", x_BSR.dtype).astype(x_BSR.dtype)
