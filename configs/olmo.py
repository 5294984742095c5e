"""OLMo 1B (arXiv 2402.00838): a Llama block with LayerNorm that has no parameters.

  python -m slmjax.main --config=configs/olmo.py:1b --workdir=DIR

1,176,764,416 parameters. Its authors: 256 MI250X nodes' GPUs, 2T tokens. Not run by us. HellaSwag
62.5.

Published: architecture, tokens, 4e-4 with 2000 steps of warm-up and a straight line to a tenth,
AdamW 0.9/0.95, decay 0.1, clip 1.0, about 4M tokens a step. Ours: the mixture's weights.
"""

from ml_collections import ConfigDict

from slmjax.architecture import decoder, layer_norm, mlp, multi_head, normal, rotary, segment
from slmjax.pretraining import linear, one_stage

VARIANTS = ("1b",)


def get_config(variant: str = "1b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = decoder(
    vocab_size=50_304,
    width=2048,
    max_length=2048,
    segments=[segment(16, multi_head(16, 16, 128), mlp(8192, "silu", gated=True))],
    positions=rotary(128),
    norm=layer_norm(1e-5, scale=False, bias=False),
    tied=True,
    init=normal(0.02),
  )
  return one_stage(
    name="olmo_1b",
    model=model,
    sources=dict(dolma=1.0),
    tokens=2.0e12,
    batch_rows=2048,
    length=2048,
    microbatch_rows=4,
    rope_theta=10_000.0,
    learning_rate=linear(4e-4, 4e-5, warmup=2000),
  )
