"""GPT-2 small (Radford et al. 2019): learned positions, tanh GELU, tied tables.

  python -m slmjax.main --config=configs/gpt2.py:124m --workdir=DIR

124,439,808 parameters. Hardware, hours and learning rate: not published, not run by us.

Published: architecture, rows of 1024, 512 of them a step, initialisation (0.02, output projections
over the root of 2L). Ours: 300B tokens of web text, the optimizer and its rates; dropout is left
out.
"""

from ml_collections import ConfigDict

from slmjax import families
from slmjax.architecture import normal
from slmjax.pretraining import cosine, one_stage

VARIANTS = ("124m",)


def get_config(variant: str = "124m") -> ConfigDict:
  """The config of a size; VARIANTS lists them."""
  if variant not in VARIANTS:
    raise ValueError(f"no variant {variant!r}; there are {', '.join(map(repr, VARIANTS))}")
  layers = 12
  model = families.gpt(
    vocab_size=50_257,
    width=768,
    layers=layers,
    heads=12,
    max_length=1024,
    activation="gelu_tanh",
    tied=True,
    eps=1e-5,
    init=normal(0.02, output=0.02 / (2 * layers) ** 0.5),
  )
  return one_stage(
    name="gpt2_124m",
    model=model,
    sources=dict(webtext=1.0),
    tokens=300e9,
    batch_rows=512,
    length=1024,
    learning_rate=cosine(6e-4, 6e-5, warmup=2000),
  )
