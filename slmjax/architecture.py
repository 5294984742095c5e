"""The parts of an architecture as a config has them, with every setting given.

What is left out in a call is as in Llama; the resolved config shows it all.
"""

from collections.abc import Sequence
from typing import Any

Settings = dict[str, Any]


def rms(eps: float, *, one_plus: bool = False) -> Settings:
  return dict(kind="rms_one_plus" if one_plus else "rms", eps=eps, scale=True, bias=False)


def layer_norm(eps: float, *, scale: bool = True, bias: bool = True) -> Settings:
  return dict(kind="layer", eps=eps, scale=scale, bias=bias)


def rotary(width: int, *, layout: str = "half", scaling: Settings | None = None) -> Settings:
  return dict(kind="rotary", width=width, layout=layout, scaling=scaling)


def learned(offset: int = 0) -> Settings:
  return dict(kind="learned", offset=offset)


def alibi() -> Settings:
  return dict(kind="alibi")


def normal(std: float, *, output: float | None = None, embedding: float | None = None) -> Settings:
  """One standard deviation for all, or others for projections back into the stream and tables."""
  return dict(
    embedding_std=std if embedding is None else embedding,
    std=std,
    output_std=std if output is None else output,
  )


def multi_head(
  heads: int,
  kv_heads: int,
  width: int,
  *,
  scale: float | None = None,
  softcap: float | None = None,
  windows: Sequence[int] = (0,),
  qk_norm: str = "none",
  qkv_bias: bool = False,
  out_bias: bool = False,
) -> Settings:
  """Attention with heads, its scores over the root of the head width unless `scale` is given."""
  return dict(
    kind="heads",
    heads=heads,
    kv_heads=kv_heads,
    head_width=width,
    scale=width**-0.5 if scale is None else scale,
    softcap=softcap,
    windows=tuple(windows),
    qk_norm=qk_norm,
    qkv_bias=qkv_bias,
    out_bias=out_bias,
  )


def mlp(
  width: int, activation: str, *, gated: bool, bias: bool = False, series: int | None = None
) -> Settings:
  return dict(kind="mlp", width=width, gated=gated, activation=activation, bias=bias, series=series)


def segment(layers: int, attention: Settings, ffn: Settings, *, repeat: int = 1) -> Settings:
  return dict(layers=layers, repeat=repeat, attention=attention, ffn=ffn)


def decoder(
  *,
  vocab_size: int,
  width: int,
  max_length: int,
  segments: Sequence[Settings],
  positions: Settings | None,
  norm: Settings,
  tied: bool,
  init: Settings,
  wiring: str = "pre",
  residual_scale: float = 1.0,
  shortcut: int | None = None,
  embedding_width: int | None = None,
  embedding_scale: float = 1.0,
  embedding_norm: bool = False,
  final_norm: bool = True,
  logit_scale: float = 1.0,
  logit_softcap: float | None = None,
) -> Settings:
  """A whole architecture; what is left out is as in Llama."""
  return dict(
    vocab_size=vocab_size,
    width=width,
    max_length=max_length,
    embedding=dict(
      tied=tied,
      width=width if embedding_width is None else embedding_width,
      scale=embedding_scale,
      norm=embedding_norm,
    ),
    positions=positions,
    norm=norm,
    block=dict(wiring=wiring, residual_scale=residual_scale, shortcut=shortcut),
    segments=tuple(segments),
    logits=dict(norm=final_norm, scale=logit_scale, softcap=logit_softcap),
    init=init,
  )
