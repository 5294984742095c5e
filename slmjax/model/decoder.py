"""The decoder: embedding, segments of equal blocks, final norm, output table.

Letters: V vocabulary, L blocks of a segment, J passes through a block, B rows, S positions,
T cached positions, D model width, K key/value heads, H head width.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig, ModelConfig, SegmentConfig
from slmjax.model import position, weights
from slmjax.model.attention import Attention, Context, KeyValues
from slmjax.model.ffn import GatedFeedForward
from slmjax.model.norm import RMSNorm
from slmjax.sharding import Specs, take_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """State of cached generation: per segment [L, J, B, T, K, H], one slot per pass of a block.

  `length` is how many of the T positions are taken, in all rows alike: shorter prompts are padded
  on the left, with segment id 0.
  """

  length: jax.Array
  segments_BT: jax.Array
  layers: tuple[KeyValues, ...]


class Block(nnx.Module):
  """Pre-norm attention and feed-forward, each added to the residual stream."""

  def __init__(
    self,
    model: ModelConfig,
    segment: SegmentConfig,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    attention, ffn = jax.random.split(key)
    dtype = jnp.dtype(compute.param_dtype)
    self.attention_norm = RMSNorm(model.width, model.norm_eps, specs, dtype)
    self.attention = Attention(model, segment, compute, specs, attention)
    self.ffn_norm = RMSNorm(model.width, model.norm_eps, specs, dtype)
    self.ffn = GatedFeedForward(model, segment, compute, specs, ffn)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: KeyValues | None
  ) -> tuple[jax.Array, KeyValues | None]:
    attended_BSD, cache = self.attention(self.attention_norm(x_BSD), context, cache)
    x_BSD = x_BSD + attended_BSD
    return x_BSD + self.ffn(self.ffn_norm(x_BSD)), cache


class Decoder(nnx.Module):
  """A decoder-only language model. One forward serves training, evaluation and generation."""

  def __init__(self, model: ModelConfig, compute: ComputeConfig, specs: Specs, key: jax.Array):
    self.model = model
    self.compute = compute
    self.specs = specs
    embed, head, blocks = jax.random.split(key, 3)
    dtype = jnp.dtype(compute.param_dtype)
    table = (model.vocab_size, model.width)
    self.embed_VD = weights.normal(embed, table, specs.embed_VD, model.init_std, dtype)
    self.segments = nnx.List(
      [
        _stack(model, segment, compute, specs, jax.random.fold_in(blocks, i))
        for i, segment in enumerate(model.segments)
      ]
    )
    self.final_norm = RMSNorm(model.width, model.norm_eps, specs, dtype)
    if not model.tie_embeddings:
      self.head_VD = weights.normal(head, table, specs.embed_VD, model.init_std, dtype)

  def __call__(
    self,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    *,
    rope_theta: float,
    cache: Cache | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Final hidden states [B, S, D] in the compute dtype, and the cache with these tokens in it.

    Args:
      tokens_BS: int32 token ids.
      segments_BS: int32; tokens attend to earlier ones with their own id; 0 is padding.
      positions_BS: int32, each token's position in its segment.
      rope_theta: base of the rotary angles, the stage's.
      cache: None in training; else the tokens are appended to it and attend to all it holds.
    """
    x_BSD = take_rows(
      self.embed_VD[...], tokens_BS, self.specs, jnp.dtype(self.compute.compute_dtype)
    )
    start = jnp.zeros((), jnp.int32)
    kv_segments_BT = segments_BS
    if cache is not None:
      start = cache.length
      kv_segments_BT = jax.lax.dynamic_update_slice_in_dim(
        cache.segments_BT, segments_BS, start, axis=1
      )
    layers: list[KeyValues | None] = []
    for i, (segment, blocks) in enumerate(zip(self.model.segments, self.segments, strict=True)):
      cos_BSR, sin_BSR = position.rotary_angles(positions_BS, segment.head_width, rope_theta)
      context = Context(cos_BSR, sin_BSR, segments_BS, kv_segments_BT, start)
      keys = None if cache is None else cache.layers[i]
      x_BSD, keys = _scan(blocks, x_BSD, context, keys, segment.repeat, self.compute.remat)
      layers.append(keys)
    if cache is not None:
      filled = tuple(keys for keys in layers if keys is not None)
      cache = Cache(start + tokens_BS.shape[1], kv_segments_BT, filled)
    return self.final_norm(x_BSD), cache

  @property
  def output_VD(self) -> jax.Array:
    """The stored table that hidden states are compared with: the embedding's if tied."""
    return self.embed_VD[...] if self.model.tie_embeddings else self.head_VD[...]

  def empty_cache(self, rows: int, length: int) -> Cache:
    """A cache for `rows` sequences of up to `length` tokens."""
    specs, dtype = self.specs, jnp.dtype(self.compute.compute_dtype)

    def layer(segment: SegmentConfig) -> KeyValues:
      K = segment.kv_heads
      shape = (segment.layers, segment.repeat, rows, length, K, segment.head_width)
      spec = jax.P(None, None, *specs.act_BTKH(K))
      return KeyValues(*(jnp.zeros(shape, dtype, out_sharding=spec) for _ in range(2)))

    return Cache(
      length=jnp.zeros((), jnp.int32),
      segments_BT=jnp.zeros((rows, length), jnp.int32, out_sharding=specs.tokens_BS),
      layers=tuple(layer(segment) for segment in self.model.segments),
    )


def _stack(
  model: ModelConfig, segment: SegmentConfig, compute: ComputeConfig, specs: Specs, key: jax.Array
) -> Block:
  """A segment's blocks as one Block whose arrays have a leading axis L."""
  keys = jax.random.split(key, segment.layers)
  return jax.vmap(lambda k: Block(model, segment, compute, specs, k))(keys)


def _scan(
  blocks: Block,
  x_BSD: jax.Array,
  context: Context,
  cache: KeyValues | None,
  repeat: int,
  remat: str,
) -> tuple[jax.Array, KeyValues | None]:
  """Applies a segment: each block `repeat` times in a row, each pass with its own cache slot."""

  def body(
    x_BSD: jax.Array, layer: tuple[Block, KeyValues | None]
  ) -> tuple[jax.Array, KeyValues | None]:
    block, slots = layer
    kept = []
    for j in range(repeat):
      slot = None if slots is None else jax.tree.map(lambda x, j=j: x[j], slots)
      x_BSD, slot = block(x_BSD, context, slot)
      kept.append(slot)
    return x_BSD, None if slots is None else jax.tree.map(lambda *x: jnp.stack(x), *kept)

  return jax.lax.scan(_rematerialise(body, remat), x_BSD, (blocks, cache))


def _rematerialise(body: Callable, remat: str) -> Callable:
  """What the backward pass recomputes: nothing, all but the matrix products, or the whole block."""
  # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward.
  if remat == "none":
    return body
  if remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
  return jax.checkpoint(body, prevent_cse=False)
