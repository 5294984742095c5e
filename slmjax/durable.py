"""Files that are whole and on disk, or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: Path, data: bytes) -> None:
  """Writes a file whole or not at all, making its directory where there is none."""
  path.parent.mkdir(parents=True, exist_ok=True)
  tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  try:
    file = tmp.open("wb")
    file.write(data)
    sync_and_close(file)
    tmp.rename(path)
  finally:
    tmp.unlink(missing_ok=True)
  sync_directory(path.parent)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
  """A folder to be filled under a temporary name, which appears as `path` when it is whole."""
  path.absolute().parent.mkdir(parents=True, exist_ok=True)
  tmp = path.with_name(f"{path.name}.tmp-{os.getpid()}")
  try:
    tmp.mkdir()
    yield tmp
    sync_directory(tmp)
    tmp.rename(path)
  finally:
    shutil.rmtree(tmp, ignore_errors=True)
  sync_directory(path.absolute().parent)


def sync_directory(path: Path) -> None:
  """Makes a directory's entries durable."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def sync_and_close(file: BinaryIO) -> None:
  """Closes a file when its content is on disk."""
  file.flush()
  os.fsync(file.fileno())
  file.close()
