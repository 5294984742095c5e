"""Every recipe at a size for tests: the same switches, a few small layers."""

import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from slmjax.config import Config
from slmjax.recipe import load_raw, variants
from slmjax.resolve import resolve
from tests import small

CONFIGS = Path(__file__).parent.parent / "configs"
RECIPES = [
  f"{path.stem}:{variant}".rstrip(":")
  for path in sorted(CONFIGS.glob("*.py"))
  if path.name != "__init__.py"
  for variant in variants(path)
]
WIDTH = 32


def recipe_path(name: str) -> str:
  """The --config of a name such as `pythia:160m`."""
  stem, colon, variant = name.partition(":")
  return f"{CONFIGS / stem}.py{colon}{variant}"


def model(name: str) -> dict[str, Any]:
  """The architecture of a recipe with small numbers in the place of large ones."""
  settings = load_raw(recipe_path(name)).to_dict()["model"]
  factorised = settings["embedding"]["width"] != settings["width"]
  scale = settings["embedding"]["scale"]
  settings.update(vocab_size=small.VOCAB, max_length=128)
  settings["embedding"].update(
    width=16 if factorised else WIDTH,
    # The root of the width where it was that.
    scale=math.sqrt(WIDTH) if scale == math.sqrt(settings["width"]) else scale,
  )
  settings["width"] = WIDTH
  settings["init"] = dict(embedding_std=0.1, std=0.1, output_std=0.05)
  if settings["block"]["shortcut"] is not None:
    settings["block"]["shortcut"] = 4
  first = settings["segments"][0]
  rotated = _rotated_share(settings["positions"], first["attention"])
  head_width = 12 if rotated and rotated < 0.5 else 8
  if settings["positions"] is not None and settings["positions"]["kind"] == "rotary":
    _shrink_rotary(settings["positions"], max(2, int(head_width * rotated) // 2 * 2))
  # Layer-wise models keep their ends, others two layers: enough for two windows in turn.
  segments = settings["segments"]
  segments = [segments[0], segments[-1]] if len(segments) > 1 else segments
  for i, segment in enumerate(segments):
    segment["layers"] = 1 if len(segments) > 1 else 2
    segment["ffn"]["width"] = 48 + 16 * i
    _shrink_attention(segment["attention"], head_width, wider=i == 1)
  settings["segments"] = tuple(segments)
  return settings


def _rotated_share(positions: dict[str, Any] | None, attention: dict[str, Any]) -> float:
  """Of a head's width that is rotated; 0 where nothing is, 1 in latent attention."""
  if positions is None or positions["kind"] != "rotary":
    return 0.0
  return positions["width"] / attention.get("head_width", positions["width"])


def _shrink_rotary(positions: dict[str, Any], width: int) -> None:
  positions["width"] = width
  scaling = positions["scaling"]
  if scaling is not None:
    scaling["original_length"] = 16
    for name in ("short_factors", "long_factors"):
      if name in scaling:
        scaling[name] = scaling[name][: width // 2]


def _shrink_attention(attention: dict[str, Any], head_width: int, *, wider: bool) -> None:
  if attention["kind"] == "rwkv":
    attention["width"] = WIDTH
    return
  if attention["kind"] == "latent":
    attention.update(heads=4, latent_width=16, content_width=8, value_width=12, scale=16**-0.5)
    if attention["query_latent"] is not None:
      attention["query_latent"] = 24
    return
  heads = 8 if wider else 4
  group = attention["heads"] // attention["kv_heads"]
  attention.update(
    heads=heads,
    kv_heads=heads if group == 1 else 1 if attention["kv_heads"] == 1 else 2,
    head_width=head_width,
    # GPT-Neo's is 1.
    scale=1.0 if attention["scale"] == 1.0 else head_width**-0.5,
    windows=tuple(min(window, 6) for window in attention["windows"]),
  )


def raw_config(name: str, store: str = "unused") -> ConfigDict:
  """The small curriculum with this recipe's architecture."""
  c = small.raw_config(store)
  c.name = name
  c.model = model(name)
  positions = c.model.positions
  if positions is None or positions.kind != "rotary":
    for stage in c.stages:
      with stage.ignore_type():
        stage.rope_theta = None
  return c


def config(name: str, store: str = "unused") -> Config:
  return resolve(raw_config(name, store))
