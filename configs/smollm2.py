"""SmolLM2 (arXiv 2502.02737): small Llamas on curated text, warm-up, constant, decay.

  python -m slmjax.main --config=configs/smollm2.py:135m --workdir=DIR

Parameters: 135m 134,515,008; 360m 361,821,120; 1_7b 1,711,376,384. Tokens: 2T, 4T, 11T. Its
authors: 64 to 256 H100. Not run by us.

Published: architecture, tokens, the shape of the schedule, peak rates of 3e-3 for the small two and
5e-4 for 1.7B, rows of 2048 before the context is extended, 2M tokens a step. The share of the decay
phase (20 and 10 %) and the mixture, which changes over four stages there, are ours.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import one_stage, wsd

# layers, width, heads, key/value heads, feed-forward, rotary base, tokens, peak rate, decay's share
_SIZES = {
  "135m": (30, 576, 9, 3, 1536, 100_000.0, 2e12, 3e-3, 0.2),
  "360m": (32, 960, 15, 5, 2560, 100_000.0, 4e12, 3e-3, 0.2),
  "1_7b": (24, 2048, 32, 32, 8192, 130_000.0, 11e12, 5e-4, 0.1),
}
VARIANTS = tuple(_SIZES)


def get_config(variant: str = "135m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers, width, heads, kv_heads, ffn, theta, tokens, peak, decay = _SIZES[variant]
  model = families.llama(
    vocab_size=49_152,
    width=width,
    layers=layers,
    heads=heads,
    kv_heads=kv_heads,
    ffn=ffn,
    max_length=8192,
    tied=True,
    eps=1e-5,
    init=normal(width**-0.5),
  )
  rows, length = 1024, 2048
  return one_stage(
    name=f"smollm2_{variant}",
    model=model,
    sources=dict(web=0.8, code=0.1, math=0.05, synthetic=0.05),
    tokens=tokens,
    batch_rows=rows,
    length=length,
    microbatch_rows=4,
    rope_theta=theta,
    learning_rate=wsd(peak, warmup=2000, decay=int(decay * tokens / (rows * length))),
    weight_decay=0.01,
  )
