"""Devices that this machine does not have, to compile for: TPU slices and NVIDIA GPU nodes.

A TPU slice comes from libtpu, which is used as a compiler only; GPUs come from JAX's CUDA plugin,
told the facts of a device that it then does not look for. Neither needs a driver.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from slmjax.errors import UserError

_INSTALL = "run `pip install -r requirements-compile.txt`"
_EXAMPLES = "v5e:16x16, v5p:4x4x4, v6e:4x4 (TPU), h100:8 or a100:8 (GPU)"
_TPU_DIMENSIONS = {"v5e": 2, "v5p": 3, "v6e": 2}
_GPUS_PER_NODE = 8

# What a CUDA driver would report, in the units of XLA's GpuDeviceInfoProto.
_EVERY_GPU = {
  "threads_per_block_limit": 1024,
  "threads_per_warp": 32,
  "threads_per_core_limit": 2048,
  "shared_memory_per_block": 49_152,
  "registers_per_core_limit": 65_536,
  "registers_per_block_limit": 65_536,
  "block_dim_limit_x": 2**31 - 1,
  "block_dim_limit_y": 65_535,
  "block_dim_limit_z": 65_535,
}
_GPUS: dict[str, dict[str, Any]] = {
  "a100": {
    "kind": "NVIDIA A100-SXM4-80GB",
    "capability": (8, 0),
    "core_count": 108,
    "fpus_per_core": 64,
    "clock_rate_ghz": 1.41,
    "memory_bandwidth": 2_039_040_000_000,
    "l2_cache_size": 40 * 2**20,
    "device_memory_size": 85_100_068_864,
    "shared_memory_per_core": 167_936,
    "shared_memory_per_block_optin": 166_912,
  },
  "h100": {
    "kind": "NVIDIA H100 80GB HBM3",
    "capability": (9, 0),
    "core_count": 132,
    "fpus_per_core": 128,
    "clock_rate_ghz": 1.98,
    "memory_bandwidth": 3_352_320_000_000,
    "l2_cache_size": 50 * 2**20,
    "device_memory_size": 84_942_979_072,
    "shared_memory_per_core": 233_472,
    "shared_memory_per_block_optin": 232_448,
  },
}


def devices(name: str) -> list[jax.Device]:
  """Compile-only devices of a target such as `v5e:16x16` or `h100:8`.

  Raises:
    UserError: the name is not one of a target, or the target's compiler is not installed.
  """
  family, _, size = name.partition(":")
  if family in _TPU_DIMENSIONS:
    if not re.fullmatch("x".join([r"[1-9]\d*"] * _TPU_DIMENSIONS[family]), size):
      example = "x".join(["4"] * _TPU_DIMENSIONS[family])
      raise UserError(f"topology {name!r}: {family} takes its sides, as in {family}:{example}")
    return _tpu_devices(name)
  if family in _GPUS:
    if not re.fullmatch(r"[1-9]\d*", size):
      raise UserError(f"topology {name!r}: {family} takes a number of GPUs, as in {family}:8")
    return _gpu_devices(family, int(size))
  raise UserError(f"topology {name!r} is unknown; use a name such as {_EXAMPLES}")


def missing_compiler(name: str) -> str | None:
  """What has to be installed before `devices(name)` can work, or None."""
  if name.partition(":")[0] in _TPU_DIMENSIONS:
    return None if _installed("libtpu") else f"libtpu is not installed: {_INSTALL}"
  if not _installed("jax_plugins.xla_cuda13"):
    return f"JAX's CUDA plugin is not installed: {_INSTALL}"
  return None if _has_ptxas() else f"ptxas, NVIDIA's assembler, is not installed: {_INSTALL}"


def _tpu_devices(name: str) -> list[jax.Device]:
  _require_compiler(name)
  # libtpu reads these when it loads. It would otherwise ask a cloud's metadata server what machine
  # this is, and refuse to load twice on one machine, though it is only going to compile.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
  try:
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
  except jax.errors.JaxRuntimeError as error:
    raise UserError(
      f"topology {name!r}: libtpu has no such slice ({_first_line(error)})"
    ) from error


def _gpu_devices(family: str, count: int) -> list[jax.Device]:
  _require_compiler(f"{family}:{count}")
  if count > _GPUS_PER_NODE and count % _GPUS_PER_NODE:
    raise UserError(
      f"topology '{family}:{count}': more than one node means whole nodes of {_GPUS_PER_NODE}"
    )
  nodes = -(-count // _GPUS_PER_NODE)
  shape = f"1x{nodes}x{count // nodes}"  # slices, nodes, GPUs of a node
  topology = topologies.get_topology_desc(
    platform="cuda", topology_name=shape, topology=shape, target_config=gpu_target(family)
  )
  return list(topology.devices)


def gpu_target(family: str) -> str:
  """XLA's description of a GPU as a GpuTargetConfigProto in text form."""
  facts = dict(_GPUS[family])
  kind = facts.pop("kind")
  major, minor = facts.pop("capability")
  info = " ".join(f"{key}: {value}" for key, value in {**_EVERY_GPU, **facts}.items())
  return (
    f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
    'platform_name: "CUDA" runtime_version { major: 13 } dnn_version_info { major: 9 minor: 8 } '
    f'device_description_str: "{kind}"'
  )


def _require_compiler(name: str) -> None:
  missing = missing_compiler(name)
  if missing:
    raise UserError(f"topology {name!r}: {missing}")


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # the package around it is not there either
    return False


def _has_ptxas() -> bool:
  """Whether XLA will find ptxas: in NVIDIA's wheel, or on the PATH."""
  wheel = importlib.util.find_spec("nvidia")
  places = [] if wheel is None else list(wheel.submodule_search_locations or ())
  found = any(path.exists() for place in places for path in Path(place).glob("*/bin/ptxas"))
  return found or shutil.which("ptxas") is not None


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0]
