"""Qwen (arXiv 2309.16609, 2412.15115, 2505.09388): three generations of small Qwen.

  python -m slmjax.main --config=configs/qwen.py:3_0_6b --workdir=DIR

Parameters: 1_5_1_8b 1,836,828,672; 2_5_1_5b 1,543,714,304; 3_0_6b 596,049,920. Hardware and hours:
not published, not run by us.

Published: the architectures; 18T tokens for 2.5 and 36T for 3. Everything else is ours, tokens of
1.5 and the lengths of rows included. 1.5 and 2.5 have biases on queries, keys and values; 3 norms
queries and keys instead.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import Settings, normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("1_5_1_8b", "2_5_1_5b", "3_0_6b")


def get_config(variant: str = "3_0_6b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  tokens = {"1_5_1_8b": 2.2e12, "2_5_1_5b": 18e12, "3_0_6b": 36e12}[variant]
  return one_stage(
    name=f"qwen_{variant}",
    model=_model(variant),
    sources=dict(web=0.7, code=0.2, math=0.1),
    tokens=tokens,
    batch_rows=1024,
    length=4096,
    rope_theta=1_000_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=2000),
  )


def _model(variant: str) -> Settings:
  if variant == "1_5_1_8b":
    return families.llama(
      vocab_size=151_936,
      width=2048,
      layers=24,
      heads=16,
      kv_heads=16,
      ffn=5504,
      max_length=32_768,
      tied=False,
      eps=1e-6,
      init=normal(0.02),
      qkv_bias=True,
    )
  if variant == "2_5_1_5b":
    return families.llama(
      vocab_size=151_936,
      width=1536,
      layers=28,
      heads=12,
      kv_heads=2,
      ffn=8960,
      max_length=131_072,
      tied=True,
      eps=1e-6,
      init=normal(0.02),
      qkv_bias=True,
    )
  return families.llama(
    vocab_size=151_936,
    width=1024,
    layers=28,
    heads=16,
    kv_heads=8,
    head_width=128,
    ffn=3072,
    max_length=32_768,
    tied=True,
    eps=1e-6,
    init=normal(0.02),
    qk_norm="head",
  )
