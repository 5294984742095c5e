"""Recipes of one stage: what most published models were trained with, in the few numbers in which
they differ. The rest is the practice that they share, and stands here for all of them to see."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from slmjax.architecture import Settings


def cosine(peak: float, end: float, warmup: int) -> Settings:
  """Linear warm-up over so many steps, then half a cosine down to `end`."""
  return _rate("cosine", peak, end, warmup)


def linear(peak: float, end: float, warmup: int) -> Settings:
  """Linear warm-up over so many steps, then a straight line down to `end`."""
  return _rate("linear", peak, end, warmup)


def wsd(peak: float, warmup: int, decay: int) -> Settings:
  """Warm-up, constant, and over the last `decay` steps 1 - sqrt down to zero."""
  return {**_rate("wsd", peak, 0.0, warmup), "decay_steps": decay}


def _rate(shape: str, peak: float, end: float, warmup: int) -> Settings:
  return dict(shape=shape, start=0.0, peak=peak, end=end, warmup_steps=warmup, decay_steps=0)


def one_stage(
  *,
  name: str,
  model: Settings,
  sources: Mapping[str, float],
  tokens: float,
  batch_rows: int,
  length: int,
  learning_rate: Settings,
  rope_theta: float | None = None,
  epochs: float = 1.0,
  isolate_documents: bool = False,
  beta2: float = 0.95,
  eps: float = 1e-8,
  weight_decay: float = 0.1,
  decay: str = "matrices",
  clip_norm: float = 1.0,
  z_loss: float = 0.0,
  microbatch_rows: int = 1,
) -> ConfigDict:
  """A whole recipe.

  Args:
    sources: weight of each source, in tokens.
    tokens: budget of the run.
    batch_rows: rows of `length` tokens per step.
    rope_theta: base of rotary positions; None for a model without them.
    epochs: how often the run may use each token.
    isolate_documents: whether documents in one row see each other not. Most of the published
      models let them.
  """
  c = ConfigDict()
  c.name = name
  c.seed = 0
  c.model = model
  c.compute = dict(
    param_dtype="float32",
    compute_dtype="bfloat16",
    remat="block",
    attention="auto",
    cross_entropy="auto",
  )
  c.mesh = dict(replica=1, fsdp=-1, context=1, tensor=1)
  c.data = dict(
    store=f"data/{name}", sources={source: dict(max_epochs=epochs) for source in sources}
  )
  stage: dict[str, Any] = dict(
    name="pretrain",
    tokens=int(tokens),
    batch_tokens=batch_rows * length,
    microbatch_rows=microbatch_rows,
    sources={source: dict(weight=weight, chunk=length) for source, weight in sources.items()},
    isolate_documents=isolate_documents,
    rope_theta=rope_theta,
    learning_rate=learning_rate,
    optimizer_state="keep",
  )
  c.stages = (ConfigDict(stage),)
  c.optimizer = dict(
    beta1=0.9,
    beta2=beta2,
    eps=eps,
    weight_decay=weight_decay,
    decay=decay,
    clip_norm=clip_norm,
    z_loss=z_loss,
    nonfinite="stop",
  )
  c.checkpoint = dict(every_steps=1000, keep=3)
  c.eval = dict(every_steps=5000, tokens_per_source=4 * 2**20, row_length=length, rows=256)
  return c
