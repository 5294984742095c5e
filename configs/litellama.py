"""LiteLlama 460M (ahxt/LiteLlama-460M-1T): a small Llama with GPT-2's tokenizer.

  python -m slmjax.main --config=configs/litellama.py:460m --workdir=DIR

461,685,760 parameters. Its card: 499,679 steps of 192 rows of 1024, which are 98.2B tokens (the
card prints 0.98T, ten times that). MMLU 26.39 (5-shot). Hardware and hours: not published, not run
by us.

Published: the architecture, steps and batch. Everything else is ours. The card's config names
special ids (1, 2, 0) that GPT-2's tokenizer does not have: they are taken from the tokenizer.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("460m",)


def get_config(variant: str = "460m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.llama(
    vocab_size=50_304,
    width=1024,
    layers=24,
    heads=16,
    kv_heads=2,
    ffn=4096,
    max_length=1024,
    tied=False,
    eps=1e-6,
    init=normal(0.02),
  )
  return one_stage(
    name="litellama_460m",
    model=model,
    sources=dict(redpajama=1.0),
    tokens=499_679 * 192 * 1024,
    batch_rows=192,
    length=1024,
    rope_theta=10_000.0,
    learning_rate=cosine(3e-4, 3e-5, warmup=2000),
  )
