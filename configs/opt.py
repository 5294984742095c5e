"""OPT (arXiv 2205.01068): GPT-3's block with ReLU; 350m has norms after the branches.

  python -m slmjax.main --config=configs/opt.py:125m --workdir=DIR

Parameters: 125m 125,239,296; 350m 331,196,416 (tables 512 wide with projections, no final norm);
1_3b 1,315,758,080. Hardware and hours of these sizes: not published, not run by us.

Published: architecture, initialisation (0.006, output projections over the root of 2L), AdamW
0.9/0.95, decay 0.1, clip 1.0, peak rates, a straight line to a tenth, 0.5M and 1M tokens a step,
180B tokens. Ours: the mixture's weights; dropout 0.1 is left out.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import learned, normal
from slmjax.pretraining import linear, one_stage

# layers, width, heads, width of the tables, peak rate, rows per step
_SIZES = {
  "125m": (12, 768, 12, 768, 6e-4, 256),
  "350m": (24, 1024, 16, 512, 3e-4, 256),
  "1_3b": (24, 2048, 32, 2048, 2e-4, 512),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "125m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, heads, embedding_width, peak, rows = _SIZES[variant]
  post_norm = variant == "350m"
  model = families.gpt(
    vocab_size=50_272,
    width=width,
    layers=layers,
    heads=heads,
    max_length=2048,
    activation="relu",
    tied=True,
    eps=1e-5,
    init=normal(0.006, output=0.006 / (2 * layers) ** 0.5),
    positions=learned(offset=2),
    wiring="post" if post_norm else "pre",
    final_norm=not post_norm,
    embedding_width=embedding_width,
  )
  return one_stage(
    name=f"opt_{variant}",
    model=model,
    sources=dict(roberta=0.5, pile=0.35, reddit=0.15),
    tokens=180e9,
    batch_rows=rows,
    length=2048,
    learning_rate=linear(peak, peak / 10, warmup=2000),
  )
