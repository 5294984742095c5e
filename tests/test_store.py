"""The token store: what is written is what is read, damage is found, half a store never appears."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from slmjax.data import store, store_writer

BOS, EOS = 2, 1


def facts(vocab_size=1000, **changes):
  ids = {"bos_id": BOS, "eos_id": EOS, "unk_id": 3, "pad_id": 0} | changes
  return store.TokenizerFacts(sha256="0" * 64, vocab_size=vocab_size, normalisation={}, **ids)


def write(directory, documents, *, vocab_size=1000, shard_tokens=16, add_bos=False, origin=None):
  with store_writer.StoreWriter(
    directory,
    source=directory.parent.name,
    split=directory.name,
    tokenizer=facts(vocab_size),
    add_bos=add_bos,
    shard_tokens=shard_tokens,
    origin=origin,
  ) as writer:
    for document in documents:
      writer.add(np.array(document, np.int64), len(document) * 3)
  return store.TokenStore.open(directory)


def some_documents(count=40, vocab_size=1000, seed=0):
  rng = np.random.default_rng(seed)
  return [rng.integers(4, vocab_size, rng.integers(0, 30)).tolist() for _ in range(count)]


@pytest.mark.parametrize("vocab_size", [65536, 65537])
@pytest.mark.parametrize("add_bos", [False, True])
def test_reads_what_was_written_across_shards(tmp_path, vocab_size, add_bos):
  documents = [*some_documents(vocab_size=vocab_size), [vocab_size - 1]]
  opened = write(tmp_path / "web" / "train", documents, vocab_size=vocab_size, add_bos=add_bos)
  laid = [[*([BOS] if add_bos else []), *document, EOS] for document in documents]
  expected = np.concatenate(laid)
  assert opened.tokens == len(expected)
  assert opened.documents == len(documents)
  assert opened.bytes == 3 * sum(map(len, documents)) == opened.document_bytes.sum()
  assert (opened.source, opened.split, opened.eos_id) == ("web", "train", EOS)
  assert opened.read(0, opened.tokens).dtype == np.int32
  np.testing.assert_array_equal(opened.read(0, opened.tokens), expected)
  for start, count in [(0, 0), (15, 2), (3, 50), (opened.tokens - 1, 1), (opened.tokens, 0)]:
    np.testing.assert_array_equal(opened.read(start, count), expected[start : start + count])
  starts = np.cumsum([0, *map(len, laid)])[:-1]
  np.testing.assert_array_equal(opened.document_starts, starts)
  width = 2 if vocab_size == 65536 else 4
  sizes = [os.path.getsize(file) for file in sorted(opened.path.glob("shard-*"))]
  assert sizes[:-1] == [16 * width] * (len(sizes) - 1)
  assert not list(tmp_path.glob("**/*tmp*"))


@hypothesis.given(
  lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
  shard_tokens=st.integers(1, 50),
  data=st.data(),
)
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_span_of_any_sharding(tmp_path_factory, lengths, shard_tokens, data):
  documents = [list(range(4, 4 + length)) for length in lengths]
  directory = tmp_path_factory.mktemp("store") / "s" / "heldout"
  opened = write(directory, documents, shard_tokens=shard_tokens)
  expected = np.concatenate([[*document, EOS] for document in documents])
  start = data.draw(st.integers(0, opened.tokens))
  stop = data.draw(st.integers(start, opened.tokens))
  np.testing.assert_array_equal(opened.read(start, stop - start), expected[start:stop])
  starts = np.cumsum([0] + [length + 1 for length in lengths])[:-1]
  begun = int(((starts >= start) & (starts < stop)).sum())
  assert opened.documents_begun(start, stop) == begun


def test_documents_begun_of_arrays_adds_up(tmp_path):
  opened = write(tmp_path / "web" / "train", some_documents())
  edges = np.arange(0, opened.tokens + 1)
  counts = opened.documents_begun(edges[:-1], edges[1:])
  assert counts.shape == (opened.tokens,)
  assert counts.dtype == np.int64
  np.testing.assert_array_equal(np.flatnonzero(counts), opened.document_starts)
  assert opened.documents_begun(0, opened.tokens) == opened.documents
  np.testing.assert_array_equal(
    opened.documents_begun(0, edges), np.concatenate([[0], np.cumsum(counts)])
  )


def test_spans_outside_are_refused(tmp_path):
  opened = write(tmp_path / "web" / "train", some_documents())
  for start, count in [(-1, 2), (0, opened.tokens + 1), (opened.tokens + 1, 0), (0, -1)]:
    with pytest.raises(IndexError, match="asked of a store with"):
      opened.read(start, count)
  for start, stop in [(-1, 2), (0, opened.tokens + 1), (3, 2)]:
    with pytest.raises(IndexError, match="outside"):
      opened.documents_begun(start, stop)


def test_pickles_small_and_threads_agree(tmp_path):
  opened = write(tmp_path / "web" / "train", some_documents(400))
  expected = opened.read(0, opened.tokens)
  blob = pickle.dumps(opened)
  assert len(blob) < 1000
  other = pickle.loads(blob)
  with ThreadPoolExecutor(8) as pool:
    parts = list(pool.map(lambda i: other.read(i, 1), range(other.tokens)))
  np.testing.assert_array_equal(np.concatenate(parts), expected)
  write(tmp_path / "other" / "train", some_documents(3, seed=1))
  os.rename(opened.path, tmp_path / "gone")
  os.rename(tmp_path / "other" / "train", opened.path)
  with pytest.raises(store.StoreError, match="replaced by another store"):
    pickle.loads(blob)


def test_fingerprint_is_of_content_tokenizer_and_flags(tmp_path):
  base = write(tmp_path / "a" / "train", some_documents(), origin={"manifest": "x"})
  same = write(tmp_path / "deep" / "b" / "heldout", some_documents(), origin={"manifest": "y"})
  assert base.fingerprint == same.fingerprint
  changed = [[5, *some_documents()[0]], *some_documents()[1:]]
  others = [
    write(tmp_path / "c" / "train", changed),
    write(tmp_path / "d" / "train", some_documents(), add_bos=True),
    write(tmp_path / "e" / "train", some_documents(), vocab_size=1001),
  ]
  assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 4


def damaged(tmp_path, damage):
  """A store with `damage(directory)` done to it; returns its directory."""
  opened = write(tmp_path / "web" / "train", some_documents())
  (tmp_path / store.TOKENIZER_FILE).write_bytes(b"model")
  damage(opened.path)
  return opened.path


def edit_index(**changes):
  def damage(directory):
    index = json.loads((directory / store.INDEX).read_text())
    (directory / store.INDEX).write_text(json.dumps(index | changes))

  return damage


def truncate(name, by):
  return lambda directory: os.truncate(directory / name, os.path.getsize(directory / name) - by)


@pytest.mark.parametrize(
  ("damage", "message"),
  [
    (truncate("shard-00000.bin", 2), r"shard-00000\.bin: 30 bytes where the index says 32"),
    (lambda d: (d / "shard-00001.bin").unlink(), r"shard-00001\.bin: missing"),
    (lambda d: (d / store.STARTS).unlink(), r"documents\.npy: missing"),
    (truncate(store.BYTES, 8), r"document_bytes\.npy: truncated"),
    (truncate(store.BYTES, 8 * 40 + 60), r"document_bytes\.npy: truncated"),
    (
      lambda d: np.save(d / store.STARTS, np.zeros(3, np.uint64)),
      r"documents\.npy: holds uint64\[3\]",
    ),
    (lambda d: (d / store.INDEX).unlink(), r"index\.json: no such file, so no store; make it"),
    (lambda d: (d / store.INDEX).write_text("{"), r"index\.json: not valid JSON"),
    (edit_index(format=99), r"index\.json: not a token store of format 1"),
    (edit_index(tokens=12), r"index\.json: contradicts its own fingerprint"),
    (edit_index(special_ids={"eos": 7}), r"index\.json: contradicts its own fingerprint"),
    (edit_index(shards=[]), r"index\.json: incomplete"),
  ],
)
def test_open_finds_damage_in_one_line(tmp_path, damage, message):
  directory = damaged(tmp_path, damage)
  with pytest.raises(store.StoreError, match=message) as caught:
    store.TokenStore.open(directory)
  assert "\n" not in str(caught.value)
  assert "tokenize" in str(caught.value)


def flip(name):
  def damage(path):
    data = bytearray((path / name).read_bytes())
    data[-1] ^= 1
    (path / name).write_bytes(data)

  return damage


@pytest.mark.parametrize("name", ["shard-00000.bin", "shard-00003.bin", store.BYTES])
def test_verify_finds_one_changed_bit(tmp_path, name):
  opened = store.TokenStore.open(damaged(tmp_path, flip(name)))
  with pytest.raises(store.StoreError, match=f"{re.escape(name)}: content differs"):
    opened.verify()


def test_verify_looks_at_the_tokenizer(tmp_path):
  opened = write(tmp_path / "web" / "train", some_documents())
  with pytest.raises(store.StoreError, match=r"tokenizer\.model: missing"):
    opened.verify()
  (tmp_path / store.TOKENIZER_FILE).write_bytes(b"another")
  with pytest.raises(store.StoreError, match="not the tokenizer that made"):
    opened.verify()


def test_one_tokenizer_per_store(tmp_path):
  mine, other = tmp_path / "mine", tmp_path / "other"
  mine.write_bytes(b"1")
  other.write_bytes(b"2")
  for _ in range(2):
    store_writer.install_tokenizer(mine, tmp_path / "store")
  with pytest.raises(store.StoreError, match="choose another store directory"):
    store_writer.install_tokenizer(other, tmp_path / "store")
  assert (tmp_path / "store" / store.TOKENIZER_FILE).read_bytes() == b"1"


@pytest.mark.parametrize(
  ("ids", "message"),
  [
    ([5, 1000], "outside"),
    ([-1], "outside"),
    ([5, EOS, 6], "EOS .* inside its text"),
    ([BOS, 6], "BOS .* inside its text"),
  ],
)
def test_bad_ids_are_refused_and_nothing_stays(tmp_path, ids, message):
  with pytest.raises(store.StoreError, match=message):
    write(tmp_path / "web" / "train", [[5, 6], ids])
  assert list((tmp_path / "web").iterdir()) == []


def test_refusals_of_the_writer(tmp_path):
  def writer(**changes):
    arguments = {"source": "web", "split": "train", "tokenizer": facts()} | changes
    return store_writer.StoreWriter(tmp_path / "web" / "train", **arguments)

  with pytest.raises(store.StoreError, match="has no EOS"):
    writer(tokenizer=facts(eos_id=None))
  with pytest.raises(store.StoreError, match="has no BOS"):
    writer(tokenizer=facts(bos_id=None), add_bos=True)
  with pytest.raises(store.StoreError, match="is none of train, heldout"):
    writer(split="dev")
  with pytest.raises(store.StoreError, match="no documents"), writer():
    pass
  assert list((tmp_path / "web").iterdir()) == []
  write(tmp_path / "web" / "train", [[5]])
  with pytest.raises(store.StoreError, match="exists already"):
    writer()


def test_an_exception_and_a_kill_publish_nothing(tmp_path):
  def documents():
    yield [5, 6]
    raise RuntimeError("mine")

  with pytest.raises(RuntimeError, match="mine"):
    write(tmp_path / "web" / "train", documents())
  assert list((tmp_path / "web").iterdir()) == []

  program = textwrap.dedent("""
    import sys, numpy as np
    from slmjax.data import store, store_writer
    facts = store.TokenizerFacts("0", 1000, 2, 1, 3, 0, {})
    with store_writer.StoreWriter(
      sys.argv[1], source="web", split="train", tokenizer=facts, shard_tokens=1000
    ) as writer:
      while True:
        writer.add(np.full(500, 5), 500)
        if writer.documents == 50:
          print("going", flush=True)
  """)
  command = [sys.executable, "-c", program, str(tmp_path / "web" / "train")]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout is not None
    assert process.stdout.readline() == "going\n"
    process.send_signal(signal.SIGKILL)
  assert not (tmp_path / "web" / "train").exists()
  write(tmp_path / "web" / "train", [[5]]).read(0, 2)  # a leftover doesn't stand in the way


def test_the_header_is_numpys(tmp_path):
  for length in (0, 1, 12345, 2**40):
    (tmp_path / "h").write_bytes(store_writer.npy_header(length))
    with (tmp_path / "h").open("rb") as file:
      assert np.lib.format.read_magic(file) == (1, 0)
      shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
      assert (shape, fortran, dtype, file.tell()) == ((length,), False, np.dtype("<u8"), 128)
