"""The ledger: what it derives is what the rows hold, and spans of steps add up."""

import collections
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from slmjax.data import ledger
from slmjax.data.plan import Plan, demand
from slmjax.resolve import resolve
from tests import small
from tests.made_stores import make_store


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """The small curriculum, half of its sources repeated, over real stores."""
  raw = small.raw_config()
  for name in ("docs", "code"):
    raw.data.sources[name].max_epochs = 4.0
  config = resolve(raw)
  root = tmp_path_factory.mktemp("stores")
  stores = {}
  for name, takes in demand(config).items():
    size = sum(takes) // 3 if name in ("docs", "code") else sum(takes) + 50
    stores[name] = make_store(root / name / "train", size)
  return config, Plan(config, {n: s.tokens for n, s in stores.items()}), stores


def counted(run, first, stop):
  """{(stage, source): [tokens, chunks, documents]} by going through the rows one by one."""
  config, plan, stores = run
  found = collections.defaultdict(lambda: [0, 0, 0])
  for step in range(first, stop):
    i = config.stage_index(step)
    stage = config.stages[i]
    begin = (step - config.boundaries[i]) * stage.rows
    rows = plan.rows(i, np.arange(begin, begin + stage.rows))
    for source, starts in zip(rows.sources, rows.starts, strict=True):
      share = plan.shares[i][source]
      entry = found[stage.name, share.source]
      for start in starts.tolist():
        starts_of_documents = set(stores[share.source].document_starts.tolist())
        entry[0] += share.chunk
        entry[1] += 1
        entry[2] += sum(t in starts_of_documents for t in range(start, start + share.chunk))
  return found


def test_equals_counting_the_rows(run):
  config, plan, stores = run
  for first, stop in [(0, config.steps), (0, 1), (7, 9), (3, 17), (13, 15), (5, 5), (18, 18)]:
    entries = ledger.between(config, plan, stores, first, stop)
    expected = counted(run, first, stop)
    assert len(entries) == sum(len(stage.sources) for stage in config.stages)
    for entry in entries:
      found = [entry.tokens, entry.chunks, entry.documents]
      assert found == expected[entry.stage, entry.source]
      assert entry.masked == 0
    trained = config.tokens_before(stop) - config.tokens_before(first)
    assert sum(entry.tokens for entry in entries) == trained


def test_epochs_of_the_whole_run_are_the_plans(run):
  config, plan, stores = run
  entries = ledger.between(config, plan, stores, 0, config.steps)
  shares = [share for shares in plan.shares for share in shares]
  assert any(share.epochs > 2 for share in shares)
  for entry, share in zip(entries, shares, strict=True):
    assert (entry.source, entry.epochs) == (share.source, share.epochs)
    assert entry.range_chunks == share.chunks


@hypothesis.given(cuts=st.lists(st.integers(0, 18), max_size=6))
@hypothesis.settings(max_examples=40, deadline=None)
def test_spans_add_up(run, cuts):
  config, plan, stores = run
  points = [0, *sorted(cuts), config.steps]
  total = ledger.between(config, plan, stores, 0, 0)
  for first, stop in itertools.pairwise(points):
    total = ledger.add(total, ledger.between(config, plan, stores, first, stop))
  assert total == ledger.between(config, plan, stores, 0, config.steps)


def test_documents_are_looked_up_in_blocks(run, monkeypatch):
  config, plan, stores = run
  whole = ledger.between(config, plan, stores, 0, config.steps)
  monkeypatch.setattr(ledger, "BLOCK", 7)
  assert ledger.between(config, plan, stores, 0, config.steps) == whole


def test_refuses_to_add_other_runs(run):
  config, plan, stores = run
  entries = ledger.between(config, plan, stores, 0, 1)
  with pytest.raises(ValueError, match="ledgers of different runs: general/"):
    ledger.add(entries, entries[::-1])
  with pytest.raises(ValueError, match="shorter"):
    ledger.add(entries, entries[:-1])
