"""Trains a lossless SentencePiece tokenizer, for runs too small for a published one.

Example:
  python -m slmjax.data.train_tokenizer --input=books/ --input=code.jsonl --vocab_size=4096 \\
    --out=tokenizer.model
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from slmjax.data import documents, tokenizer
from slmjax.errors import UserError, run_command


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.data.train_tokenizer",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add(
    "--input", action="append", required=True, help="a .jsonl or .txt file or a folder; repeatable"
  )
  add("--vocab_size", type=int, required=True, help="pieces, with the 4 special and 256 byte ones")
  add("--out", type=Path, required=True, help="the model file to write")
  add("--text_key", default="text", help="key of the text in the objects of .jsonl files (text)")
  add("--seed", type=int, default=0, help="seed of the sample that is trained on (0)")
  args = parser.parse_args()
  if args.out.exists():
    raise UserError(
      f"{args.out} exists; stores made with it would not fit a new one: choose a name"
    )
  texts = _texts(args.input, args.text_key)
  trained = tokenizer.train(texts, args.out, args.vocab_size, seed=args.seed)
  print(f"{args.out}: {trained.vocab_size:,} pieces, sha256 {trained.sha256[:12]}")


def _texts(inputs: list[str], text_key: str) -> Iterator[str]:
  files, _ = documents.list_files(inputs)
  corpus = documents.gather(files, (documents.scan(file, text_key) for file in files))
  for i in range(corpus.documents):
    yield documents.read(corpus.location(i), text_key)


if __name__ == "__main__":
  run_command(main)
