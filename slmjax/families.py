"""Families of architectures, each from the few numbers in which its members differ.

What a function returns is the `model` part of a config with every setting given; a recipe may
change any of them afterwards. configs/ and `slmjax.convert` both build on these, so that an
imported model and the recipe of the same name are one architecture.
"""

import math
from collections.abc import Sequence

from slmjax.architecture import (
  Settings,
  decoder,
  layer_norm,
  learned,
  mlp,
  multi_head,
  normal,
  rms,
  rotary,
  segment,
)


def llama(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  ffn: int,
  max_length: int,
  tied: bool,
  eps: float,
  init: Settings,
  head_width: int | None = None,
  repeat: int = 1,
  scaling: Settings | None = None,
  windows: Sequence[int] = (0,),
  qk_norm: str = "none",
  qkv_bias: bool = False,
  wiring: str = "pre",
) -> Settings:
  """Llama and its many relatives: Fox-1, TinyLlama, MobileLLM (`repeat` 2 is its layer sharing),
  SmolLM2, Mistral (`windows`), Phi-3, Qwen 1.5 to 2.5 (`qkv_bias`), Qwen3 (`qk_norm` "head"),
  OLMo 2 (`qk_norm` "width", `wiring` "output"). `head_width` is width / heads unless given."""
  h = width // heads if head_width is None else head_width
  attention = multi_head(heads, kv_heads, h, windows=windows, qk_norm=qk_norm, qkv_bias=qkv_bias)
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[segment(layers, attention, mlp(ffn, "silu", gated=True), repeat=repeat)],
    positions=rotary(h, scaling=scaling),
    norm=rms(eps),
    tied=tied,
    init=init,
    wiring=wiring,
  )


def gemma(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  head_width: int,
  ffn: int,
  max_length: int,
  eps: float,
  init: Settings,
) -> Settings:
  """Gemma: wide heads, GeGLU, norms times 1 + w, embeddings times the root of the width."""
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[
      segment(layers, multi_head(heads, kv_heads, head_width), mlp(ffn, "gelu_tanh", gated=True))
    ],
    positions=rotary(head_width),
    norm=rms(eps, one_plus=True),
    tied=True,
    init=init,
    embedding_scale=math.sqrt(width),
  )


def gemma2(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  head_width: int,
  ffn: int,
  max_length: int,
  eps: float,
  init: Settings,
  windows: Sequence[int],
  query_scalar: float,
  attention_softcap: float | None,
  logit_softcap: float | None,
) -> Settings:
  """Gemma 2: norms on both sides of each branch, layers that see a window and all in turn,
  soft-caps, scores over the root of `query_scalar`."""
  attention = multi_head(
    heads,
    kv_heads,
    head_width,
    scale=query_scalar**-0.5,
    softcap=attention_softcap,
    windows=windows,
  )
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[segment(layers, attention, mlp(ffn, "gelu_tanh", gated=True))],
    positions=rotary(head_width),
    norm=rms(eps, one_plus=True),
    tied=True,
    init=init,
    wiring="sandwich",
    embedding_scale=math.sqrt(width),
    logit_softcap=logit_softcap,
  )


def stablelm(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  kv_heads: int,
  ffn: int,
  max_length: int,
  rotary_width: int,
  qkv_bias: bool,
  tied: bool,
  eps: float,
  init: Settings,
) -> Settings:
  """StableLM 2: LayerNorm, rotary positions over a part of each head, SwiGLU."""
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[
      segment(
        layers,
        multi_head(heads, kv_heads, width // heads, qkv_bias=qkv_bias),
        mlp(ffn, "silu", gated=True),
      )
    ],
    positions=rotary(rotary_width),
    norm=layer_norm(eps),
    tied=tied,
    init=init,
  )


def gpt(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  max_length: int,
  activation: str,
  tied: bool,
  eps: float,
  init: Settings,
  ffn: int | None = None,
  positions: Settings | None = None,
  scale: float | None = None,
  windows: Sequence[int] = (0,),
  qkv_bias: bool = True,
  out_bias: bool = True,
  wiring: str = "pre",
  embedding_width: int | None = None,
  embedding_norm: bool = False,
  final_norm: bool = True,
) -> Settings:
  """GPT-2 and its relatives, with LayerNorm, a plain feed-forward and biases: Cerebras-GPT, OPT and
  Galactica, GPT-Neo, BLOOM (`embedding_norm`, ALiBi), GPT-NeoX with Pythia and Dolly (`wiring`
  "parallel", rotary). Positions are learned unless given; `ffn` is four times the width."""
  attention = multi_head(
    heads,
    heads,
    width // heads,
    scale=scale,
    windows=windows,
    qkv_bias=qkv_bias,
    out_bias=out_bias,
  )
  feed_forward = mlp(4 * width if ffn is None else ffn, activation, gated=False, bias=True)
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[segment(layers, attention, feed_forward)],
    positions=learned() if positions is None else positions,
    norm=layer_norm(eps),
    tied=tied,
    init=init,
    wiring=wiring,
    embedding_width=embedding_width,
    embedding_norm=embedding_norm,
    final_norm=final_norm,
  )


def latent(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  heads: int,
  query_latent: int | None,
  latent_width: int,
  content_width: int,
  rope_width: int,
  value_width: int,
  ffn: int,
  max_length: int,
  tied: bool,
  eps: float,
  init: Settings,
  layout: str = "half",
  scaling: Settings | None = None,
  scale_factor: float = 1.0,
  residual_scale: float = 1.0,
  embedding_scale: float = 1.0,
  logit_scale: float = 1.0,
) -> Settings:
  """Multi-head latent attention in dense blocks: MiniCPM3, and DeepSeek-V2 without its experts.
  Scores are over the root of content + rotary width, times `scale_factor`."""
  attention = dict(
    kind="latent",
    heads=heads,
    query_latent=query_latent,
    latent_width=latent_width,
    content_width=content_width,
    value_width=value_width,
    scale=(content_width + rope_width) ** -0.5 * scale_factor,
    latent_eps=1e-6,  # that of the norms' class, whatever the model's own eps
  )
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[segment(layers, attention, mlp(ffn, "silu", gated=True))],
    positions=rotary(rope_width, layout=layout, scaling=scaling),
    norm=rms(eps),
    tied=tied,
    init=init,
    residual_scale=residual_scale,
    embedding_scale=embedding_scale,
    logit_scale=logit_scale,
  )


def rwkv(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  attention_width: int,
  ffn: int,
  max_length: int,
  tied: bool,
  eps: float,
  init: Settings,
) -> Settings:
  """RWKV-4: no attention, no positions, LayerNorm also on the embeddings."""
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=[
      segment(layers, dict(kind="rwkv", width=attention_width), dict(kind="rwkv", width=ffn))
    ],
    positions=None,
    norm=layer_norm(eps),
    tied=tied,
    init=init,
    embedding_norm=True,
  )


def openelm(
  *,
  vocab_size: int,
  width: int,
  layers: int,
  head_width: int,
  groups: int,
  max_length: int,
  eps: float,
  attention_multipliers: tuple[float, float] = (0.5, 1.0),
  ffn_multipliers: tuple[float, float] = (0.5, 4.0),
) -> Settings:
  """OpenELM (arXiv 2404.14619): heads and feed-forward grow with depth, one segment per block.
  `groups` query heads share a key/value head. Rounding as in its code, multipliers to two decimals
  first: without that some layers come out different."""

  def multipliers(ends: tuple[float, float]) -> list[float]:
    low, high = ends
    return [round(low + (high - low) * i / (layers - 1), 2) for i in range(layers)]

  segments = []
  for qkv, ffn in zip(
    multipliers(attention_multipliers), multipliers(ffn_multipliers), strict=True
  ):
    heads = _make_divisible(width * qkv, head_width * groups) // head_width
    attention = multi_head(heads, heads // groups, head_width, qk_norm="head")
    wide = _make_divisible(ffn * width, 256)
    segments.append(segment(1, attention, mlp(wide, "silu", gated=True)))
  std = width**-0.5
  return decoder(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    segments=segments,
    positions=rotary(head_width),
    norm=rms(eps),
    tied=True,
    init=normal(std, output=std * (2 * layers) ** -0.5),
  )


def _make_divisible(value: float, divisor: int) -> int:
  """The nearest multiple of `divisor`, at least one and not more than a tenth below `value`."""
  rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
  return rounded + divisor if rounded < 0.9 * value else rounded
