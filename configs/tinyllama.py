"""TinyLlama 1.1B (arXiv 2401.02385): Llama 2's block at 1.1B, 3T tokens of text and code.

  python -m slmjax.main --config=configs/tinyllama.py:1b --workdir=DIR

1,100,048,384 parameters. Its authors: 16 A100-40G, about 90 days, 24k tokens/s each. Not run by us.
Result to compare with: average of seven zero-shot tasks 52.99 at 3T tokens (its EVAL.md).

Published (its repository at bf12224): everything below but the seed. Documents of a row see each
other, weight decay takes every array, the learning rate's unit there is a microstep, here a step.
"""

import math

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("1b",)


def get_config(variant: str = "1b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width = 22, 2048
  model = families.llama(
    vocab_size=32_000,
    width=width,
    layers=layers,
    heads=32,
    kv_heads=4,
    ffn=5632,
    max_length=2048,
    tied=False,
    eps=1e-5,
    init=normal(math.sqrt(2 / (5 * width)), output=1 / (layers * math.sqrt(width))),
  )
  return one_stage(
    name="tinyllama_1b",
    model=model,
    sources=dict(slimpajama=0.693584, starcoder=0.306416),
    tokens=3.0e12,
    batch_rows=1024,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    epochs=4.0,  # about 950B tokens of data, three times over
    learning_rate=cosine(4e-4, 4e-5, warmup=2000),
    decay="all",
  )
