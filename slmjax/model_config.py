"""The schema of an architecture: what every model of the library says of itself.

Where a choice brings settings of its own (rotary positions have a width, ALiBi has none), it is a
dataclass with its name in `kind`; where it can be left out, it may be None. `slmjax.families` fills
in these fields for whole families of models from the few numbers in which their members differ.
"""

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclasses.dataclass(frozen=True)
class NormConfig:
  """Normalisation before, after or between the layers.

  `rms` is RMSNorm as Llama has it (float32, cast, times w); `rms_one_plus` is Gemma's (times 1 + w
  in float32, then cast); `layer` is LayerNorm. `scale` and `bias` say whether it has those vectors.
  """

  kind: Literal["rms", "rms_one_plus", "layer"]
  eps: float
  scale: bool
  bias: bool


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
  """Rotary frequencies of Llama 3.1: those of waves longer than original_length / low are divided
  by `factor`, those shorter than original_length / high kept, and between them interpolated."""

  kind: Literal["llama3"]
  factor: float
  low: float
  high: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv 2309.00071): frequencies that turn more than `fast` times in original_length are
  kept, fewer than `slow` times divided by `factor`. `magnitude` multiplies cosines and sines."""

  kind: Literal["yarn"]
  factor: float
  fast: float
  slow: float
  original_length: int
  magnitude: float


@dataclasses.dataclass(frozen=True)
class LongRopeScaling:
  """LongRoPE (arXiv 2402.13753): one divisor per frequency, `short_factors` while the positions of
  a call stay below original_length and `long_factors` beyond. `magnitude` as in YaRN."""

  kind: Literal["longrope"]
  short_factors: tuple[float, ...]
  long_factors: tuple[float, ...]
  original_length: int
  magnitude: float


@dataclasses.dataclass(frozen=True)
class RotaryPositions:
  """Rotary positions (arXiv 2104.09864) over the first `width` dimensions of each head (in latent
  attention: over the dimensions that are for positions). `half` pairs dimension i with i + width/2,
  `interleaved` 2i with 2i + 1. The base is the stage's `rope_theta`."""

  kind: Literal["rotary"]
  width: int
  layout: Literal["half", "interleaved"]
  scaling: Llama3Scaling | YarnScaling | LongRopeScaling | None


@dataclasses.dataclass(frozen=True)
class LearnedPositions:
  """A table of max_length + offset vectors added to the embeddings; position p reads row
  p + offset."""

  kind: Literal["learned"]
  offset: int


@dataclasses.dataclass(frozen=True)
class AlibiPositions:
  """ALiBi (arXiv 2108.12409): scores fall with distance, at a fixed slope per head."""

  kind: Literal["alibi"]


@dataclasses.dataclass(frozen=True)
class EmbeddingConfig:
  """The tables at both ends.

  `width` is that of the tables: where it differs from the model's, bias-free projections stand
  between (OPT-350M). `scale` multiplies the embeddings, rounded to the compute dtype first as Gemma
  does. `norm` normalises them (BLOOM).
  """

  tied: bool
  width: int
  scale: float
  norm: bool


@dataclasses.dataclass(frozen=True)
class LogitsConfig:
  """What happens on the way to the logits: the final norm, a factor, a soft-cap c tanh(x / c)."""

  norm: bool
  scale: float
  softcap: float | None


@dataclasses.dataclass(frozen=True)
class InitConfig:
  """Standard deviations of normal draws: embeddings (and learned positions), projections out of
  the residual stream, and projections back into it (attention output, feed-forward down)."""

  embedding_std: float
  std: float
  output_std: float


@dataclasses.dataclass(frozen=True)
class HeadsAttention:
  """Multi-head, grouped-query (arXiv 2305.13245) or multi-query attention.

  `scale` multiplies the scores. `softcap` bounds them by c tanh(x / c). `windows` are how many
  keys the layers of the segment see, in turn (0: all). `qk_norm` normalises queries and keys before
  rotation, each head by itself with one vector for all (`head`) or all of them together (`width`).
  """

  kind: Literal["heads"]
  heads: int
  kv_heads: int
  head_width: int
  scale: float
  softcap: float | None
  windows: tuple[int, ...]
  qk_norm: Literal["none", "head", "width"]
  qkv_bias: bool
  out_bias: bool

  def window(self, layer: int) -> int:
    """How many keys a layer of the segment sees; 0 is all."""
    return self.windows[layer % len(self.windows)]


@dataclasses.dataclass(frozen=True)
class LatentAttention:
  """Multi-head latent attention (arXiv 2405.04434): keys and values come from one latent vector of
  `latent_width` per token, positions from one rotated key that all heads share. `query_latent` is
  the width of the queries' own latent, None where they come straight from the residual stream."""

  kind: Literal["latent"]
  heads: int
  query_latent: int | None
  latent_width: int
  content_width: int
  value_width: int
  scale: float
  latent_eps: float


@dataclasses.dataclass(frozen=True)
class RwkvTimeMix:
  """RWKV-4 time mixing (arXiv 2305.13048): a decayed weighted mean in the place of attention."""

  kind: Literal["rwkv"]
  width: int


@dataclasses.dataclass(frozen=True)
class FeedForward:
  """down(act(up x)), or if `gated` down(act(gate x) * up x). `series` is the number of terms of
  PanGu-pi's series activation (arXiv 2312.17276), None for the plain activation."""

  kind: Literal["mlp"]
  width: int
  gated: bool
  activation: Activation
  bias: bool
  series: int | None


@dataclasses.dataclass(frozen=True)
class RwkvChannelMix:
  """RWKV-4 channel mixing: a squared-ReLU feed-forward with a gate and a token shift."""

  kind: Literal["rwkv"]
  width: int


@dataclasses.dataclass(frozen=True)
class SegmentConfig:
  """A run of equal blocks: stacked, scanned, each applied `repeat` times in a row."""

  layers: int
  repeat: int
  attention: HeadsAttention | LatentAttention | RwkvTimeMix
  ffn: FeedForward | RwkvChannelMix


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """How a block's two branches and the residual stream x meet.

  `pre`: x + f(norm x). `post`: norm(x + f(x)). `output`: x + norm(f(x)). `sandwich`:
  x + norm(f(norm x)). `parallel`: x + attention(norm x) + ffn(another norm x);
  `parallel_shared` the same with one norm. `residual_scale` multiplies each branch.
  `shortcut` is the inner width of PanGu-pi's augmented shortcut beside attention
  (arXiv 2312.17276), None without.
  """

  wiring: Literal["pre", "post", "output", "sandwich", "parallel", "parallel_shared"]
  residual_scale: float
  shortcut: int | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The architecture. Nothing here depends on hardware or data."""

  vocab_size: int
  width: int
  max_length: int
  embedding: EmbeddingConfig
  positions: RotaryPositions | LearnedPositions | AlibiPositions | None
  norm: NormConfig
  block: BlockConfig
  segments: tuple[SegmentConfig, ...]
  logits: LogitsConfig
  init: InitConfig

  @property
  def depth(self) -> int:
    """Blocks of the model, each counted once however often it is applied."""
    return sum(segment.layers for segment in self.segments)
