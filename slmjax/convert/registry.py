"""All model_types, and which of them can say what one of our own models is."""

import math
from collections.abc import Mapping
from typing import Any

from slmjax.config import differences, to_dict
from slmjax.convert.families import gemma, gpt, latent, llama, neox, openelm, phi, rwkv
from slmjax.convert.family import Family, NotThisFamily
from slmjax.errors import UserError
from slmjax.model_config import ModelConfig
from slmjax.resolve import resolve_model

_MODULES = (llama, phi, gemma, gpt, neox, latent, rwkv, openelm)

FAMILIES: Mapping[str, Family] = {
  family.model_type: family for module in _MODULES for family in module.FAMILIES
}


def family_of(config: Mapping[str, Any], where: str) -> Family:
  """The family of a config.json.

  Raises:
    UserError: none that can be converted.
  """
  model_type = str(config.get("model_type"))
  if model_type not in FAMILIES:
    raise UserError(
      f"{where}: model_type is {model_type!r}; those that can be converted are "
      f"{', '.join(sorted(FAMILIES))}"
    )
  return FAMILIES[model_type]


def describe(model: ModelConfig, rope_theta: float | None) -> tuple[Family, dict[str, Any]]:
  """The family and the config.json of one of our own models.

  Each family writes a config and reads it again: the first that comes back as the same model is the
  one. How weights are drawn is no part of that.

  Raises:
    UserError: no class of Hugging Face computes what this model does; names what is in the way of
      the nearest.
  """
  nearest: list[str] | None = None
  near_type = ""
  for family in FAMILIES.values():
    try:
      config = family.write(model, rope_theta)
      reading = family.reading(config, "the config written")
      back = resolve_model(reading.settings)
    except (NotThisFamily, UserError):
      continue
    lines = [*_differences(model, back)]
    if not _close(rope_theta, reading.rope_theta):
      lines.append(f"rope_theta: {rope_theta} -> {reading.rope_theta}")
    if not lines:
      whole = {"architectures": [family.architecture], "model_type": family.model_type, **config}
      return family, whole
    if nearest is None or len(lines) < len(nearest):
      nearest, near_type = lines, family.model_type
  if nearest is None:
    raise UserError("no model_type of Hugging Face has blocks of this kind; it cannot be exported")
  shown = "; ".join(line if len(line) < 120 else f"{line[:117]}..." for line in nearest[:3])
  raise UserError(
    f"no model_type of Hugging Face computes what this model does; as {near_type}, the nearest, it "
    f"would differ in {shown}"
  )


def _differences(model: ModelConfig, other: ModelConfig) -> list[str]:
  """Where two models differ, not in the last bits of a number nor in how weights are drawn."""
  mine, theirs = (_rounded(to_dict(m)) for m in (model, other))
  del mine["init"], theirs["init"]
  return differences(mine, theirs, "model")


def _rounded(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _rounded(v) for key, v in value.items()}
  if isinstance(value, list):
    return [_rounded(v) for v in value]
  return float(f"{value:.12g}") if isinstance(value, float) else value


def _close(a: float | None, b: float | None) -> bool:
  return a == b if a is None or b is None else math.isclose(a, b)
