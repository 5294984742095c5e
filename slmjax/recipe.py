"""Recipes by name, and the flags that name and change them: --config=FILE.py:VARIANT and
--config.PATH=VALUE, such as --config.mesh.tensor=4 or --config.stages[0].tokens=1000000."""

import argparse
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from slmjax.config import Config
from slmjax.errors import UserError
from slmjax.resolve import resolve

_OVERRIDE = "--config."


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Config:
  """The checked config of `FILE.py` or `FILE.py:VARIANT`, changed by lines `PATH=VALUE`.

  Raises:
    UserError: no such file, not a recipe, no such variant, setting or value.
    ConfigError: the recipe cannot be honoured.
  """
  raw = load_raw(name)
  for override in overrides:
    _override(raw, override)
  return resolve(raw)


def load_raw(name: str) -> ConfigDict:
  """What the recipe `FILE.py` or `FILE.py:VARIANT` gives, as it stands.

  Raises:
    UserError: no such file, not a recipe, or no such variant.
  """
  path, _, variant = name.partition(":")
  get_config = getattr(_module(Path(path)), "get_config", None)
  if get_config is None:
    raise UserError(f"{path} is not a recipe: it has no get_config(variant)")
  try:
    return get_config(variant)
  except ValueError as error:
    raise UserError(f"{name}: {error}") from error


def variants(path: Path) -> tuple[str, ...]:
  """The names that a recipe's `get_config` takes, as it lists them in VARIANTS."""
  return tuple(_module(path).VARIANTS)


def parse_with_recipe(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
  """Adds --config to a command's flags, parses them all, and loads the recipe."""
  parser.add_argument(
    "--config",
    required=True,
    help="recipe, as configs/FILE.py:VARIANT; --config.PATH=VALUE changes a setting",
  )
  args, rest = parser.parse_known_args()
  overrides = [flag.removeprefix(_OVERRIDE) for flag in rest if flag.startswith(_OVERRIDE)]
  unknown = [flag for flag in rest if not flag.startswith(_OVERRIDE)]
  if unknown:
    parser.error(f"unrecognized argument {unknown[0]}; flags look like --name=value")
  return args, load_recipe(args.config, overrides)


def _override(raw: ConfigDict, line: str) -> None:
  """Sets one leaf, keeping its type."""
  path, equals, text = line.partition("=")
  if not equals:
    raise UserError(f"--config.{line} has no value; write --config.{line}=VALUE")
  keys = [int(key) if key.isdigit() else key for key in re.findall(r"[^.\[\]]+", path)]
  owner, value, seen = raw, raw, "config"
  for key in keys:
    owner = value
    try:
      value = owner[key]
    except (KeyError, IndexError, TypeError):
      known = (
        ", ".join(map(str, owner)) if isinstance(owner, ConfigDict) else f"{len(owner)} entries"
      )
      raise UserError(f"--config.{path}: {seen} has no {key!r}; it has {known}") from None
    seen = f"{seen}.{key}"
  if isinstance(value, ConfigDict | tuple | list):
    raise UserError(f"--config.{path} is not a single setting; change those in it one by one")
  owner[keys[-1]] = _as_type_of(value, text, path)


def _as_type_of(value: Any, text: str, path: str) -> Any:
  kind = type(value)
  if value is None:
    raise UserError(f"--config.{path} is None in the recipe; give it a value there, with its type")
  if kind is bool and text.lower() in ("true", "false"):
    return text.lower() == "true"
  try:
    if kind is not bool:
      return kind(text)
  except ValueError:
    pass
  raise UserError(f"--config.{path} must be {kind.__name__}, got {text!r}")


def _module(path: Path) -> ModuleType:
  """The module of a file, which need not be importable by a name."""
  if path.suffix != ".py" or not path.is_file():
    raise UserError(f"{path} is not a recipe file; give one such as configs/fox1.py:tiny")
  spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
  assert spec is not None
  assert spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module
