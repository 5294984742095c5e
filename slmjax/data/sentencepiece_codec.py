"""SentencePiece models (Kudo and Richardson, arXiv:1808.06226).

SentencePiece writes a space as U+2581, so that a model that neither normalises text nor adds or
removes spaces decodes to exactly what it encoded, with one exception: U+2581 in the text itself
comes back as a space. `SentencePieceCodec` spells that character as its three UTF-8 bytes where the
model has byte pieces and leaves spaces alone, which closes the gap.
"""

from __future__ import annotations

from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

SPACE_MARK = "\u2581"


class SentencePieceCodec:
  """What `slmjax.data.tokenizer.Codec` asks for, of a SentencePiece model."""

  def __init__(self, data: bytes):
    """Raises RuntimeError for what is no SentencePiece model."""
    if not data:
      raise RuntimeError("empty")
    self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
    self.vocab_size: int = self._model.vocab_size()
    self.bos_id = _optional(self._model.bos_id())
    self.eos_id = _optional(self._model.eos_id())
    self.unk_id = _optional(self._model.unk_id())
    self.pad_id = _optional(self._model.pad_id())
    # Protobuf makes this module's classes at import, out of a type checker's sight.
    proto: Any = sentencepiece_model_pb2.ModelProto  # type: ignore[attr-defined]
    spec = proto.FromString(data)
    of_text = (proto.SentencePiece.NORMAL, proto.SentencePiece.BYTE)
    self._symbols = {i for i, piece in enumerate(spec.pieces) if piece.type not in of_text}
    self.normalisation: dict[str, Any] = {
      "rules": spec.normalizer_spec.name,
      "add_dummy_prefix": spec.normalizer_spec.add_dummy_prefix,
      "remove_extra_whitespaces": spec.normalizer_spec.remove_extra_whitespaces,
      "byte_fallback": spec.trainer_spec.byte_fallback,
    }
    byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
    keeps_spaces = not (
      spec.normalizer_spec.add_dummy_prefix or spec.normalizer_spec.remove_extra_whitespaces
    )
    self._mark_ids = byte_ids if keeps_spaces and spec.trainer_spec.byte_fallback else None

  def encode(self, text: str) -> list[int]:
    if self._mark_ids is None or SPACE_MARK not in text:
      return self._model.encode(text)
    first, *others = self._model.encode(text.split(SPACE_MARK))
    for ids in others:
      first += self._mark_ids + ids
    return first

  def decode(self, ids: list[int]) -> str:
    return self._model.decode([i for i in ids if i < self.vocab_size])

  def is_piece_of_text(self, token: int) -> bool:
    return token < self.vocab_size and token not in self._symbols


def _optional(special_id: int) -> int | None:
  return None if special_id < 0 else special_id
