"""Reports: one line a step, one step late, cut back on resume; a non-finite step stops or not."""

import dataclasses
import json

import jax.numpy as jnp
import pytest

from slmjax import flops
from slmjax.metrics import EVALS, METRICS, NonFiniteError, Reporter
from slmjax.step import StepMetrics
from tests import small

KEYS = [
  *("step", "stage", "loss", "z_loss", "grad_norm", "lr", "tokens", "tokens_per_second"),
  *("utilisation", "applied"),
]


@pytest.fixture(autouse=True)
def peak(monkeypatch):
  """A made-up machine: measuring the real one takes time and proves nothing here."""
  monkeypatch.setattr(flops, "peak_flops", lambda: (1e9, "made up"))


def numbers(loss=2.0, applied=1.0):
  """A step's report: a mean loss over 4 targets."""
  values = dict(loss_sum=4 * loss, z_loss_sum=0.5, count=4.0, grad_norm=0.1, learning_rate=1e-3)
  return StepMetrics(**{k: jnp.float32(v) for k, v in values.items()}, applied=jnp.float32(applied))


def lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def make(run, first_step=0, *, writes=True, nonfinite="stop"):
  config = small.config()
  optimizer = dataclasses.replace(config.optimizer, nonfinite=nonfinite)
  return Reporter(run, dataclasses.replace(config, optimizer=optimizer), first_step, writes=writes)


def test_a_line_per_step_one_step_late(tmp_path):
  reporter = make(tmp_path)
  path = tmp_path / METRICS
  for step in range(10):
    reporter.push(step, numbers(loss=step / 3))
    assert [line["step"] for line in lines(path)] == list(range(step))
  reporter.flush()
  written = lines(path)
  assert [line["step"] for line in written] == list(range(10))
  config = small.config()
  for step, line in enumerate(written):
    assert list(line) == KEYS
    assert line["stage"] == ("general" if step < 8 else "curated")
    # With every digit of its float32: reading it back gives the same bits.
    assert line["loss"] == float(jnp.float32(4 * (step / 3))) / 4.0
    assert line["z_loss"] == 0.125
    assert line["lr"] == float(jnp.float32(1e-3))
    assert line["grad_norm"] == float(jnp.float32(0.1))
    assert line["tokens"] == config.tokens_before(step + 1)
    assert line["tokens_per_second"] > 0
    assert line["utilisation"] > 0
    assert line["applied"] is True
  reporter.flush()  # nothing is pending: nothing is written twice
  reporter.close()
  assert len(lines(path)) == 10
  assert list((tmp_path / "tensorboard").glob("events.*"))


def run_ten(run, first_step=0):
  """Reports the steps up to 10 with evaluations after steps 3, 6 and 9."""
  reporter = make(run, first_step)
  for step in range(first_step, 10):
    reporter.push(step, numbers(loss=1.0 + step))
    if (step + 1) % 3 == 0:
      reporter.flush()
      reporter.evaluation(step + 1, "general", {"web": {"bits_per_byte": 1.0 + step}})
  reporter.flush()
  reporter.close()


def stable(run):
  """What the files say but for the speeds."""
  records = [
    {k: v for k, v in line.items() if k not in ("tokens_per_second", "utilisation")}
    for line in lines(run / METRICS)
  ]
  return records, lines(run / EVALS)


@pytest.mark.parametrize("resumed", [0, 1, 5, 6, 9, 10])
@pytest.mark.parametrize("tail", ["", '{"step": 10, "sta', "\n", "\0\0", "no newline"])
def test_resumed_files_read_as_if_never_stopped(tmp_path, resumed, tail):
  """Whatever a killed process left at the end of the files. The run is resumed at step `resumed`:
  metrics of later steps go; an evaluation after that very step stays."""
  for name in ("whole", "cut"):
    (tmp_path / name).mkdir()
    run_ten(tmp_path / name)
  for name in (METRICS, EVALS):
    path = tmp_path / "cut" / name
    text = path.read_text()
    path.write_text(text[:-1] if tail == "no newline" else text + tail)
  run_ten(tmp_path / "cut", resumed)
  assert stable(tmp_path / "cut") == stable(tmp_path / "whole")
  assert not list((tmp_path / "cut").glob("*tmp*"))


def test_only_the_first_process_writes(tmp_path):
  reporter = make(tmp_path, writes=False)
  reporter.push(0, numbers())
  reporter.push(1, numbers())
  reporter.evaluation(2, "general", {"web": {"bits_per_byte": 1.0}})
  reporter.flush()
  reporter.close()
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("writes", [True, False])
def test_stops_at_a_step_that_is_not_finite(tmp_path, writes):
  """In every process, so that none waits for the others; the line is written first."""
  reporter = make(tmp_path, writes=writes)
  reporter.push(8, numbers())
  reporter.push(9, numbers(loss=float("nan"), applied=0.0))
  with pytest.raises(NonFiniteError) as caught:
    reporter.push(10, numbers())
  reporter.close()
  message = str(caught.value)
  assert message.startswith("step 9 (stage curated): loss nan or gradient norm 0.1")
  assert "config.optimizer.nonfinite" in message
  assert "\n" not in message
  if writes:
    last = lines(tmp_path / METRICS)[-1]
    assert (last["step"], last["applied"]) == (9, False)
    assert last["loss"] is None  # JSON has no NaN


def test_goes_on_if_it_is_to_skip(tmp_path, capsys):
  reporter = make(tmp_path, nonfinite="skip")
  reporter.push(0, numbers(loss=float("inf"), applied=0.0))
  reporter.push(1, numbers())
  reporter.flush()
  reporter.close()
  assert [line["applied"] for line in lines(tmp_path / METRICS)] == [False, True]
  assert "step 0 (stage general): loss inf" in capsys.readouterr().err


def test_plain_progress_where_there_is_no_terminal(tmp_path, capsys):
  """The first and the last step, and else one line in PLAIN_SECONDS; no control characters."""
  reporter = make(tmp_path)
  for step in range(18):
    reporter.push(step, numbers())
  reporter.flush()
  reporter.close()
  shown = capsys.readouterr().err.splitlines()
  assert [line.split("loss")[0].split() for line in shown] == [
    ["general", "step", "1/18"],
    ["instruct", "step", "18/18"],
  ]
  assert all("tokens/s" in line and "ETA" in line and "utilisation" in line for line in shown)
  assert not any("\x1b" in line or "\r" in line for line in shown)
