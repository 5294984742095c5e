"""`python -m tests.interrupted STEP SIGNAL FLAGS...`: the training command, which sends itself a
signal when it has dispatched a step. A real process and a real signal at an exact place."""

import os
import runpy
import sys
from typing import Any

from slmjax.metrics import Reporter


def main() -> None:
  step, number = int(sys.argv[1]), int(sys.argv[2])
  sys.argv[1:3] = []
  push = Reporter.push

  def interrupt(self: Reporter, pushed: int, metrics: Any) -> None:
    push(self, pushed, metrics)
    if pushed == step:
      os.kill(os.getpid(), number)

  Reporter.push = interrupt  # type: ignore[method-assign]
  runpy.run_module("slmjax.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
  main()
