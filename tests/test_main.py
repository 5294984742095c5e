"""The command line: overrides, --explain, and one clear line for whatever is wrong."""

import argparse
import json
import subprocess
import sys

import pytest

from slmjax import main as command
from slmjax.errors import run_command
from slmjax.recipe import load_recipe

FOX = "configs/fox1.py"


def run(monkeypatch, *flags):
  """The command's exit code."""
  monkeypatch.setattr(sys, "argv", ["main", *flags])
  with pytest.raises(SystemExit) as exit_:
    run_command(command.main)
  return exit_.value.code


def test_overrides_keep_the_types():
  changed = load_recipe(
    f"{FOX}:tiny",
    [
      "seed=7",
      "optimizer.weight_decay=0",
      "model.embedding.tied=false",
      "stages[1].batch_tokens=16384",
      "stages[0].sources.docs.weight=0.9",
      "data.store=elsewhere",
      "model.segments[0].layers=3",
    ],
  )
  assert (changed.seed, changed.optimizer.weight_decay) == (7, 0.0)
  assert (changed.model.embedding.tied, changed.data.store) == (False, "elsewhere")
  assert changed.stages[1].batch_tokens == 16384
  assert changed.stages[0].sources["docs"].weight == 0.9
  assert changed.model.segments[0].layers == 3


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--config=configs/nope.py"], "configs/nope.py is not a recipe file"),
    ([f"--config={FOX}:huge"], "no variant 'huge'; there are '', 'tiny'"),
    ([f"--config={FOX}", "--config.modle.width=1"], "--config.modle.width: config has no 'modle'"),
    ([f"--config={FOX}", "--config.mesh.tensor=x"], "--config.mesh.tensor must be int, got 'x'"),
    ([f"--config={FOX}", "--config.model.embedding.tied=1"], "must be bool, got '1'"),
    ([f"--config={FOX}", "--config.stages[3].tokens=1"], "config.stages has no 3; it has 3"),
    ([f"--config={FOX}", "--config.mesh=1"], "--config.mesh is not a single setting"),
    ([f"--config={FOX}", "--config.seed"], "--config.seed has no value"),
    ([f"--config={FOX}", "--explain", "more"], "unrecognized argument more"),
    ([f"--config={FOX}", "--work=x"], "unrecognized argument --work=x"),
    ([f"--config={FOX}"], "--workdir is missing"),
    ([f"--config={FOX}", "--json"], "--json only goes with --explain"),
    ([f"--config={FOX}", "--workdir=x", "--process=1"], "--coordinator, --processes and --process"),
    (["--explain"], "required: --config"),
  ],
)
def test_bad_flags_are_one_line(monkeypatch, capsys, flags, message):
  assert run(monkeypatch, *flags) == 2
  errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
  assert len(errors) == 1
  assert message in errors[0]


def test_both_ways_of_joining_processes_are_refused():
  args = argparse.Namespace(coordinator="a:1", processes=2, process=0, distributed=True)
  with pytest.raises(ValueError, match="give either --distributed or"):
    command.start_processes(args)


def test_explain_shows_the_plan_of_fox1(monkeypatch, capsys):
  assert run(monkeypatch, f"--config={FOX}", "--explain") == 0
  shown = capsys.readouterr().out
  for fact in ("1,665,271,808 parameters", "892,161 steps", "stage curated", "chunks of 8,192"):
    assert fact in shown


def test_explain_as_json(monkeypatch, capsys):
  assert run(monkeypatch, f"--config={FOX}", "--explain", "--json") == 0
  facts = json.loads(capsys.readouterr().out)
  assert facts["parameters"] == 1_665_271_808
  budgets = [1_050_000_000_000, 1_580_000_000_000, 62_000_000_000]
  assert [stage["budget"] for stage in facts["stages"]] == budgets
  for stage in facts["stages"]:
    assert 0 <= stage["budget"] - stage["tokens"] < stage["batch_tokens"]
    assert sum(stage["tokens_by_source"].values()) == stage["tokens"]


def test_a_reader_that_has_had_enough_is_no_error():
  code = (
    "from slmjax.errors import run_command\nrun_command(lambda: print('x' * 10**6, flush=True))"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
  ) as process:
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait() == 141
    assert process.stderr is not None
    assert process.stderr.read() == b""
