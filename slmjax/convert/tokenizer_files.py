"""The files of a tokenizer that go with a model in either direction."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from slmjax.convert.hf_files import read_json
from slmjax.data.tokenizer_files import find

# What folders of Hugging Face have beside config and weights that belongs to the tokenizer or to
# generation.
FILES = (
  "tokenizer.model",
  "tokenizer.json",
  "tokenizer_config.json",
  "special_tokens_map.json",
  "added_tokens.json",
  "vocab.json",
  "merges.txt",
  "generation_config.json",
  "chat_template.jinja",
)


def copy_files(source: Path, target: Path) -> list[str]:
  """Copies those that are there; their names."""
  found = [name for name in FILES if (source / name).is_file()]
  for name in found:
    shutil.copyfile(source / name, target / name)
  return found


def describe_tokenizer(folder: Path) -> dict[str, Any] | None:
  """What a checkpoint records of the tokenizer in a folder: the digest of its file, and whether
  texts begin with BOS. None where there is none."""
  path = find(folder)
  if path is None:
    return None
  return {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "add_bos": _adds_bos(folder)}


def _adds_bos(folder: Path) -> bool:
  if (folder / "tokenizer_config.json").is_file():
    said = read_json(folder / "tokenizer_config.json").get("add_bos_token")
    if isinstance(said, bool):
      return said
  if (folder / "tokenizer.json").is_file():
    return _begins_special(read_json(folder / "tokenizer.json").get("post_processor"))
  # A SentencePiece model alone: the classes for such files (Llama, Gemma) add it by themselves.
  return True


def _begins_special(processor: Any) -> bool:
  """Whether a post-processor of the library `tokenizers` puts a special token before a text."""
  if not isinstance(processor, dict):
    return False
  if processor.get("type") == "Sequence":
    return any(_begins_special(p) for p in processor.get("processors") or [])
  if processor.get("type") in ("BertProcessing", "RobertaProcessing"):
    return True
  template = processor.get("single") or []
  return bool(template) and "SpecialToken" in template[0]
