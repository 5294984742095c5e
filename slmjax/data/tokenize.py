"""Turns text files into a source of a token store.

Example:
  python -m slmjax.data.tokenize --input=books/ --input=more.jsonl --source=books \\
    --tokenizer=tokenizer.model --store=store/

reads every .jsonl (one object a line) and .txt (one document a file) of the inputs, drops empty and
duplicate documents, holds some out by the hash of their text, shuffles once, and writes
store/books/train and store/books/heldout. The result depends on the texts, the tokenizer and the
flags, not on file names or the number of processes. Running it again with the same inputs does
nothing; with other inputs it refuses.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slmjax import durable
from slmjax.data import documents, encode, store, store_writer, tokenizer_files
from slmjax.data.tokenizer import Tokenizer
from slmjax.errors import UserError, run_command

# This many documents of each split, the first of the shuffle, are decoded and compared.
ROUND_TRIPS = 256
PROGRESS_SECONDS = 10.0
# A process takes about half a second to start, in which one encodes some 2 MB.
BYTES_A_PROCESS = 8 << 20


@dataclasses.dataclass(frozen=True)
class Summary:
  """What `tokenize_source` did. Counts are of documents that were kept, unless they say otherwise.

  `splits` has documents, tokens, bytes (UTF-8 bytes of text) and fingerprint of each split. `done`
  is False when the source was there already; seconds and tokens_per_second are then 0.
  """

  source: str
  done: bool
  files: int
  files_ignored: int
  documents: int
  duplicates_dropped: int
  empty_dropped: int
  tokens: int
  bytes: int
  bytes_per_token: float
  lossy_documents_in_sample: int
  sample_documents: int
  seconds: float
  tokens_per_second: float
  splits: dict[str, dict[str, Any]]


def tokenize_source(
  inputs: Iterable[Path | str],
  *,
  source: str,
  tokenizer: Path | str,
  root: Path | str,
  heldout_fraction: float = 0.01,
  text_key: str = "text",
  seed: int = 0,
  processes: int | None = None,
  shard_tokens: int = store_writer.SHARD_TOKENS,
  add_bos: bool = False,
  report: Callable[[str], None] = lambda line: None,
) -> Summary:
  """Writes `root/source/train` and `root/source/heldout` from text files, or neither.

  Memory grows with the number of documents (some 100 bytes each), not with their length.

  Args:
    inputs: .jsonl and .txt files, and directories of them.
    source: name of the source, a directory name.
    tokenizer: SentencePiece model file or tokenizer.json; copied into the store.
    root: the store.
    heldout_fraction: expected share of documents held out, in [0, 1).
    text_key: key of the text in the objects of .jsonl files.
    seed: of the shuffle.
    processes: how many encode; by default one for each processor, fewer for little text.
    shard_tokens: tokens of a shard file.
    add_bos: put BOS before each document.
    report: gets lines on progress, and warnings.

  Raises:
    InputError: the text is unusable, or an argument is.
    StoreError: the source exists with other content, or the store has another tokenizer.
    TokenizerError: the tokenizer can't be loaded.
  """
  if source.startswith(".") or source != Path(source).name or not source or ".tmp-" in source:
    raise documents.InputError(f"source {source!r} must be usable as the name of a directory")
  if not 0 <= heldout_fraction < 1:
    raise documents.InputError(f"heldout_fraction is {heldout_fraction}; it must be in [0, 1)")
  if processes is not None and processes < 1:
    raise documents.InputError(f"processes is {processes}; it must be at least 1")
  if not -(2**63) <= seed < 2**63:
    raise documents.InputError(f"seed is {seed}; it must fit 64 bits")
  began = time.monotonic()
  root = Path(root)
  model = Tokenizer.load(tokenizer)
  final = root / source
  for left in sorted(root.glob(f"{glob.escape(source)}.tmp-*")):
    report(f"warning: {left} is of a run that still goes on or was killed; if killed, delete it")
  files, ignored = documents.list_files(inputs)
  if processes is None:
    size = sum(path.stat().st_size for path in files if path.exists())
    processes = min(os.cpu_count() or 1, 1 + size // BYTES_A_PROCESS)
  with encode.workers(processes, model) as mapped:
    corpus = documents.gather(files, mapped(encode.scan, ((path, text_key) for path in files)))
    origin = {
      "content_sha256": corpus.sha256,
      "documents": corpus.documents,
      "tokenizer_sha256": model.sha256,
      "heldout_fraction": heldout_fraction,
      "seed": seed,
      "shard_tokens": shard_tokens,
      "add_bos": add_bos,
    }
    if final.exists():
      _refuse_other(final, origin)
      report(f"{final}: already made from the same inputs, nothing to do")
      return _summary(final, corpus, len(files), ignored, None)
    store_writer.check_tokenizer(model.path, root)
    split = corpus.split(heldout_fraction)
    root.mkdir(parents=True, exist_ok=True)
    work = root / f"{source}.tmp-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)  # of a dead process with our process id
    try:
      for name, every_N in split.items():
        order_N = corpus.shuffled(every_N, seed)
        checked = min(ROUND_TRIPS, len(order_N))
        progress = _Progress(f"{source}/{name}", len(order_N), report)
        with store_writer.StoreWriter(
          work / name,
          source=source,
          split=name,
          tokenizer=model.facts,
          tokenizer_file=tokenizer_files.name_in_folder(model.path),
          add_bos=add_bos,
          shard_tokens=shard_tokens,
          origin=origin | {"sample_documents": checked, "lossy_documents_in_sample": 0},
        ) as writer:
          for encoded in mapped(encode.encode, encode.batches(corpus, order_N, text_key, checked)):
            for ids, size in zip(encoded.ids, encoded.text_bytes, strict=True):
              writer.add(ids, size)
            writer.origin["lossy_documents_in_sample"] += encoded.lossy
            progress.show(writer.documents, writer.tokens)
        lossy = writer.origin["lossy_documents_in_sample"]
        if lossy:
          report(
            f"warning: {source}/{name}: {lossy} of a sample of {checked} documents don't decode to "
            f"their text: {model.path} changes or loses characters"
          )
      store_writer.install_tokenizer(model.path, root)
      work.rename(final)
      durable.sync_directory(root)
    finally:
      shutil.rmtree(work, ignore_errors=True)
  return _summary(final, corpus, len(files), ignored, time.monotonic() - began)


def _refuse_other(final: Path, origin: dict[str, Any]) -> None:
  """Raises StoreError unless the finished source at `final` was made from the same things."""
  made = store.TokenStore.open(final / "train").index["origin"]
  names = [name for name, value in origin.items() if made.get(name) != value]
  if origin["heldout_fraction"] and not names:
    store.TokenStore.open(final / "heldout")
  if names:
    differences = ", ".join(f"{name} was {made.get(name)} and is {origin[name]}" for name in names)
    raise store.StoreError(
      f"{final}: made from other inputs ({differences}); delete it or choose another --source"
    )


def _summary(
  final: Path, corpus: documents.Corpus, files: int, ignored: int, seconds: float | None
) -> Summary:
  paths = [final / name for name in store.SPLITS if (final / name).exists()]
  splits = [store.TokenStore.open(path) for path in paths]
  tokens, size = sum(split.tokens for split in splits), sum(split.bytes for split in splits)
  return Summary(
    source=final.name,
    done=seconds is not None,
    files=files,
    files_ignored=ignored,
    documents=corpus.documents,
    duplicates_dropped=corpus.duplicates,
    empty_dropped=corpus.empty,
    tokens=tokens,
    bytes=size,
    bytes_per_token=size / tokens,
    lossy_documents_in_sample=sum(
      split.index["origin"]["lossy_documents_in_sample"] for split in splits
    ),
    sample_documents=sum(split.index["origin"]["sample_documents"] for split in splits),
    seconds=seconds or 0.0,
    tokens_per_second=tokens / seconds if seconds else 0.0,
    splits={
      split.split: {
        "documents": split.documents,
        "tokens": split.tokens,
        "bytes": split.bytes,
        "fingerprint": split.fingerprint,
      }
      for split in splits
    },
  )


class _Progress:
  """A line every few seconds, so that a long run isn't silent."""

  def __init__(self, name: str, total: int, report: Callable[[str], None]):
    self.name, self.total, self.report = name, total, report
    self.began = self.shown = time.monotonic()

  def show(self, count: int, tokens: int) -> None:
    now = time.monotonic()
    if now - self.shown >= PROGRESS_SECONDS:
      self.shown = now
      rate = tokens / (now - self.began)
      self.report(f"{self.name}: {count} of {self.total} documents, {rate:,.0f} tokens/s")


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.data.tokenize",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--input", action="append", default=[], help="a .jsonl or .txt file or a folder; repeatable")
  add("--source", required=True, help="name of the source")
  add("--tokenizer", required=True, help="SentencePiece model file or tokenizer.json")
  add("--store", required=True, help="folder of the token store")
  add(
    "--heldout_fraction", type=float, default=0.01, help="documents to hold out, in [0, 1) (0.01)"
  )
  add("--text_key", default="text", help="key of the text in the objects of .jsonl files (text)")
  add("--seed", type=int, default=0, help="seed of the shuffle (0)")
  add("--processes", type=int, help="encoding processes (by processors and text)")
  add("--shard_tokens", type=int, default=store_writer.SHARD_TOKENS, help="tokens of a shard file")
  add("--add_bos", action="store_true", help="put BOS before each document")
  add("--json", action="store_true", help="print the summary as one JSON object")
  args = parser.parse_args()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that half a source is removed
  try:
    summary = tokenize_source(
      args.input,
      source=args.source,
      tokenizer=args.tokenizer,
      root=args.store,
      heldout_fraction=args.heldout_fraction,
      text_key=args.text_key,
      seed=args.seed,
      processes=args.processes,
      shard_tokens=args.shard_tokens,
      add_bos=args.add_bos,
      report=lambda line: print(line, file=sys.stderr, flush=True),
    )
  except OSError as error:
    raise UserError(
      f"{error.filename or args.store}: {error.strerror}; nothing was written"
    ) from error
  print(json.dumps(dataclasses.asdict(summary)) if args.json else _text(summary))


def _text(summary: Summary) -> str:
  """The summary for a person."""
  lines = [
    f"{summary.source}: {summary.documents:,} documents in {summary.files:,} files; dropped "
    f"{summary.duplicates_dropped:,} duplicates and {summary.empty_dropped:,} empty ones; "
    f"ignored {summary.files_ignored:,} files of other kinds"
  ]
  lines += [
    f"  {name}: {split['documents']:,} documents, {split['tokens']:,} tokens, "
    f"{split['bytes']:,} bytes"
    for name, split in summary.splits.items()
  ]
  speed = f", {summary.tokens_per_second:,.0f} tokens/s" if summary.done else ""
  return "\n".join([*lines, f"  {summary.bytes_per_token:.3f} bytes per token{speed}"])


if __name__ == "__main__":
  run_command(main)
