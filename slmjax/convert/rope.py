"""Rotary positions as a config.json has them, in the forms of transformers 4 and 5."""

import math
from typing import Any

from slmjax.architecture import Settings
from slmjax.convert.fields import ROPE_LENGTH, Fields
from slmjax.model_config import (
  Llama3Scaling,
  LongRopeScaling,
  ModelConfig,
  RotaryPositions,
  YarnScaling,
)

# What transformers takes where a config gives no base.
_THETA = 10000.0

_COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_KEYS = {
  "default": set(),
  "llama3": {"factor", "low_freq_factor", "high_freq_factor", ROPE_LENGTH},
  "yarn": {
    *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
    *("truncate", ROPE_LENGTH),
  },
  "longrope": {"factor", "short_factor", "long_factor", "attention_factor", ROPE_LENGTH},
}


class Rope:
  """The rotary positions of a config.

  Attributes:
    theta: the base.
    fraction: how much of each head turns.
    scaling: our settings of the frequencies' scaling, None without.
    score_factor: what attention's scale is multiplied by in latent attention (a square of mscale).
  """

  def __init__(
    self,
    fields: Fields,
    *,
    fraction: float = 1.0,
    theta: float = _THETA,
    latent: bool = False,
  ):
    """`fraction` and `theta` are what the class takes where neither form of the fields says it. A
    `latent` attention reads mscale_all_dim."""
    self._fields = fields
    raw = fields.given.get("rope_scaling") or fields.given.get("rope_parameters") or {}
    if not isinstance(raw, dict):
      fields.refuse("rope_parameters", raw, "it must be a JSON object")
    self._raw = raw
    self.theta = self._number("rope_theta", self._top("rope_theta", theta))
    self.fraction = self._number(
      "partial_rotary_factor", self._top("partial_rotary_factor", fraction)
    )
    kind = raw.get("rope_type") or raw.get("type") or "default"
    kind = "longrope" if kind == "su" else kind
    if kind not in _KEYS:
      fields.refuse("rope_scaling", kind, f"scalings here are {', '.join(_KEYS)}")
    for name, value in raw.items():
      if name not in _KEYS[kind] | _COMMON and value is not None:
        fields.refuse(f"rope_scaling.{name}", value, f"it has no meaning here in {kind!r}")
    self.scaling: Settings | None = None
    self.score_factor = 1.0
    if kind == "llama3":
      self.scaling = self._llama3()
    elif kind == "yarn":
      self.scaling = self._yarn()
    elif kind == "longrope":
      self.scaling = self._longrope()
    if latent and kind == "yarn" and raw.get("mscale_all_dim"):
      self.score_factor = _mscale(self._factor(), self._number("mscale_all_dim", None)) ** 2

  def _top(self, name: str, default: float) -> float:
    return self._fields.number(name) if self._fields.has(name) else default

  def _number(self, name: str, default: float | None) -> float:
    value = self._raw.get(name)
    if value is None and default is not None:
      return default
    if not isinstance(value, int | float) or isinstance(value, bool):
      self._fields.refuse(f"rope_scaling.{name}", value, "it must be a number")
    assert value is not None
    return float(value)

  def _length(self) -> int:
    """Of contexts before stretching. Phi-3's class reads it from beside the scaling."""
    fields = self._fields
    if fields.reads(ROPE_LENGTH):
      return fields.integer(ROPE_LENGTH)
    inside = int(self._number(ROPE_LENGTH, fields.number("max_position_embeddings")))
    if fields.has(ROPE_LENGTH) and fields[ROPE_LENGTH] != inside:
      fields.refuse(ROPE_LENGTH, fields[ROPE_LENGTH], f"the scaling's own is {inside}")
    return inside

  def _factor(self) -> float:
    stretch = self._fields.number("max_position_embeddings") / self._length()
    return self._number("factor", stretch)

  def _llama3(self) -> Settings:
    return dict(
      kind="llama3",
      factor=self._number("factor", None),
      low=self._number("low_freq_factor", None),
      high=self._number("high_freq_factor", None),
      original_length=self._length(),
    )

  def _yarn(self) -> Settings:
    if self._raw.get("truncate") is False:
      self._fields.refuse("rope_scaling.truncate", False, "only rounded ranges can be converted")
    factor, m, m_all = self._factor(), self._raw.get("mscale"), self._raw.get("mscale_all_dim")
    # Zero means absent, in the original too.
    if m and m_all:
      magnitude = _mscale(factor, self._number("mscale", None)) / _mscale(
        factor, self._number("mscale_all_dim", None)
      )
    else:
      magnitude = _mscale(factor, 1.0)
    return dict(
      kind="yarn",
      factor=factor,
      fast=self._number("beta_fast", 32.0) or 32.0,
      slow=self._number("beta_slow", 1.0) or 1.0,
      original_length=self._length(),
      magnitude=self._number("attention_factor", magnitude),
    )

  def _longrope(self) -> Settings:
    length, factor = self._length(), self._factor()
    magnitude = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    factors = {}
    for name in ("short_factor", "long_factor"):
      value = self._raw.get(name)
      if not isinstance(value, list):
        self._fields.refuse(f"rope_scaling.{name}", value, "it must be a list of numbers")
      factors[name] = value
    return dict(
      kind="longrope",
      short_factors=factors["short_factor"],
      long_factors=factors["long_factor"],
      original_length=length,
      magnitude=self._number("attention_factor", magnitude),
    )


def _mscale(factor: float, weight: float) -> float:
  """YaRN's correction of attention for stretched positions."""
  return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def write_rope(model: ModelConfig, theta: float | None, fraction: float = 1.0) -> dict[str, Any]:
  """The fields of a config.json for these positions, for transformers 4 and 5 alike."""
  positions = model.positions
  assert isinstance(positions, RotaryPositions)
  scaling = positions.scaling
  written: dict[str, Any] | None = None
  if isinstance(scaling, Llama3Scaling):
    written = dict(
      rope_type="llama3",
      factor=scaling.factor,
      low_freq_factor=scaling.low,
      high_freq_factor=scaling.high,
    )
  elif isinstance(scaling, YarnScaling):
    written = dict(
      rope_type="yarn",
      factor=scaling.factor,
      beta_fast=scaling.fast,
      beta_slow=scaling.slow,
      attention_factor=scaling.magnitude,
    )
  elif isinstance(scaling, LongRopeScaling):
    written = dict(
      rope_type="longrope",
      short_factor=list(scaling.short_factors),
      long_factor=list(scaling.long_factors),
      attention_factor=scaling.magnitude,
    )
  if written is not None and scaling is not None:
    written[ROPE_LENGTH] = scaling.original_length
  parameters = {"rope_type": "default", **(written or {}), "rope_theta": theta}
  top: dict[str, Any] = {"rope_theta": theta, "rope_scaling": written}
  if fraction != 1.0:
    parameters["partial_rotary_factor"] = fraction
    top["partial_rotary_factor"] = fraction
  return {**top, "rope_parameters": parameters}
