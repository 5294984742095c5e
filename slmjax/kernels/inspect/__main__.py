"""Compiles a kernel for a chip that need not be there, and prints what the compiler made of it.

  python -m slmjax.kernels.inspect --op=attention --chip=v5e --shape=fox1 --length=8192
  python -m slmjax.kernels.inspect --op=attention --chip=h100 --shape=tinyllama --length=2048 --json
  python -m slmjax.kernels.inspect --op=cross_entropy --chip=v5e --shape=fox1 --length=2048

For TPUs, per kernel: bundles (a bundle is a cycle if nothing stalls), vector memory, and of the hot
block (the run of bundles with most of the matrix products) its bundles, the share of them in which
a matrix unit is at work (fed), the share of all matrix units' time that is used (occupied), that of
the vector slots, and registers spilled and filled.

For GPUs, per kernel and inner loop: registers per thread, bytes spilled, shared memory, the loop's
instructions, how many are for tensor cores and how many special functions, and the tensor cores'
share of a lone warp's time.

Needs requirements-compile.txt.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import jax

from slmjax.errors import UserError, run_command
from slmjax.kernels import programs, shapes
from slmjax.kernels.inspect import gpu, tpu

OPS: dict[str, Mapping[str, Any]] = {
  "attention": shapes.ATTENTION,
  "cross_entropy": shapes.CROSS_ENTROPY,
}
GPUS = ("a100", "h100")


def lowered(op: str, chip: str, shape: str, length: int, rows: int) -> jax.stages.Lowered:
  """The op's program with our kernel for the chip.

  Raises:
    UserError: no such shape of this op, or no kernel of it for this chip.
  """
  if shape not in OPS[op]:
    raise UserError(f"--shape={shape} is not one of {op}: {', '.join(OPS[op])}")
  implementation = "pallas_gpu" if chip in GPUS else "pallas_tpu"
  if op == "attention":
    some = shapes.ATTENTION[shape]
    return programs.lower_attention(chip, some, length, rows=rows, implementation=implementation)
  if chip in GPUS:
    raise UserError("--op=cross_entropy has no kernel for GPUs: there it is XLA's")
  table = shapes.CROSS_ENTROPY[shape]
  return programs.lower_cross_entropy(chip, table, length, rows=rows, implementation=implementation)


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.kernels.inspect",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--op", required=True, choices=OPS)
  parser.add_argument("--chip", required=True, choices=programs.TARGETS)
  names = dict.fromkeys(name for known in OPS.values() for name in known)
  parser.add_argument("--shape", required=True, choices=names, help="heads and widths of a model")
  parser.add_argument("--length", type=int, default=2048, help="positions of a row (2048)")
  parser.add_argument("--rows", type=int, default=1, help="of the batch (1)")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # compilers only: no chip of this machine is taken

  def program() -> jax.stages.Lowered:
    return lowered(args.op, args.chip, args.shape, args.length, args.rows)

  found, text = report_gpu(program) if args.chip in GPUS else report_tpu(args.op, program)
  if args.json:
    named = {name: getattr(args, name) for name in ("op", "chip", "shape", "length", "rows")}
    print(json.dumps({**named, "kernels": found}))
  else:
    print(text)
  return 0


def report_tpu(
  op: str, program: Callable[[], jax.stages.Lowered]
) -> tuple[list[dict[str, Any]], str]:
  with tpu.dump() as dump:
    kernels = dump.kernels(op, lambda: program().compile())
  return [dataclasses.asdict(kernel) for kernel in kernels], tpu.table(kernels)


def report_gpu(program: Callable[[], jax.stages.Lowered]) -> tuple[list[dict[str, Any]], str]:
  kernels = gpu.report(program())
  return gpu.as_json(kernels), gpu.table(kernels)


if __name__ == "__main__":
  run_command(main)
