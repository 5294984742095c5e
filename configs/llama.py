"""Llama 2 7B (arXiv 2307.09288) and Llama 3.2 1B (meta-llama/Llama-3.2-1B).

  python -m slmjax.main --config=configs/llama.py:3_2_1b --workdir=DIR

Parameters: 2_7b 6,738,415,616; 3_2_1b 1,235,814,400. Not run by us.

Published for 2_7b: everything but the mixture (2T tokens, 4M a step, cosine from 3e-4 to a tenth,
2000 steps of warm-up, decay 0.1, clip 1.0). For 3_2_1b: the architecture and "up to 9T tokens"; it
was pruned and distilled, which this recipe does not do: its recipe is ours.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("2_7b", "3_2_1b")


def get_config(variant: str = "3_2_1b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant == "2_7b":
    model = families.llama(
      vocab_size=32_000,
      width=4096,
      layers=32,
      heads=32,
      kv_heads=32,
      ffn=11_008,
      max_length=4096,
      tied=False,
      eps=1e-5,
      init=normal(0.02),
    )
    return one_stage(
      name="llama_2_7b",
      model=model,
      sources=dict(web=1.0),
      tokens=2.0e12,
      batch_rows=1024,
      length=4096,
      rope_theta=10_000.0,
      learning_rate=cosine(3e-4, 3e-5, warmup=2000),
      eps=1e-5,
    )
  if variant == "3_2_1b":
    model = families.llama(
      vocab_size=128_256,
      width=2048,
      layers=16,
      heads=32,
      kv_heads=8,
      ffn=8192,
      max_length=131_072,
      tied=True,
      eps=1e-5,
      init=normal(0.02),
      scaling=dict(kind="llama3", factor=32.0, low=1.0, high=4.0, original_length=8192),
    )
    return one_stage(
      name="llama_3_2_1b",
      model=model,
      sources=dict(web=0.75, code=0.17, multilingual=0.08),
      tokens=9.0e12,
      batch_rows=512,
      length=8192,
      rope_theta=500_000.0,
      isolate_documents=True,
      learning_rate=cosine(3e-4, 3e-6, warmup=2000),
    )
  raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
