"""Gemma 2 2B (arXiv 2408.00118): norms around each branch, windows in turn, soft-caps.

  python -m slmjax.main --config=configs/gemma2.py:2b --workdir=DIR

2,614,341,888 parameters. Its authors: 512 TPU v5e, 2T tokens, distilled from a larger model. Not
run by us.

Published: the architecture and the number of tokens. This recipe does not distil: optimizer,
learning rate, batch and mixture are ours.
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
  model = families.gemma2(
    vocab_size=256_000,
    width=2304,
    layers=26,
    heads=8,
    kv_heads=4,
    head_width=256,
    ffn=9216,
    max_length=8192,
    eps=1e-6,
    init=normal(0.02),
    windows=(4096, 0),
    query_scalar=256,
    attention_softcap=50.0,
    logit_softcap=30.0,
  )
  return one_stage(
    name="gemma2_2b",
    model=model,
    sources=dict(web=0.8, code=0.1, math=0.1),
    tokens=2.0e12,
    batch_rows=512,
    length=8192,
    rope_theta=10_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=2000),
  )
