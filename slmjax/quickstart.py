"""The whole curriculum on real text on this machine: what `make run` runs.

  python -m slmjax.quickstart --folder=runs/quickstart

Takes the text that this Python installation carries (slmjax.data.local_text), trains a tokenizer on
it, tokenizes five sources, trains configs/fox1.py:tiny through its three stages, and prints what
came of it: held-out bits per byte beside two baselines, and text sampled at the end of each stage.
Every part is skipped if it is done; an interrupted training resumes.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from configs import fox1
from slmjax import sharding, train
from slmjax.baselines import Bigram, xz_bits
from slmjax.checkpoint import read_meta
from slmjax.config import Config
from slmjax.data import local_text, tokenize, tokenizer
from slmjax.data.ledger import Entry
from slmjax.data.loader import read_span
from slmjax.data.plan import Plan
from slmjax.data.store import TokenStore
from slmjax.durable import write_atomically
from slmjax.errors import run_command
from slmjax.evaluate import Evaluator
from slmjax.generate import Sampling, generate
from slmjax.loaded import Loaded
from slmjax.resolve import resolve

# The more text is held out, the better xz does on it, by repetition across documents, which the
# model cannot see: with 4 % it beats a model of this size (docs/log.md).
HELDOUT_FRACTION = 0.01
PROMPTS = ("def ", "The ", "How do I ")
SAMPLE_TOKENS = 48


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m slmjax.quickstart",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="all goes here")
  folder: Path = parser.parse_args().folder
  logging.set_verbosity(logging.WARNING)
  begin = time.perf_counter()
  raw = fox1.get_config("tiny")
  raw.data.store = str(folder / "store")
  config = resolve(raw)
  make_stores(config, folder)
  code = train.run(config, folder / "run")
  if code:
    return code
  report = compare(config, folder / "run")
  report["samples"] = sample_stages(config, folder / "run")
  report["seconds"] = time.perf_counter() - begin
  write_atomically(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
  show(report)
  print(
    f"\nall in {report['seconds']:.0f} s; curves: tensorboard --logdir {folder}/run/tensorboard"
  )
  return 0


def make_stores(config: Config, folder: Path) -> None:
  """Collects the text, trains the tokenizer and tokenizes each source, unless they are there."""
  texts, model = folder / "text", folder / "tokenizer.model"
  if not model.exists():
    for source, stats in local_text.collect(texts).items():
      print(f"text {source}: {stats.documents:,} documents, {stats.bytes / 1e6:.1f} MB")
    tokenizer.train(_texts(config, texts), model, config.model.vocab_size, seed=config.seed)
  for source in config.data.sources:
    if (Path(config.data.store) / source / "heldout").exists():
      continue
    summary = tokenize.tokenize_source(
      [texts / f"{source}.jsonl"],
      source=source,
      tokenizer=model,
      root=config.data.store,
      heldout_fraction=HELDOUT_FRACTION,
    )
    print(f"tokens {source}: {summary.tokens:,}")


def _texts(config: Config, folder: Path) -> Iterator[str]:
  for source in config.data.sources:
    with (folder / f"{source}.jsonl").open(encoding="utf-8") as lines:
      yield from (json.loads(line)["text"] for line in lines)


def compare(config: Config, run: Path) -> dict[str, Any]:
  """Held-out bits per byte of the model, of a bigram that saw the same tokens, and of xz.

  All three are scored on the same documents: each source's whole held-out split.
  """
  stores = train.open_stores(config, "train")
  heldout = train.open_stores(config, "heldout")
  bigram = Bigram.count(trained_tokens(config, stores), config.model.vocab_size)
  loaded = Loaded.open(run, None)
  evaluator = Evaluator(config.eval.rows, config.stages[-1].row_length)
  results = {}
  totals = dict.fromkeys(("model", "bigram", "xz", "bytes"), 0.0)
  with jax.set_mesh(loaded.mesh):
    for name, store in heldout.items():
      scored = evaluator.store(
        loaded.model, store, store.tokens, loaded.rope_theta, loaded.isolate_documents
      )
      text = "".join(heldout_texts(loaded, store)).encode()
      bits = {
        "model": scored["bits_per_byte"] * scored["bytes"],
        "bigram": bigram.bits(read_span(store, 0, store.tokens)),
        "xz": xz_bits(text),
      }
      results[name] = {k: v / store.bytes for k, v in bits.items()} | {"bytes": store.bytes}
      for key, value in (bits | {"bytes": store.bytes}).items():
        totals[key] += value
  all_bytes = totals.pop("bytes")
  results["total"] = {k: v / all_bytes for k, v in totals.items()} | {"bytes": int(all_bytes)}
  entries = read_meta(run, loaded.step)["ledger"]
  return {"step": loaded.step, "bits_per_byte": results, "ledger": entries}


def trained_tokens(config: Config, stores: dict[str, TokenStore]) -> np.ndarray:
  """The tokens that the run was trained on, from the stages' ranges of each source."""
  plan = Plan(config, {name: store.tokens for name, store in stores.items()})
  return np.concatenate(
    [
      read_span(stores[share.source], share.start, share.stop - share.start)
      for shares in plan.shares
      for share in shares
      if share.stop > share.start
    ]
  )


def heldout_texts(loaded: Loaded, store: TokenStore) -> Iterator[str]:
  """The documents of a store as text."""
  ends = [*map(int, store.document_starts[1:]), store.tokens]
  for start, end in zip(map(int, store.document_starts), ends, strict=True):
    yield loaded.tokenizer.decode(store.read(start, end - start - 1).tolist())  # without its EOS


def sample_stages(config: Config, run: Path) -> dict[str, dict[str, str]]:
  """What the model of each stage's end makes of a few prompts."""
  samples = {}
  for stage, step in zip(config.stages, config.boundaries[1:], strict=True):
    loaded = Loaded.open(run, step)
    prompts = [loaded.encode(text) for text in PROMPTS]
    rows = sharding.data_shards(loaded.mesh)
    with jax.set_mesh(loaded.mesh):
      outputs = generate(
        loaded.model,
        [*prompts, *[prompts[0]] * (-len(prompts) % rows)],
        SAMPLE_TOKENS,
        rope_theta=loaded.rope_theta,
        stop_ids=loaded.stop_ids,
        sampling=Sampling(temperature=0.7, top_k=0, top_p=0.9),
        seed=config.seed,
      )
    texts = zip(PROMPTS, outputs, strict=False)
    samples[stage.name] = {prompt: loaded.tokenizer.decode(ids) for prompt, ids in texts}
  return samples


def show(report: dict[str, Any]) -> None:
  """Prints the samples, the ledger and the table of bits per byte."""
  for stage, texts in report["samples"].items():
    print(f"\n=== text after stage {stage}")
    for prompt, text in texts.items():
      print(f"--- {prompt}{text}")
  print("\nwhat the sources gave         tokens   documents  epochs")
  for fields in report["ledger"]:
    entry = Entry(**fields)
    name = f"{entry.stage} {entry.source}"
    print(f"{name:22} {entry.tokens:>13,} {entry.documents:>11,} {entry.epochs:>7.2f}")
  print("\nheld-out bits per byte        model   bigram       xz      bytes")
  for name, r in report["bits_per_byte"].items():
    print(f"{name:26} {r['model']:8.3f} {r['bigram']:8.3f} {r['xz']:8.3f} {r['bytes']:>10,}")


if __name__ == "__main__":
  run_command(main)
