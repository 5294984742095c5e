"""BLOOM 560M (arXiv 2211.05100): ALiBi, a norm after the embeddings, a 250K vocabulary.

  python -m slmjax.main --config=configs/bloom.py:560m --workdir=DIR

559,214,592 parameters. Its authors: 384 A100-80G for the family, 350B tokens. Not run by us.

Published: architecture, tokens, rows of 2048, 256 of them a step, AdamW 0.9/0.95, decay 0.1, clip
1.0, 3e-4 with a cosine to 1e-5. Ours: the mixture of languages as one source, the warm-up in steps.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import alibi, normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("560m",)


def get_config(variant: str = "560m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.gpt(
    vocab_size=250_880,
    width=1024,
    layers=24,
    heads=16,
    max_length=2048,
    activation="gelu_tanh",
    tied=True,
    eps=1e-5,
    init=normal(0.02),
    positions=alibi(),
    embedding_norm=True,
  )
  return one_stage(
    name="bloom_560m",
    model=model,
    sources=dict(roots=1.0),
    tokens=350e9,
    batch_rows=256,
    length=2048,
    learning_rate=cosine(3e-4, 1e-5, warmup=700),
  )
