"""StableLM 2 1.6B (arXiv 2402.17834): LayerNorm, a quarter of each head rotated, biased queries.

  python -m slmjax.main --config=configs/stablelm.py:2_1_6b --workdir=DIR

1,644,515,328 parameters (its card's 1,644,417,024 leaves out the biases of the blocks' norms). Its
authors: 512 A100-40G, 2T tokens in two epochs. Not run by us. HellaSwag 70.46.

Published: the architecture, tokens and epochs. Its schedule (a cosine, then an inverse square root,
then a cool-down) is a warm-up, constant, decay here; rates, batch and mixture are ours.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import one_stage, wsd

VARIANTS = ("2_1_6b",)


def get_config(variant: str = "2_1_6b") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  model = families.stablelm(
    vocab_size=100_352,
    width=2048,
    layers=24,
    heads=32,
    kv_heads=32,
    ffn=5632,
    max_length=4096,
    rotary_width=16,
    qkv_bias=True,
    tied=False,
    eps=1e-5,
    init=normal(0.02),
  )
  return one_stage(
    name="stablelm_2_1_6b",
    model=model,
    sources=dict(web=0.75, code=0.15, multilingual=0.1),
    tokens=2.0e12,
    batch_rows=1024,
    length=4096,
    rope_theta=10_000.0,
    epochs=2.0,
    learning_rate=wsd(1e-3, warmup=10_000, decay=50_000),
  )
