"""A block: attention, feed-forward, and how they meet the residual stream.

Letters: B rows, S positions, D model width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.model.attention import Attention, KeyValues
from slmjax.model.context import Context, LayerCache
from slmjax.model.ffn import FeedForwardLayer
from slmjax.model.latent_attention import LatentAttentionLayer, Latents
from slmjax.model.norm import Norm
from slmjax.model.rwkv import ChannelMix, ChannelMixState, TimeMix, TimeMixState
from slmjax.model.shortcut import AugmentedShortcut
from slmjax.model_config import (
  HeadsAttention,
  LatentAttention,
  ModelConfig,
  RotaryPositions,
  RwkvChannelMix,
  SegmentConfig,
)
from slmjax.sharding import Specs

# Which wirings have a norm before attention, before the feed-forward, and after each of them.
_BEFORE_ATTENTION = ("pre", "sandwich", "parallel", "parallel_shared")
_BEFORE_FFN = ("pre", "sandwich", "parallel")
_AFTER = ("post", "output", "sandwich")


class Block(nnx.Module):
  """Attention and feed-forward, wired as `BlockConfig` says."""

  attention: Attention | LatentAttentionLayer | TimeMix
  ffn: FeedForwardLayer | ChannelMix

  def __init__(
    self,
    model: ModelConfig,
    segment: SegmentConfig,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
    layer: jax.Array,
  ):
    """`layer` is the index in the whole model, int32: RWKV's initial decays depend on it."""
    self.config = model.block
    attention, ffn, shortcut = jax.random.split(key, 3)
    parts = (compute, specs)
    norm = (model.norm, model.width, specs, jnp.dtype(compute.param_dtype))
    wiring = model.block.wiring
    if wiring in _BEFORE_ATTENTION:
      self.attention_norm = Norm(*norm)
    if isinstance(segment.attention, HeadsAttention):
      self.attention = Attention(model, segment.attention, *parts, attention)
    elif isinstance(segment.attention, LatentAttention):
      self.attention = LatentAttentionLayer(model, segment.attention, *parts, attention)
    else:
      self.attention = TimeMix(model, segment.attention, *parts, attention, layer)
    if wiring in _AFTER:
      self.attention_output_norm = Norm(*norm)
      self.ffn_output_norm = Norm(*norm)
    if wiring in _BEFORE_FFN:
      self.ffn_norm = Norm(*norm)
    if isinstance(segment.ffn, RwkvChannelMix):
      self.ffn = ChannelMix(model, segment.ffn, *parts, ffn, layer)
    else:
      self.ffn = FeedForwardLayer(model, segment.ffn, *parts, ffn)
    if model.block.shortcut is not None:
      self.shortcut = AugmentedShortcut(model, model.block.shortcut, *parts, shortcut)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: LayerCache | None
  ) -> tuple[jax.Array, LayerCache | None]:
    """The stream after this block, and the cache with its tokens in it."""
    wiring = self.config.wiring
    seen, ffn_seen = (None, None) if cache is None else cache
    normed_BSD = self.attention_norm(x_BSD) if wiring in _BEFORE_ATTENTION else x_BSD
    attended_BSD, seen = self.attention(normed_BSD, context, seen)
    if self.config.shortcut is not None:
      attended_BSD = attended_BSD + self.shortcut(normed_BSD)
    if wiring in ("output", "sandwich"):
      attended_BSD = self.attention_output_norm(attended_BSD)
    stream_BSD = x_BSD + self._scaled(attended_BSD)
    if wiring == "post":
      stream_BSD = self.attention_output_norm(stream_BSD)

    if wiring == "parallel":
      normed_BSD = self.ffn_norm(x_BSD)
    elif wiring in ("pre", "sandwich"):
      normed_BSD = self.ffn_norm(stream_BSD)
    elif wiring in ("post", "output"):
      normed_BSD = stream_BSD
    if isinstance(self.ffn, ChannelMix):
      fed_BSD, ffn_seen = self.ffn(normed_BSD, context, ffn_seen)
    else:
      fed_BSD = self.ffn(normed_BSD)
    if wiring in ("output", "sandwich"):
      fed_BSD = self.ffn_output_norm(fed_BSD)
    stream_BSD = stream_BSD + self._scaled(fed_BSD)
    if wiring == "post":
      stream_BSD = self.ffn_output_norm(stream_BSD)
    return stream_BSD, None if cache is None else (seen, ffn_seen)

  def _scaled(self, branch_BSD: jax.Array) -> jax.Array:
    scale = self.config.residual_scale
    return branch_BSD if scale == 1.0 else scale * branch_BSD


def empty_cache(
  model: ModelConfig, segment: SegmentConfig, specs: Specs, rows: int, length: int, dtype: jnp.dtype
) -> LayerCache:
  """What a segment's blocks keep of up to `length` tokens of so many rows: one slot per pass of a
  block, arrays [L, J, B, ...]."""
  lead = (segment.layers, segment.repeat, rows)
  attention = segment.attention
  if isinstance(attention, HeadsAttention):
    return KeyValues.empty(attention, specs, lead, length, dtype), None
  if isinstance(attention, LatentAttention):
    assert isinstance(model.positions, RotaryPositions)
    return Latents.empty(attention, model.positions, specs, lead, length, dtype), None
  time = TimeMixState.empty(model, attention, specs, lead, dtype)
  return time, ChannelMixState.empty(model, specs, lead, dtype)
