"""A curriculum small enough for tests: Fox-1's three stages at some ten thousand parameters."""

from ml_collections import ConfigDict

from configs import fox1
from slmjax import families
from slmjax.architecture import normal
from slmjax.config import Config
from slmjax.resolve import resolve

VOCAB = 384
SOURCES = ("code", "reference", "docs", "packages", "examples")


def raw_config(store: str = "unused") -> ConfigDict:
  """As a config file gives it: 8 + 6 + 4 steps in rows of 32, 64 and 64 tokens."""
  c = fox1.get_config("tiny")
  c.model = families.llama(
    vocab_size=VOCAB,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    ffn=64,
    max_length=128,
    tied=True,
    eps=1e-5,
    init=normal(0.08),
  )
  c.data.store = store
  # Nothing here follows the recipe's tuning: tests hold golden values of this config.
  c.optimizer.beta2 = 0.95
  sources = (
    dict(docs=(0.6, 32), code=(0.4, 32)),
    dict(docs=(0.3, 32), reference=(0.2, 32), packages=(0.1, 32), code=(0.4, 64)),
    dict(examples=(0.6, 32), docs=(0.2, 64), code=(0.2, 64)),
  )
  rates = ((4e-3, 4e-3), (4e-3, 4e-4), (4e-4, 4e-5))
  for stage, steps, mixture, (peak, end) in zip(c.stages, (8, 6, 4), sources, rates, strict=True):
    stage.sources = ConfigDict({k: dict(weight=w, chunk=n) for k, (w, n) in mixture.items()})
    stage.batch_tokens = 8 * max(chunk for _, chunk in mixture.values())
    stage.tokens = steps * stage.batch_tokens
    stage.microbatch_rows = 2
    warmup = 2 if stage is c.stages[0] else 0
    start = peak if stage is not c.stages[0] else 0.0
    stage.learning_rate.update(start=start, peak=peak, end=end, warmup_steps=warmup)
  c.checkpoint.update(every_steps=3, keep=2)
  c.eval.update(every_steps=5, tokens_per_source=256, row_length=64, rows=8)
  return c


def config(store: str = "unused") -> Config:
  return resolve(raw_config(store))
