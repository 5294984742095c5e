"""Chooses the blocks of the TPU attention kernels, with no TPU: by what the compiler makes of them.

  python -m slmjax.kernels.tune --chip=v5e

Compiles forward and backward of every known shape with several sizes of blocks, and estimates from
the compiler's bundles how long two kinds of rows of 8192 positions take: one document as long as
the row, and documents of lognormal lengths with a mean of 600. The blocks with the smallest product
of both are written to slmjax/kernels/attention/tiles.json. Needs requirements-compile.txt; about
ten minutes on two cores.
"""

import argparse
import functools
import json
import sys
from typing import Any

import jax
import numpy as np

from slmjax.errors import run_command
from slmjax.kernels import programs
from slmjax.kernels.attention import pallas_tpu, tiles, walks
from slmjax.kernels.attention.blocks import Blocks
from slmjax.kernels.inspect import tpu
from slmjax.kernels.inspect.tpu import TpuKernel
from slmjax.kernels.shapes import ATTENTION, AttentionShape

LENGTH = 8192
PACKED_ROWS = 16
MEAN_DOCUMENT = 600

# What a step of the grid costs beside its computation: about a third of a microsecond.
STEP_BUNDLES = 500


def candidates(shape: AttentionShape) -> list[Blocks]:
  """Blocks with enough rows to fill the matrix units, and no more than fit."""
  return [
    Blocks(queries, keys)
    for queries in (128, 256, 512, 1024)
    for keys in ((512, 1024) if shape.width <= 128 else (256, 512))
    if 384 <= shape.group * queries <= 2048
  ]


@functools.cache
def rows(kind: str) -> tuple[np.ndarray, ...]:
  """Segment ids of dense or packed rows."""
  if kind == "dense":
    return tuple(walks.row_segments([LENGTH], LENGTH))
  lengths = walks.lognormal_lengths(MEAN_DOCUMENT, PACKED_ROWS * LENGTH)
  return tuple(walks.row_segments(lengths, LENGTH))


@functools.cache
def steps(kind: str, blocks: Blocks) -> tuple[float, int]:
  """Steps of the walk and blocks of queries, per row."""
  visits = walks.visits(rows(kind), *blocks)
  return visits.minimum / len(rows(kind)), LENGTH // blocks.queries


def bundles(kind: str, blocks: Blocks, kernels: list[TpuKernel]) -> float:
  """Of a row and one key/value head: the forward twice, because the backward recomputes it."""
  total, query_blocks = steps(kind, blocks)
  forward, backward = (
    total * (kernel.hot.bundles + STEP_BUNDLES)
    + query_blocks * (kernel.bundles - kernel.hot.bundles)
    for kernel in kernels
  )
  return 2 * forward + backward


def compiled(
  dump: tpu.Dump, chip: str, shape: AttentionShape, blocks: Blocks, length: int
) -> list[TpuKernel]:
  """Forward and backward of one row with these blocks; none if they do not fit."""

  def attend(*arrays: Any, scale: float) -> jax.Array:
    return pallas_tpu.attention(
      *arrays, scale=scale, window=None, softcap=None, slopes_N=None, blocks=blocks
    )[0]

  program = programs.lower_attention(chip, shape, length, rows=1, attend=attend)
  try:
    kernels = dump.kernels("attention_", program.compile)
    return sorted(kernels, key=lambda kernel: "attention_o_lse" not in kernel.name)
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" in str(error):
      return []
    raise


def tune(chip: str, names: list[str]) -> dict[str, list[int]]:
  best = {}
  with tpu.dump() as dump:
    for name in names:
      shape = ATTENTION[name]
      found = {}
      for blocks in candidates(shape):
        if kernels := compiled(dump, chip, shape, blocks, 2048):
          dense, packed = (bundles(kind, blocks, kernels) for kind in ("dense", "packed"))
          found[blocks] = dense * packed
          print(
            f"{chip} {name:10} {blocks.queries:5} {blocks.keys:5}  "
            f"dense {dense:12,.0f}  packed {packed:12,.0f}",
            file=sys.stderr,
            flush=True,
          )
      chosen = min(found, key=lambda blocks: found[blocks])
      best[tiles.key(shape.group, shape.width, shape.value_width)] = list(chosen)
  return best


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.kernels.tune",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--chip", required=True, choices=sorted(set(tiles.CHIPS.values())))
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")  # a compiler only: no chip of this machine is taken
  tuned = tune(args.chip, list(ATTENTION))
  tiles.write(args.chip, tuned)
  print(json.dumps({args.chip: tuned}))
  return 0


if __name__ == "__main__":
  run_command(main)
