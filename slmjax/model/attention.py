"""Attention with heads: projections, positions and the cache around the attention kernel.

Letters: B rows, S query positions, T cached positions, D model width, N query heads,
K key/value heads, H head width.
"""

import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.kernels.attention.api import attention
from slmjax.model import position, weights
from slmjax.model.context import Context
from slmjax.model.norm import AllHeadsNorm, HeadNorm
from slmjax.model_config import AlibiPositions, HeadsAttention, ModelConfig, RotaryPositions
from slmjax.sharding import Specs, gather, shard_attention

Kept = TypeVar("Kept")  # arrays [B, T, ...] that attention keeps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """What attention reads: keys (already rotated) and values of one layer, in the compute dtype."""

  k_BTKH: jax.Array
  v_BTKH: jax.Array

  @classmethod
  def empty(
    cls, heads: HeadsAttention, specs: Specs, lead: tuple[int, ...], length: int, dtype: jnp.dtype
  ) -> "KeyValues":
    """Zeros; `lead` is layers, passes and rows."""
    shape = (*lead, length, heads.kv_heads, heads.head_width)
    spec = jax.P(None, None, *specs.act_BTKH(heads.kv_heads))
    return cls(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))


def append(cache: Kept, new: Kept, start: jax.Array) -> Kept:
  """Writes the arrays of `new` into those of `cache`, from position `start` of their axis T."""
  return jax.tree.map(
    lambda old, x: jax.lax.dynamic_update_slice_in_dim(old, x, start, axis=1), cache, new
  )


class Attention(nnx.Module):
  """Multi-head, grouped-query (arXiv 2305.13245) or multi-query attention, causal in segments."""

  q_norm: HeadNorm | AllHeadsNorm
  k_norm: HeadNorm | AllHeadsNorm

  def __init__(
    self,
    model: ModelConfig,
    heads: HeadsAttention,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    self.config = heads
    self.positions = model.positions
    self.specs = specs
    self.implementation = compute.attention
    D, N, K, H = model.width, heads.heads, heads.kv_heads, heads.head_width
    self.kv_spec = specs.kv_DKH(K)
    dtype, init = jnp.dtype(compute.param_dtype), model.init
    q, k, v, out = jax.random.split(key, 4)
    self.q_DNH = weights.normal(q, (D, N, H), specs.q_DNH, init.std, dtype)
    self.k_DKH = weights.normal(k, (D, K, H), self.kv_spec, init.std, dtype)
    self.v_DKH = weights.normal(v, (D, K, H), self.kv_spec, init.std, dtype)
    self.out_NHD = weights.normal(out, (N, H, D), specs.out_NHD, init.output_std, dtype)
    if heads.qkv_bias:
      self.q_bias_NH = weights.zeros((N, H), specs.bias_NH, dtype)
      self.k_bias_KH = weights.zeros((K, H), specs.bias_KH(K), dtype)
      self.v_bias_KH = weights.zeros((K, H), specs.bias_KH(K), dtype)
    if heads.out_bias:
      self.out_bias_D = weights.zeros((D,), specs.norm_D, dtype)
    if heads.qk_norm == "head":
      self.q_norm = HeadNorm(model.norm, H, specs, dtype)
      self.k_norm = HeadNorm(model.norm, H, specs, dtype)
    elif heads.qk_norm == "width":
      self.q_norm = AllHeadsNorm(model.norm, (N, H), specs.bias_NH, dtype)
      self.k_norm = AllHeadsNorm(model.norm, (K, H), specs.bias_KH(K), dtype)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: KeyValues | None
  ) -> tuple[jax.Array, KeyValues | None]:
    """Attends within x (no cache), or appends x to the cache and attends within that."""
    heads, specs, dtype = self.config, self.specs, x_BSD.dtype
    q_BSNH = jnp.einsum("bsd,dnh->bsnh", x_BSD, gather(self.q_DNH[...], specs.q_DNH, dtype))
    k_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, gather(self.k_DKH[...], self.kv_spec, dtype))
    v_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, gather(self.v_DKH[...], self.kv_spec, dtype))
    if heads.qkv_bias:
      q_BSNH = q_BSNH + self.q_bias_NH[...].astype(dtype)
      k_BSKH = k_BSKH + self.k_bias_KH[...].astype(dtype)
      v_BSKH = v_BSKH + self.v_bias_KH[...].astype(dtype)
    if heads.qk_norm != "none":
      q_BSNH, k_BSKH = self.q_norm(q_BSNH), self.k_norm(k_BSKH)
    if isinstance(self.positions, RotaryPositions):
      assert context.angles_BSR is not None
      layout = self.positions.layout
      q_BSNH, k_BSKH = (position.rotate(x, *context.angles_BSR, layout) for x in (q_BSNH, k_BSKH))

    seen = KeyValues(k_BSKH, v_BSKH)
    if cache is not None:
      seen = cache = append(cache, seen, context.start)
    attend = functools.partial(
      attention, scale=heads.scale, softcap=heads.softcap, implementation=self.implementation
    )
    slopes_N = None
    if isinstance(self.positions, AlibiPositions):
      slopes_N = jnp.asarray(position.alibi_slopes(heads.heads))
    out_BSNH = shard_attention(attend, specs, heads.kv_heads)(
      q_BSNH,
      seen.k_BTKH,
      seen.v_BTKH,
      context.segments_BS,
      context.kv_segments_BT,
      context.start,
      window=context.window,
      slopes_N=slopes_N,
    )
    out_NHD = gather(self.out_NHD[...], specs.out_NHD, dtype)
    # einsum sums in alphabetical order: "nhd" would be transposed, and copied on CPU, so n is g.
    out_BSD = jnp.einsum("bsgh,ghd->bsd", out_BSNH, out_NHD, out_sharding=specs.act_BSD)
    return (out_BSD + self.out_bias_D[...].astype(dtype) if heads.out_bias else out_BSD), cache
