"""Gemma 2B (arXiv 2403.08295): wide heads with one key/value head, GeGLU, a 256K vocabulary.

  python -m slmjax.main --config=configs/gemma.py:2b --workdir=DIR

2,506,172,416 parameters. Its authors: 512 TPU v5e, 3T tokens. Not run by us. HellaSwag 71.4.

Published: the architecture, tokens and chips. Optimizer, learning rate, batch and mixture are ours.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("2b",)


def get_config(variant: str = "2b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.gemma(
    vocab_size=256_000,
    width=2048,
    layers=18,
    heads=8,
    kv_heads=1,
    head_width=256,
    ffn=16_384,
    max_length=8192,
    eps=1e-6,
    init=normal(0.02),
  )
  return one_stage(
    name="gemma_2b",
    model=model,
    sources=dict(web=0.8, code=0.1, math=0.1),
    tokens=3.0e12,
    batch_rows=512,
    length=8192,
    rope_theta=10_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=2000),
  )
