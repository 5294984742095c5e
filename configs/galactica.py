"""Galactica 125M (arXiv 2211.09085): OPT's block with exact GELU, trained on science.

  python -m slmjax.main --config=configs/galactica.py:125m --workdir=DIR

125,030,400 parameters, biases and affine norms counted as the released config has them (the paper
says there are no biases). Its authors: 450B tokens, 4.25 epochs of 106B. Not run by us.

Published: architecture, AdamW 0.9/0.95, decay 0.1, clip 1.0, 6e-4 and a straight line to a tenth,
0.5M tokens a step. Ours: the mixture, the initialisation's 0.006; attention dropout 0.1 is left
out.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import learned, normal
from slmjax.pretraining import linear, one_stage

VARIANTS = ("125m",)


def get_config(variant: str = "125m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.gpt(
    vocab_size=50_000,
    width=768,
    layers=12,
    heads=12,
    max_length=2048,
    activation="gelu",
    tied=True,
    eps=1e-5,
    init=normal(0.006, output=0.006 / (2 * 12) ** 0.5),
    positions=learned(offset=2),
  )
  return one_stage(
    name="galactica_125m",
    model=model,
    sources=dict(papers=0.83, code=0.07, references=0.07, web=0.03),
    tokens=450e9,
    batch_rows=256,
    length=2048,
    epochs=4.5,
    learning_rate=linear(6e-4, 6e-5, warmup=1000),
  )
