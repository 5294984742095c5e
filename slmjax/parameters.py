"""How many numbers an architecture trains, in closed form."""

from slmjax.model_config import (
  FeedForward,
  HeadsAttention,
  LatentAttention,
  LearnedPositions,
  ModelConfig,
  NormConfig,
  RotaryPositions,
  SegmentConfig,
)

_NORMS = {"pre": 2, "post": 2, "output": 2, "sandwich": 4, "parallel": 2, "parallel_shared": 1}


def parameters(model: ModelConfig) -> int:
  """Every trained number, counted once."""
  embedding, d = model.embedding, model.width
  total = model.vocab_size * embedding.width * (1 if embedding.tied else 2)
  if isinstance(model.positions, LearnedPositions):
    total += (model.max_length + model.positions.offset) * d
  if embedding.width != d:
    total += 2 * d * embedding.width
  total += (embedding.norm + model.logits.norm) * _norm(model.norm, d)
  return total + sum(s.layers * block_parameters(model, s) for s in model.segments)


def block_parameters(model: ModelConfig, segment: SegmentConfig) -> int:
  """All of one block."""
  matrices = block_matrices(model, segment)
  norms = _NORMS[model.block.wiring] * _norm(model.norm, model.width)
  return matrices + norms + _vectors(model, segment)


def block_matrices(model: ModelConfig, segment: SegmentConfig) -> int:
  """The numbers of a block that every token is multiplied with."""
  d, attention, ffn = model.width, segment.attention, segment.ffn
  if isinstance(attention, HeadsAttention):
    total = d * attention.head_width * 2 * (attention.heads + attention.kv_heads)
  elif isinstance(attention, LatentAttention):
    total = _latent_matrices(model, attention)
  else:
    total = 4 * d * attention.width
  if isinstance(ffn, FeedForward):
    total += (3 if ffn.gated else 2) * d * ffn.width
  else:
    total += 2 * d * ffn.width + d * d
  return total + 2 * d * (model.block.shortcut or 0)


def _latent_matrices(model: ModelConfig, attention: LatentAttention) -> int:
  assert isinstance(model.positions, RotaryPositions)
  d, n, latent = model.width, attention.heads, attention.latent_width
  q_width = n * (attention.content_width + model.positions.width)
  rank = attention.query_latent
  queries = d * q_width if rank is None else rank * (d + q_width)
  down = d * (latent + model.positions.width)
  up = latent * n * (attention.content_width + attention.value_width)
  return queries + down + up + n * attention.value_width * d


def _vectors(model: ModelConfig, segment: SegmentConfig) -> int:
  """Biases, inner norms and other vectors of a block."""
  d, attention, ffn, total = model.width, segment.attention, segment.ffn, 0
  if isinstance(attention, HeadsAttention):
    queries, keys = (n * attention.head_width for n in (attention.heads, attention.kv_heads))
    total += attention.qkv_bias * (queries + 2 * keys) + attention.out_bias * d
    inner = {"none": 0, "head": 2 * attention.head_width, "width": queries + keys}
    total += inner[attention.qk_norm]
  elif isinstance(attention, LatentAttention):
    total += attention.latent_width + (attention.query_latent or 0)
  else:
    total += 3 * d + 2 * attention.width
  if isinstance(ffn, FeedForward):
    total += ffn.bias * ((2 if ffn.gated else 1) * ffn.width + d)
    total += 2 * ffn.width * (ffn.series or 0)
  else:
    total += 2 * d
  return total


def _norm(norm: NormConfig, width: int) -> int:
  return (norm.scale + norm.bias) * width
