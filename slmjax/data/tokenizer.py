"""Tokenizers: loading any of two kinds, and training a small lossless one.

A SentencePiece model, or a tokenizer.json of the Hugging Face library `tokenizers`, which is
imported for such a file only.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import sentencepiece

from slmjax.data.sentencepiece_codec import SentencePieceCodec
from slmjax.data.store import TokenizerFacts
from slmjax.data.tokenizer_files import is_json
from slmjax.durable import write_atomically
from slmjax.errors import UserError

# Ids as in Gemma's tokenizer (google/gemma-2b, tokenizer.model).
PAD, EOS, BOS, UNK = range(4)
# Training reads documents in pieces of this many characters, so that one huge file can't be all of
# the sample.
PIECE_CHARS = 1 << 14
# Enough text for a vocabulary of a few thousand, a second or two of training.
SAMPLE_BYTES = 8 << 20


class TokenizerError(UserError):
  """A tokenizer that can't be loaded or trained. One line: what, where, what to do."""


class Codec(Protocol):
  """What each kind of tokenizer does in its own way; see `Tokenizer` for the meanings."""

  vocab_size: int
  bos_id: int | None
  eos_id: int | None
  unk_id: int | None
  pad_id: int | None
  normalisation: dict[str, Any]

  def encode(self, text: str) -> list[int]: ...
  def decode(self, ids: list[int]) -> str: ...
  def is_piece_of_text(self, token: int) -> bool: ...


class Tokenizer:
  """A tokenizer of either kind. Pickles as its path.

  Attributes: path, sha256 (of the model file), vocab_size (all ids are below it), bos_id, eos_id,
  unk_id, pad_id (None where there is none), facts (for a token store's index).
  """

  def __init__(self, path: Path, sha256: str, codec: Codec):
    """Use `Tokenizer.load`."""
    self.path = path
    self.sha256 = sha256
    self._codec = codec
    self.vocab_size = codec.vocab_size
    self.bos_id, self.eos_id = codec.bos_id, codec.eos_id
    self.unk_id, self.pad_id = codec.unk_id, codec.pad_id
    self.facts = TokenizerFacts(
      sha256=sha256,
      vocab_size=self.vocab_size,
      bos_id=self.bos_id,
      eos_id=self.eos_id,
      unk_id=self.unk_id,
      pad_id=self.pad_id,
      normalisation=codec.normalisation,
    )

  @classmethod
  def load(cls, path: Path | str) -> Tokenizer:
    """Loads a tokenizer.json if the file's name ends so, else a SentencePiece model.

    Raises:
      TokenizerError: the file can't be read or is no tokenizer.
    """
    path = Path(path)
    try:
      data = path.read_bytes()
    except OSError as error:
      raise TokenizerError(
        f"{path}: can't read the tokenizer ({error.strerror}); give a SentencePiece .model file or "
        "a tokenizer.json"
      ) from None
    sha256 = hashlib.sha256(data).hexdigest()
    return cls(path, sha256, _json_codec(path, data) if is_json(path) else _sp_codec(path, data))

  def __reduce__(self):
    return Tokenizer.load, (self.path,)

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS or EOS, and never a special id for text that spells one."""
    return self._codec.encode(text)

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, as `encode` gives them."""
    return [self._codec.encode(text) for text in texts]

  def decode(self, ids: list[int]) -> str:
    """The text of ids; control symbols (BOS, EOS, PAD) and unknown ids give nothing."""
    return self._codec.decode(ids)

  def is_piece_of_text(self, token: int) -> bool:
    """Whether text is made of this id: not of control symbols, nor of ids that do not exist."""
    return self._codec.is_piece_of_text(token)


def _sp_codec(path: Path, data: bytes) -> Codec:
  try:
    return SentencePieceCodec(data)
  except RuntimeError:
    raise TokenizerError(
      f"{path}: not a SentencePiece model; give the .model file that its training wrote, or a "
      "tokenizer.json"
    ) from None


def _json_codec(path: Path, data: bytes) -> Codec:
  from slmjax.data.json_codec import JsonCodec  # with `tokenizers`, which few runs need

  try:
    return JsonCodec(data, path)
  except (ValueError, KeyError, TypeError) as error:
    reason = " ".join(str(error).split())
    raise TokenizerError(
      f"{path}: not a usable tokenizer.json ({reason}); give the file that the tokenizers library "
      "saved, with its tokenizer_config.json"
    ) from None


def train(
  texts: Iterable[str],
  out: Path | str,
  vocab_size: int,
  *,
  seed: int = 0,
  sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
  """Trains a lossless byte-pair model with byte fallback, writes it to `out` and loads it.

  The model depends on the set of texts, not their order: it is trained on a sample of about
  `sample_bytes` (UTF-8) drawn by a hash keyed with `seed`. Memory stays near `sample_bytes`.
  Ids: PAD 0, EOS 1, BOS 2, UNK 3, then 256 bytes, then pieces.

  Raises:
    TokenizerError: the text is empty, or too little for this vocabulary size.
  """
  out = Path(out)
  sample = _sample(texts, seed, sample_bytes)
  if not sample:
    raise TokenizerError(f"{out}: no text to train a tokenizer on; give at least one document")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(sample),
      model_writer=model,
      model_type="bpe",
      vocab_size=vocab_size,
      normalization_rule_name="identity",
      add_dummy_prefix=False,
      remove_extra_whitespaces=False,
      allow_whitespace_only_pieces=True,
      split_digits=True,
      byte_fallback=True,
      pad_id=PAD,
      eos_id=EOS,
      bos_id=BOS,
      unk_id=UNK,
      # In bytes, and four is the most that a character takes: nothing is skipped for its length.
      max_sentence_length=4 * PIECE_CHARS,
      num_threads=1,
      minloglevel=3,
    )
  except RuntimeError as error:
    reason = " ".join(str(error).split())
    raise TokenizerError(
      f"{out}: no tokenizer of {vocab_size} pieces from this text; give more text or another "
      f"vocabulary size ({reason})"
    ) from None
  write_atomically(out, model.getvalue())
  return Tokenizer.load(out)


def _sample(texts: Iterable[str], seed: int, budget: int) -> list[str]:
  """Pieces of the texts with the smallest keyed hashes, as many as reach `budget` bytes."""
  key = seed.to_bytes(8, "little", signed=True)
  kept: list[tuple[int, str]] = []  # a heap, the largest hash first
  hashes: set[int] = set()
  total = 0
  for text in texts:
    for start in range(0, len(text), PIECE_CHARS):
      piece = text[start : start + PIECE_CHARS]
      data = piece.encode()
      rank = -int.from_bytes(hashlib.blake2b(data, digest_size=16, key=key).digest(), "little")
      if rank in hashes:
        continue
      hashes.add(rank)
      heapq.heappush(kept, (rank, piece))
      total += len(data)
      while total - (size := len(kept[0][1].encode())) >= budget:
        hashes.remove(heapq.heappop(kept)[0])
        total -= size
  return [piece for _, piece in sorted(kept)]
