"""Reports of a run: metrics.jsonl, evals.jsonl, TensorBoard and the terminal.

A step's numbers are read when the next step has been handed to the devices, so that reporting
never holds them up. After a restart the files are cut back to the step that the run resumes from:
they read as if it had never stopped.
"""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from slmjax import flops
from slmjax.config import Config
from slmjax.durable import write_atomically
from slmjax.errors import UserError
from slmjax.step import StepMetrics

METRICS = "metrics.jsonl"
EVALS = "evals.jsonl"
PLAIN_SECONDS = 10.0  # between progress lines where the output is not a terminal


class NonFiniteError(UserError):
  """A step's loss or gradient was not finite and the config says to stop."""


class Reporter:
  """Writes what steps report. Only the first process writes; all of them check for finiteness."""

  def __init__(self, run: Path, config: Config, first_step: int, *, writes: bool):
    """Cuts the files back to what steps before `first_step` reported."""
    self._config = config
    self._first_step = first_step
    self._pending: tuple[int, StepMetrics] | None = None
    self._mark = self._shown = time.perf_counter()
    self._busy = 0.0  # seconds of steps, without compiling, evaluating and saving
    self._peak, self.peak_source = flops.peak_flops()
    self._writes = writes
    if writes:
      for name in (METRICS, EVALS):
        _cut_back(run / name, first_step)
      self._metrics = (run / METRICS).open("a")
      self._evals = (run / EVALS).open("a")
      self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

  def push(self, step: int, metrics: StepMetrics) -> None:
    """Takes the numbers of a step that has just been dispatched and writes the previous one's."""
    pending, self._pending = self._pending, (step, metrics)
    if pending:
      self._report(*pending)

  def flush(self) -> None:
    """Writes the last step's numbers too, and syncs: before a save or an evaluation."""
    if self._pending:
      pending, self._pending = self._pending, None
      self._report(*pending)
    if self._writes:
      for file in (self._metrics, self._evals):
        file.flush()
        os.fsync(file.fileno())
      self._board.flush()

  def start_clock(self) -> None:
    """Leaves the time since the last step (compiling, evaluating, saving) out of its speed."""
    self._mark = time.perf_counter()

  def evaluation(self, step: int, stage: str, results: dict[str, Any]) -> None:
    """Writes held-out results after `step` steps: {source: {"bits_per_byte": ...}, ...}."""
    if not self._writes:
      return
    _write_line(self._evals, {"step": step, "stage": stage, "sources": results})
    for source, result in results.items():
      self._board.add_scalar(f"heldout_bits_per_byte/{source}", result["bits_per_byte"], step)
    figures = "  ".join(f"{name} {r['bits_per_byte']:.3f}" for name, r in results.items())
    self.say(f"step {step}  held-out bits per byte: {figures}")

  def say(self, line: str) -> None:
    """Prints a line, above the progress bar if there is one."""
    if self._writes:
      print(f"\r\x1b[K{line}" if sys.stderr.isatty() else line, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Closes the files. Call `flush` before, unless the run failed."""
    if self._writes:
      self._metrics.close()
      self._evals.close()
      self._board.close()
      if sys.stderr.isatty():
        print(file=sys.stderr)

  def _report(self, step: int, metrics: StepMetrics) -> None:
    count = float(metrics.count)  # waits for the step
    now = time.perf_counter()
    seconds, self._mark = now - self._mark, now
    self._busy += seconds
    stage = self._config.stages[self._config.stage_index(step)]
    speed = stage.batch_tokens / seconds
    line = {
      "step": step,
      "stage": stage.name,
      "loss": float(metrics.loss_sum) / count,
      "z_loss": float(metrics.z_loss_sum) / count,
      "grad_norm": float(metrics.grad_norm),
      "lr": float(metrics.learning_rate),
      "tokens": self._config.tokens_before(step + 1),
      "tokens_per_second": speed,
      "utilisation": speed * flops.train_flops_per_token(self._config.model, stage) / self._peak,
      "applied": bool(metrics.applied),
    }
    if self._writes:
      # JSON has no NaN or infinity: null, with "applied": false.
      finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()
      }
      _write_line(self._metrics, finite)
      for name in ("loss", "z_loss", "grad_norm", "lr", "tokens_per_second", "utilisation"):
        if finite[name] is not None:
          self._board.add_scalar(f"{stage.name}/{name}", finite[name], step)
      self._progress(step, line)
    if not line["applied"]:
      problem = (
        f"step {step} (stage {stage.name}): loss {line['loss']} or gradient norm "
        f"{line['grad_norm']} is not finite; the update was not applied"
      )
      if self._config.optimizer.nonfinite == "stop":
        raise NonFiniteError(
          f"{problem}. The last checkpoint is sound: lower the learning rate, or set "
          "config.optimizer.nonfinite to 'skip' to leave such steps out"
        )
      self.say(problem)

  def _progress(self, step: int, line: dict[str, Any]) -> None:
    terminal, now, last = sys.stderr.isatty(), time.perf_counter(), self._config.steps - 1
    if not terminal and now - self._shown < PLAIN_SECONDS and step not in (self._first_step, last):
      return
    self._shown = now
    tokens = line["tokens"] - self._config.tokens_before(self._first_step)
    left = self._config.tokens_before(self._config.steps) - line["tokens"]
    eta = int(self._busy * left / tokens)
    text = (
      f"{line['stage']}  step {step + 1}/{self._config.steps}  loss {line['loss']:.4f}  "
      f"{line['tokens_per_second']:,.0f} tokens/s  utilisation {line['utilisation']:.0%}  "
      f"ETA {eta // 3600}:{eta // 60 % 60:02}:{eta % 60:02}"
    )
    if terminal:
      filled = int(20 * (step + 1) / self._config.steps)
      bar = "#" * filled + "-" * (20 - filled)
      print(f"\r\x1b[K[{bar}] {text}", end="", file=sys.stderr, flush=True)
    else:
      print(text, file=sys.stderr, flush=True)


def _write_line(file: Any, record: dict[str, Any]) -> None:
  file.write(json.dumps(record, allow_nan=False) + "\n")
  file.flush()


def _cut_back(path: Path, first_step: int) -> None:
  """Drops what came after the steps that the run resumes with: a metrics line is about the step it
  names (kept if below `first_step`), an evals line about the steps before (kept if not above)."""
  if not path.exists():
    return
  last = first_step - 1 if path.name == METRICS else first_step
  kept = []
  for line in path.read_text().splitlines():
    try:
      record = json.loads(line)
    except json.JSONDecodeError:
      break  # a line that a killed process left half-written; it is the last one
    if record["step"] <= last:
      kept.append(line + "\n")
  write_atomically(path, ("".join(kept)).encode())
