"""Attention layers: projections, positions and the cache around the attention kernel.

Letters: B rows, S query positions, T cached positions, D model width, N query heads,
K key/value heads, H head width, R rotation angles.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig, ModelConfig, SegmentConfig
from slmjax.kernels.attention.api import attention
from slmjax.model import position, weights
from slmjax.sharding import Specs, gather, shard_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
  """What attention reads: keys (already rotated) and values of one layer, in the compute dtype."""

  k_BTKH: jax.Array
  v_BTKH: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Where the tokens of a call stand, shared by all layers.

  `segments_BS` are the queries' segment ids (0 is padding), `kv_segments_BT` the keys';
  query i sits at index `start` + i of the keys.
  """

  cos_BSR: jax.Array
  sin_BSR: jax.Array
  segments_BS: jax.Array
  kv_segments_BT: jax.Array
  start: jax.Array


class Attention(nnx.Module):
  """Grouped-query attention (arXiv 2305.13245) with rotary positions, causal inside segments.

  kv_heads = heads is multi-head and kv_heads = 1 multi-query attention.
  """

  def __init__(
    self,
    model: ModelConfig,
    segment: SegmentConfig,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    self.specs = specs
    self.implementation = compute.attention
    self.kv_heads = segment.kv_heads
    D, N, K, H = model.width, segment.heads, segment.kv_heads, segment.head_width
    self.kv_spec = specs.kv_DKH(K)
    dtype, std = jnp.dtype(compute.param_dtype), model.init_std
    q, k, v, out = jax.random.split(key, 4)
    self.q_DNH = weights.normal(q, (D, N, H), specs.q_DNH, std, dtype)
    self.k_DKH = weights.normal(k, (D, K, H), self.kv_spec, std, dtype)
    self.v_DKH = weights.normal(v, (D, K, H), self.kv_spec, std, dtype)
    self.out_NHD = weights.normal(out, (N, H, D), specs.out_NHD, std, dtype)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: KeyValues | None
  ) -> tuple[jax.Array, KeyValues | None]:
    """Attends within x (no cache), or appends x to the cache and attends within that."""
    dtype, specs = x_BSD.dtype, self.specs
    q_DNH = gather(self.q_DNH[...], specs.q_DNH, dtype)
    k_DKH = gather(self.k_DKH[...], self.kv_spec, dtype)
    v_DKH = gather(self.v_DKH[...], self.kv_spec, dtype)
    q_BSNH = jnp.einsum("bsd,dnh->bsnh", x_BSD, q_DNH)
    k_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, k_DKH)
    v_BSKH = jnp.einsum("bsd,dkh->bskh", x_BSD, v_DKH)
    q_BSNH = position.rotate(q_BSNH, context.cos_BSR, context.sin_BSR)
    k_BSKH = position.rotate(k_BSKH, context.cos_BSR, context.sin_BSR)

    seen = KeyValues(k_BSKH, v_BSKH)
    if cache is not None:
      seen = cache = jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, context.start, axis=1),
        cache,
        seen,
      )

    def attend(*args: jax.Array) -> jax.Array:
      H = q_BSNH.shape[-1]
      return attention(*args, scale=H**-0.5, implementation=self.implementation)

    out_BSNH = shard_attention(attend, specs, self.kv_heads)(
      q_BSNH,
      seen.k_BTKH,
      seen.v_BTKH,
      context.segments_BS,
      context.kv_segments_BT,
      context.start,
    )
    out_NHD = gather(self.out_NHD[...], specs.out_NHD, dtype)
    return jnp.einsum("bsnh,nhd->bsd", out_BSNH, out_NHD, out_sharding=specs.act_BSD), cache
