"""PanGu-pi 1B (arXiv 2312.17276): augmented shortcuts beside attention, series activations.

  python -m slmjax.main --config=configs/pangu_pi.py:1b --workdir=DIR

1,023,803,392 parameters with the feed-forward width and untied tables that we chose. Its authors:
Ascend 910A. Not run by us. Result to compare with: average 40.46 over its tasks.

Published: 12 layers, width 2048, 16 heads of 128, a vocabulary of 100,883, series of 2 terms, a
bottleneck of d/32, AdamW 0.9/0.95, 1.6T tokens half English and half Chinese, cosine from 3e-4, 4M
tokens a step, 4000 steps of warm-up. Ours: feed-forward width (8/3 d rounded up to 128), rows of
2048, untied tables, one augmented branch, the series on the gate, their initial values, the decay.
"""

from ml_collections import ConfigDict

from slmjax.architecture import decoder, mlp, multi_head, normal, rms, rotary, segment
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("1b",)


def get_config(variant: str = "1b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  width = 2048
  model = decoder(
    vocab_size=100_883,
    width=width,
    max_length=2048,
    segments=[
      segment(12, multi_head(16, 16, 128), mlp(5504, "silu", gated=True, series=2)),
    ],
    positions=rotary(128),
    norm=rms(1e-5),
    tied=False,
    init=normal(0.02),
    shortcut=width // 32,
  )
  return one_stage(
    name="pangu_pi_1b",
    model=model,
    sources=dict(english=0.5, chinese=0.5),
    tokens=1.6e12,
    batch_rows=2048,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=4000),
  )
