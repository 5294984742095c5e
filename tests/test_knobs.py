"""No dead knobs: a run reads every field of the config. Checking or printing one does not count."""

import dataclasses
import functools
import inspect
import json
import sys
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from slmjax import config as config_module
from slmjax import model_config, parameters, resolve, resolve_model, sharding, train
from slmjax.config import Config
from slmjax.data.loader import abstract_batch
from slmjax.state import abstract_state
from slmjax.step import train_step
from tests import shrunken, small

KINDS = {
  kind
  for module in (config_module, model_config)
  for kind in vars(module).values()
  if inspect.isclass(kind) and dataclasses.is_dataclass(kind)
}
# A `kind` decides which dataclass a part becomes: it has done its work then.
FIELDS = {
  (kind.__name__, field.name)
  for kind in KINDS
  for field in dataclasses.fields(kind)
  if field.name != "kind"
}
# One recipe for each kind of attention, feed-forward, positions and stretching of them.
ARCHITECTURES = ("openelm:270m", "llama:3_2_1b", "deepseek_v2_lite:dense", "minicpm3:4b")
ARCHITECTURES += ("opt:350m", "bloom:560m", "gemma2:2b", "pangu_pi:1b", "rwkv4:169m")


def counts_as_read(frame):
  """Not the conversion to plain types, checks, comparisons or copies."""
  code = frame.f_code
  if code.co_filename == config_module.__file__:
    return code.co_qualname.split(".")[0] not in ("to_dict", "identity", "differences")
  if code.co_filename == resolve.__file__:
    return code.co_qualname.startswith("resolve_mesh")
  if code.co_filename in (resolve_model.__file__, parameters.__file__):
    return False
  return code.co_filename not in ("<string>", dataclasses.__file__)


@pytest.fixture
def reads(monkeypatch):
  """Collects (class, field) of every attribute of a config that is read from now on."""
  found = set()

  def record(self, name):
    if name[0] != "_" and counts_as_read(sys._getframe(1)):
      found.add((type(self).__name__, name))
    return object.__getattribute__(self, name)

  for kind in KINDS:
    monkeypatch.setattr(kind, "__getattribute__", record)
  return found


def two_steps(store: str) -> Config:
  """One stage of two steps whose loss overflows, so that `nonfinite` is read too."""
  raw = small.raw_config(store)
  stage = raw.stages[0]
  stage.tokens = 2 * stage.batch_tokens
  stage.learning_rate.update(shape="wsd", end=0.0, warmup_steps=1, decay_steps=1)
  raw.stages = (stage,)
  raw.data.sources = ConfigDict({name: raw.data.sources[name] for name in stage.sources})
  raw.model.init.update(embedding_std=1e30, std=1e30, output_std=1e30)
  raw.optimizer.nonfinite = "skip"
  return resolve.resolve(raw)


@pytest.mark.medium
def test_a_run_reads_every_field(reads, text_store, tmp_path: Path, monkeypatch):
  monkeypatch.setattr(
    train, "make_mesh", lambda c: sharding.make_mesh(resolve.resolve_mesh(c, 1), jax.devices()[:1])
  )
  assert train.run(two_steps(text_store), tmp_path) == 0
  lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
  assert [line["applied"] for line in lines] == [False, False]
  for name in ARCHITECTURES:
    trace_a_step(shrunken.config(name))
  unread = FIELDS - reads
  assert not unread


def trace_a_step(config: Config):
  mesh = sharding.abstract_mesh((1, 1, 1, 1))
  with jax.sharding.use_abstract_mesh(mesh):
    batch = abstract_batch(config.stages[0], mesh)
    step = functools.partial(train_step, config=config, stage_index=0)
    jax.eval_shape(step, abstract_state(config), batch)


def test_checks_and_copies_do_not_count_as_reading(reads):
  config = small.config()
  config_module.to_json(config)
  config_module.identity(config)
  assert config == dataclasses.replace(config)
  assert not {("OptimizerConfig", "beta1"), ("ModelConfig", "init_std")} & reads
  assert config.optimizer.beta1 < 1
  assert ("OptimizerConfig", "beta1") in reads
