"""RWKV-4 169M (arXiv 2305.13048): no attention; a decayed mean carries the past.

  python -m slmjax.main --config=configs/rwkv4.py:169m --workdir=DIR

169,342,464 parameters. Its authors: 332B tokens of the Pile. Hardware and hours: not published, not
run by us. Average of eight zero-shot tasks in MobileLLM's harness: 43.6.

Published: architecture, the initial decays and mixes, rows of 1024, Adam without weight decay, a
rate that falls exponentially from 6e-4 to 1e-5 (a cosine here). Ours: matrices from N(0, 0.02) and
output projections from zero in the place of the original's orthogonal draws, the clip.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("169m",)


def get_config(variant: str = "169m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.rwkv(
    vocab_size=50_277,
    width=768,
    layers=12,
    attention_width=768,
    ffn=3072,
    max_length=1024,
    tied=False,
    eps=1e-5,
    init=normal(0.02, output=0.0),
  )
  return one_stage(
    name="rwkv4_169m",
    model=model,
    sources=dict(pile=1.0),
    tokens=332e9,
    batch_rows=256,
    length=1024,
    learning_rate=cosine(6e-4, 1e-5, warmup=0) | dict(start=6e-4),
    weight_decay=0.0,
  )
