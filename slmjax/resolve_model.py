"""What an architecture must satisfy, by itself and on a mesh."""

from slmjax.checks import divides, positive, require
from slmjax.config import MeshConfig
from slmjax.model_config import (
  AlibiPositions,
  FeedForward,
  HeadsAttention,
  LatentAttention,
  LearnedPositions,
  Llama3Scaling,
  LongRopeScaling,
  ModelConfig,
  RotaryPositions,
  RwkvTimeMix,
  SegmentConfig,
  YarnScaling,
)

PATH = "config.model"


def check_model(model: ModelConfig) -> None:
  """Raises ConfigError for an architecture that cannot be built."""
  positive(model, PATH, "vocab_size", "width", "max_length")
  positive(model.norm, f"{PATH}.norm", "eps")
  if model.norm.kind != "layer":
    require(
      model.norm.scale and not model.norm.bias,
      f"{PATH}.norm: kind {model.norm.kind!r} has a scale and no bias; set scale=True, bias=False",
    )
  positive(model.embedding, f"{PATH}.embedding", "width", "scale")
  positive(model.logits, f"{PATH}.logits", "scale")
  if model.logits.softcap is not None:
    positive(model.logits, f"{PATH}.logits", "softcap")
  positive(model.block, f"{PATH}.block", "residual_scale")
  if model.block.shortcut is not None:
    positive(model.block, f"{PATH}.block", "shortcut")
  positive(model.init, f"{PATH}.init", "embedding_std", "std")
  require(
    model.init.output_std >= 0,
    f"{PATH}.init.output_std is {model.init.output_std}; it must not be negative",
  )
  _check_positions(model)
  for i, segment in enumerate(model.segments):
    _check_segment(model, segment, f"{PATH}.segments[{i}]")


def _check_positions(model: ModelConfig) -> None:
  path, positions = f"{PATH}.positions", model.positions
  if isinstance(positions, LearnedPositions):
    require(positions.offset >= 0, f"{path}.offset is {positions.offset}; it must not be negative")
  if not isinstance(positions, RotaryPositions):
    return
  positive(positions, path, "width")
  require(
    positions.width % 2 == 0,
    f"{path}.width is {positions.width}; rotary positions turn pairs, so it must be even",
  )
  scaling, where = positions.scaling, f"{path}.scaling"
  if isinstance(scaling, Llama3Scaling):
    positive(scaling, where, "factor", "low", "original_length")
    require(
      scaling.high > scaling.low, f"{where}: high {scaling.high} is not above low {scaling.low}"
    )
  elif isinstance(scaling, YarnScaling):
    positive(scaling, where, "factor", "slow", "original_length", "magnitude")
    require(
      scaling.fast > scaling.slow, f"{where}: fast {scaling.fast} is not above slow {scaling.slow}"
    )
  elif isinstance(scaling, LongRopeScaling):
    positive(scaling, where, "original_length", "magnitude")
    for name in ("short_factors", "long_factors"):
      count = len(getattr(scaling, name))
      require(
        2 * count == positions.width,
        f"{where}.{name} has {count} entries; {path}.width {positions.width} needs "
        f"{positions.width // 2}",
      )


def _check_segment(model: ModelConfig, segment: SegmentConfig, path: str) -> None:
  positive(segment, path, "layers", "repeat")
  where, attention = f"{path}.attention", segment.attention
  if isinstance(attention, HeadsAttention):
    _check_heads(model, attention, where)
  elif isinstance(attention, LatentAttention):
    positive(
      attention,
      where,
      *("heads", "latent_width", "content_width", "value_width", "scale", "latent_eps"),
    )
    if attention.query_latent is not None:
      positive(attention, where, "query_latent")
    require(
      isinstance(model.positions, RotaryPositions),
      f"{where}: latent attention has rotary positions; set {PATH}.positions to kind 'rotary'",
    )
  else:
    positive(attention, where, "width")
    require(
      model.positions is None,
      f"{where}: RWKV knows order by itself; set {PATH}.positions to None",
    )
  positive(segment.ffn, f"{path}.ffn", "width")
  require(
    isinstance(segment.ffn, FeedForward) != isinstance(attention, RwkvTimeMix),
    f"{path}: attention of kind 'rwkv' and a feed-forward of kind 'rwkv' go together",
  )
  if isinstance(segment.ffn, FeedForward) and segment.ffn.series is not None:
    positive(segment.ffn, f"{path}.ffn", "series")


def _check_heads(model: ModelConfig, attention: HeadsAttention, path: str) -> None:
  positive(attention, path, "heads", "kv_heads", "head_width", "scale")
  divides(f"{path}.kv_heads", attention.kv_heads, f"{path}.heads", attention.heads)
  if attention.softcap is not None:
    positive(attention, path, "softcap")
    require(
      not isinstance(model.positions, AlibiPositions),
      f"{path}.softcap does not go with positions of kind 'alibi'; set it to None",
    )
  for i, window in enumerate(attention.windows):
    require(
      window >= 0, f"{path}.windows[{i}] is {window}; give a number of keys, or 0 for all of them"
    )
  require(
    attention.qk_norm == "none" or model.norm.kind != "layer",
    f"{path}.qk_norm is {attention.qk_norm!r}, which needs a {PATH}.norm of kind 'rms'",
  )
  if isinstance(model.positions, RotaryPositions):
    require(
      model.positions.width <= attention.head_width,
      f"{PATH}.positions.width {model.positions.width} is above {path}.head_width "
      f"{attention.head_width}",
    )


def check_model_on_mesh(model: ModelConfig, mesh: MeshConfig, fsdp: int) -> None:
  """Raises ConfigError where an axis does not divide what it splits."""
  split = ("config.mesh.fsdp", fsdp)
  tensor = ("config.mesh.tensor", mesh.tensor)
  divides(*split, f"{PATH}.width", model.width)
  if model.embedding.width != model.width:
    divides(*split, f"{PATH}.embedding.width", model.embedding.width)
  divides(*tensor, f"{PATH}.vocab_size", model.vocab_size)
  for i, segment in enumerate(model.segments):
    where, attention = f"{PATH}.segments[{i}].attention", segment.attention
    divides(*tensor, f"{PATH}.segments[{i}].ffn.width", segment.ffn.width)
    if isinstance(attention, RwkvTimeMix):
      divides(*tensor, f"{where}.width", attention.width)
      continue
    divides(*tensor, f"{where}.heads", attention.heads)
    if isinstance(attention, LatentAttention):
      divides(*split, f"{where}.latent_width", attention.latent_width)
      if attention.query_latent is not None:
        divides(*split, f"{where}.query_latent", attention.query_latent)
    elif mesh.tensor < attention.kv_heads:
      divides(*tensor, f"{where}.kv_heads", attention.kv_heads)
    else:
      divides(f"{where}.kv_heads", attention.kv_heads, *tensor)
