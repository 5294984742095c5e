"""From what a config file returns to a checked `Config`.

Every refusal is one line that names the setting and shows the arithmetic.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ml_collections import ConfigDict

from slmjax.checks import divides, positive, require
from slmjax.config import Config, ConfigError, MeshConfig, OptimizerConfig, StageConfig
from slmjax.model_config import ModelConfig, RotaryPositions
from slmjax.resolve_model import check_model, check_model_on_mesh


def resolve(raw: Any) -> Config:
  """Converts what a config file returns (a ConfigDict or nested mappings) and validates it.

  Raises:
    ConfigError: an unknown or missing key, a wrong type, or a combination that cannot work.
  """
  config = _convert(Config, raw, "config")
  _check(config)
  return config


def resolve_model(raw: Any) -> ModelConfig:
  """The architecture of plain settings, as `slmjax.families` gives them, checked by itself.

  Raises:
    ConfigError: as `resolve`.
  """
  model: ModelConfig = _convert(ModelConfig, raw, "config.model")
  check_model(model)
  return model


def _convert(kind: Any, value: Any, path: str) -> Any:
  """`value` as the type `kind`, or a ConfigError that names `path`."""
  if isinstance(value, ConfigDict):
    value = value.to_dict()
  origin = typing.get_origin(kind)
  if origin is types.UnionType:
    return _convert_union(typing.get_args(kind), value, path)
  if dataclasses.is_dataclass(kind):
    return _convert_dataclass(kind, value, path)
  if origin is Literal:
    choices = typing.get_args(kind)
    if value not in choices:
      raise ConfigError(f"{path} is {value!r}; choose one of {', '.join(map(repr, choices))}")
    return value
  if origin is tuple:
    if not isinstance(value, list | tuple) or not value:
      raise ConfigError(f"{path} must be a list of at least one entry, got {value!r}")
    element = typing.get_args(kind)[0]
    return tuple(_convert(element, v, f"{path}[{i}]") for i, v in enumerate(value))
  if origin is not None and issubclass(origin, Mapping):
    if not isinstance(value, Mapping) or not value:
      raise ConfigError(f"{path} must be a mapping with at least one entry, got {value!r}")
    element = typing.get_args(kind)[1]
    converted = {str(k): _convert(element, value[k], f"{path}.{k}") for k in sorted(value)}
    return types.MappingProxyType(converted)
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if kind is float and isinstance(value, float) and not math.isfinite(value):
    raise ConfigError(f"{path} is {value}; it must be finite")
  if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
    raise ConfigError(f"{path} must be {kind.__name__}, got {type(value).__name__} {value!r}")
  return value


def _convert_union(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
  """`X | None`, or one of several dataclasses, told apart by their field `kind`."""
  if value is None and types.NoneType in kinds:
    return None
  options = [kind for kind in kinds if kind is not types.NoneType]
  if len(options) == 1:
    return _convert(options[0], value, path)
  if not isinstance(value, Mapping):
    raise ConfigError(f"{path} must be a mapping, got {type(value).__name__} {value!r}")
  if "kind" not in value:
    raise ConfigError(f"{path}.kind is missing; every setting has to be given")
  names = {typing.get_args(typing.get_type_hints(kind)["kind"])[0]: kind for kind in options}
  kind = value["kind"]
  if not isinstance(kind, str) or kind not in names:
    raise ConfigError(f"{path}.kind is {kind!r}; choose one of {', '.join(map(repr, names))}")
  return _convert_dataclass(names[kind], value, path)


def _convert_dataclass(kind: Any, value: Any, path: str) -> Any:
  if not isinstance(value, Mapping):
    raise ConfigError(f"{path} must be a mapping, got {type(value).__name__} {value!r}")
  hints = typing.get_type_hints(kind)
  unknown = sorted(set(value) - set(hints))
  if unknown:
    raise ConfigError(f"{path}.{unknown[0]} is not a setting; known here: {', '.join(hints)}")
  missing = [name for name in hints if name not in value]
  if missing:
    raise ConfigError(f"{path}.{missing[0]} is missing; every setting has to be given")
  return kind(
    **{name: _convert(hint, value[name], f"{path}.{name}") for name, hint in hints.items()}
  )


def _check(config: Config) -> None:
  check_model(config.model)
  _check_optimizer(config.optimizer)
  _check_mesh(config.mesh)
  require(config.seed >= 0, f"config.seed is {config.seed}; it must not be negative")
  positive(config.checkpoint, "config.checkpoint", "every_steps", "keep")
  positive(config.eval, "config.eval", "every_steps", "tokens_per_source", "row_length", "rows")
  require(
    config.eval.row_length <= config.model.max_length,
    f"config.eval.row_length {config.eval.row_length} is above config.model.max_length "
    f"{config.model.max_length}",
  )
  for name, source in config.data.sources.items():
    positive(source, f"config.data.sources.{name}", "max_epochs")
  names = [stage.name for stage in config.stages]
  require(len(set(names)) == len(names), f"config.stages have equal names: {', '.join(names)}")
  for i, stage in enumerate(config.stages):
    _check_stage(config, stage, f"config.stages[{i}] ({stage.name})")
  for name in config.data.sources:
    require(
      any(name in stage.sources for stage in config.stages),
      f"config.data.sources.{name} is in no stage's sources; add it to one or remove it",
    )


def _check_optimizer(optimizer: OptimizerConfig) -> None:
  path = "config.optimizer"
  positive(optimizer, path, "eps", "clip_norm")
  for name in ("beta1", "beta2"):
    value = getattr(optimizer, name)
    require(0 <= value < 1, f"{path}.{name} is {value}; it must lie in [0, 1)")
  for name in ("weight_decay", "z_loss"):
    value = getattr(optimizer, name)
    require(value >= 0, f"{path}.{name} is {value}; it must not be negative")


def _check_mesh(mesh: MeshConfig) -> None:
  require(
    mesh.fsdp > 0 or mesh.fsdp == -1,
    f"config.mesh.fsdp is {mesh.fsdp}; give a count or -1 for the devices that are left",
  )
  axes = [f.name for f in dataclasses.fields(mesh)]
  positive(dataclasses.replace(mesh, fsdp=max(mesh.fsdp, 1)), "config.mesh", *axes)
  require(
    mesh.context == 1,
    f"config.mesh.context is {mesh.context}; sequences are not split over devices yet: set it to 1 "
    "and use fsdp or tensor",
  )


def _check_stage(config: Config, stage: StageConfig, path: str) -> None:
  positive(stage, path, "tokens", "batch_tokens", "microbatch_rows")
  if isinstance(config.model.positions, RotaryPositions):
    require(
      stage.rope_theta is not None, f"{path}.rope_theta is None; rotary positions need a base"
    )
    positive(stage, path, "rope_theta")
  else:
    require(
      stage.rope_theta is None,
      f"{path}.rope_theta is {stage.rope_theta}, but the model has no rotary positions; set it to "
      "None",
    )
  for name, mixture in stage.sources.items():
    where = f"{path}.sources.{name}"
    known = ", ".join(config.data.sources)
    require(name in config.data.sources, f"{where} is not one of config.data.sources: {known}")
    positive(mixture, where, "chunk")
    require(mixture.weight >= 0, f"{where}.weight is {mixture.weight}; it must not be negative")
    require(
      stage.row_length % mixture.chunk == 0,
      f"{where}.chunk {mixture.chunk} does not divide the row: {stage.row_length} = "
      f"{stage.row_length // mixture.chunk} x {mixture.chunk} + "
      f"{stage.row_length % mixture.chunk}; the row is the stage's longest chunk",
    )
  total = sum(mixture.weight for mixture in stage.sources.values())
  require(total > 0, f"{path}.sources: the weights sum to {total}; at least one must be above 0")
  require(
    stage.row_length <= config.model.max_length,
    f"{path}: a row of {stage.row_length} tokens is above config.model.max_length "
    f"{config.model.max_length}",
  )
  require(
    stage.batch_tokens % stage.row_length == 0,
    f"{path}.batch_tokens {stage.batch_tokens} is not whole rows: {stage.rows} x "
    f"{stage.row_length} + {stage.batch_tokens % stage.row_length}",
  )
  require(
    stage.steps > 0,
    f"{path}.tokens {stage.tokens} does not pay for one batch of {stage.batch_tokens} tokens",
  )
  _check_learning_rate(stage, f"{path}.learning_rate")


def _check_learning_rate(stage: StageConfig, path: str) -> None:
  rate = stage.learning_rate
  for name in ("start", "peak", "end", "warmup_steps", "decay_steps"):
    value = getattr(rate, name)
    require(value >= 0, f"{path}.{name} is {value}; it must not be negative")
  require(rate.peak > 0, f"{path}.peak is {rate.peak}: the stage would not train")
  require(rate.end <= rate.peak, f"{path}: end {rate.end} is above peak {rate.peak}")
  # A number that the shape does not read would be a dead knob.
  if rate.warmup_steps == 0:
    require(
      rate.start == rate.peak,
      f"{path}: start {rate.start} is not peak {rate.peak}; without warmup they must be equal",
    )
  if rate.shape == "constant":
    require(
      rate.end == rate.peak,
      f"{path}: end {rate.end} is not peak {rate.peak}; with shape 'constant' they must be equal",
    )
  if rate.shape == "wsd":
    require(rate.decay_steps > 0, f"{path}.decay_steps is 0; shape 'wsd' needs it above 0")
  else:
    require(
      rate.decay_steps == 0,
      f"{path}.decay_steps is {rate.decay_steps}; only shape 'wsd' reads it: set it to 0",
    )
  require(
    rate.warmup_steps + rate.decay_steps <= stage.steps,
    f"{path}: warmup_steps {rate.warmup_steps} + decay_steps {rate.decay_steps} are more than the "
    f"stage's {stage.steps} steps ({stage.tokens} tokens // {stage.batch_tokens})",
  )


def resolve_mesh(config: Config, devices: int) -> tuple[int, int, int, int]:
  """The mesh shape (replica, fsdp, context, tensor) on so many devices, checked against the model
  and the batches.

  Raises:
    ConfigError: the axes do not multiply to `devices`, or do not divide what they shard.
  """
  mesh = config.mesh
  others = mesh.replica * mesh.context * mesh.tensor
  fsdp = devices // others if mesh.fsdp == -1 else mesh.fsdp
  require(
    others * fsdp == devices and fsdp > 0,
    f"config.mesh: replica {mesh.replica} x fsdp {fsdp} x context {mesh.context} x tensor "
    f"{mesh.tensor} = {others * fsdp}, but there are {devices} devices",
  )
  check_model_on_mesh(config.model, mesh, fsdp)
  shards = mesh.replica * fsdp
  product = f"replica {mesh.replica} x fsdp {fsdp}"
  for i, stage in enumerate(config.stages):
    divides(
      f"{product} x microbatch_rows {stage.microbatch_rows} =",
      shards * stage.microbatch_rows,
      f"the rows of config.stages[{i}] ({stage.name}), {stage.batch_tokens} / {stage.row_length} =",
      stage.rows,
    )
  divides(f"{product} =", shards, "config.eval.rows", config.eval.rows)
  return (mesh.replica, fsdp, mesh.context, mesh.tensor)
