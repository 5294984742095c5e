"""Pythia (arXiv 2304.01373): GPT-NeoX's parallel block, 300B tokens of the Pile for every size.

  python -m slmjax.main --config=configs/pythia.py:160m --workdir=DIR

Parameters: 160m 162,322,944; 410m 405,334,016; 1b 1,011,781,632; 1_4b 1,414,647,808. Its authors
for 1B: 4830 A100 hours. Not run by us.

Published (EleutherAI/pythia at a19eecb): everything below. GPT-NeoX's cosine of the time fell
towards 0 and was clamped at a tenth of the peak; ours arrives there at the last step.
"""

import math

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal, rotary
from slmjax.pretraining import cosine, one_stage

# layers, width, heads, rotated width, peak rate
_SIZES = {
  "160m": (12, 768, 12, 16, 6e-4),
  "410m": (24, 1024, 16, 16, 3e-4),
  "1b": (16, 2048, 8, 64, 2.5e-4),
  "1_4b": (24, 2048, 16, 32, 2e-4),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "160m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, heads, rotated, peak = _SIZES[variant]
  model = families.gpt(
    vocab_size=50_304,
    width=width,
    layers=layers,
    heads=heads,
    max_length=2048,
    activation="gelu",
    tied=False,
    eps=1e-5,
    init=normal(math.sqrt(2 / (5 * width)), output=2 / (layers * math.sqrt(width))),
    positions=rotary(rotated),
    wiring="parallel",
  )
  return one_stage(
    name=f"pythia_{variant}",
    model=model,
    sources=dict(pile=1.0),
    tokens=143_000 * 1024 * 2048,
    batch_rows=1024,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    learning_rate=cosine(peak, peak / 10, warmup=1430),
  )
