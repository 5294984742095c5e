"""MiniCPM3 4B (openbmb/MiniCPM3-4B): multi-head latent attention, 62 layers, scaled branches.

  python -m slmjax.main --config=configs/minicpm3.py:4b --workdir=DIR

4,073,875,968 parameters. Hardware, hours and training recipe: not published, not run by us.

Published (its config and transformers' code): the architecture. The recipe is ours: a warm-up,
constant, decay schedule as in its predecessor's paper (arXiv 2404.06395).
"""

import math

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import one_stage, wsd

VARIANTS = ("4b",)

# One divisor per rotary frequency; its short and long lists are equal.
_FACTORS = (
  *(1.0591234137867171, 1.1241891283591912, 1.2596935748670968, 1.5380380402321725),
  *(2.093982484148734, 3.1446935121267696, 4.937952647693647, 7.524541999994549),
  *(10.475458000005451, 13.062047352306353, 14.85530648787323, 15.906017515851266),
  *(16.461961959767827, 16.740306425132907, 16.87581087164081, 16.940876586213285),
)


def get_config(variant: str = "4b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  width, layers = 2560, 62
  model = families.latent(
    vocab_size=73_448,
    width=width,
    layers=layers,
    heads=40,
    query_latent=768,
    latent_width=256,
    content_width=64,
    rope_width=32,
    value_width=64,
    ffn=6400,
    max_length=32_768,
    tied=True,
    eps=1e-5,
    init=normal(0.1),
    scaling=dict(
      kind="longrope",
      short_factors=_FACTORS,
      long_factors=_FACTORS,
      original_length=32_768,
      magnitude=1.0,
    ),
    residual_scale=1.4 / math.sqrt(layers),
    embedding_scale=12.0,
    logit_scale=256 / width,
  )
  return one_stage(
    name="minicpm3_4b",
    model=model,
    sources=dict(web=0.8, code=0.2),
    tokens=1.0e12,
    batch_rows=1024,
    length=4096,
    rope_theta=10_000.0,
    learning_rate=wsd(1e-2, warmup=2000, decay=24_000),
  )
