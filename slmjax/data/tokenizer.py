"""SentencePiece tokenizers: loading any model, and training a small lossless one.

SentencePiece (Kudo and Richardson, arXiv:1808.06226) writes a space as U+2581, so that a model that
neither normalises text nor adds or removes spaces decodes to exactly what it encoded, with one
exception: U+2581 in the text itself comes back as a space. `Tokenizer` spells that character as its
three UTF-8 bytes where the model has byte pieces and leaves spaces alone, which closes the gap.
"""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from slmjax.data.store import TokenizerFacts
from slmjax.durable import write_atomically
from slmjax.errors import UserError

SPACE_MARK = "\u2581"
# Ids as in Gemma's tokenizer (google/gemma-2b, tokenizer.model).
PAD, EOS, BOS, UNK = range(4)
# Training reads documents in pieces of this many characters, so that one huge file can't be all of
# the sample.
PIECE_CHARS = 1 << 14
# Enough text for a vocabulary of a few thousand, a second or two of training.
SAMPLE_BYTES = 8 << 20


class TokenizerError(UserError):
  """A tokenizer that can't be loaded or trained. One line: what, where, what to do."""


class Tokenizer:
  """A SentencePiece model. Pickles as its path.

  Attributes: path, sha256 (of the model file), vocab_size, bos_id, eos_id, unk_id, pad_id (None
  where the model has none), facts (for a token store's index).
  """

  def __init__(self, path: Path, model: bytes):
    """Use `Tokenizer.load`."""
    self.path = path
    self.sha256 = hashlib.sha256(model).hexdigest()
    self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab_size: int = self._model.vocab_size()
    self.bos_id = _optional(self._model.bos_id())
    self.eos_id = _optional(self._model.eos_id())
    self.unk_id = _optional(self._model.unk_id())
    self.pad_id = _optional(self._model.pad_id())
    # Protobuf makes this module's classes at import, out of a type checker's sight.
    spec = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
    byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    self.facts = TokenizerFacts(
      sha256=self.sha256,
      vocab_size=self.vocab_size,
      bos_id=self.bos_id,
      eos_id=self.eos_id,
      unk_id=self.unk_id,
      pad_id=self.pad_id,
      normalisation={
        "rules": spec.normalizer_spec.name,
        "add_dummy_prefix": spec.normalizer_spec.add_dummy_prefix,
        "remove_extra_whitespaces": spec.normalizer_spec.remove_extra_whitespaces,
        "byte_fallback": spec.trainer_spec.byte_fallback,
      },
    )
    keeps_spaces = not (
      spec.normalizer_spec.add_dummy_prefix or spec.normalizer_spec.remove_extra_whitespaces
    )
    self._mark_ids = byte_ids if keeps_spaces and spec.trainer_spec.byte_fallback else None

  @classmethod
  def load(cls, path: Path | str) -> Tokenizer:
    """Loads a SentencePiece model file.

    Raises:
      TokenizerError: the file can't be read or is no SentencePiece model.
    """
    path = Path(path)
    try:
      model = path.read_bytes()
    except OSError as error:
      raise TokenizerError(
        f"{path}: can't read the tokenizer ({error.strerror}); give a SentencePiece .model file"
      ) from None
    try:
      if not model:
        raise RuntimeError("empty")
      return cls(path, model)
    except RuntimeError:
      raise TokenizerError(
        f"{path}: not a SentencePiece model; give the .model file that its training wrote"
      ) from None

  def __reduce__(self):
    return Tokenizer.load, (self.path,)

  def encode(self, text: str) -> list[int]:
    """Ids of a text, without BOS or EOS."""
    if self._mark_ids is None or SPACE_MARK not in text:
      return self._model.encode(text)
    first, *others = self._model.encode(text.split(SPACE_MARK))
    for ids in others:
      first += self._mark_ids + ids
    return first

  def encode_batch(self, texts: list[str]) -> list[list[int]]:
    """Ids of each text, as `encode` gives them."""
    return [self.encode(text) for text in texts]

  def decode(self, ids: list[int]) -> str:
    """The text of ids; control symbols (BOS, EOS, PAD) give nothing."""
    return self._model.decode(ids)


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


def _optional(special_id: int) -> int | None:
  return None if special_id < 0 else special_id
