"""What a model_type of Hugging Face is made of, and helpers that the families share."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from slmjax.architecture import Settings
from slmjax.convert.fields import Fields
from slmjax.convert.names import Names
from slmjax.convert.rope import Rope
from slmjax.model_config import FeedForward, HeadsAttention, ModelConfig, RotaryPositions


@dataclasses.dataclass(frozen=True)
class Reading:
  """An architecture in our settings, and the base of its rotary positions if it has them."""

  settings: Settings
  rope_theta: float | None


@dataclasses.dataclass(frozen=True)
class Family:
  """One model_type, both ways.

  Attributes:
    architecture: the class in transformers, as config.json names it.
    in_transformers: whether the library itself has that class.
    defaults: the fields that `read` reads, with what the class takes where one is absent.
    accepted: fields with the values that can be converted.
    rope: whether it reads the fields of rotary positions.
    aliases: other names of fields.
    read: settings from a config.
    write: a config from a model and its base of rotary positions. It need not look whether the
      model fits: what it gives is read again and compared.
  """

  model_type: str
  architecture: str
  defaults: Mapping[str, Any]
  read: Callable[[Fields], Reading]
  write: Callable[[ModelConfig, float | None], dict[str, Any]]
  names: Names
  accepted: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
  rope: bool = True
  in_transformers: bool = True

  def reading(self, config: Mapping[str, Any], where: str, allowed: Sequence[str] = ()) -> Reading:
    """What a config.json describes.

    Raises:
      UserError: a field that cannot be honoured.
    """
    fields = Fields(config, self.defaults, where=where, aliases=self.aliases, rope=self.rope)
    fields.check(self.accepted, allowed)
    return self.read(fields)


def full_rope(fields: Fields) -> Rope:
  """Rotary positions of a class that turns whole heads only."""
  rope = Rope(fields)
  if rope.fraction != 1.0:
    fields.refuse("partial_rotary_factor", rope.fraction, "this model_type turns whole heads")
  return rope


def head_width(fields: Fields) -> int:
  width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
  if width % heads:
    fields.refuse("hidden_size", width, f"num_attention_heads {heads} does not divide it")
  return width // heads


def with_biases(settings: Settings, *, attention: bool = False, ffn: bool = False) -> Settings:
  """Biases on all four projections of attention, and on all of the feed-forward."""
  for segment in settings["segments"]:
    if attention:
      segment["attention"] |= dict(qkv_bias=True, out_bias=True)
    if ffn:
      segment["ffn"]["bias"] = True
  return settings


def with_activation(settings: Settings, activation: str) -> Settings:
  for segment in settings["segments"]:
    segment["ffn"]["activation"] = activation
  return settings


def cycle(windows: Sequence[int]) -> tuple[int, ...]:
  """The shortest sequence that repeated gives these, one per layer."""
  for n in range(1, len(windows) + 1):
    if all(w == windows[i % n] for i, w in enumerate(windows)):
      return tuple(windows[:n])
  return ()


def layer_windows(fields: Fields, window: int | None, default: list[str]) -> tuple[int, ...]:
  """What each layer sees, from `layer_types` or its default."""
  types = fields["layer_types"] or default
  layers = fields.integer("num_hidden_layers")
  if not isinstance(types, list) or len(types) != layers:
    fields.refuse("layer_types", types, f"it must be a list of {layers} entries")
  windows = []
  for kind in types:
    if kind not in ("full_attention", "sliding_attention"):
      fields.refuse("layer_types", kind, "layers here are full_attention or sliding_attention")
    if kind == "sliding_attention" and window is None:
      fields.refuse("layer_types", kind, "sliding_window gives no window for it")
    windows.append(window if kind == "sliding_attention" and window is not None else 0)
  return cycle(windows)


def write_layer_types(model: ModelConfig) -> dict[str, Any]:
  """`layer_types` and `sliding_window` of a model with at most one window."""
  attention, layers = first(model)[0], model.depth
  windows = [attention.window(i) for i in range(layers)]
  return dict(
    sliding_window=max(windows) or None,
    layer_types=["sliding_attention" if w else "full_attention" for w in windows],
  )


def first(model: ModelConfig) -> tuple[HeadsAttention, FeedForward]:
  """Attention and feed-forward of the first segment.

  Raises:
    NotThisFamily: they are of another kind.
  """
  attention, ffn = model.segments[0].attention, model.segments[0].ffn
  if not isinstance(attention, HeadsAttention) or not isinstance(ffn, FeedForward):
    raise NotThisFamily
  return attention, ffn


def rotary_fraction(model: ModelConfig) -> float:
  """How much of each head turns, such that rounding down its product gives the width again."""
  if not isinstance(model.positions, RotaryPositions):
    raise NotThisFamily
  width, head = model.positions.width, first(model)[0].head_width
  fraction = width / head
  return fraction if int(head * fraction) == width else math.nextafter(fraction, 1.0)


class NotThisFamily(Exception):
  """A model that a family's config cannot describe."""
