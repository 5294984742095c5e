"""What libtpu made of the Mosaic kernels of a program: bundles, matrix units, spills, memory.

A TPU core executes one bundle of instructions a cycle as long as nothing stalls. libtpu can be told
to write the bundles of every kernel that it compiles, and which units each one occupies. The kernel
is cut into blocks at its branches; the *hot block* is the one that occupies the matrix units most,
which for our kernels is the computation of one step.
"""

import contextlib
import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slmjax.errors import UserError

_UNITS = ("mxu", "xlu", "valu", "vpop", "eup", "vload", "fill", "vstore", "spill", "salu")
# Of the hundred accounts of a kernel that libtpu can write, the last ones.
_FLAGS = (
  "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
  "--xla_jf_dump_llo_pass_label_regex=.*final.*"
)
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|\d+)\s+(?:(LH|LB|LE|PB|PF|CT)\b)?[^:{]*:[ >]*(\{.*)")
_VMEM = re.compile(r"#(allocation\d+) \[[^\n]*?space=vmem, size = (0x[0-9a-f]+)")


@dataclasses.dataclass(frozen=True)
class HotBlock:
  """The straight run of bundles that does most of a kernel's matrix products.

  Attributes:
    bundles: how many; cycles, if nothing stalls.
    fed: share of them in which a matrix unit is at work.
    occupied: share of all matrix units' time that is used: 1 if all units work in every bundle.
    vector: share of the slots for vector arithmetic that are used.
    spills, fills: vector registers saved to memory and read back.
  """

  bundles: int
  fed: float
  occupied: float
  vector: float
  spills: int
  fills: int


@dataclasses.dataclass(frozen=True)
class TpuKernel:
  """One kernel: `name` as the program calls it, all its bundles, the bytes of vector memory that it
  reserves (buffers of its blocks, scratch, spilled registers), and its hot block."""

  name: str
  bundles: int
  vmem: int
  hot: HotBlock


class Dump:
  """A folder into which libtpu writes what it makes of kernels, from its first use on."""

  def __init__(self, folder: Path):
    self._folder = folder

  def kernels(self, name: str, compile_program: Callable[[], Any]) -> list[TpuKernel]:
    """Compiles, and reads the kernels with `name` in that of their `pallas_call`, in the order
    of their names: libtpu compiles several at a time."""
    for file in self._folder.iterdir():
      file.unlink()
    compile_program()
    found = []
    for file in sorted(self._folder.glob("*-final_bundles.txt")):
      stem = re.fullmatch(r"(\d+-(.*?))-\d+-final_bundles\.txt", file.name)
      if stem and name in stem[2]:
        found.append(read_kernel(self._folder, stem[1]))
    if not found:
      raise UserError(f"the compiled program has no TPU kernel with {name!r} in its name")
    return sorted(found, key=lambda kernel: kernel.name)


@contextlib.contextmanager
def dump() -> Iterator[Dump]:
  """libtpu with dumps on. It reads its flags when it is first loaded, so only once in a process.

  Raises:
    UserError: LIBTPU_INIT_ARGS is set already.
  """
  if os.environ.get("LIBTPU_INIT_ARGS"):
    raise UserError("LIBTPU_INIT_ARGS is set; unset it: this command needs flags of its own")
  with tempfile.TemporaryDirectory() as folder:
    os.environ["LIBTPU_INIT_ARGS"] = _FLAGS.format(folder=folder)
    yield Dump(Path(folder))


def kernels_in(text: str) -> list[str]:
  """The names of a compiled program's calls of Mosaic kernels, from its text."""
  calls = [line for line in text.splitlines() if 'custom_call_target="tpu_custom_call"' in line]
  return sorted(name for line in calls for name in re.findall(r"(\w+)/pallas_call", line))


def read_kernel(folder: Path, stem: str) -> TpuKernel:
  """A kernel from its two files: the bundles, and which units each of them occupies."""
  bundles = read_bundles(_only(folder, f"{stem}-*-final_bundles.txt").read_text())
  capacity, use = read_utilization(
    _only(folder, f"{stem}-*-final_hlo-static-per-bundle-utilization.txt").read_text()
  )
  if len(use) != len(bundles):
    raise UserError(f"libtpu wrote {len(bundles)} bundles but figures for {len(use)} ({stem})")
  blocks = [use[start:stop] for start, stop in cut(bundles)]
  hottest = max(blocks, key=lambda block: sum(row[0] for row in block))
  name = stem.split("-", 1)[1]
  if not any(row[0] for row in hottest):
    raise UserError(f"kernel {name} has no matrix product")

  def share(unit: str) -> float:
    column = _UNITS.index(unit)
    return sum(row[column] for row in hottest) / (capacity[column] * len(hottest))

  def count(unit: str) -> int:
    return sum(row[_UNITS.index(unit)] for row in hottest)

  return TpuKernel(
    name=name,
    bundles=len(use),
    vmem=vector_memory(
      _only(folder, f"{stem}-*-pre-finalize-registers-and-allocations.txt").read_text()
    ),
    hot=HotBlock(
      bundles=len(hottest),
      fed=sum(row[0] > 0 for row in hottest) / len(hottest),
      occupied=share("mxu"),
      vector=share("valu"),
      spills=count("spill"),
      fills=count("fill"),
    ),
  )


def read_bundles(text: str) -> list[tuple[str, str]]:
  """Label (of a branch's target, or empty) and instructions of each bundle."""
  found = (_BUNDLE.match(line) for line in text.splitlines())
  return [(match[1] or "", match[2]) for match in found if match]


def read_utilization(text: str) -> tuple[list[int], list[list[int]]]:
  """How often the chip has each unit, and how many of them each bundle occupies."""
  lines = (line.split() for line in text.splitlines() if re.fullmatch(r"[\d ]+", line))
  rows = [[int(x) for x in line] for line in lines if len(line) == len(_UNITS)]
  if len(rows) < 2:
    raise UserError("libtpu's account of its bundles has a form that this tool does not know")
  return rows[0], rows[1:]


def vector_memory(text: str) -> int:
  """Bytes of all allocations in vector memory."""
  return sum(int(size, 16) for size in dict(_VMEM.findall(text)).values())


def cut(bundles: list[tuple[str, str]]) -> list[tuple[int, int]]:
  """The blocks [start, stop) without a branch inside or a branch's target after the first."""
  starts = {0}
  for i, (label, instructions) in enumerate(bundles):
    if label:
      starts.add(i)
    if "sbr.rel" in instructions and i + 1 < len(bundles):
      starts.add(i + 1)
  ordered = [*sorted(starts), len(bundles)]
  return list(itertools.pairwise(ordered))


def _only(folder: Path, pattern: str) -> Path:
  files = [file for file in folder.glob(pattern) if "schedule-analysis" not in file.name]
  if len(files) != 1:
    raise UserError(f"expected one file {pattern} of libtpu's, found {len(files)}")
  return files[0]


def table(kernels: Sequence[TpuKernel]) -> str:
  """The kernels as lines of text."""
  head = ("kernel", "bundles", "VMEM MiB", "hot block", "fed", "occupied", "vector", "spills")
  rows: list[tuple[str, ...]] = [(*head, "fills")]
  for x in kernels:
    shares = (f"{share:.3f}" for share in (x.hot.fed, x.hot.occupied, x.hot.vector))
    sizes = (str(x.bundles), f"{x.vmem / 2**20:.1f}", str(x.hot.bundles))
    rows.append((x.name, *sizes, *shares, str(x.hot.spills), str(x.hot.fills)))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
  )
