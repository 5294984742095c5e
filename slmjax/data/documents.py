"""Finds the documents in text files: where each one lies and a hash of its text, not the texts.

A `.jsonl` file holds one JSON object a line, a `.txt` file is one document. Every text is strict
UTF-8. The set of documents, its split and its shuffle depend on the texts alone: not on file names,
the order of files or how many processes looked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from slmjax.errors import UserError

SUFFIXES = (".jsonl", ".txt")


class InputError(UserError):
  """Input that can't be tokenized. The message is one line: file (and line), what, what to do."""


@dataclasses.dataclass(frozen=True)
class Location:
  """Where a document lies, and the BLAKE2b-128 hash of its text."""

  path: Path
  offset: int
  length: int
  hash: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Found:
  """The documents of one file: per document offset, length and the two halves of its hash."""

  columns: list[array]
  empty: int


@dataclasses.dataclass(frozen=True)
class Corpus:
  """The distinct, non-empty documents of some files, ordered by the hash of their text.

  Attributes:
    files: the files, in the order in which they were read.
    file_N: int64 index into files.
    offset_N: uint64 bytes before the document in its file.
    length_N: uint64 bytes of the document in its file.
    high_N: uint64, the first half of the hash.
    low_N: uint64, the second half of the hash.
    duplicates: documents dropped because another has the same text.
    empty: documents dropped because there is nothing but white space in them.
  """

  files: Sequence[Path]
  file_N: np.ndarray
  offset_N: np.ndarray
  length_N: np.ndarray
  high_N: np.ndarray
  low_N: np.ndarray
  duplicates: int
  empty: int

  @property
  def documents(self) -> int:
    return len(self.file_N)

  @property
  def sha256(self) -> str:
    """Of all hashes: equal for equal sets of texts."""
    hashes = np.stack([self.high_N, self.low_N], axis=1).astype("<u8")
    return hashlib.sha256(hashes.tobytes()).hexdigest()

  def location(self, i: int) -> Location:
    return Location(
      self.files[self.file_N[i]],
      int(self.offset_N[i]),
      int(self.length_N[i]),
      (int(self.high_N[i]), int(self.low_N[i])),
    )

  def split(self, fraction: float) -> dict[str, np.ndarray]:
    """Indices of the documents by split, int64: train, and heldout unless fraction is 0.

    A document is held out when its hash is small enough, so that a text is in the same split of
    whatever source it is in and stays there as the source grows. When chance holds out none, the
    document with the smallest hash is.

    Raises:
      InputError: a split would be empty.
    """
    every_N = np.arange(self.documents)
    if fraction == 0:
      return {"train": every_N}
    count = int(np.searchsorted(self.high_N, np.uint64(fraction * 2.0**64)))
    count = max(count, 1)
    if count == self.documents:
      raise InputError(
        f"{self.documents} distinct documents leave none to train on when a fraction of {fraction} "
        "is held out; give more documents or a smaller --heldout_fraction"
      )
    return {"train": every_N[count:], "heldout": every_N[:count]}

  def shuffled(self, every_N: np.ndarray, seed: int) -> np.ndarray:
    """The given documents in the order of a hash keyed by the seed."""
    key = _mix(np.array([seed], np.int64).view(np.uint64))
    return every_N[np.argsort(_mix(self.low_N[every_N] ^ key), kind="stable")]


def list_files(inputs: Iterable[Path | str]) -> tuple[list[Path], int]:
  """The text files of files and directories (walked in sorted order), and how many others lay by.

  Raises:
    InputError: an input doesn't exist or is a file of another kind, or there is no text file.
  """
  files: list[Path] = []
  ignored = 0
  for given in map(Path, inputs):
    if given.is_dir():
      inside = sorted(Path(folder, name) for folder, _, names in os.walk(given) for name in names)
      texts = [path for path in inside if path.suffix in SUFFIXES]
      files += texts
      ignored += len(inside) - len(texts)
    elif not given.exists():
      raise InputError(f"{given}: no such file or directory; check --input")
    elif given.suffix not in SUFFIXES:
      raise InputError(f"{given}: neither .jsonl nor .txt; convert it to one of them")
    else:
      files.append(given)
  if not files:
    raise InputError("no .jsonl or .txt file in the inputs; check --input")
  return files, ignored


def scan(path: Path, text_key: str) -> Found:
  """Reads one file through.

  Raises:
    InputError: unreadable, invalid UTF-8, or a line that isn't an object with the text.
  """
  columns = [array("Q") for _ in range(4)]
  empty = offset = 0
  try:
    with path.open("rb") as file:
      raws: Iterable[bytes] = file if path.suffix == ".jsonl" else [file.read()]
      for line, raw in enumerate(raws, start=1):
        if path.suffix != ".jsonl" or raw.strip():
          text = _text(raw, path, line, text_key)
          if text.strip():
            row = (offset, len(raw), *_hash(_encoded(text, path, line)))
            for column, value in zip(columns, row, strict=True):
              column.append(value)
          else:
            empty += 1
        offset += len(raw)
  except OSError as error:
    raise InputError(f"{path}: can't be read ({error.strerror}); check the file") from None
  return Found(columns, empty)


def gather(files: Sequence[Path], found: Iterable[Found]) -> Corpus:
  """Joins what `scan` found in each of the files, dropping duplicates (the first one stays).

  Raises:
    InputError: there is no document.
  """
  columns = [array("Q") for _ in range(5)]
  empty = 0
  for number, part in enumerate(found):
    columns[0].extend(array("Q", [number]) * len(part.columns[0]))
    for column, values in zip(columns[1:], part.columns, strict=True):
      column.extend(values)
    empty += part.empty
  file_N, offset_N, length_N, high_N, low_N = (np.array(column, np.uint64) for column in columns)
  if not len(file_N):
    raise InputError(f"{files[0]}: no documents in it or any other input ({empty} empty ones)")
  order = np.lexsort((low_N, high_N))  # stable: of equal texts the first stays first
  high_N, low_N = high_N[order], low_N[order]
  distinct = np.ones(len(order), bool)
  distinct[1:] = (high_N[1:] != high_N[:-1]) | (low_N[1:] != low_N[:-1])
  kept = order[distinct]
  return Corpus(
    files=files,
    file_N=file_N[kept].astype(np.int64),
    offset_N=offset_N[kept],
    length_N=length_N[kept],
    high_N=high_N[distinct],
    low_N=low_N[distinct],
    duplicates=len(order) - len(kept),
    empty=empty,
  )


def read(location: Location, text_key: str) -> str:
  """The text of a document that `scan` found.

  Raises:
    InputError: the file has changed since.
  """
  changed = f"{location.path}: changed while it was being tokenized; run the command again"
  try:
    with location.path.open("rb") as file:
      file.seek(location.offset)
      raw = file.read(location.length)
    text = _text(raw, location.path, 0, text_key)
  except (OSError, InputError):
    raise InputError(changed) from None
  if _hash(text.encode()) != location.hash:
    raise InputError(changed)
  return text


def _text(raw: bytes, path: Path, line: int, text_key: str) -> str:
  try:
    text = raw.decode()
  except UnicodeDecodeError as error:
    line += raw[: error.start].count(b"\n")
    raise InputError(
      f"{path}:{line}: invalid UTF-8 at byte {error.start} ({raw[error.start]:#04x}); convert the "
      "file to UTF-8"
    ) from None
  if path.suffix != ".jsonl":
    return text
  try:
    record = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise InputError(f"{path}:{line}: not valid JSON ({error}); fix or remove the line") from None
  if not isinstance(record, dict) or text_key not in record:
    raise InputError(
      f"{path}:{line}: not an object with the key {text_key!r}; name the right one with --text_key"
    )
  if not isinstance(record[text_key], str):
    raise InputError(
      f"{path}:{line}: {text_key!r} isn't a string; name the right key with --text_key"
    )
  return record[text_key]


def _encoded(text: str, path: Path, line: int) -> bytes:
  try:
    return text.encode()
  except UnicodeEncodeError:
    raise InputError(
      f"{path}:{line}: half a surrogate pair (\\ud800 to \\udfff) alone isn't text; fix or remove "
      "the line"
    ) from None


def _hash(data: bytes) -> tuple[int, int]:
  digest = hashlib.blake2b(data, digest_size=16).digest()
  return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _mix(x_N: np.ndarray) -> np.ndarray:
  """The output function of SplitMix64 (Steele, Lea and Flood, 2014), a bijection of uint64."""
  x_N = x_N + np.uint64(0x9E3779B97F4A7C15)
  x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_N ^ (x_N >> np.uint64(31))
