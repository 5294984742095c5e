"""What NVIDIA's compiler made of the kernels of a program: registers, spills, memory, inner loops.

XLA writes down the PTX of a program that it compiles, and how it launches each kernel. NVIDIA's
assembler, the one that XLA calls, makes machine code of the PTX and says what it needs, and their
disassembler lists it. No GPU is asked. Kernels that Mosaic GPU compiles are not in XLA's PTX.
"""

import dataclasses
import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from slmjax.errors import UserError

# Products of bfloat16 that the tensor core of a warp's quarter of a multiprocessor adds up in a
# cycle: NVIDIA's peak of the chip, spread over clock, multiprocessors and quarters.
_PRODUCTS_PER_CYCLE = {"sm_80": 256, "sm_90": 512}


# Newer versions of XLA write PTX only if asked to. Optimizing is the default; tests turn it off.
_OPTIONS: dict[str, str | bool] = {
  "xla_dump_emitter_re": "ptx",
  "xla_backend_optimization_level": "3",
  "xla_llvm_disable_expensive_passes": False,
}


@dataclasses.dataclass(frozen=True)
class Loop:
  """An innermost loop: what one warp issues in one turn."""

  instructions: int
  tensor: int  # of them for the tensor cores
  special: int  # of them exponentials, reciprocals and the like
  spilled: int  # of them loads and stores of spilled registers
  tensor_cycles: float  # that the tensor core of the warp works on it

  @property
  def tensor_share(self) -> float:
    """Of a lone warp's time, as if all that is no product took one cycle and hid none. What other
    warps hide raises it; so it compares kernels and does not predict time."""
    return self.tensor_cycles / (self.tensor_cycles + self.instructions - self.tensor)


@dataclasses.dataclass(frozen=True)
class Kernel:
  """One kernel of a program. Registers are per thread, memory in bytes per block of threads."""

  name: str
  target: str
  grid: tuple[int, ...]
  threads: int
  shared_memory: int
  registers: int
  spilled: int
  serialized: bool  # the compiler found no registers to let products run beside the rest
  loops: tuple[Loop, ...]  # those with products, or all if there are none


def report(lowered: jax.stages.Lowered) -> list[Kernel]:
  """Compiles the program and reads each Triton kernel in it, in the order of their names.

  Args:
    lowered: a program lowered for one kind of GPU, which may be that of `topology.devices`.

  Raises:
    UserError: a tool is not installed, or there is no such kernel in the program.
  """
  if missing := missing_tool():
    raise UserError(missing)
  wanted = set(kernels_in(lowered.as_text()))
  if not wanted:
    raise UserError("there is no Triton kernel in this program")
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    lowered.compile(compiler_options={**_OPTIONS, "xla_dump_to": name})
    launches = {
      launch["name"]: launch
      for path in folder.glob("*.thunk_sequence.txt")
      for launch in _LAUNCH.finditer(path.read_text())
      if launch["name"] in wanted
    }
    kernels = [
      _read(entry, path, launches[entry])
      for path in folder.glob("*.ptx")
      for entry in re.findall(r"\.visible \.entry (\w+)\(", path.read_text())
      if entry in launches
    ]
  return sorted(kernels, key=lambda kernel: kernel.name)


def kernels_in(text: str) -> list[str]:
  """The names of a program's calls of Triton kernels, from its text before or after compiling."""
  calls = [line for line in text.splitlines() if "__gpu$xla.gpu.triton" in line]
  return sorted(name for line in calls for name in re.findall(r'\bname = "(\w+)"', line))


_LAUNCH = re.compile(
  r"kCustomKernel \[.*?\] (?P<name>\w+) grid: \[(?P<grid>[\d, ]+)\] "
  r"threads: \[(?P<threads>\d+).*?shared_memory: (?P<shared>\d+) bytes"
)


def _read(name: str, ptx: Path, launch: re.Match[str]) -> Kernel:
  target = re.findall(r"^\.target (\w+)", ptx.read_text(), re.MULTILINE)[0]
  cubin = ptx.with_suffix(".cubin")
  said = _run("ptxas", "-v", f"-arch={target}", str(ptx), "-o", str(cubin))
  about = re.split(r"Compiling entry function", said)
  (mine,) = (text for text in about if text.lstrip().startswith(f"'{name}'"))
  registers, spills = (
    re.findall(pattern, mine)[0] for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill st")
  )
  machine = machine_code(_run("nvdisasm", "-c", str(cubin)), name)
  return Kernel(
    name=name,
    target=target,
    grid=tuple(int(x) for x in launch["grid"].split(",")),
    threads=int(launch["threads"]),
    shared_memory=int(launch["shared"]),
    registers=int(registers),
    spilled=int(spills),
    serialized=any("wgmma" in x and f"'{name}'" in x for x in said.splitlines()),
    loops=loops(machine, target),
  )


def machine_code(listing: str, name: str) -> str:
  """The part of a disassembler's listing that is the kernel of that name."""
  sections = re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.MULTILINE)
  (mine,) = (text for text in sections if re.match(rf"{name}\b", text))
  return mine


def loops(machine: str, target: str) -> tuple[Loop, ...]:
  """The innermost loops of a kernel's machine code: those with products, or all without any."""
  names: list[str] = []
  labels: dict[str, int] = {}
  spans: list[tuple[int, int]] = []
  for line in machine.splitlines():
    if label := re.match(r"(\.L\w+):", line):
      labels[label[1]] = len(names)
    elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ +)?([A-Z][\w.]*)(.*);", line):
      names.append(found[1])
      back = re.search(r"`\((\.L\w+)\)", found[2])
      if found[1].startswith("BRA") and back and back[1] in labels:
        spans.append((labels[back[1]], len(names)))
  inner = [x for x in spans if not any(x != y and x[0] <= y[0] and y[1] <= x[1] for y in spans)]
  every = tuple(_loop(names[start:end], target) for start, end in inner)
  return tuple(loop for loop in every if loop.tensor) or every


def _loop(names: Sequence[str], target: str) -> Loop:
  products = [_products(name) for name in names]
  return Loop(
    instructions=len(names),
    tensor=sum(x > 0 for x in products),
    special=sum(name.startswith("MUFU") for name in names),
    spilled=sum(name.startswith(("LDL", "STL")) for name in names),
    tensor_cycles=sum(products) / _PRODUCTS_PER_CYCLE[target.removesuffix("a")],
  )


def _products(name: str) -> float:
  """Of numbers, that one warp's share of an instruction adds up; those of TF32 count twice."""
  if group := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)\.", name):
    count = int(group[1]) * int(group[2]) * int(group[3]) / 4  # four warps share one instruction
  elif alone := re.match(r"HMMA\.16(8)(\d+)\.", name):
    count = 16 * int(alone[1]) * int(alone[2])
  else:
    return 0
  return 2 * count if "TF32" in name else count


def table(kernels: Sequence[Kernel]) -> str:
  """The kernels as lines of text, a line per loop."""
  head = (
    "kernel",
    "registers",
    "spilled",
    "shared",
    "loop",
    "products",
    "special",
    "share",
    "note",
  )
  rows: list[tuple[str, ...]] = [head]
  for x in kernels:
    note = "products serialized" if x.serialized else ""
    for loop in x.loops:
      share = f"{loop.tensor_share:.2f}"
      counts = (loop.instructions, loop.tensor, loop.special)
      needs = (x.registers, x.spilled, x.shared_memory)
      rows.append((x.name, *map(str, needs), *map(str, counts), share, note))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
    for row in rows
  )


def as_json(kernels: Sequence[Kernel]) -> list[dict[str, Any]]:
  def loop(x: Loop) -> dict[str, Any]:
    return {**dataclasses.asdict(x), "tensor_share": round(x.tensor_share, 3)}

  return [{**dataclasses.asdict(x), "loops": [loop(y) for y in x.loops]} for x in kernels]


def missing_tool() -> str | None:
  """What has to be installed before `report` can work, or None."""
  missing = [name for name in ("ptxas", "nvdisasm") if _tool(name) is None]
  if missing:
    return f"{missing[0]} is not installed: run `pip install -r requirements-compile.txt`"
  return None


def _tool(name: str) -> str | None:
  """NVIDIA's tool in one of their wheels, or on the PATH."""
  wheel = importlib.util.find_spec("nvidia")
  places = [] if wheel is None else list(wheel.submodule_search_locations or ())
  found = [path for place in places for path in Path(place).glob(f"*/bin/{name}")]
  return str(found[0]) if found else shutil.which(name)


def _run(name: str, *arguments: str) -> str:
  command = [_tool(name) or name, *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise UserError(f"{name} failed: {(done.stderr or done.stdout).strip()[-300:]}")
  return done.stdout + done.stderr
