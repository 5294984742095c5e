"""GPT-Neo 125M (EleutherAI/gpt-neo-125m): global and local attention in turn, scores unscaled.

  python -m slmjax.main --config=configs/gpt_neo.py:125m --workdir=DIR

125,198,592 parameters. Its authors: 300B tokens of the Pile. Hardware and hours: not published, not
run by us.

Published: the architecture and tokens. Optimizer, rates and batch are ours.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("125m",)


def get_config(variant: str = "125m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.gpt(
    vocab_size=50_257,
    width=768,
    layers=12,
    heads=12,
    max_length=2048,
    activation="gelu_tanh",
    tied=True,
    eps=1e-5,
    init=normal(0.02),
    scale=1.0,
    windows=(0, 256),
    qkv_bias=False,
  )
  return one_stage(
    name="gpt_neo_125m",
    model=model,
    sources=dict(pile=1.0),
    tokens=300e9,
    batch_rows=256,
    length=2048,
    learning_rate=cosine(6e-4, 6e-5, warmup=3000),
  )
