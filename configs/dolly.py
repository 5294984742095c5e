"""Dolly v2 3B (databricks/dolly-v2-3b): Pythia 2.8B with its vocabulary cut to 50,280 rows.

  python -m slmjax.main --config=configs/dolly.py:v2_3b --workdir=DIR

2,775,086,080 parameters. Dolly was tuned on 15k instructions from Pythia's weights; this recipe is
Pythia 2.8B's own pretraining (arXiv 2304.01373). Not run by us.

Published: architecture, and Pythia's recipe: rates, batch, tokens, initialisation.
"""

import math

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal, rotary
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("v2_3b",)


def get_config(variant: str = "v2_3b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width = 32, 2560
  model = families.gpt(
    vocab_size=50_280,
    width=width,
    layers=layers,
    heads=32,
    max_length=2048,
    activation="gelu",
    tied=False,
    eps=1e-5,
    init=normal(math.sqrt(2 / (5 * width)), output=2 / (layers * math.sqrt(width))),
    positions=rotary(20),
    wiring="parallel",
  )
  return one_stage(
    name="dolly_v2_3b",
    model=model,
    sources=dict(pile=1.0),
    tokens=143_000 * 1024 * 2048,
    batch_rows=1024,
    length=2048,
    rope_theta=10_000.0,
    learning_rate=cosine(1.6e-4, 1.6e-5, warmup=1430),
  )
