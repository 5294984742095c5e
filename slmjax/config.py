"""The configuration of a run: frozen dataclasses, converted and validated once.

`configs/*.py` are ml_collections files with `get_config(variant)`; `slmjax.resolve` turns what they
return into a `Config`. Every field must be given and every given field must exist, so that a config
file shows the whole recipe and a typo cannot pass. Units are in the names: `*_tokens`, `*_steps`,
`*_rows`. What follows from the fields (rows per batch, steps per stage) is a property here and
nowhere else.
"""

import dataclasses
import functools
import itertools
import json
from collections.abc import Mapping
from typing import Any, Literal

from slmjax.errors import UserError
from slmjax.model_config import ModelConfig


class ConfigError(UserError):
  """A configuration that cannot be honoured. The message is one line: where, what, what to do."""


@dataclasses.dataclass(frozen=True)
class ComputeConfig:
  """How the model is computed: precision, what the backward recomputes, which kernels."""

  param_dtype: Literal["float32", "bfloat16"]
  compute_dtype: Literal["float32", "bfloat16"]
  remat: Literal["none", "dots", "block"]
  attention: Literal["auto", "reference", "chunked", "pallas_tpu", "pallas_gpu"]
  cross_entropy: Literal["auto", "reference", "chunked", "pallas_tpu"]


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices per mesh axis; `fsdp=-1` takes what the other axes leave."""

  replica: int
  fsdp: int
  context: int
  tensor: int


@dataclasses.dataclass(frozen=True)
class SourceConfig:
  """A corpus. `max_epochs`: how often the run may use each of its tokens (1 = never twice)."""

  max_epochs: float


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """`store` is a folder with one token store per source: STORE/SOURCE/{train,heldout}."""

  store: str
  sources: Mapping[str, SourceConfig]


@dataclasses.dataclass(frozen=True)
class MixtureConfig:
  """A source's part in a stage: its weight in tokens and its chunk length in tokens."""

  weight: float
  chunk: int


@dataclasses.dataclass(frozen=True)
class LearningRateConfig:
  """One stage's segment of the learning-rate curve.

  The rate rises linearly from `start` to `peak` over `warmup_steps` (the step with index k of the
  stage trains at start + (peak - start)(k + 1) / warmup_steps), then follows `shape`:
  `constant` stays; `cosine` and `linear` fall to `end` at the stage's last step; `wsd` stays until
  the last `decay_steps` steps and falls to `end` over them by 1 - sqrt.
  """

  shape: Literal["constant", "cosine", "linear", "wsd"]
  start: float
  peak: float
  end: float
  warmup_steps: int
  decay_steps: int


@dataclasses.dataclass(frozen=True)
class StageConfig:
  """One stage of the curriculum.

  `tokens` is the budget: the stage takes as many whole steps as fit. `microbatch_rows` is how many
  rows each data shard (a coordinate of replica x fsdp) holds at once; the rest of the batch is
  accumulated. `rope_theta` is the base of rotary positions, None for a model without them.
  `optimizer_state` says what happens to Adam's moments on entry.
  """

  name: str
  tokens: int
  batch_tokens: int
  microbatch_rows: int
  sources: Mapping[str, MixtureConfig]
  isolate_documents: bool
  rope_theta: float | None
  learning_rate: LearningRateConfig
  optimizer_state: Literal["keep", "reset"]

  @functools.cached_property
  def row_length(self) -> int:
    """Tokens per row: the longest chunk of the stage."""
    return max(mixture.chunk for mixture in self.sources.values())

  @functools.cached_property
  def rows(self) -> int:
    """Rows per global batch."""
    return self.batch_tokens // self.row_length

  @functools.cached_property
  def steps(self) -> int:
    """Whole steps that the budget pays for."""
    return self.tokens // self.batch_tokens

  def microbatches(self, data_shards: int) -> int:
    """Microbatches per step on a mesh with so many data shards."""
    return self.rows // (data_shards * self.microbatch_rows)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (arXiv 1711.05101). `decay` names what weight decay acts on: `matrices` leaves out
  norms and other vectors, `all` takes every array. `nonfinite` is what a step with a non-finite
  loss or gradient does: neither choice applies the update; `stop` ends the run, `skip` goes on."""

  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  decay: Literal["matrices", "all"]
  clip_norm: float
  z_loss: float
  nonfinite: Literal["stop", "skip"]


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
  """Save every so many steps and keep the newest `keep`; ends of stages are always kept."""

  every_steps: int
  keep: int


@dataclasses.dataclass(frozen=True)
class EvalConfig:
  """Held-out bits per byte every so many steps and at the end of each stage, on at most
  `tokens_per_source` tokens of each source, in rows of `row_length`, `rows` at a time."""

  every_steps: int
  tokens_per_source: int
  row_length: int
  rows: int


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run."""

  name: str
  seed: int
  model: ModelConfig
  compute: ComputeConfig
  mesh: MeshConfig
  data: DataConfig
  stages: tuple[StageConfig, ...]
  optimizer: OptimizerConfig
  checkpoint: CheckpointConfig
  eval: EvalConfig

  @functools.cached_property
  def boundaries(self) -> tuple[int, ...]:
    """First step of each stage, and the end of the last: len(stages) + 1 numbers."""
    return (0, *itertools.accumulate(stage.steps for stage in self.stages))

  @property
  def steps(self) -> int:
    """Steps of the whole run."""
    return self.boundaries[-1]

  def stage_index(self, step: int) -> int:
    """Index of the stage that trains `step`."""
    if not 0 <= step < self.steps:
      raise ValueError(f"step {step} is outside the run's {self.steps} steps")
    return next(i for i, end in enumerate(self.boundaries[1:]) if step < end)

  def tokens_before(self, step: int) -> int:
    """Tokens trained before `step`."""
    starts = zip(self.stages, self.boundaries, strict=False)
    return sum(min(max(step - first, 0), s.steps) * s.batch_tokens for s, first in starts)


def to_dict(config: Any) -> Any:
  """The resolved config as plain JSON types; `resolve` gives it back."""
  if dataclasses.is_dataclass(config):
    return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, Mapping):
    return {key: to_dict(value) for key, value in config.items()}
  if isinstance(config, tuple):
    return [to_dict(value) for value in config]
  return config


def to_json(config: Config) -> str:
  return json.dumps(to_dict(config), indent=2) + "\n"


def identity(config: Config) -> dict[str, Any]:
  """The part of a config that decides the losses: a resume under another one is refused.

  Left out: what may change between two starts of the same run, because it moves work (mesh,
  microbatches, kernels, remat), files (store's folder, whose content the fingerprints pin) or
  reports (checkpoint and evaluation intervals).
  """
  whole = to_dict(config)
  for name in ("mesh", "checkpoint", "eval"):
    del whole[name]
  for name in ("remat", "attention", "cross_entropy"):
    del whole["compute"][name]
  del whole["data"]["store"]
  for stage in whole["stages"]:
    del stage["microbatch_rows"]
  return whole


def differences(saved: Any, current: Any, path: str = "config") -> list[str]:
  """Lines `path: saved -> current` for each leaf in which two plain trees differ."""
  if isinstance(saved, Mapping) and isinstance(current, Mapping):
    keys = dict.fromkeys([*saved, *current])
    return [
      line
      for key in keys
      for line in differences(saved.get(key), current.get(key), f"{path}.{key}")
    ]
  if isinstance(saved, list) and isinstance(current, list) and len(saved) == len(current):
    return [
      line
      for i, (a, b) in enumerate(zip(saved, current, strict=True))
      for line in differences(a, b, f"{path}[{i}]")
    ]
  return [] if saved == current else [f"{path}: {saved!r} -> {current!r}"]
