"""Multi-head latent attention (arXiv 2405.04434): keys and values from one latent per token.

Letters: B rows, S query positions, T cached positions, D model width, N heads, C latent width,
R width of the queries' latent, H content width of a head, P rotated width, Q = H + P, U value
width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.kernels.attention.api import attention
from slmjax.model import position, weights
from slmjax.model.attention import append
from slmjax.model.context import Context
from slmjax.model.norm import LatentNorm
from slmjax.model_config import LatentAttention, ModelConfig, RotaryPositions
from slmjax.sharding import Specs, gather, shard_attention


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Latents:
  """All that a token leaves behind: its normed latent and its rotated key, in the compute dtype."""

  latent_BTC: jax.Array
  k_rope_BTP: jax.Array

  @classmethod
  def empty(
    cls,
    latent: LatentAttention,
    positions: RotaryPositions,
    specs: Specs,
    lead: tuple[int, ...],
    length: int,
    dtype: jnp.dtype,
  ) -> "Latents":
    """Zeros; `lead` is layers, passes and rows."""
    spec = jax.P(None, None, *specs.act_BSD)
    widths = (latent.latent_width, positions.width)
    return cls(*(jnp.zeros((*lead, length, width), dtype, out_sharding=spec) for width in widths))


class LatentAttentionLayer(nnx.Module):
  """Causal latent attention in segments.

  Training expands the latents to keys and values of every head. With a cache the expansions are
  folded into the queries and the output instead, so that all heads attend to the latents as they
  are kept: one key/value head of width C + P.
  """

  def __init__(
    self,
    model: ModelConfig,
    latent: LatentAttention,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    assert isinstance(model.positions, RotaryPositions)
    self.config = latent
    self.positions = model.positions
    self.specs = specs
    self.implementation = compute.attention
    D, N, C, U = model.width, latent.heads, latent.latent_width, latent.value_width
    H, P = latent.content_width, model.positions.width
    dtype, std = jnp.dtype(compute.param_dtype), model.init.std
    q_down, q, kv_down, k_rope, k, v, out = jax.random.split(key, 7)
    if latent.query_latent is None:
      self.q_DNQ = weights.normal(q, (D, N, H + P), specs.q_DNH, std, dtype)
    else:
      R = latent.query_latent
      self.q_down_DR = weights.normal(q_down, (D, R), specs.down_DR, std, dtype)
      self.q_latent_norm = LatentNorm(R, latent.latent_eps, specs, dtype)
      self.q_up_RNQ = weights.normal(q, (R, N, H + P), specs.q_DNH, std, dtype)
    self.kv_down_DC = weights.normal(kv_down, (D, C), specs.down_DR, std, dtype)
    self.kv_latent_norm = LatentNorm(C, latent.latent_eps, specs, dtype)
    self.k_rope_DP = weights.normal(k_rope, (D, P), specs.down_DR, std, dtype)
    self.k_up_CNH = weights.normal(k, (C, N, H), specs.q_DNH, std, dtype)
    self.v_up_CNU = weights.normal(v, (C, N, U), specs.q_DNH, std, dtype)
    self.out_NUD = weights.normal(out, (N, U, D), specs.out_NHD, model.init.output_std, dtype)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: Latents | None
  ) -> tuple[jax.Array, Latents | None]:
    """Attends within x (no cache), or appends x to the cache and attends within that."""
    specs, dtype = self.specs, x_BSD.dtype
    H = self.config.content_width
    q_BSNQ = self._queries(x_BSD)
    q_content_BSNH, q_rope_BSNP = q_BSNQ[..., :H], q_BSNQ[..., H:]
    kv_down_DC = gather(self.kv_down_DC[...], specs.down_DR, dtype)
    latent_BSC = self.kv_latent_norm(jnp.einsum("bsd,dc->bsc", x_BSD, kv_down_DC))
    k_rope_DP = gather(self.k_rope_DP[...], specs.down_DR, dtype)
    k_rope_BS1P = jnp.einsum("bsd,dp->bsp", x_BSD, k_rope_DP)[:, :, None]
    assert context.angles_BSR is not None
    angles = (*context.angles_BSR, self.positions.layout)
    q_rope_BSNP, k_rope_BS1P = (position.rotate(x, *angles) for x in (q_rope_BSNP, k_rope_BS1P))
    k_up_CNH = gather(self.k_up_CNH[...], specs.q_DNH, dtype)
    v_up_CNU = gather(self.v_up_CNU[...], specs.q_DNH, dtype)

    attend = functools.partial(
      attention, scale=self.config.scale, implementation=self.implementation
    )
    where = (context.segments_BS, context.kv_segments_BT, context.start)
    if cache is None:
      k_BSNH = jnp.einsum("bsc,cnh->bsnh", latent_BSC, k_up_CNH)
      k_rope_BSNP = jnp.broadcast_to(k_rope_BS1P, q_rope_BSNP.shape, out_sharding=specs.act_BSNH)
      out_BSNU = shard_attention(attend, specs, self.config.heads)(
        jnp.concatenate([q_content_BSNH, q_rope_BSNP], axis=-1),
        jnp.concatenate([k_BSNH, k_rope_BSNP], axis=-1),
        jnp.einsum("bsc,cnu->bsnu", latent_BSC, v_up_CNU),
        *where,
      )
    else:
      cache = append(cache, Latents(latent_BSC, k_rope_BS1P[:, :, 0]), context.start)
      latent_BTC, k_rope_BTP = cache.latent_BTC, cache.k_rope_BTP
      q_latent_BSNC = jnp.einsum("bsnh,cnh->bsnc", q_content_BSNH, k_up_CNH)
      k_BTC = jnp.concatenate([latent_BTC, k_rope_BTP], axis=-1)
      found_BSNC = shard_attention(attend, specs, 1)(
        jnp.concatenate([q_latent_BSNC, q_rope_BSNP], axis=-1),
        *(jax.reshard(x[:, :, None], specs.act_BTKH(1)) for x in (k_BTC, latent_BTC)),
        *where,
      )
      out_BSNU = jnp.einsum("bsnc,cnu->bsnu", found_BSNC, v_up_CNU)
    out_NUD = gather(self.out_NUD[...], specs.out_NHD, dtype)
    return jnp.einsum("bsnu,nud->bsd", out_BSNU, out_NUD, out_sharding=specs.act_BSD), cache

  def _queries(self, x_BSD: jax.Array) -> jax.Array:
    specs, dtype = self.specs, x_BSD.dtype
    if self.config.query_latent is None:
      return jnp.einsum("bsd,dnq->bsnq", x_BSD, gather(self.q_DNQ[...], specs.q_DNH, dtype))
    q_down_DR = gather(self.q_down_DR[...], specs.down_DR, dtype)
    latent_BSR = self.q_latent_norm(jnp.einsum("bsd,dr->bsr", x_BSD, q_down_DR))
    q_up_RNQ = gather(self.q_up_RNQ[...], specs.q_DNH, dtype)
    return jnp.einsum("bsr,rnq->bsnq", latent_BSR, q_up_RNQ)
