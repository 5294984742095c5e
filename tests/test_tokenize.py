"""Tokenizing: every text once and whole, the same store whatever the way there, or nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from slmjax.data import documents, encode, store, tokenize, tokenizer

TEXTS = [path.read_text("utf-8") for path in sorted(Path(os.__file__).parent.glob("s*.py"))]
PARAGRAPHS = sorted({part for text in TEXTS for part in text.split("\n\n") if part.strip()})[:600]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  out = tmp_path_factory.mktemp("model") / "tokenizer.model"
  return tokenizer.train(TEXTS, out, 600, sample_bytes=1 << 17)


def write_jsonl(path, texts, key="text"):
  path.parent.mkdir(parents=True, exist_ok=True)
  lines = [
    json.dumps({"other": 1, key: text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)
  ]
  path.write_text("\n".join(lines), "utf-8")
  return path


def run(model, inputs, root, **changes):
  arguments: dict[str, Any] = {"source": "code", "processes": 1, "heldout_fraction": 0.1}
  return tokenize.tokenize_source(inputs, tokenizer=model.path, root=root, **arguments | changes)


def texts_of(model, path):
  """What a store holds, cut at its document starts and decoded."""
  opened = store.TokenStore.open(path)
  opened.verify()
  ids = opened.read(0, opened.tokens)
  parts = np.split(ids, opened.document_starts[1:].astype(np.int64))
  assert all(part[-1] == opened.eos_id and (part == opened.eos_id).sum() == 1 for part in parts)
  texts = [model.decode(part.tolist()) for part in parts]
  np.testing.assert_array_equal(opened.document_bytes, [len(text.encode()) for text in texts])
  return texts


def test_every_text_comes_out_once_in_one_split(tmp_path, model):
  awkward = ["one\u2581two", "  \tx\r\n", "日本語 🎉", "\ufeffmark", "a\x00b", "\n\nlead"]
  texts = PARAGRAPHS[:200] + awkward
  write_jsonl(tmp_path / "in" / "b.jsonl", [*texts[100:], texts[0], "", " \n"])
  write_jsonl(tmp_path / "in" / "a" / "z.jsonl", texts[:90])
  for i, text in enumerate(texts[90:100]):
    (tmp_path / "in" / "a" / f"{i}.txt").write_bytes(text.encode())
  (tmp_path / "in" / "README.md").write_text("not read")
  summary = run(model, [tmp_path / "in"], tmp_path / "store", shard_tokens=1000, add_bos=True)
  train = texts_of(model, tmp_path / "store" / "code" / "train")
  heldout = texts_of(model, tmp_path / "store" / "code" / "heldout")
  assert sorted(train + heldout) == sorted(texts)
  # 206 documents held out with probability 0.1: mean 21, standard deviation 4.3; 5 deviations.
  assert 1 <= len(heldout) <= 42
  assert train != sorted(train)
  opened = store.TokenStore.open(tmp_path / "store" / "code" / "train")
  np.testing.assert_array_equal(
    opened.read(0, opened.tokens)[opened.document_starts], opened.bos_id
  )
  assert len(opened.index["shards"]) > 1
  assert (summary.documents, summary.duplicates_dropped, summary.empty_dropped) == (206, 1, 2)
  assert (summary.files, summary.files_ignored, summary.done) == (12, 1, True)
  assert summary.bytes == sum(len(text.encode()) for text in texts)
  assert summary.tokens == sum(len(model.encode(text)) + 2 for text in texts)
  assert summary.lossy_documents_in_sample == 0
  assert summary.sample_documents == 206
  assert opened.tokenizer_path.read_bytes() == model.path.read_bytes()
  assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["code", "tokenizer.model"]


@pytest.mark.medium
def test_processes_and_batches_dont_matter(tmp_path, model, monkeypatch):
  inputs = [
    write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:300]),
    write_jsonl(tmp_path / "b.jsonl", PARAGRAPHS[300:]),
  ]
  monkeypatch.setattr(encode, "BATCH_DOCUMENTS", 7)
  summaries = [
    run(model, inputs, tmp_path / str(processes), processes=processes) for processes in (1, 2, 3)
  ]
  splits = [summary.splits for summary in summaries]
  assert splits[0] == splits[1] == splits[2]


def test_names_and_order_of_files_dont_matter_and_the_seed_does(tmp_path, model):
  one = write_jsonl(tmp_path / "x.jsonl", PARAGRAPHS)
  two = [
    write_jsonl(tmp_path / "d" / "0.jsonl", PARAGRAPHS[400:]),
    write_jsonl(tmp_path / "c" / "1.jsonl", PARAGRAPHS[:410]),
  ]
  base = run(model, [one], tmp_path / "s1")
  assert run(model, two, tmp_path / "s2", source="other").splits == base.splits
  seeded = run(model, [one], tmp_path / "s3", seed=1)
  for split in store.SPLITS:
    assert seeded.splits[split]["fingerprint"] != base.splits[split]["fingerprint"]
    first, second = (texts_of(model, tmp_path / s / "code" / split) for s in ("s1", "s3"))
    assert first != second
    assert sorted(first) == sorted(second)


def test_growing_a_source_moves_no_text_between_splits(tmp_path, model):
  few = write_jsonl(tmp_path / "few.jsonl", PARAGRAPHS[:300])
  more = write_jsonl(tmp_path / "more.jsonl", PARAGRAPHS[300:])
  run(model, [few], tmp_path / "s1")
  run(model, [few, more], tmp_path / "s2")
  before = set(texts_of(model, tmp_path / "s1" / "code" / "heldout"))
  after = set(texts_of(model, tmp_path / "s2" / "code" / "heldout"))
  assert before == after & set(PARAGRAPHS[:300])


def test_held_out_is_never_empty_unless_asked(tmp_path, model):
  few = write_jsonl(tmp_path / "few.jsonl", PARAGRAPHS[:3])
  assert (
    run(model, [few], tmp_path / "s1", heldout_fraction=1e-9).splits["heldout"]["documents"] == 1
  )
  assert set(run(model, [few], tmp_path / "s2", heldout_fraction=0).splits) == {"train"}
  with pytest.raises(documents.InputError, match="leave none to train on"):
    run(model, [few], tmp_path / "s3", heldout_fraction=0.999999)
  assert not (tmp_path / "s3").exists()


def test_again_does_nothing_and_other_inputs_are_refused(tmp_path, model):
  first = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:100])
  made = run(model, [first], tmp_path / "store")
  times = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
  lines: list[str] = []
  again = run(model, [shutil.copy(first, tmp_path / "copy.jsonl")], tmp_path / "store",
              report=lines.append)  # fmt: skip
  assert not again.done
  assert again.splits == made.splits
  assert len(lines) == 1
  assert "nothing to do" in lines[0]
  other = write_jsonl(tmp_path / "b.jsonl", PARAGRAPHS[:101])
  with pytest.raises(store.StoreError, match=r"documents was 100 and is 101.*choose another"):
    run(model, [other], tmp_path / "store")
  with pytest.raises(store.StoreError, match=r"other inputs \(seed was 0 and is 5\);"):
    run(model, [first], tmp_path / "store", seed=5)
  another = tokenizer.train(PARAGRAPHS, tmp_path / "another.model", 500)
  with pytest.raises(store.StoreError, match="tokenizer_sha256 was"):
    run(another, [first], tmp_path / "store")
  with pytest.raises(store.StoreError, match="choose another store directory"):
    run(another, [first], tmp_path / "store", source="new")
  assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}


def test_a_lossy_tokenizer_is_reported(tmp_path):
  with (tmp_path / "lossy.model").open("wb") as file:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(PARAGRAPHS), model_writer=file, vocab_size=300, minloglevel=3
    )
  lossy = tokenizer.Tokenizer.load(tmp_path / "lossy.model")
  texts = ["plain words", *[f"two  spaces {i}" for i in range(9)]]
  lines: list[str] = []
  summary = run(
    lossy, [write_jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "store", report=lines.append
  )
  assert (summary.lossy_documents_in_sample, summary.sample_documents) == (9, 10)
  assert any(re.search("warning: .* don't decode to their text", line) for line in lines)
  index = store.TokenStore.open(tmp_path / "store" / "code" / "train").index
  assert index["origin"]["lossy_documents_in_sample"] >= 7
  assert index["tokenizer"]["normalisation"]["rules"] == "nmt_nfkc"


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl:2: not valid JSON .*; fix or remove"),
    ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl:3: not an object with the key 'text'"),
    ("a.jsonl", b'{"body": "x"}\n', r"a\.jsonl:1: .*; name the right one with --text_key"),
    ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1: 'text' isn't a string"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', r"a\.jsonl:2: invalid UTF-8 at byte 10"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: half a surrogate pair"),
    ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON"),
    ("a.jsonl", b'{"text": " "}\n', r"a\.jsonl: no documents .*1 empty"),
    ("a.jsonl", b"", r"a\.jsonl: no documents"),
    ("a.txt", b"ok\nok\n\xe9t\xe9", r"a\.txt:3: invalid UTF-8"),
    ("a.csv", b"x", r"a\.csv: neither \.jsonl nor \.txt"),
    (None, None, r"missing: no such file or directory"),
  ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, model, name, content, message):
  folder = tmp_path / "in"
  write_jsonl(folder / "good.jsonl", PARAGRAPHS[:5])
  path = folder / (name or "missing")
  if name:
    path.write_bytes(content)
  # Files of other kinds and empty ones are an error alone, not beside good ones in a directory.
  alone = name in (None, "a.csv") or "no documents" in message
  for given in [path] if alone else [path, folder]:
    with pytest.raises(documents.InputError, match=message) as caught:
      run(model, [given], tmp_path / "store")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_unreadable_and_changing_files(tmp_path, model, monkeypatch):
  (tmp_path / "in").mkdir()
  (tmp_path / "in" / "gone.txt").symlink_to(tmp_path / "nowhere")
  with pytest.raises(documents.InputError, match=r"gone\.txt: can't be read \(No such file"):
    run(model, [tmp_path / "in"], tmp_path / "store")
  path = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:50])

  def gather(*arguments):
    corpus = documents_gather(*arguments)
    path.write_bytes(path.read_bytes()[:-3] + b'~"}')  # the last letter of the last text
    return corpus

  documents_gather = documents.gather
  monkeypatch.setattr(documents, "gather", gather)
  with pytest.raises(documents.InputError, match=r"a\.jsonl: changed while it was being tokenized"):
    run(model, [path], tmp_path / "store")
  assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"source": "a/b"}, "name of a directory"),
    ({"source": ".."}, "name of a directory"),
    ({"source": ""}, "name of a directory"),
    ({"heldout_fraction": 1.0}, r"must be in \[0, 1\)"),
    ({"processes": 0}, "at least 1"),
    ({"shard_tokens": 0}, "at least 1"),
    ({"seed": 2**63}, "fit 64 bits"),
  ],
)
def test_bad_arguments_are_refused(tmp_path, model, changes, message):
  path = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS[:50])
  with pytest.raises(ValueError, match=message):
    run(model, [path], tmp_path / "store", **changes)
  assert not list(tmp_path.glob("store/*"))


def command(model, inputs, root, *more):
  return [
    *(sys.executable, "-m", "slmjax.data.tokenize", "--source=code", f"--store={root}"),
    *(f"--tokenizer={model.path}", *(f"--input={path}" for path in inputs), *more),
  ]


@pytest.mark.medium
def test_command_line(tmp_path, model):
  path = write_jsonl(tmp_path / "a.jsonl", PARAGRAPHS, key="body")

  def call(*more):
    arguments = command(model, [path], tmp_path / "store", *more)
    return subprocess.run(arguments, capture_output=True, text=True, check=False)

  missing = call()
  assert missing.returncode == 2
  assert re.fullmatch(r"error: .*a\.jsonl:1: .*--text_key\n", missing.stderr)
  made = call("--text_key=body", "--processes=2", "--json")
  assert (made.returncode, made.stderr) == (0, "")
  summary = json.loads(made.stdout)
  assert summary["documents"] == len(PARAGRAPHS)
  assert (
    summary["splits"]["train"]["tokens"] + summary["splits"]["heldout"]["tokens"]
    == (summary["tokens"])
  )
  again = call("--text_key=body")
  assert again.returncode == 0
  assert "nothing to do" in again.stderr
  assert f"{len(PARAGRAPHS):,} documents" in again.stdout
  assert call("--text_key=body", "--seed=3").returncode == 2
  shown = call("--help")
  assert "--input=books/" in shown.stdout
  assert "--heldout_fraction" in shown.stdout


@pytest.mark.medium
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_no_source_and_no_process(tmp_path, model, sent):
  texts = [f"{i} {text}" for i in range(60) for text in TEXTS]
  path = write_jsonl(tmp_path / "a.jsonl", texts)
  root = tmp_path / "store"
  arguments = command(model, [path], root, "--processes=2")
  with subprocess.Popen(arguments, stderr=subprocess.DEVNULL) as process:
    deadline = time.monotonic() + 60
    while not list(root.glob("code.tmp-*/train.tmp-*/shard-00000.bin")):
      assert process.poll() is None
      assert time.monotonic() < deadline
      time.sleep(0.01)
    children = _children(process.pid)
    assert len(children) >= 2
    process.send_signal(sent)
  assert process.returncode == (143 if sent == signal.SIGTERM else -sent)
  assert not (root / "code").exists()
  if sent == signal.SIGTERM:
    assert list(root.iterdir()) == []
  while any(map(_alive, children)):
    assert time.monotonic() < deadline, "workers outlive their parent"
    time.sleep(0.01)
  lines: list[str] = []
  small = write_jsonl(tmp_path / "b.jsonl", PARAGRAPHS)
  run(model, [small], root, report=lines.append)
  assert (len(lines) == 1 and "was killed" in lines[0]) == (sent == signal.SIGKILL)


def _children(pid):
  return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid):
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except FileNotFoundError:
    return False


def test_a_dead_worker_is_an_error_not_a_wait(tmp_path, model):
  with (
    pytest.raises(documents.InputError, match=r"died.*fewer --processes"),
    encode.workers(2, model) as mapped,
  ):
    list(mapped(os._exit, [3]))


def test_tokenizing_does_not_import_jax():
  program = "import sys, slmjax.data.tokenize; sys.exit('jax' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
