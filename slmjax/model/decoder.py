"""The decoder: embedding, segments of equal blocks, final norm, output table.

Letters: V vocabulary, E width of the tables, L blocks of a segment, J passes through a block,
B rows, S positions, T cached positions, D model width.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.kernels.lookup import take_rows
from slmjax.model import block, position, weights
from slmjax.model.block import Block
from slmjax.model.context import Context, LayerCache
from slmjax.model.norm import Norm
from slmjax.model_config import (
  HeadsAttention,
  LearnedPositions,
  ModelConfig,
  RotaryPositions,
  SegmentConfig,
)
from slmjax.sharding import Specs, gather, gathered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """State of cached generation: per segment arrays [L, J, B, ...], one slot per pass of a block.

  `length` is how many of the T positions are taken, in all rows alike: shorter prompts are padded
  on the left, with segment id 0.
  """

  length: jax.Array
  segments_BT: jax.Array
  layers: tuple[LayerCache, ...]


class Decoder(nnx.Module):
  """A decoder-only language model. One forward serves training, evaluation and generation."""

  def __init__(self, model: ModelConfig, compute: ComputeConfig, specs: Specs, key: jax.Array):
    self.model = model
    self.compute = compute
    self.specs = specs
    embed, head, blocks, positions, project = jax.random.split(key, 5)
    dtype, std = jnp.dtype(compute.param_dtype), model.init.embedding_std
    D, E = model.width, model.embedding.width
    table = (model.vocab_size, E)
    self.embed_VE = weights.normal(embed, table, specs.embed_VD, std, dtype)
    if isinstance(model.positions, LearnedPositions):
      rows = model.max_length + model.positions.offset
      self.position_TD = weights.normal(positions, (rows, D), specs.up_RD, std, dtype)
    if E != D:
      into, out = jax.random.split(project)
      self.project_in_ED = weights.normal(into, (E, D), specs.down_DR, model.init.std, dtype)
      self.project_out_DE = weights.normal(out, (D, E), specs.down_DR, model.init.std, dtype)
    if model.embedding.norm:
      self.embed_norm = Norm(model.norm, D, specs, dtype)
    firsts = [sum(s.layers for s in model.segments[:i]) for i in range(len(model.segments))]
    self.segments = nnx.List(
      [
        _stack(model, segment, compute, specs, jax.random.fold_in(blocks, i), first)
        for i, (segment, first) in enumerate(zip(model.segments, firsts, strict=True))
      ]
    )
    if model.logits.norm:
      self.final_norm = Norm(model.norm, D, specs, dtype)
    if not model.embedding.tied:
      self.head_VE = weights.normal(head, table, specs.embed_VD, std, dtype)

  def __call__(
    self,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    *,
    rope_theta: float | None,
    cache: Cache | None = None,
    layers: Sequence[Sequence[Block]] | None = None,
  ) -> tuple[jax.Array, Cache | None]:
    """Final hidden states [B, S, E] in the compute dtype, and the cache with these tokens in it.

    Logits are their products with `output_VE`, soft-capped if the model has `logits.softcap`.

    Args:
      tokens_BS: int32 token ids.
      segments_BS: int32; tokens attend to earlier ones with their own id; 0 is padding.
      positions_BS: int32, each token's position in its segment.
      rope_theta: base of the rotary angles, the stage's; None for a model without them.
      cache: None in training; else the tokens are appended to it and attend to all it holds.
      layers: None, or the blocks as `one_by_one` gave them, with a cache that went through it too.
    """
    x_BSD, _ = self._embed(tokens_BS, positions_BS)
    return self._apply(x_BSD, segments_BS, positions_BS, rope_theta, cache, layers)

  def passing_tables_on(
    self,
    tokens_BS: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    *,
    rope_theta: float | None,
  ) -> tuple[jax.Array, "Decoder"]:
    """For a loss: final hidden states as from a call, and this decoder with the embedding as the
    lookup passed it on, so that a table which is used again has its gradient in one array."""
    x_BSD, embed_VE = self._embed(tokens_BS, positions_BS)
    hidden_BSE, _ = self._apply(x_BSD, segments_BS, positions_BS, rope_theta, None, None)
    return hidden_BSE, self._with("embed_VE", embed_VE)

  def with_output(self, table_VE: jax.Array) -> "Decoder":
    """This decoder with another array for `output_VE`."""
    return self._with("embed_VE" if self.model.embedding.tied else "head_VE", table_VE)

  def _with(self, name: str, array: jax.Array) -> "Decoder":
    return jax.tree_util.tree_map_with_path(
      lambda path, x: array if path[0].name == name else x, self
    )

  def _apply(
    self,
    x_BSD: jax.Array,
    segments_BS: jax.Array,
    positions_BS: jax.Array,
    rope_theta: float | None,
    cache: Cache | None,
    layers: Sequence[Sequence[Block]] | None,
  ) -> tuple[jax.Array, Cache | None]:
    """All that follows the embedding; arguments and results as in a call."""
    model = self.model
    start = jnp.zeros((), jnp.int32)
    kv_segments_BT = segments_BS
    if cache is not None:
      start = cache.length
      kv_segments_BT = jax.lax.dynamic_update_slice_in_dim(
        cache.segments_BT, segments_BS, start, axis=1
      )
    angles_BSR = None
    if isinstance(model.positions, RotaryPositions):
      assert rope_theta is not None
      angles_BSR = position.rotary_angles(positions_BS, model.positions, rope_theta)
    context = Context(segments_BS, kv_segments_BT, start, angles_BSR, window=None)
    caches: list[LayerCache | None] = []
    for i, (segment, blocks) in enumerate(zip(model.segments, self.segments, strict=True)):
      kept = None if cache is None else cache.layers[i]
      if layers is None:
        x_BSD, kept = _scan(blocks, x_BSD, context, kept, segment, self.compute.remat)
      else:
        x_BSD, kept = _loop(layers[i], x_BSD, context, kept, segment)
      caches.append(kept)
    if cache is not None:
      cache = Cache(start + segments_BS.shape[1], kv_segments_BT, tuple(caches))
    return self._to_output(x_BSD), cache

  def _embed(self, tokens_BS: jax.Array, positions_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The residual stream before the first block, and the table, passed on by the lookup."""
    model, specs, dtype = self.model, self.specs, jnp.dtype(self.compute.compute_dtype)
    x_BSD, embed_VE = take_rows(self.embed_VE[...], tokens_BS, specs, dtype)
    if model.embedding.scale != 1.0:
      x_BSD = x_BSD * jnp.asarray(model.embedding.scale, dtype)
    if model.embedding.width != model.width:
      project_in_ED = gather(self.project_in_ED[...], specs.down_DR, dtype)
      x_BSD = jnp.einsum("bse,ed->bsd", x_BSD, project_in_ED)
    if isinstance(model.positions, LearnedPositions):
      rows_BS = positions_BS + model.positions.offset
      position_TD = gather(self.position_TD[...], specs.up_RD, dtype)
      x_BSD = x_BSD + position_TD.at[rows_BS].get(out_sharding=specs.act_BSD)
    return (self.embed_norm(x_BSD) if model.embedding.norm else x_BSD), embed_VE

  def _to_output(self, x_BSD: jax.Array) -> jax.Array:
    """What the output table is compared with, after the last block."""
    model, dtype = self.model, x_BSD.dtype
    if model.logits.norm:
      x_BSD = self.final_norm(x_BSD)
    if model.logits.scale != 1.0:
      x_BSD = x_BSD * jnp.asarray(model.logits.scale, dtype)
    if model.embedding.width == model.width:
      return x_BSD
    project_out_DE = gather(self.project_out_DE[...], self.specs.down_DR, dtype)
    return jnp.einsum("bsd,de->bse", x_BSD, project_out_DE)

  @property
  def output_VE(self) -> jax.Array:
    """The stored table that hidden states are compared with: the embedding's if tied."""
    return self.embed_VE[...] if self.model.embedding.tied else self.head_VE[...]

  def empty_cache(self, rows: int, length: int) -> Cache:
    """A cache for `rows` sequences of up to `length` tokens."""
    specs, dtype = self.specs, jnp.dtype(self.compute.compute_dtype)
    return Cache(
      length=jnp.zeros((), jnp.int32),
      segments_BT=jnp.zeros((rows, length), jnp.int32, out_sharding=specs.tokens_BS),
      layers=tuple(
        block.empty_cache(self.model, segment, specs, rows, length, dtype)
        for segment in self.model.segments
      ),
    )

  def one_by_one(self, cache: Cache) -> tuple[list[list[Block]], Cache]:
    """The blocks of each segment and their slots of a cache, each with arrays of its own.

    For a loop that decodes token by token: in each step a scan would copy every block's weights and
    slots out of the stacked arrays, and every weight would be cast and gathered again. It costs the
    memory of all blocks' weights once more, in the compute dtype and whole on each `fsdp` device.
    """
    dtype = jnp.dtype(self.compute.compute_dtype)
    layers, slots = [], []
    for segment, blocks, kept in zip(self.model.segments, self.segments, cache.layers, strict=True):
      used = jax.tree.map(lambda x: gathered(x, dtype), blocks)
      layers.append([jax.tree.map(lambda x, i=i: x[i], used) for i in range(segment.layers)])
      slots.append(
        [
          [jax.tree.map(lambda x, i=i, j=j: x[i, j], kept) for j in range(segment.repeat)]
          for i in range(segment.layers)
        ]
      )
    return layers, dataclasses.replace(cache, layers=tuple(slots))


def _stack(
  model: ModelConfig,
  segment: SegmentConfig,
  compute: ComputeConfig,
  specs: Specs,
  key: jax.Array,
  first: int,
) -> Block:
  """A segment's blocks as one Block whose arrays have a leading axis L; `first` is the index of
  the first of them in the model."""
  keys = jax.random.split(key, segment.layers)
  layers = first + jnp.arange(segment.layers)
  return jax.vmap(lambda key, layer: Block(model, segment, compute, specs, key, layer))(
    keys, layers
  )


def _windows(segment: SegmentConfig) -> list[int | None]:
  """The attention window of each of a segment's layers."""
  attention = segment.attention
  if not isinstance(attention, HeadsAttention):
    return [None] * segment.layers
  return [attention.window(layer) or None for layer in range(segment.layers)]


def _scan(
  blocks: Block,
  x_BSD: jax.Array,
  context: Context,
  cache: LayerCache | None,
  segment: SegmentConfig,
  remat: str,
) -> tuple[jax.Array, LayerCache | None]:
  """Applies a segment: each block `repeat` times in a row, each pass with its own cache slot."""
  windows = _windows(segment)
  per_layer = None
  if len(set(windows)) > 1:
    per_layer = jnp.asarray([window or 0 for window in windows], jnp.int32)

  def body(
    x_BSD: jax.Array, layer: tuple[Block, LayerCache | None, jax.Array | None]
  ) -> tuple[jax.Array, LayerCache | None]:
    block, slots, window = layer
    seen = dataclasses.replace(context, window=windows[0] if window is None else window)
    kept = []
    for j in range(segment.repeat):
      slot = None if slots is None else jax.tree.map(lambda x, j=j: x[j], slots)
      x_BSD, slot = block(x_BSD, seen, slot)
      kept.append(slot)
    return x_BSD, None if slots is None else jax.tree.map(lambda *x: jnp.stack(x), *kept)

  return jax.lax.scan(_rematerialise(body, remat), x_BSD, (blocks, cache, per_layer))


def _loop(
  blocks: Sequence[Block],
  x_BSD: jax.Array,
  context: Context,
  slots: LayerCache,
  segment: SegmentConfig,
) -> tuple[jax.Array, list[list[LayerCache]]]:
  """As `_scan`, of blocks and slots one by one."""
  kept: list[list[LayerCache]] = []
  for each, passes, window in zip(blocks, slots, _windows(segment), strict=True):
    seen = dataclasses.replace(context, window=window)
    kept.append([])
    for slot in passes:
      x_BSD, slot = each(x_BSD, seen, slot)
      kept[-1].append(slot)
  return x_BSD, kept


def _rematerialise(body: Callable, remat: str) -> Callable:
  """What the backward pass recomputes: nothing, all but the matrix products, or the whole block."""
  # Inside a scan the loop itself keeps XLA from merging the recomputation with the forward.
  if remat == "none":
    return body
  if remat == "dots":
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(body, prevent_cse=False, policy=policy)
  return jax.checkpoint(body, prevent_cse=False)
