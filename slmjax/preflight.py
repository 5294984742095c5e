"""Compiles each stage's train step for a named target, on a machine that has none of its chips.

  python -m slmjax.preflight --config=configs/fox1.py --topology=v5e:16x16
  python -m slmjax.preflight --config=configs/fox1.py --topology=h100:8 --json

Prints the memory that the compiler wants per device, beside the chip's limit. Exits with 1 if a
stage does not fit. Needs requirements-compile.txt; a stage takes one or two minutes on two cores.
"""

import argparse
import dataclasses
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from slmjax import flops, sharding, topology
from slmjax.config import Config
from slmjax.errors import UserError, run_command
from slmjax.kernels.inspect import gpu, tpu
from slmjax.recipe import parse_with_recipe
from slmjax.resolve import resolve_mesh
from slmjax.train import compile_step


@dataclasses.dataclass(frozen=True)
class StageReport:
  """What a stage's train step needs on one device of a target. Sizes are bytes per device.

  Attributes:
    stage: its name.
    mesh: (replica, fsdp, context, tensor).
    microbatches: gradients accumulated per step.
    compile_seconds: on this machine.
    arguments, outputs, aliased, temporaries, code: the compiler's account; None where it refused
      the program, which leaves `need` alone known. `aliased` bytes are in arguments and outputs.
    need: all of it at once.
    limit: what the chip has for a program, and `limit_source` says why that much.
    kernels: our kernels that are in the program, by name; none where all is XLA's.
  """

  stage: str
  mesh: tuple[int, ...]
  microbatches: int
  compile_seconds: float
  arguments: int | None
  outputs: int | None
  aliased: int | None
  temporaries: int | None
  code: int | None
  need: int
  limit: int
  limit_source: str
  kernels: tuple[str, ...]

  @property
  def margin(self) -> int:
    return self.limit - self.need

  @property
  def fits(self) -> bool:
    return self.margin >= 0


def preflight(config: Config, target: str) -> list[StageReport]:
  """Compiles every stage for a target such as `v5e:16x16` or `h100:8`.

  Raises:
    UserError: an unknown target, a compiler that is not installed, or a config whose mesh or
      batches do not fit so many devices.
  """
  devices = topology.devices(target)
  chip = flops.chip(devices[0].device_kind)
  if chip is None:
    raise UserError(
      f"topology {target!r}: no memory limit is known for {devices[0].device_kind!r}; "
      "add it to CHIPS in slmjax/flops.py"
    )
  shape = resolve_mesh(config, len(devices))
  mesh = sharding.make_mesh(shape, devices)
  reports = []
  with jax.set_mesh(mesh):
    for index, stage in enumerate(config.stages):
      begin = time.perf_counter()
      found = _compiled(config, index, mesh)
      reports.append(
        StageReport(
          stage=stage.name,
          mesh=shape,
          microbatches=stage.microbatches(shape[0] * shape[1]),
          compile_seconds=time.perf_counter() - begin,
          **found,
          limit=chip.memory,
          limit_source=chip.memory_source,
        )
      )
  return reports


def _compiled(config: Config, stage_index: int, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The fields of a stage's report that the compiler fills in."""
  try:
    compiled = compile_step(config, stage_index, mesh)
  except jax.errors.JaxRuntimeError as error:
    unknown = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries", "code"))
    return {**unknown, "need": refused_bytes(str(error), error), "kernels": ()}
  memory, text = compiled.memory_analysis(), compiled.as_text()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes,
    "aliased": memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }
  kernels = dict.fromkeys([*tpu.kernels_in(text), *gpu.kernels_in(text)])
  need = sum(sizes.values()) - 2 * sizes["aliased"]
  return {**sizes, "need": need, "kernels": tuple(kernels)}


def refused_bytes(message: str, error: Exception) -> int:
  """How much a program would have needed, from libtpu's refusal; any other error is raised."""
  units = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
  for pattern in (r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"\(([\d.]+)([KMGT])\) exceeds"):
    found = re.search(pattern, message)
    if found and "RESOURCE_EXHAUSTED" in message:
      return int(float(found[1]) * units[found[2]])
  raise error


def table(target: str, reports: Sequence[StageReport]) -> str:
  """The reports as lines of text, sizes in GiB."""
  head = ("stage", "mesh", "micro", "compile", "args", "out", "alias", "temp", "need", "limit")
  rows: list[tuple[str, ...]] = [(*head, "margin", "fits")]
  for r in reports:
    parts = (r.arguments, r.outputs, r.aliased, r.temporaries, r.need, r.limit, r.margin)
    sizes = ("-" if size is None else f"{size / 2**30:.2f}" for size in parts)
    shape = "x".join(map(str, r.mesh))
    seconds = f"{r.compile_seconds:.0f} s"
    rows.append((r.stage, shape, str(r.microbatches), seconds, *sizes, "yes" if r.fits else "NO"))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    f"{target}: GiB per device; mesh is {' x '.join(sharding.AXES)}; "
    "need = args + out - alias + temp + code",
    *(
      "  ".join(
        cell.ljust(width) if i < 2 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
      )
      for row in rows
    ),
    f"limit: {reports[0].limit_source}",
    *(f"kernels of {r.stage}: {', '.join(r.kernels) or 'none but those of XLA'}" for r in reports),
  ]
  return "\n".join(lines)


def as_json(target: str, reports: Sequence[StageReport]) -> dict[str, Any]:
  stages = [{**dataclasses.asdict(r), "margin": r.margin, "fits": r.fits} for r in reports]
  return {"topology": target, "fits": all(r.fits for r in reports), "stages": stages}


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.preflight",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--topology", required=True, help="target, as v5e:16x16 or h100:8")
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  args, config = parse_with_recipe(parser)
  jax.config.update("jax_platforms", "cpu")  # compilers only: no chip of this machine is taken
  reports = preflight(config, args.topology)
  if args.json:
    print(json.dumps(as_json(args.topology, reports)))
  else:
    print(table(args.topology, reports))
  return 0 if all(report.fits for report in reports) else 1


if __name__ == "__main__":
  run_command(main)
