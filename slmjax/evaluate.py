"""Held-out loss in bits per byte, per source or of a text file.

  python -m slmjax.evaluate --checkpoint=runs/tiny                    each source's held-out split
  python -m slmjax.evaluate --checkpoint=runs/tiny --text=essay.txt   one text
  python -m slmjax.evaluate --checkpoint=runs/tiny --step=146 --json
  python -m slmjax.evaluate --checkpoint=imported/gpt2 --text=essay.txt --window=512

Every token is predicted from the tokens before it in its window (a row): windows do not overlap, so
a token at a window's start has little context and the figure is an upper bound. Bits per byte are
the summed negative log-likelihoods in bits over the UTF-8 bytes of the text, so that models with
different tokenizers compare.

Before a text stands what stood there in training. For a run's own model that is EOS (and BOS if its
stores have it), and the EOS that closes a document is predicted too. For an imported model it is
the BOS that its tokenizer adds, or the token that is both its BOS and EOS (GPT-2, Pythia), or
nothing: then the text's first token is context only and not predicted. No EOS is predicted. Its
windows are of 2048 tokens, or of as many as it has positions for. The output names both.

Letters: B rows, S positions.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from slmjax import probe, sharding
from slmjax.data.loader import Batch, read_span, row_arrays
from slmjax.data.store import TokenStore
from slmjax.errors import UserError, run_command
from slmjax.loaded import Loaded, add_checkpoint_arguments
from slmjax.model.decoder import Decoder
from slmjax.step import eval_step


class Evaluator:
  """Computes held-out losses on the current mesh; compiled once, for rows of one shape."""

  def __init__(self, rows: int, row_length: int):
    self._rows = rows
    self._row_length = row_length
    self._step = jax.jit(eval_step, static_argnames="rope_theta")

  def store(
    self, model: Decoder, store: TokenStore, tokens: int, rope_theta: float | None, isolate: bool
  ) -> dict[str, Any]:
    """Evaluates the first whole documents of a store that fit into `tokens` (at least one)."""
    ends = np.append(np.asarray(store.document_starts[1:], np.int64), store.tokens)
    documents = max(1, int(np.searchsorted(ends, tokens, side="right")))
    ids = read_span(store, 0, int(ends[documents - 1]))
    text_bytes = int(np.sum(store.document_bytes[:documents]))
    nats = self.nats(model, ids, store.eos_id if isolate else None, rope_theta)
    return {"documents": documents, **figures(nats, len(ids) - 1, text_bytes)}

  def nats(
    self, model: Decoder, ids: np.ndarray, separator: int | None, rope_theta: float | None
  ) -> float:
    """Summed negative log-likelihood of ids[1:], each from the ids before it in its row.

    Where the separator is read, a document begins that sees nothing before it; None: all is one.
    """
    total = 0.0  # float64 over float32 sums of one batch
    for batch in self._batches(ids, separator):
      total += float(self._step(model, batch, rope_theta=rope_theta))
    return total

  def _batches(self, ids: np.ndarray, separator: int | None) -> Iterator[Batch]:
    length = self._row_length
    rows = -(-(len(ids) - 1) // length)
    for first in range(0, rows, self._rows):
      arrays = [
        _padded_row(ids[r * length : (r + 1) * length + 1], length, separator)
        for r in range(first, first + self._rows)
      ]
      stacked = {name: np.stack([row[name] for row in arrays]) for name in arrays[0]}
      yield Batch(**{name: sharding.place_rows(x) for name, x in stacked.items()})


def figures(nats: float, tokens: int, text_bytes: int) -> dict[str, Any]:
  """The reported numbers of a summed loss."""
  return {
    "bits_per_byte": nats / math.log(2) / text_bytes,
    "loss": nats / tokens,
    "perplexity": math.exp(min(nats / tokens, 700.0)),
    "tokens": tokens,
    "bytes": text_bytes,
  }


def _padded_row(span: np.ndarray, length: int, separator: int | None) -> dict[str, np.ndarray]:
  """A row of up to `length` targets, filled up with padding."""
  count = max(len(span) - 1, 0)
  padded = np.zeros(length + 1, np.int32)
  padded[: len(span)] = span
  row = row_arrays(padded[None], -1 if separator is None else separator, separator is not None)
  real = np.arange(length) < count
  row["segments"] = np.where(real, row["segments"], 0).astype(np.int32)
  row["weights"] = real.astype(np.float32)
  return row


def read_text(path: Path) -> str:
  """The text of a UTF-8 file that is not empty."""
  try:
    text = path.read_bytes().decode()
  except OSError as error:
    raise UserError(f"{path} cannot be read: {error.strerror}") from error
  except UnicodeDecodeError as error:
    raise UserError(f"{path} is not UTF-8 (byte {error.start}); convert it first") from error
  if not text:
    raise UserError(f"{path} is empty; there is nothing to evaluate")
  return text


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add_checkpoint_arguments(parser)
  parser.add_argument("--text", type=Path, help="a UTF-8 text file to evaluate as one document")
  parser.add_argument("--window", type=int, help="tokens of a window (as above, or the run's own)")
  args = parser.parse_args()
  run = Loaded.open(args.checkpoint, args.step)
  window = _window(run, args.window)
  with jax.set_mesh(run.mesh):
    results = (
      {str(args.text): _evaluate_text(run, window, args.text)}
      if args.text
      else _evaluate_sources(run, window, args.checkpoint)
    )
  prefix, suffix = run.names_of(run.prefix), run.names_of(run.suffix)
  if args.json:
    header = {"checkpoint": str(args.checkpoint), "step": run.step, "windows": window}
    print(json.dumps({**header, "prefix": prefix, "suffix": suffix, "results": results}))
    return
  print(
    f"step {run.step}, windows of {window} tokens without overlap; a text begins after "
    f"{' '.join(prefix) or 'nothing: its first token is not predicted'}; predicted after it: "
    f"{' '.join(suffix) or 'nothing'}"
  )
  width = max(map(len, results))
  print(f"{'':{width}}  bits/byte    loss  perplexity    tokens     bytes")
  for name, r in results.items():
    print(
      f"{name:{width}}  {r['bits_per_byte']:9.4f} {r['loss']:7.4f} {r['perplexity']:11.3f} "
      f"{r['tokens']:9,} {r['bytes']:9,}"
    )


def _window(run: Loaded, asked: int | None) -> int:
  if asked is None:
    return run.window
  if not 0 < asked <= run.model.model.max_length:
    raise UserError(
      f"--window is {asked}; it must lie in 1 to the model's {run.model.model.max_length} positions"
    )
  return asked


def _evaluator(run: Loaded, length: int) -> Evaluator:
  probe.check(run.model.model, run.model.compute, [(run.rows, length)])
  return Evaluator(run.rows, length)


def _evaluate_text(run: Loaded, window: int, path: Path) -> dict[str, Any]:
  text = read_text(path)
  ids = np.array([*run.encode(text), *run.suffix], np.int32)
  if len(ids) < 2:
    raise UserError(
      f"{path} is a single token, with nothing to predict it from; give a longer text"
    )
  # A short text does not need a whole window: one row, up to the next power of two.
  short = 1 << (len(ids) - 2).bit_length()
  evaluator = _evaluator(run, min(window, max(16, short)))
  nats = evaluator.nats(run.model, ids, None, run.rope_theta)
  return figures(nats, len(ids) - 1, len(text.encode()))


def _evaluate_sources(run: Loaded, window: int, folder: Path) -> dict[str, Any]:
  if run.config is None:
    raise UserError(f"{folder} is an imported model, which has no sources; give --text=FILE")
  results, evaluator = {}, _evaluator(run, window)
  for name in run.config.data.sources:
    store = TokenStore.open(Path(run.config.data.store) / name / "heldout")
    run.check_tokenizer(store)
    limit = run.config.eval.tokens_per_source
    results[name] = evaluator.store(run.model, store, limit, run.rope_theta, run.isolate_documents)
  return results


if __name__ == "__main__":
  run_command(main)
