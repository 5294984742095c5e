"""Which files make up a tokenizer, and under which names a folder holds one.

SentencePiece is one file, `tokenizer.model`. `tokenizer.json` (the `tokenizers` library) has beside
it `tokenizer_config.json`, which says what its special tokens are for.
"""

from pathlib import Path

from slmjax.data.store import TOKENIZER_FILE
from slmjax.durable import write_atomically

JSON = "tokenizer.json"
JSON_CONFIG = "tokenizer_config.json"


def is_json(path: Path) -> bool:
  """Whether a tokenizer's file is one of the `tokenizers` library, which its name tells."""
  return path.suffix == ".json"


def name_in_folder(path: Path) -> str:
  """Under which name a folder (a store, a run) keeps a tokenizer's file."""
  return JSON if is_json(path) else TOKENIZER_FILE


def find(folder: Path) -> Path | None:
  """The tokenizer of a folder; SentencePiece where it has both kinds."""
  return next((folder / name for name in (TOKENIZER_FILE, JSON) if (folder / name).exists()), None)


def same(path: Path, folder: Path) -> bool:
  """Whether a folder has this tokenizer, or none."""
  there = find(folder)
  if there is None:
    return True
  ours = _files(path)
  return set(ours) == set(_files(there)) and all(
    (folder / name).read_bytes() == file.read_bytes() for name, file in ours.items()
  )


def copy(path: Path, folder: Path) -> None:
  """Copies a tokenizer's files into a folder, each whole or not at all."""
  for name, file in reversed(_files(path).items()):  # what `find` looks for comes last
    write_atomically(folder / name, file.read_bytes())


def _files(path: Path) -> dict[str, Path]:
  """The files of a tokenizer by their names in a folder."""
  files = {name_in_folder(path): path}
  config = path.with_name(JSON_CONFIG)
  if is_json(path) and config.exists():
    files[JSON_CONFIG] = config
  return files
