"""Phi-3-mini 4K (arXiv 2404.14219): a 3.8B Llama block with a sliding window.

  python -m slmjax.main --config=configs/phi3.py:mini --workdir=DIR

3,821,079,552 parameters. Its authors: 512 H100, 7 days, 3.3T tokens. Not run by us. MMLU 69.

Published: the architecture, tokens and hardware. Optimizer, rates, batch and mixture are ours. The
window is 2047 keys, as in transformers' code and the released config.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("mini",)


def get_config(variant: str = "mini") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.llama(
    vocab_size=32_064,
    width=3072,
    layers=32,
    heads=32,
    kv_heads=32,
    ffn=8192,
    max_length=4096,
    tied=False,
    eps=1e-5,
    init=normal(0.02),
    windows=(2047,),
  )
  return one_stage(
    name="phi3_mini",
    model=model,
    sources=dict(web=0.6, synthetic=0.4),
    tokens=3.3e12,
    batch_rows=1024,
    length=4096,
    rope_theta=10_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=2000),
  )
