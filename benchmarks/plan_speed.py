"""Times the data plan: microseconds per row, by how many rows are asked for at once.

  python -m benchmarks.plan_speed
  python -m benchmarks.plan_speed --config=configs/fox1.py:tiny --json

A loader asks for the rows that one process holds of one microbatch, so 4 to 64 at a time. The
rows are drawn at random from each stage, so that caches help no more than in a run, the
stores are made up and just large enough. No file is read.
"""

import argparse
import json
import time

import numpy as np

from slmjax.config import Config
from slmjax.data.plan import Plan, demand
from slmjax.errors import run_command
from slmjax.recipe import load_recipe

BATCHES = (1, 4, 64, 1024)
ROWS = 4096  # timed per stage and batch size, at least; the best of three tries counts


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.plan_speed",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--config", default="configs/fox1.py", help="FILE:VARIANT (configs/fox1.py)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args = parser.parse_args()
  config = load_recipe(args.config)
  sizes = {name: max(1, sum(takes)) for name, takes in demand(config).items()}
  plan = Plan(config, sizes)
  results = {
    stage.name: {batch: measure(config, plan, i, batch) for batch in BATCHES}
    for i, stage in enumerate(config.stages)
  }
  if args.json:
    print(json.dumps({"config": args.config, "microseconds_per_row": results}))
    return
  print(f"{'microseconds per row':24}" + "".join(f"{f'{b} rows':>12}" for b in BATCHES))
  for name, figures in results.items():
    print(f"{name:24}" + "".join(f"{figures[b]:12.2f}" for b in BATCHES))


def measure(config: Config, plan: Plan, stage: int, batch: int) -> float:
  """Microseconds per row when `batch` neighbouring rows are asked for at a time."""
  rows = config.stages[stage].steps * config.stages[stage].rows
  batch = min(batch, rows)
  rng = np.random.default_rng(0)
  firsts = rng.integers(0, rows - batch + 1, -(-ROWS // batch))
  spans = [np.arange(first, first + batch) for first in firsts]
  best = float("inf")
  for _ in range(3):
    begin = time.process_time()  # not wall time: the machine may have other work
    for span in spans:
      plan.rows(stage, span)
    best = min(best, time.process_time() - begin)
  return best / len(spans) / batch * 1e6


if __name__ == "__main__":
  run_command(main)
