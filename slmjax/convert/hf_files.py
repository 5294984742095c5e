"""Folders of safetensors: headers read and checked first, tensors one at a time.

A safetensors file is 8 bytes (the header's length, little endian), a JSON header that gives each
tensor's dtype, shape and place, and the tensors, end to end.
"""

import dataclasses
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from slmjax.durable import write_atomically
from slmjax.errors import UserError

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(ml_dtypes.bfloat16),
}
_LETTERS = {dtype: letters for letters, dtype in DTYPES.items()}

# Bytes of these and of what else may stand in a file: to check that the file is whole.
_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()}
_SIZES |= {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4, "F64": 8}
_SIZES |= {"I64": 8, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclasses.dataclass(frozen=True)
class Stored:
  """Where a tensor is. `dtype` is as the file names it; `start` is in bytes from the file's."""

  file: Path
  dtype: str
  shape: tuple[int, ...]
  start: int

  def load(self) -> np.ndarray:
    """The tensor, in memory of its own."""
    flat = np.fromfile(
      self.file, dtype=DTYPES[self.dtype], count=math.prod(self.shape), offset=self.start
    )
    return flat.reshape(self.shape)


def stored_in(folder: Path) -> dict[str, Stored]:
  """The tensors of a folder by name: of model.safetensors or of all files that the index names.

  Raises:
    UserError: no safetensors there, a file that is broken or truncated, an index that disagrees
      with its files.
  """
  if not folder.is_dir():
    raise UserError(f"{folder} is not a folder; name one with config.json and model.safetensors")
  if (folder / INDEX).exists():
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
      raise UserError(f"{folder / INDEX} has no weight_map; fetch it again")
    tensors: dict[str, Stored] = {}
    for name in sorted(set(weight_map.values())):
      tensors |= _read_header(folder / name)
    for name, file in weight_map.items():
      if name not in tensors or tensors[name].file.name != file:
        raise UserError(f"{folder / file} lacks {name}, which {INDEX} puts there; fetch it again")
    unlisted = sorted(set(tensors) - set(weight_map))
    if unlisted:
      raise UserError(
        f"{tensors[unlisted[0]].file} holds {unlisted[0]}, which {INDEX} does not list; "
        "fetch the folder again"
      )
    return tensors
  if (folder / ONE_FILE).exists():
    return _read_header(folder / ONE_FILE)
  pickles = sorted(folder.glob("*.bin"))
  if pickles:
    raise UserError(
      f"{pickles[0]} is a pickle, which runs code when it is opened, and there is no {ONE_FILE}; "
      "load the model with transformers and save it again with save_pretrained"
    )
  raise UserError(f"{folder} holds neither {ONE_FILE} nor {INDEX}")


def read_json(path: Path) -> dict[str, Any]:
  """The object in a JSON file."""
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise UserError(f"{path} is missing; the folder must be as save_pretrained leaves it") from None
  except ValueError as error:
    raise UserError(f"{path} is not JSON ({error}); fetch it again") from None
  if not isinstance(value, dict):
    raise UserError(f"{path} must hold a JSON object; fetch it again")
  return value


def _read_header(path: Path) -> dict[str, Stored]:
  """The tensors of one file; its size must be what the header says."""
  if not path.exists():
    raise UserError(f"{path} is missing, though {INDEX} names it; fetch it again")
  size = path.stat().st_size
  broken = f"{path} is not a whole safetensors file"
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
      raise UserError(f"{broken}: it ends within its header; fetch it again")
    try:
      header = json.loads(file.read(length))
      tensors = {
        name: Stored(path, entry["dtype"], tuple(entry["shape"]), entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
      }
      ends = {name: header[name]["data_offsets"][1] for name in tensors}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
      raise UserError(f"{broken} ({error}); fetch it again") from None
  for name, tensor in tensors.items():
    itemsize = _SIZES.get(tensor.dtype)
    if itemsize is None:
      raise UserError(f"{path}: {name} has dtype {tensor.dtype}, which cannot be converted")
    needed = math.prod(tensor.shape) * itemsize
    if ends[name] - tensor.start != needed:
      raise UserError(
        f"{path}: {name} takes {ends[name] - tensor.start} bytes, but {tensor.dtype} "
        f"{list(tensor.shape)} needs {needed}; fetch it again"
      )
  total = 0
  for start, end in sorted((tensor.start, ends[name]) for name, tensor in tensors.items()):
    if start != total:
      raise UserError(f"{broken}: its tensors overlap or leave gaps; fetch it again")
    total = end
  data = 8 + length
  if size != data + total:
    cut = [name for name in tensors if data + ends[name] > size]
    at = f", within {cut[0]}" if cut else ""
    raise UserError(
      f"{path} has {size} bytes and its header says {data + total}{at}; fetch it again"
    )
  return {
    name: dataclasses.replace(tensor, start=data + tensor.start) for name, tensor in tensors.items()
  }


def equal(one: Stored, other: Stored) -> bool:
  """Whether two tensors are the same to the bit, compared piece by piece."""
  if (one.shape, one.dtype) != (other.shape, other.dtype):
    return False
  left = math.prod(one.shape) * DTYPES[one.dtype].itemsize
  with one.file.open("rb") as a, other.file.open("rb") as b:
    a.seek(one.start)
    b.seek(other.start)
    while left > 0:
      size = min(left, 1 << 24)
      if a.read(size) != b.read(size):
        return False
      left -= size
  return True


class Writer:
  """Safetensors files of given tensors, filled in any order.

  All files are made at once, so that a tensor can be filled part by part as its parts are read.
  """

  def __init__(
    self,
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: np.dtype,
    shard_bytes: int,
  ):
    """Files of at most `shard_bytes` each, but for a tensor that is larger by itself."""
    self._folder = folder
    self._dtype = dtype
    self._places: dict[str, tuple[mmap.mmap, int]] = {}
    self._shapes = dict(shapes)
    self._files: list[mmap.mmap] = []
    shards = list(self._shards(shard_bytes))
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
      numbered = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
      file = numbered if len(shards) > 1 else ONE_FILE
      self._make(folder / file, names)
      weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
      total = sum(self._bytes(name) for name in self._shapes)
      index = {"metadata": {"total_size": total}, "weight_map": weight_map}
      write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())

  def __getitem__(self, name: str) -> np.ndarray:
    """The tensor, to be written into."""
    file, start = self._places[name]
    shape = self._shapes[name]
    return np.frombuffer(file, self._dtype, math.prod(shape), start).reshape(shape)

  def release(self) -> None:
    """Leaves to the system what was written, so that it is no memory of this process."""
    for file in self._files:
      file.madvise(mmap.MADV_DONTNEED)

  def close(self) -> None:
    """Everything on disk."""
    for file in self._files:
      file.flush()
    self.release()
    self._places.clear()
    self._files.clear()

  def _bytes(self, name: str) -> int:
    return math.prod(self._shapes[name]) * self._dtype.itemsize

  def _shards(self, shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name in self._shapes:
      if names and size + self._bytes(name) > shard_bytes:
        yield names
        names, size = [], 0
      names.append(name)
      size += self._bytes(name)
    yield names

  def _make(self, path: Path, names: list[str]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
      start, end = end, end + self._bytes(name)
      shape = list(self._shapes[name])
      header[name] = {
        "dtype": _LETTERS[self._dtype],
        "shape": shape,
        "data_offsets": [start, end],
      }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("w+b") as file:
      file.write(len(text).to_bytes(8, "little") + text)
      file.truncate(8 + len(text) + end)
      file.flush()
      data = mmap.mmap(file.fileno(), 0)
    self._files.append(data)
    for name in names:
      self._places[name] = (data, 8 + len(text) + header[name]["data_offsets"][0])
