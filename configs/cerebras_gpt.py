"""Cerebras-GPT (arXiv 2304.03208): GPT-2's block, twenty tokens per parameter of the Pile.

  python -m slmjax.main --config=configs/cerebras_gpt.py:111m --workdir=DIR

Parameters: 111m 111,050,496; 256m 255,977,024; 590m 590,310,912; 1_3b 1,315,723,264. Its authors:
CS-2 clusters. Not run by us.

Published: architecture (exact GELU, 2048 positions), tokens, decay 0.1, clip 1.0, a straight line
to a tenth, peak rates 6e-3, 6e-3, 2e-3, 2e-3. Ours: rows a step are theirs (120, 264, 264, 528)
rounded to what 256 chips divide; 375M tokens of warm-up in whole steps.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import linear, one_stage

# layers, width, heads, peak rate, rows per step, tokens
_SIZES = {
  "111m": (10, 768, 12, 6e-3, 256, 2.2e9),
  "256m": (14, 1088, 17, 6e-3, 256, 5.1e9),
  "590m": (18, 1536, 12, 2e-3, 256, 11.8e9),
  "1_3b": (24, 2048, 16, 2e-3, 512, 26.3e9),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "111m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, heads, peak, rows, tokens = _SIZES[variant]
  model = families.gpt(
    vocab_size=50_257,
    width=width,
    layers=layers,
    heads=heads,
    max_length=2048,
    activation="gelu",
    tied=True,
    eps=1e-5,
    init=normal(0.02, output=0.02 / (2 * layers) ** 0.5),
  )
  return one_stage(
    name=f"cerebras_gpt_{variant}",
    model=model,
    sources=dict(pile=1.0),
    tokens=tokens,
    batch_rows=rows,
    length=2048,
    learning_rate=linear(peak, peak / 10, warmup=int(375e6 / (rows * 2048))),
  )
