"""The token store: one source's documents, tokenized once, laid end to end in fixed-size shards.

On disk, `STORE/SOURCE/SPLIT/` (SPLIT is `train` or `heldout`) holds

  index.json          what is here: counts, tokenizer, flags, checksums, fingerprint
  shard-00000.bin     token ids, raw little-endian uint16 (vocabulary up to 65536) or uint32
  documents.npy       uint64, the token offset at which each document starts
  document_bytes.npy  uint64, UTF-8 bytes of each document's original text

and `STORE/tokenizer.model` (or tokenizer.json) is the one tokenizer of every source in the store. A
document is `[BOS] ids... EOS`, with exactly one EOS, its last token. Nothing here depends on a
chunk length.
`StoreWriter` (slmjax.data.store_writer) makes one; this module reads it and needs only NumPy.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np

from slmjax.errors import UserError

FORMAT = 1
INDEX = "index.json"
STARTS = "documents.npy"
BYTES = "document_bytes.npy"
TOKENIZER_FILE = "tokenizer.model"
SPLITS = ("train", "heldout")
AGAIN = "delete the directory and tokenize the source again"


class StoreError(UserError):
  """A token store that can't be used as it is. The message is one line: what, where, what to do."""


@dataclasses.dataclass(frozen=True)
class TokenizerFacts:
  """What a store must know of the tokenizer that made it. Ids are None where there is none."""

  sha256: str
  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  unk_id: int | None
  pad_id: int | None
  # What the tokenizer does to text before cutting it (see Tokenizer.facts); plain JSON values.
  normalisation: Mapping[str, Any]


def token_dtype(vocab_size: int) -> np.dtype:
  """The dtype on disk of a token id."""
  return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def fingerprint(index: Mapping[str, Any]) -> str:
  """SHA-256 over the content, tokenizer and flags that an index names; not over names or paths.

  Equal fingerprints mean the same tokens in the same order. The shard size is part of it, the
  source's name, the split's name and the origin (where the text came from) are not.
  """
  facts = {k: v for k, v in index.items() if k not in ("source", "split", "origin", "fingerprint")}
  facts["shards"] = [{"tokens": s["tokens"], "sha256": s["sha256"]} for s in index["shards"]]
  facts["tokenizer"] = {k: v for k, v in index["tokenizer"].items() if k != "file"}
  return hashlib.sha256(
    json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()
  ).hexdigest()


def file_sha256(path: Path) -> str:
  """SHA-256 of a file's bytes, in hexadecimal."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class TokenStore:
  """One split of one source, opened for reading: a flat array of tokens and its document starts.

  Attributes: path, source, split, tokens, documents, bytes (UTF-8 bytes of the text), vocab_size,
  eos_id, bos_id and unk_id and pad_id (int or None), add_bos, fingerprint, index (the parsed
  index.json), document_starts (uint64 memory map), document_bytes (uint64 memory map).

  Safe to read from many threads. Pickles as its path and opens again on the other side.
  """

  def __init__(self, path: Path, index: Mapping[str, Any]):
    """Use `TokenStore.open`."""
    self.path = path
    self.index = index
    self.source: str = index["source"]
    self.split: str = index["split"]
    self.tokens: int = index["tokens"]
    self.documents: int = index["documents"]
    self.bytes: int = index["bytes"]
    self.vocab_size: int = index["vocab_size"]
    self.bos_id: int | None = index["special_ids"]["bos"]
    self.eos_id: int = index["special_ids"]["eos"]
    self.unk_id: int | None = index["special_ids"]["unk"]
    self.pad_id: int | None = index["special_ids"]["pad"]
    self.add_bos: bool = index["flags"]["add_bos"]
    self.fingerprint: str = index["fingerprint"]
    self._dtype = np.dtype(index["dtype"])
    self._shard_tokens: int = index["shards"][0]["tokens"]
    for shard in index["shards"]:
      _check_size(path / shard["file"], shard["tokens"] * self._dtype.itemsize)
    # Mapped at first use: a store of a trillion tokens has thousands of shards.
    self._shards: list[np.memmap | None] = [None] * len(index["shards"])
    self.document_starts = _open_array(path / STARTS, self.documents)
    self.document_bytes = _open_array(path / BYTES, self.documents)
    if self.document_starts[0] != 0 or self.document_starts[-1] >= self.tokens:
      raise StoreError(
        f"{path / STARTS}: document starts lie outside the {self.tokens} tokens; {AGAIN}"
      )

  @classmethod
  def open(cls, path: Path | str) -> TokenStore:
    """Opens `STORE/SOURCE/SPLIT`, checking sizes and the index, not the content (see `verify`).

    Raises:
      StoreError: a file is missing or of the wrong size, or the index contradicts itself.
    """
    path = Path(path)
    return cls(path, read_index(path))

  def __reduce__(self):
    return _reopen, (self.path, self.fingerprint)

  @property
  def tokenizer_path(self) -> Path:
    """The tokenizer's model file, at the root of the store."""
    return self.path.parent.parent / self.index["tokenizer"]["file"]

  def verify(self) -> None:
    """Reads every file once and compares its SHA-256 with the index.

    Raises:
      StoreError: names the first file that differs.
    """
    expected = {shard["file"]: shard["sha256"] for shard in self.index["shards"]}
    for name, sha256 in (expected | self.index["arrays"]).items():
      if file_sha256(self.path / name) != sha256:
        raise StoreError(f"{self.path / name}: content differs from its checksum; {AGAIN}")
    if self.tokenizer_path.exists():
      found = file_sha256(self.tokenizer_path)
      if found != self.index["tokenizer"]["sha256"]:
        raise StoreError(
          f"{self.tokenizer_path}: not the tokenizer that made {self.path}; put back the file with "
          f"SHA-256 {self.index['tokenizer']['sha256']}"
        )
    else:
      raise StoreError(f"{self.tokenizer_path}: missing; copy the tokenizer's model there")

  def read(self, start: int, count: int) -> np.ndarray:
    """Tokens [start, start + count) as a fresh int32 array.

    Raises:
      IndexError: the span doesn't lie within [0, tokens).
    """
    if start < 0 or count < 0 or start + count > self.tokens:
      raise IndexError(
        f"{self.path}: tokens [{start}, {start + count}) asked of a store with {self.tokens}"
      )
    out = np.empty(count, np.int32)
    done = 0
    while done < count:
      number, offset = divmod(start + done, self._shard_tokens)
      shard = self._shard(number)
      part = shard[offset : offset + count - done]
      out[done : done + len(part)] = part
      done += len(part)
    return out

  @overload
  def documents_begun(self, start: int, stop: int) -> int: ...
  @overload
  def documents_begun(self, start: np.ndarray, stop: np.ndarray) -> np.ndarray: ...
  def documents_begun(self, start, stop):
    """How many documents start in [start, stop): an int, or int64 of the arrays' shape.

    Raises:
      IndexError: a span doesn't lie within [0, tokens].
    """
    start_N, stop_N = np.broadcast_arrays(np.asarray(start), np.asarray(stop))
    if np.any(start_N < 0) or np.any(stop_N > self.tokens) or np.any(start_N > stop_N):
      raise IndexError(f"{self.path}: a span outside [0, {self.tokens}] or with start > stop")
    # As uint64: for another dtype searchsorted would first convert the whole memory map.
    below_start = np.searchsorted(self.document_starts, start_N.astype(np.uint64))
    below_stop = np.searchsorted(self.document_starts, stop_N.astype(np.uint64))
    begun = below_stop - below_start
    return int(begun) if begun.ndim == 0 else begun.astype(np.int64)

  def _shard(self, number: int) -> np.ndarray:
    shard = self._shards[number]
    if shard is None:
      # Two threads may both map it; either map is right and the loser is dropped.
      shard = np.memmap(self.path / self.index["shards"][number]["file"], self._dtype, mode="r")
      self._shards[number] = shard
    return shard


def _reopen(path: Path, expected: str) -> TokenStore:
  store = TokenStore.open(path)
  if store.fingerprint != expected:
    raise StoreError(f"{path}: was replaced by another store while in use; start the run again")
  return store


def read_index(path: Path) -> dict[str, Any]:
  """Reads and checks `path/index.json`.

  Raises:
    StoreError: absent, not of this format, or contradicting itself.
  """
  file = path / INDEX
  try:
    index = json.loads(file.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise StoreError(
      f"{file}: no such file, so no store; make it with python -m slmjax.data.tokenize"
    ) from None
  except OSError as error:
    raise StoreError(f"{file}: can't be read ({error.strerror}); check the path") from None
  except ValueError:
    raise StoreError(f"{file}: not valid JSON; {AGAIN}") from None
  if not isinstance(index, dict) or index.get("format") != FORMAT:
    raise StoreError(f"{file}: not a token store of format {FORMAT}; {AGAIN}")
  try:
    actual = fingerprint(index)
    lengths = [shard["tokens"] for shard in index["shards"]]
    full, last = lengths[:-1], lengths[-1]
    consistent = (
      actual == index["fingerprint"]
      and sum(lengths) == index["tokens"]
      and all(length == lengths[0] for length in full)
      and 0 < last <= lengths[0]
      and index["dtype"] == token_dtype(index["vocab_size"]).str
    )
  except (KeyError, TypeError, IndexError) as error:
    raise StoreError(f"{file}: incomplete ({error!r}); {AGAIN}") from None
  if not consistent:
    raise StoreError(f"{file}: contradicts its own fingerprint (edited or damaged); {AGAIN}")
  return index


def _check_size(file: Path, expected: int) -> None:
  try:
    size = file.stat().st_size
  except FileNotFoundError:
    raise StoreError(f"{file}: missing; {AGAIN}") from None
  if size != expected:
    raise StoreError(f"{file}: {size} bytes where the index says {expected}; {AGAIN}")


def _open_array(file: Path, length: int) -> np.ndarray:
  try:
    array = np.load(file, mmap_mode="r")
  except FileNotFoundError:
    raise StoreError(f"{file}: missing; {AGAIN}") from None
  except (ValueError, EOFError):
    raise StoreError(f"{file}: truncated or not a NumPy file; {AGAIN}") from None
  if array.shape != (length,) or array.dtype != np.uint64:
    found = f"{array.dtype}{list(array.shape)}"
    raise StoreError(f"{file}: holds {found} where the index says uint64[{length}]; {AGAIN}")
  return array
