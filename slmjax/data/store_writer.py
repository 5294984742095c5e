"""Writes one split of a token store (layout: slmjax.data.store), in bounded memory, all or nothing.

The split is built in a directory beside the final one and renamed when every file is on disk: a
reader sees a whole store or none, whatever kills the writer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from slmjax import durable
from slmjax.data import store, tokenizer_files

# 2**27 tokens: shards of 256 MiB at two bytes a token, 512 MiB at four.
SHARD_TOKENS = 1 << 27
NPY_HEADER = 128


class StoreWriter:
  """Context manager that writes `directory`, which must not exist: add documents, leave the block.

  Leaving the block normally publishes the split; leaving it by an exception removes all of it.

  Args:
    directory: the finished split, `STORE/SOURCE/SPLIT`.
    source: name of the corpus.
    split: "train" or "heldout".
    tokenizer: facts of the tokenizer, which must have an EOS.
    tokenizer_file: the name of its file at the root of the store.
    add_bos: put BOS before every document.
    shard_tokens: tokens of every shard but the last.
    origin: JSON values to keep in the index, outside the fingerprint.

  Raises:
    StoreError: the directory exists, the tokenizer lacks EOS (or BOS with add_bos), a document
      holds ids that aren't plain vocabulary, or no document came.
  """

  def __init__(
    self,
    directory: Path | str,
    *,
    source: str,
    split: str,
    tokenizer: store.TokenizerFacts,
    tokenizer_file: str = store.TOKENIZER_FILE,
    add_bos: bool = False,
    shard_tokens: int = SHARD_TOKENS,
    origin: Mapping[str, Any] | None = None,
  ):
    self.directory = Path(directory)
    if split not in store.SPLITS:
      raise store.StoreError(f"{directory}: split {split!r} is none of {', '.join(store.SPLITS)}")
    if shard_tokens < 1:
      raise store.StoreError(f"{directory}: shard_tokens is {shard_tokens}; it must be at least 1")
    if tokenizer.eos_id is None:
      raise store.StoreError(
        f"{directory}: the tokenizer has no EOS, which must close each document"
      )
    if add_bos and tokenizer.bos_id is None:
      raise store.StoreError(f"{directory}: add_bos, but the tokenizer has no BOS; drop add_bos")
    self._refuse_existing()
    self.tokens = self.documents = self.bytes = 0
    self._tokenizer, self._add_bos, self._shard_tokens = tokenizer, add_bos, shard_tokens
    self._tokenizer_file = tokenizer_file
    self._source, self._split, self.origin = source, split, dict(origin or {})
    self._dtype = store.token_dtype(tokenizer.vocab_size)
    self._tmp = self.directory.with_name(f"{self.directory.name}.tmp-{os.getpid()}")
    self._shards: list[dict[str, Any]] = []
    self._file: BinaryIO | None = None

  def __enter__(self) -> StoreWriter:
    self.directory.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(self._tmp, ignore_errors=True)  # of a dead process with our process id
    self._tmp.mkdir()
    self._arrays = {name: (self._tmp / name).open("w+b") for name in (store.STARTS, store.BYTES)}
    for array in self._arrays.values():
      array.write(bytes(NPY_HEADER))
    return self

  def __exit__(self, kind, value, traceback) -> None:
    try:
      if kind is None:
        self._publish()
    finally:
      for file in (self._file, *self._arrays.values()):
        if file is not None:
          file.close()
      shutil.rmtree(self._tmp, ignore_errors=True)

  def add(self, ids: np.ndarray, text_bytes: int) -> None:
    """Appends a document.

    Args:
      ids: [T] integers, the text alone: BOS and EOS are added here.
      text_bytes: UTF-8 bytes of the original text.
    """
    facts = self._tokenizer
    if ids.size and (ids.min() < 0 or ids.max() >= facts.vocab_size):
      raise store.StoreError(
        f"{self.directory}: document {self.documents} has ids outside [0, {facts.vocab_size})"
      )
    for name, special in (("BOS", facts.bos_id), ("EOS", facts.eos_id)):
      if special is not None and np.any(ids == special):
        raise store.StoreError(
          f"{self.directory}: document {self.documents} has {name} (id {special}) inside its text; "
          "encode text without special tokens"
        )
    head = [facts.bos_id] if self._add_bos else []
    document = np.concatenate([head, ids, [facts.eos_id]]).astype(self._dtype)
    self._arrays[store.STARTS].write(struct.pack("<Q", self.tokens))
    self._arrays[store.BYTES].write(struct.pack("<Q", text_bytes))
    self.tokens += len(document)
    self.documents += 1
    self.bytes += text_bytes
    while len(document):
      if self._file is None:
        self._file = (self._tmp / f"shard-{len(self._shards):05d}.bin").open("wb", 1 << 20)
        self._hash, self._filled = hashlib.sha256(), 0
      part = document[: self._shard_tokens - self._filled]
      document = document[len(part) :]
      self._hash.update(part.data)
      self._file.write(part.data)
      self._filled += len(part)
      if self._filled == self._shard_tokens:
        self._close_shard()

  def _close_shard(self) -> None:
    assert self._file is not None
    name = f"shard-{len(self._shards):05d}.bin"
    self._shards.append({"file": name, "tokens": self._filled, "sha256": self._hash.hexdigest()})
    durable.sync_and_close(self._file)
    self._file = None

  def _publish(self) -> None:
    if not self.documents:
      raise store.StoreError(f"{self.directory}: no documents to write; give the source some text")
    if self._file is not None:
      self._close_shard()
    for file in self._arrays.values():
      file.seek(0)
      file.write(npy_header(self.documents))
      durable.sync_and_close(file)
    facts = self._tokenizer
    index: dict[str, Any] = {
      "format": store.FORMAT,
      "source": self._source,
      "split": self._split,
      "tokens": self.tokens,
      "documents": self.documents,
      "bytes": self.bytes,
      "dtype": self._dtype.str,
      "vocab_size": facts.vocab_size,
      "special_ids": {
        "bos": facts.bos_id,
        "eos": facts.eos_id,
        "unk": facts.unk_id,
        "pad": facts.pad_id,
      },
      "tokenizer": {
        "file": self._tokenizer_file,
        "sha256": facts.sha256,
        "normalisation": dict(facts.normalisation),
      },
      "flags": {"add_bos": self._add_bos},
      "shards": self._shards,
      "arrays": {name: store.file_sha256(self._tmp / name) for name in self._arrays},
      "origin": self.origin,
    }
    index["fingerprint"] = store.fingerprint(index)
    durable.write_atomically(self._tmp / store.INDEX, json.dumps(index, indent=1).encode() + b"\n")
    self._refuse_existing()
    self._tmp.rename(self.directory)
    durable.sync_directory(self.directory.parent)

  def _refuse_existing(self) -> None:
    if self.directory.exists():
      raise store.StoreError(f"{self.directory}: exists already; delete it or choose another name")


def install_tokenizer(model: Path, root: Path) -> None:
  """Copies a tokenizer's files to the root of a store, once for all its sources.

  Raises:
    StoreError: another tokenizer is there.
  """
  check_tokenizer(model, root)
  if tokenizer_files.find(root) is None:
    tokenizer_files.copy(model, root)


def check_tokenizer(model: Path, root: Path) -> None:
  """Raises StoreError when the store at `root` belongs to another tokenizer than `model`."""
  if not tokenizer_files.same(model, root):
    raise store.StoreError(
      f"{tokenizer_files.find(root)}: another tokenizer than {model}; a store has one: choose "
      "another store directory"
    )


def npy_header(length: int) -> bytes:
  """The .npy (version 1.0) header of a uint64 vector, always NPY_HEADER bytes long.

  A fixed length lets the vector grow on disk while its length is unknown. Format:
  https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
  """
  body = f"{{'descr': '<u8', 'fortran_order': False, 'shape': ({length},), }}"
  size = NPY_HEADER - 10
  return b"\x93NUMPY\x01\x00" + struct.pack("<H", size) + body.ljust(size - 1).encode() + b"\n"
