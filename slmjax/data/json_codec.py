"""Tokenizers of the Hugging Face library `tokenizers`: tokenizer.json, with tokenizer_config.json
beside it.

Special ids come from these two files and never from a model's config.json, which has them wrong in
some published models (Fox-1, LiteLlama).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from slmjax.data.tokenizer_files import JSON_CONFIG

# What published tokenizers call the end and the start of a text, for files that do not say it.
_EOS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|end▁of▁sentence|>")
_BOS = ("<s>", "<bos>", "<|begin_of_text|>", "<|begin▁of▁sentence|>")


class JsonCodec:
  """What `slmjax.data.tokenizer.Codec` asks for, of a tokenizer.json.

  Text is text: where it spells a special token it is cut like any other text.
  """

  def __init__(self, data: bytes, path: Path):
    """Raises ValueError for what is no tokenizer.json, or does not fit tokenizer_config.json."""
    self._model = tokenizers.Tokenizer.from_buffer(data)
    # What a file may have been saved with, and would change or cut a text.
    self._model.no_padding()
    self._model.no_truncation()
    self._model.encode_special_tokens = True
    spec = json.loads(data)
    # Not the number of tokens: their ids may have holes.
    self.vocab_size: int = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
    self._added = {token["id"] for token in spec["added_tokens"]}
    self.normalisation: dict[str, Any] = {
      "model": spec["model"].get("type"),
      "normalizer": _kind(spec["normalizer"]),
      "pre_tokenizer": _kind(spec["pre_tokenizer"]),
    }
    config = _read_config(path.with_name(JSON_CONFIG))
    self.eos_id = self._special(config, "eos_token", _EOS)
    self.bos_id = self._special(config, "bos_token", _BOS)
    if "bos_token" not in config and self.bos_id is None:
      # GPT-2 and its like: one token for both.
      bos = self._special({}, "bos_token", _EOS[:1])
      self.bos_id = bos if bos == self.eos_id else None
    unk = {"unk_token": spec["model"].get("unk_token")} | config
    self.unk_id = self._special(unk, "unk_token", ())
    self.pad_id = self._special(config, "pad_token", ())

  def encode(self, text: str) -> list[int]:
    # The batch of one, and `fast`: no offsets into the text are computed.
    (encoding,) = self._model.encode_batch_fast([text], add_special_tokens=False)
    return encoding.ids

  def decode(self, ids: list[int]) -> str:
    return self._model.decode(ids, skip_special_tokens=True)

  def is_piece_of_text(self, token: int) -> bool:
    return token < self.vocab_size and token not in self._added

  def _special(self, config: dict[str, Any], name: str, usual: tuple[str, ...]) -> int | None:
    """The id of the token that `config` names, or if it is silent of the first usual one there."""
    if name not in config:
      ids = (self._model.token_to_id(token) for token in usual)
      return next((i for i in ids if i in self._added), None)
    token = config[name]
    if isinstance(token, dict):
      token = token["content"]
    found = None if token is None else self._model.token_to_id(token)
    if found is None and token is not None and usual:
      raise ValueError(f"{JSON_CONFIG} names {name} {token!r}, which is not in the vocabulary")
    return found


def _kind(part: dict[str, Any] | None) -> str | None:
  """The type of a normalizer or pre-tokenizer: `NFC`, `Sequence(Prepend, Replace)`."""
  if part is None:
    return None
  inner = [_kind(item) for key in ("normalizers", "pretokenizers") for item in part.get(key) or ()]
  return f"{part['type']}({', '.join(map(str, inner))})" if inner else part["type"]


def _read_config(path: Path) -> dict[str, Any]:
  if not path.exists():
    return {}
  config = json.loads(path.read_bytes())
  if not isinstance(config, dict):
    raise ValueError(f"{path.name} is no JSON object")
  return config
