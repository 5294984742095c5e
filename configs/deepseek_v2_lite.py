"""DeepSeek-V2-Lite's attention (arXiv 2405.04434) in a dense model.

  python -m slmjax.main --config=configs/deepseek_v2_lite.py:dense --workdir=DIR

2,606,624,256 parameters. The original has 64 routed experts from its second layer on, which
this decoder has not: every layer here has the feed-forward of its first. Not run by us.

Published: the attention, RoPE stretching (yarn), widths, AdamW 0.9/0.95, decay 0.1, clip 1.0, peak
4.2e-4, 4608 rows of 4096, 2000 steps of warm-up. Ours: dense blocks, the token budget, a cosine in
the place of two steps down.
"""

import math

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("dense",)


def get_config(variant: str = "dense") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  factor, mscale = 40.0, 0.707
  stretched = 0.1 * mscale * math.log(factor) + 1.0
  model = families.latent(
    vocab_size=102_400,
    width=2048,
    layers=27,
    heads=16,
    query_latent=None,
    latent_width=512,
    content_width=128,
    rope_width=64,
    value_width=128,
    ffn=10_944,
    max_length=163_840,
    tied=False,
    eps=1e-6,
    init=normal(0.006),
    layout="interleaved",
    # mscale over mscale_all_dim is one, so cosines keep their size; scores have its square.
    scaling=dict(
      kind="yarn", factor=factor, fast=32.0, slow=1.0, original_length=4096, magnitude=1.0
    ),
    scale_factor=stretched**2,
  )
  return one_stage(
    name="deepseek_v2_lite_dense",
    model=model,
    sources=dict(web=0.7, code=0.2, math=0.1),
    tokens=5.0e11,
    batch_rows=4608,
    length=4096,
    rope_theta=10_000.0,
    learning_rate=cosine(4.2e-4, 4.2e-5, warmup=2000),
  )
