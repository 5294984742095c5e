"""Trains: the one command. The same command resumes.

  python -m slmjax.main --config=configs/fox1.py:tiny --workdir=runs/tiny
  python -m slmjax.main --config=configs/fox1.py --explain
  python -m slmjax.main --config=configs/fox1.py --workdir=DIR --config.mesh.tensor=4

On a TPU pod slice or under SLURM start it on every host with --distributed. Elsewhere give each
process --coordinator=HOST:PORT --processes=N --process=I.
"""

import argparse
from pathlib import Path

import jax
from absl import logging

from slmjax import explain, train
from slmjax.errors import UserError, run_command
from slmjax.recipe import parse_with_recipe


def main() -> int:
  logging.set_verbosity(logging.ERROR)  # libraries' own chatter; ours goes to standard error
  args, config = parse_with_recipe(flags())
  if args.json and not args.explain:
    raise UserError("--json only goes with --explain; a run writes metrics.jsonl in its --workdir")
  if args.explain:
    explain.show(config, as_json=args.json)
    return 0
  if args.workdir is None:
    raise UserError("--workdir is missing: the folder for checkpoints and metrics")
  start_processes(args)
  return train.run(config, args.workdir)


def flags() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.main",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  add = parser.add_argument
  add("--workdir", type=Path, help="run folder: checkpoints, metrics, config")
  add("--explain", action="store_true", help="print the whole plan and exit")
  add("--json", action="store_true", help="with --explain: print one JSON object")
  add("--distributed", action="store_true", help="one of several hosts, found by JAX")
  add("--coordinator", help="HOST:PORT of process 0")
  add("--processes", type=int, help="how many processes there are")
  add("--process", type=int, help="which of them this is")
  return parser


def start_processes(args: argparse.Namespace) -> None:
  """Joins the other processes, if the flags say that there are any."""
  given = [value is not None for value in (args.coordinator, args.processes, args.process)]
  if any(given) and not all(given):
    raise UserError("--coordinator, --processes and --process go together")
  if any(given) and args.distributed:
    raise UserError("give either --distributed or --coordinator, --processes and --process")
  if any(given):
    # Collectives between CPU processes; accelerators bring their own and ignore it.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(args.coordinator, args.processes, args.process)
  elif args.distributed:
    jax.distributed.initialize()


if __name__ == "__main__":
  run_command(main)
