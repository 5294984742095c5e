"""Evaluation: bits per byte by hand, and the commands on a real run folder."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from slmjax import sharding, train
from slmjax.data.loader import read_span
from slmjax.data.store import TokenStore
from slmjax.data.tokenizer import Tokenizer
from slmjax.evaluate import Evaluator
from tests import small
from tests.test_decoder import THETA, build
from tests.test_resume import environment


@pytest.fixture(scope="module")
def finished(text_store: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
  """A run of the first stage only."""
  folder = tmp_path_factory.mktemp("finished")
  config = small.config(text_store)
  patch = pytest.MonkeyPatch()
  patch.setattr(train, "make_mesh", lambda _: sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1]))
  assert train.run(config, folder) == 0
  patch.undo()
  return folder


def command(module: str, run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
  return subprocess.run(
    [sys.executable, "-m", module, f"--checkpoint={run}", *flags],
    env=environment(),
    capture_output=True,
    text=True,
    check=False,
  )


@pytest.mark.medium
def test_bits_per_byte_by_hand(text_store: str) -> None:
  """Against a softmax over whole logits in NumPy, documents isolated, rows that do not overlap."""
  store = TokenStore.open(Path(text_store) / "docs" / "heldout")
  length, documents = 64, 3
  stop = int(store.document_starts[documents])
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    model = build(small.config())
    result = Evaluator(4, length).store(model, store, stop, THETA, isolate=True)
    ids = read_span(store, 0, stop)
    nats = 0.0
    for first in range(0, stop, length):
      span = ids[first : first + length + 1]
      tokens, targets = span[:-1], span[1:]
      begins = tokens == store.eos_id
      begins[0] = True
      index = np.arange(len(tokens))
      segments = np.cumsum(begins).astype(np.int32)
      positions = (index - np.maximum.accumulate(np.where(begins, index, 0))).astype(np.int32)
      rows = [sharding.place_rows(np.asarray(x)[None]) for x in (tokens, segments, positions)]
      hidden = np.asarray(model(*rows, rope_theta=THETA)[0][0], np.float64)
      logits = hidden @ np.asarray(model.output_VE, np.float64).T
      logits -= logits.max(-1, keepdims=True)
      nats += float(np.sum(np.log(np.exp(logits).sum(-1)) - logits[index, targets]))
  text = sum(int(n) for n in store.document_bytes[:documents])
  assert (result["documents"], result["tokens"], result["bytes"]) == (documents, stop, text)
  np.testing.assert_allclose(result["bits_per_byte"], nats / math.log(2) / text, rtol=1e-5)


@pytest.mark.medium
def test_command_on_sources_equals_the_runs_own_figures(finished: Path) -> None:
  done = command("slmjax.evaluate", finished, "--json")
  assert done.returncode == 0, done.stderr
  printed = json.loads(done.stdout)
  last = json.loads((finished / "evals.jsonl").read_text().splitlines()[-1])
  assert printed["step"] == last["step"] == small.config().steps
  assert printed["results"] == last["sources"]


@pytest.mark.medium
def test_command_on_a_text(finished: Path, tmp_path: Path) -> None:
  text = "def main():\n  return 'grün'\n"
  (tmp_path / "text.txt").write_text(text)
  done = command("slmjax.evaluate", finished, f"--text={tmp_path}/text.txt", "--json", "--step=8")
  assert done.returncode == 0, done.stderr
  result: Any = json.loads(done.stdout)["results"][f"{tmp_path}/text.txt"]
  tokens = len(Tokenizer.load(finished / "tokenizer.model").encode(text)) + 1
  assert (result["bytes"], result["tokens"]) == (len(text.encode()), tokens)
  np.testing.assert_allclose(
    result["bits_per_byte"] * result["bytes"] * math.log(2), result["loss"] * tokens
  )


@pytest.mark.medium
def test_generate_command(finished: Path) -> None:
  flags = ("--prompt=def ", "--prompt=import os", "--tokens=5", "--temperature=0", "--json")
  done = command("slmjax.generate", finished, *flags)
  assert done.returncode == 0, done.stderr
  samples = json.loads(done.stdout)["samples"]
  assert [sample["prompt"] for sample in samples] == ["def ", "import os"]
  assert done.stdout == command("slmjax.generate", finished, *flags).stdout


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--checkpoint=/nowhere"], "/nowhere holds no checkpoint"),
    (["--step=7"], "has no checkpoint of step 7; it has 8, 14, 15, 18"),
    (["--text=/no/file"], "/no/file cannot be read: No such file"),
  ],
)
@pytest.mark.medium
def test_bad_input_is_one_line(finished: Path, flags: list[str], message: str) -> None:
  done = command("slmjax.evaluate", finished, *flags)
  assert done.returncode == 2
  (line,) = [line for line in done.stderr.splitlines() if not line.startswith(("WARNING", "I0"))]
  assert line.startswith("error: ")
  assert message in line
