"""The loader: a batch is a pure function of config, stores and step, on any mesh."""

import dataclasses
import hashlib
import math

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from slmjax import sharding
from slmjax.data.loader import Batch, Loader, abstract_batch, read_span, row_arrays
from slmjax.data.plan import Plan, demand
from slmjax.resolve import resolve
from tests import small
from tests.made_stores import EOS, make_store

FIELDS = [field.name for field in dataclasses.fields(Batch)]


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
  """Stores that hold exactly what the small curriculum takes: the last row reads the last token."""
  root = tmp_path_factory.mktemp("stores")
  takes = demand(small.config())
  return {name: make_store(root / name / "train", sum(t)) for name, t in takes.items()}


def make_config(**stage_changes):
  """The small curriculum with some settings of every stage changed."""
  config = small.config()
  stages = tuple(dataclasses.replace(stage, **stage_changes) for stage in config.stages)
  return dataclasses.replace(config, stages=stages)


def load(config, stores, first_step, mesh_shape=(1, 1, 1, 1)):
  """The batches from a step to its stage's end, as NumPy arrays [rows, positions] by name."""
  plan = Plan(config, {name: store.tokens for name, store in stores.items()})
  mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)])
  loaded = []
  for batch in Loader(config, plan, stores, mesh).batches(first_step):
    stage = config.stages[config.stage_index(first_step)]
    for leaf, expected in zip(
      jax.tree.leaves(batch), jax.tree.leaves(abstract_batch(stage, mesh)), strict=True
    ):
      assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
      assert leaf.sharding == expected.sharding
    loaded.append(
      {name: np.asarray(x).reshape(-1, stage.row_length) for name, x in vars(batch).items()}
    )
  return loaded


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b, strict=True):
    for name in FIELDS:
      np.testing.assert_array_equal(x[name], y[name])


def test_starting_anywhere_gives_the_same_batches(stores):
  config = small.config()
  whole = [batch for first in (0, 8, 14) for batch in load(config, stores, first)]
  assert len(whole) == config.steps == 18
  for step in range(18):
    end = next(end for end in config.boundaries[1:] if step < end)
    assert_same(load(config, stores, step), whole[step:end])
  with pytest.raises(ValueError, match="step 18 is outside the run's 18 steps"):
    load(config, stores, 18)


@pytest.mark.parametrize("mesh", [(4, 1, 1, 1), (1, 4, 1, 1), (2, 2, 1, 1), (1, 2, 1, 2)])
@pytest.mark.parametrize("microbatch_rows", [1, 2])
def test_the_same_rows_on_any_mesh_in_any_microbatches(stores, mesh, microbatch_rows):
  """In the same order too: row r of the batch is row r of the plan, however it is cut up."""
  for step in (7, 9, 17):
    alone = load(small.config(), stores, step)
    assert_same(load(make_config(microbatch_rows=8), stores, step), alone)
    config = make_config(microbatch_rows=microbatch_rows)
    assert_same(load(config, stores, step, mesh), alone)


def test_batches_hold_the_plans_tokens(stores):
  config = small.config()
  plan = Plan(config, {name: store.tokens for name, store in stores.items()})
  for first in config.boundaries[:-1]:
    index = config.stage_index(first)
    stage = config.stages[index]
    for k, batch in enumerate(load(config, stores, first)):
      rows = plan.rows(index, np.arange(k * stage.rows, (k + 1) * stage.rows))
      for r, (source, starts) in enumerate(zip(rows.sources, rows.starts, strict=True)):
        share = plan.shares[index][source]
        store = stores[share.source]
        for c, start in enumerate(starts.tolist()):
          chunk = slice(c * share.chunk, (c + 1) * share.chunk)
          targets = store.read(start, share.chunk)
          tokens = batch["tokens"][r, chunk]
          np.testing.assert_array_equal(batch["targets"][r, chunk], targets)
          np.testing.assert_array_equal(tokens[1:], targets[:-1])
          assert tokens[0] == (store.read(start - 1, 1)[0] if start else store.eos_id)
          check_segments(batch, r, chunk, stage.isolate_documents)
      assert (batch["weights"] == 1).all()


def check_segments(batch, row, chunk, isolate_documents):
  """Ids and positions of a chunk, one token after the other."""
  tokens = batch["tokens"][row]
  segments, positions = batch["segments"][row], batch["positions"][row]
  for i in range(chunk.start, chunk.stop):
    begins = i == chunk.start or (isolate_documents and tokens[i] == EOS)
    if i == 0:
      assert segments[i] == 1
    else:
      assert segments[i] == segments[i - 1] + begins
    assert positions[i] == (0 if begins else positions[i - 1] + 1)


def test_documents_may_see_one_another_if_the_stage_says_so(stores):
  config = make_config(isolate_documents=False)
  isolated = load(small.config(), stores, 8)
  for batch, other in zip(load(config, stores, 8), isolated, strict=True):
    for row in range(8):
      changes = np.flatnonzero(np.diff(batch["segments"][row])) + 1
      assert set(changes) <= {32}  # chunks of 32 or 64 in a row of 64
      check_segments(batch, row, slice(0, 32), isolate_documents=False)
    np.testing.assert_array_equal(batch["tokens"], other["tokens"])
    assert (batch["segments"] <= other["segments"]).all()


def test_every_token_of_the_stores_is_predicted_once(stores):
  """The stores hold just what is taken, so the targets are the stores' tokens but for a tail of
  less than a document, and no store's end is read past."""
  config = small.config()
  targets = np.concatenate(
    [b["targets"].ravel() for first in (0, 8, 14) for b in load(config, stores, first)]
  )
  taken = [s.read(0, sum(demand(config)[name])) for name, s in stores.items()]
  np.testing.assert_array_equal(np.sort(targets), np.sort(np.concatenate(taken)))


def test_first_token_of_a_store_is_predicted_from_an_eos(stores):
  store = stores["docs"]
  np.testing.assert_array_equal(read_span(store, 0, 5), [EOS, *store.read(0, 5)])
  np.testing.assert_array_equal(read_span(store, 7, 5), store.read(6, 6))
  last = store.tokens - 5
  np.testing.assert_array_equal(read_span(store, last, 5), store.read(last - 1, 6))
  with pytest.raises(IndexError):
    read_span(store, last + 1, 5)


@hypothesis.given(
  chunks=st.integers(1, 4), length=st.integers(1, 12), isolate=st.booleans(), data=st.data()
)
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_row(chunks, length, isolate, data):
  flat = data.draw(st.lists(st.integers(0, 3), min_size=chunks * (length + 1), max_size=80))
  spans = np.resize(np.array(flat, np.int32), (chunks, length + 1))
  row = row_arrays(spans, EOS, isolate)
  batch = {name: x[None] for name, x in row.items()}
  assert {name: str(x.dtype) for name, x in row.items()} == {
    **dict.fromkeys(FIELDS, "int32"),
    "weights": "float32",
  }
  for c in range(chunks):
    chunk = slice(c * length, (c + 1) * length)
    np.testing.assert_array_equal(row["tokens"][chunk], spans[c, :-1])
    np.testing.assert_array_equal(row["targets"][chunk], spans[c, 1:])
    check_segments(batch, 0, chunk, isolate)


def test_a_store_of_another_order_changes_the_batch(stores, tmp_path):
  """The test of the tests: what is compared above does depend on the data and on the seed."""
  config = small.config()
  first = load(config, stores, 0)[0]["tokens"]
  raw = small.raw_config()
  raw.seed = 1
  assert (load(resolve(raw), stores, 0)[0]["tokens"] != first).any()
  other = {**stores, "docs": make_store(tmp_path / "docs" / "train", 20_000, seed=1)}
  assert (load(config, other, 0)[0]["tokens"] != first).any()


def test_frozen(stores):
  """What a resumed run reads must not change between versions: mend the code, not the digest.

  (A change of the made-up stores or of the small config changes it too.)
  """
  config = small.config()
  digest = hashlib.sha256()
  for step in (0, 7, 8, 17):
    batch = load(config, stores, step)[0]
    for name in FIELDS:
      digest.update(batch[name].tobytes())
  assert digest.hexdigest() == DIGEST


DIGEST = "7db613646c2480d61af7e7756df1d926a0e465f58cf728318ec32e91ed815fc4"
