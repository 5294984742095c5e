"""The config: conversion, round trips, derived numbers, and the recipe's frozen resolution.

The golden files are what configs/fox1.py resolves to, so that a changed default shows as a diff.
After a change that is meant, write them again and read the diff:

  python -m tests.test_config
"""

import json
import types
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs import fox1
from slmjax.config import ConfigError, differences, identity, to_dict, to_json
from slmjax.resolve import resolve
from tests import small

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = {"fox1.json": "", "fox1_tiny.json": "tiny"}


@pytest.mark.parametrize("name", VARIANTS)
def test_golden(name):
  expected = (GOLDEN / name).read_text()
  assert to_json(resolve(fox1.get_config(VARIANTS[name]))) == expected, (
    "the resolved recipe has changed; if it was meant: python -m tests.test_config"
  )


def test_full_size():
  config = resolve(fox1.get_config())
  assert [stage.tokens for stage in config.stages] == [1.05e12, 1.58e12, 62e9]
  assert config.boundaries == (0, 500_679, 877_380, 892_161)
  for stage in config.stages:
    assert 0 <= stage.tokens - stage.steps * stage.batch_tokens < stage.batch_tokens


def test_unknown_variant():
  with pytest.raises(ValueError, match="no variant 'huge'"):
    fox1.get_config("huge")


@pytest.mark.parametrize("variant", ["", "tiny"])
def test_round_trip(variant):
  config = resolve(fox1.get_config(variant))
  assert resolve(to_dict(config)) == config
  assert resolve(json.loads(to_json(config))) == config
  assert to_dict(resolve(to_dict(config))) == to_dict(config)


def test_the_order_of_keys_means_nothing():
  """The sources' order decides the order of the data, so a config file's must not."""

  def reverse(tree):
    if isinstance(tree, dict):
      return {key: reverse(tree[key]) for key in reversed(tree)}
    return [reverse(x) for x in tree] if isinstance(tree, list) else tree

  config = small.config()
  assert to_json(resolve(reverse(to_dict(config)))) == to_json(config)


def test_resolved_configs_cannot_be_changed():
  config = small.config()
  with pytest.raises(AttributeError):
    config.seed = 1
  assert isinstance(config.data.sources, types.MappingProxyType)
  with pytest.raises(TypeError):
    config.data.sources["new"] = None
  assert isinstance(config.stages, tuple)


def edited(path, value):
  """The small config as plain types with one leaf replaced, or deleted if `value` is ..."""
  raw = to_dict(small.config())
  *parents, last = path
  owner = raw
  for key in parents:
    owner = owner[key]
  if value is ...:
    del owner[last]
  else:
    owner[last] = value
  return raw


def leaves(tree, path=()):
  if isinstance(tree, dict):
    for key, value in tree.items():
      yield from leaves(value, (*path, key))
  elif isinstance(tree, list):
    for i, value in enumerate(tree):
      yield from leaves(value, (*path, i))
  else:
    yield path, tree


def name_of(path):
  return "config" + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)


def test_every_leaf_refuses_other_types_and_cannot_be_left_out():
  """Whatever the setting: its name is in the one line."""
  wrong = {
    bool: ["yes", 1, 0.5, None, [True]],
    int: ["3", True, 2.0, None, [3]],
    float: ["0.1", True, None, [0.1], float("nan"), float("inf")],
    str: [1, None, True, ["a"], {"a": 1}],
    type(None): ["text", True, [1]],
  }
  checked = 0
  for path, value in leaves(to_dict(small.config())):
    for bad in wrong[type(value)]:
      if path[-1] == "rope_theta" and bad is None:  # refused for the model that it is for
        continue
      with pytest.raises(ConfigError) as caught:
        resolve(edited(path, bad))
      message = str(caught.value)
      assert message.startswith(f"{name_of(path)} "), (path, bad, message)
      assert "\n" not in message
      checked += 1
    if isinstance(path[-1], str) and path[:2] != ("data", "sources"):
      with pytest.raises(ConfigError) as caught:
        resolve(edited(path, ...))
      message = f"{name_of(path)} is missing; every setting has to be given"
      assert str(caught.value) == message
  assert checked > 300


def containers(tree, path=()):
  yield path, tree
  for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
    if isinstance(value, dict | list):
      yield from containers(value, (*path, key))


def test_containers_refuse_other_types_unknown_keys_and_emptiness():
  for path, value in containers(to_dict(small.config())):
    if path:
      # A model may do without positions.
      for bad in (3, "text", None)[: 2 if path[-1] == "positions" else 3]:
        with pytest.raises(ConfigError) as caught:
          resolve(edited(path, bad))
        kind = "a list of at least one entry" if isinstance(value, list) else "a mapping"
        assert str(caught.value).startswith(f"{name_of(path)} must be {kind}")
    names_sources = path and path[-1] == "sources"
    if isinstance(value, list) or names_sources:
      with pytest.raises(ConfigError, match="at least one entry, got"):
        resolve(edited(path, type(value)()))
    else:
      with pytest.raises(ConfigError) as caught:
        resolve(edited((*path, "colour"), "red"))
      known = ", ".join(value) if not path else next(iter(value))
      assert str(caught.value).startswith(
        f"{name_of((*path, 'colour'))} is not a setting; known here: {known}"
      )


def test_an_int_is_a_float_where_one_is_wanted():
  config = resolve(edited(("optimizer", "weight_decay"), 1))
  assert config.optimizer.weight_decay == 1.0
  assert isinstance(config.optimizer.weight_decay, float)


def test_config_dicts_inside_config_dicts():
  raw = small.raw_config()
  assert isinstance(raw.stages[0], ConfigDict)
  assert resolve(raw) == resolve(raw.to_dict())
  with pytest.raises(ConfigError, match="config must be a mapping, got NoneType None"):
    resolve(None)


def test_derived_numbers():
  config = small.config()
  assert [s.row_length for s in config.stages] == [32, 64, 64]
  assert [s.rows for s in config.stages] == [8, 8, 8]
  assert [s.steps for s in config.stages] == [8, 6, 4]
  assert [s.microbatches(2) for s in config.stages] == [2, 2, 2]
  assert config.boundaries == (0, 8, 14, 18)
  assert config.steps == 18
  assert [config.stage_index(step) for step in range(18)] == [0] * 8 + [1] * 6 + [2] * 4
  for step in (-1, 18):
    with pytest.raises(ValueError, match=f"step {step} is outside the run's 18 steps"):
      config.stage_index(step)
  trained = 0
  for step in range(18):
    assert config.tokens_before(step) == trained
    trained += config.stages[config.stage_index(step)].batch_tokens
  assert config.tokens_before(18) == trained == sum(s.tokens for s in config.stages)


def test_a_budget_that_is_not_whole_steps_is_rounded_down():
  raw = small.raw_config()
  raw.stages[0].tokens += raw.stages[0].batch_tokens - 1
  assert resolve(raw).stages[0].steps == 8


def test_identity_leaves_out_what_moves_work_and_nothing_else():
  """A resume may change these and only these."""
  config = small.config()
  free = {
    *(("mesh", axis) for axis in ("replica", "fsdp", "context", "tensor")),
    *(("checkpoint", name) for name in ("every_steps", "keep")),
    *(("eval", name) for name in ("every_steps", "tokens_per_source", "row_length", "rows")),
    *(("compute", name) for name in ("remat", "attention", "cross_entropy")),
    ("data", "store"),
    *(("stages", i, "microbatch_rows") for i in range(3)),
  }
  everything = {path for path, _ in leaves(to_dict(config))}
  kept = {path for path, _ in leaves(identity(config))}
  assert everything - kept == free
  assert kept <= everything


def test_differences_name_each_leaf():
  saved, current = to_dict(small.config()), to_dict(small.config())
  assert differences(saved, current) == []
  current["optimizer"]["beta2"] = 0.99
  current["stages"][1]["sources"]["docs"]["weight"] = 0.5
  del current["data"]["sources"]["code"]
  saved["stages"][2]["name"] = "last"
  assert differences(saved, current) == [
    "config.data.sources.code: {'max_epochs': 1.0} -> None",
    "config.stages[1].sources.docs.weight: 0.3 -> 0.5",
    "config.stages[2].name: 'last' -> 'instruct'",
    "config.optimizer.beta2: 0.95 -> 0.99",
  ]
  assert differences([1, 2], [1], "x") == ["x: [1, 2] -> [1]"]


if __name__ == "__main__":
  for file, variant in VARIANTS.items():
    (GOLDEN / file).write_text(to_json(resolve(fox1.get_config(variant))))
