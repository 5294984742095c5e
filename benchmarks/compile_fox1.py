"""Memory of full-size Fox-1's train step on its two targets, as their compilers see it.

  python -m benchmarks.compile_fox1            about fifteen minutes on two cores, no accelerator

Every stage twice: with the kernels that `auto` takes, which are ours, and with those in XLA alone
(`chunked`). On the TPU slice with 16 replicas: of 2048 rows of a weight, 256 chips would hold 8
each, half a bfloat16 tile, and libtpu would move weights and gradients by all-reduce, at about
twice the traffic of the all-gather and reduce-scatter that it finds for 16.

Needs requirements-compile.txt. Exits with 1 if a stage does not fit its chip.
"""

import dataclasses

import jax

from slmjax.errors import run_command
from slmjax.preflight import preflight, table
from slmjax.recipe import load_recipe

TARGETS = (("v5e:16x16", 16), ("h100:8", 1))  # and how many replicas


def main() -> int:
  jax.config.update("jax_platforms", "cpu")
  config = load_recipe("configs/fox1.py")
  fits = True
  for target, replica in TARGETS:
    for kernels in ("auto", "chunked"):
      compute = dataclasses.replace(config.compute, attention=kernels, cross_entropy=kernels)
      mesh = dataclasses.replace(config.mesh, replica=replica)
      reports = preflight(dataclasses.replace(config, compute=compute, mesh=mesh), target)
      print(f"kernels: {kernels}\n{table(target, reports)}\n", flush=True)
      fits = fits and all(report.fits for report in reports)
  return 0 if fits else 1


if __name__ == "__main__":
  run_command(main)
