"""The plan: every token once per epoch, nothing shared between stages, rows a pure function."""

import contextlib
import itertools
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import fox1
from slmjax.config import ConfigError
from slmjax.data.plan import Plan, demand, stage_mixture
from slmjax.resolve import resolve
from tests import small


def make_config(*stages, max_epochs=1.0):
  """A config of stages (rows in all, {source: (weight, chunk)}), one row a step."""
  raw = small.raw_config()
  names = sorted({name for _, sources in stages for name in sources})
  raw.data.sources = ConfigDict({name: dict(max_epochs=max_epochs) for name in names})
  made = []
  for i, (rows, sources) in enumerate(stages):
    stage = ConfigDict(raw.stages[0].to_dict())
    stage.name = f"stage{i}"
    stage.sources = ConfigDict({n: dict(weight=w, chunk=c) for n, (w, c) in sources.items()})
    stage.batch_tokens = max(c for _, c in sources.values())
    stage.tokens = rows * stage.batch_tokens
    stage.learning_rate.update(start=stage.learning_rate.peak, warmup_steps=0)
    made.append(stage)
  raw.stages = tuple(made)
  return resolve(raw)


def rows_of(config, stage):
  return config.stages[stage].steps * config.stages[stage].rows


def spans(config, plan, stage, rows):
  """{source: starts of its chunks in the order in which the rows have them}."""
  shares, found = plan.shares[stage], plan.rows(stage, rows)
  visits = {share.source: [] for share in shares}
  for source, starts in zip(found.sources, found.starts, strict=True):
    assert starts.shape == (shares[source].per_row,)
    visits[shares[source].source] += starts.tolist()
  return visits


def check_everything(config, tokens):
  """Every property, over every row of every stage."""
  plan = Plan(config, tokens)
  used = {name: np.zeros(size, np.int64) - 1 for name, size in tokens.items()}  # by which stage
  for i, stage in enumerate(config.stages):
    visits = spans(config, plan, i, np.arange(rows_of(config, i)))
    total = sum(m.weight for m in stage.sources.values())
    for share in plan.shares[i]:
      name, starts = share.source, np.array(visits[share.source], np.int64)
      weight = stage.sources[name].weight / total
      assert abs(len(starts) / share.per_row - weight * rows_of(config, i)) <= 64
      assert len(starts) == share.rows * share.per_row
      assert len(starts) == plan.visits(i, plan.shares[i].index(share), rows_of(config, i))
      if not len(starts):
        continue
      assert 0 <= share.start < share.stop <= tokens[name]
      owned = used[name][share.start : share.stop]
      assert (owned == -1).all(), "two stages share tokens"
      owned[:] = i
      chunks = np.arange(share.start, share.stop, share.chunk)
      assert share.chunks == len(chunks)
      assert (share.stop - share.start) % share.chunk == 0
      for first in range(0, len(starts), len(chunks)):
        epoch = starts[first : first + len(chunks)]
        if len(epoch) == len(chunks):  # a whole epoch: each chunk of the range exactly once
          np.testing.assert_array_equal(np.sort(epoch), chunks)
        else:
          assert len(set(epoch)) == len(epoch)
          assert set(epoch) <= set(chunks)
      assert len(starts) * share.chunk <= config.data.sources[name].max_epochs * len(owned)
  return plan


def test_every_token_once_without_repeats():
  config = make_config(
    (120, {"a": (0.5, 8), "b": (0.5, 8)}),
    (100, {"a": (0.3, 8), "b": (0.2, 16), "c": (0.5, 32)}),
    (64, {"c": (1.0, 16), "a": (0.0, 8)}),
  )
  takes = demand(config)
  exact = {name: sum(by_stage) for name, by_stage in takes.items()}
  plan = check_everything(config, exact)
  # The stores hold exactly what is taken: all of it is used, stage after stage.
  for name, size in exact.items():
    ranges = [(s.start, s.stop) for shares in plan.shares for s in shares if s.source == name]
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))
  check_everything(config, {name: size + 5 for name, size in exact.items()})


def test_repeats_stay_in_the_range_in_a_new_order():
  config = make_config(
    (200, {"a": (0.6, 8), "b": (0.4, 16)}), (150, {"a": (1.0, 32)}), max_epochs=5.0
  )
  takes = {name: sum(by_stage) for name, by_stage in demand(config).items()}
  plan = check_everything(config, {"a": takes["a"] // 3, "b": takes["b"] // 4 + 7})
  for i, index in ((0, 0), (0, 1), (1, 0)):
    share = plan.shares[i][index]
    assert share.epochs > 2
    epochs = [
      plan.chunk_starts(i, index, np.arange(e * share.chunks, (e + 1) * share.chunks))
      for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0].tolist() != epochs[1].tolist()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=40, deadline=None)
def test_any_small_curriculum(data):
  chunks = st.sampled_from([4, 8, 16])
  weights = st.sampled_from([0.0, 0.01, 0.3, 1.0])
  stage = st.tuples(
    st.integers(1, 150),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(weights, chunks), min_size=1).filter(
      lambda sources: any(w for w, _ in sources.values())
    ),
  )
  epochs = data.draw(st.sampled_from([1.0, 1.5, 4.0]))
  config = make_config(*data.draw(st.lists(stage, min_size=1, max_size=3)), max_epochs=epochs)
  takes = {name: sum(by_stage) for name, by_stage in demand(config).items()}
  extra = data.draw(st.integers(0, 20))
  sizes = {name: int(-(-take // epochs)) + extra for name, take in takes.items()}
  # Only where tokens repeat can whole chunks be too few; what fits once is never refused.
  refused = contextlib.suppress(ConfigError) if epochs > 1 else contextlib.nullcontext()
  with refused:
    check_everything(config, sizes)


def test_demand_is_what_the_rows_take():
  config = make_config((100, {"a": (0.7, 8), "b": (0.3, 16)}), (50, {"b": (1.0, 8)}))
  plan = Plan(config, {"a": 10**4, "b": 10**4})
  for i in range(2):
    for name, starts in spans(config, plan, i, np.arange(rows_of(config, i))).items():
      chunk = config.stages[i].sources[name].chunk
      assert demand(config)[name][i] == len(starts) * chunk


def test_rows_are_a_pure_function_of_their_numbers():
  config = make_config(
    (130, {"a": (0.5, 8), "b": (0.3, 16), "c": (0.2, 4)}), (90, {"a": (1.0, 8)}), max_epochs=9.0
  )
  sizes = {"a": 300, "b": 200, "c": 150}
  whole = Plan(config, sizes).rows(0, np.arange(130))
  rng = np.random.default_rng(0)
  plan = Plan(config, sizes)
  for _ in range(60):
    rows = rng.integers(0, 130, rng.integers(1, 90))  # any order, repeats, few and many
    found = plan.rows(0, rows)
    np.testing.assert_array_equal(found.sources, whole.sources[rows])
    for row, starts in zip(rows, found.starts, strict=True):
      np.testing.assert_array_equal(starts, whole.starts[row])
    plan.rows(1, np.arange(3))  # other calls in between leave no trace
  assert plan.rows(0, np.empty(0, np.int64)).starts == ()


def test_the_seed_and_the_stage_change_the_order_but_not_the_set():
  def visits(seed, stage_name):
    raw = small.raw_config()
    raw.seed = seed
    raw.stages[0].name = stage_name
    config = resolve(raw)
    plan = Plan(config, dict.fromkeys(config.data.sources, 10**5))
    return spans(config, plan, 0, np.arange(rows_of(config, 0)))

  first = visits(0, "general")
  assert first == visits(0, "general")
  for other in (visits(1, "general"), visits(0, "other")):
    for name, starts in first.items():
      assert sorted(starts) == sorted(other[name])
      assert starts != other[name]


def test_refuses_rows_outside_the_stage():
  config = make_config((10, {"a": (1.0, 8)}))
  plan = Plan(config, {"a": 80})
  for rows in ([-1], [10]):
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 10\), the rows of stage 0"):
      plan.rows(0, np.array(rows))


@pytest.mark.parametrize(
  ("size", "max_epochs", "message"),
  [
    (
      239,
      1.0,
      "config.data.sources.a: the stages take 160 (stage0) + 80 (stage1) = 240 tokens, but the "
      "store has 239 and max_epochs is 1; lower the weights or tokens, add text, or allow 1.01 "
      "epochs",
    ),
    (0, 1.0, "config.data.sources.a: the store is empty"),
    (
      119,
      2.0,
      "config.data.sources.a: the stages take 160 (stage0) + 80 (stage1) = 240 tokens, but the "
      "store has 119 and max_epochs is 2; lower the weights or tokens, add text, or allow 2.02 "
      "epochs",
    ),
    (  # 2/3 of 123 is 82: ten chunks of 8; 1/3 is 41, two chunks of 16 = 32
      123,
      2.0,
      "config.stages[1] (stage1).sources.a: takes 80 tokens of a range of 32, whole chunks of 16, "
      "and max_epochs is 2; lower the weight or tokens, add text, or allow 2.50 epochs",
    ),
    (
      30,
      20.0,
      "config.stages[1] (stage1).sources.a: the source's 30 tokens leave the stage less than one "
      "chunk of 16; add text or shorten the chunk",
    ),
  ],
)
def test_refuses_too_small_a_source_with_the_arithmetic(size, max_epochs, message):
  config = make_config((20, {"a": (1.0, 8)}), (5, {"a": (1.0, 16)}), max_epochs=max_epochs)
  with pytest.raises(ConfigError) as caught:
    Plan(config, {"a": size})
  assert str(caught.value) == message


@pytest.fixture(scope="module")
def full():
  """The full recipe with made-up stores: some just large enough, some larger."""
  config = resolve(fox1.get_config())
  sizes = {name: sum(takes) + 12_345 * i for i, (name, takes) in enumerate(demand(config).items())}
  return config, Plan(config, sizes), sizes


def test_fox1_by_sampling(full):
  config, plan, sizes = full
  rng = np.random.default_rng(0)
  for i, stage in enumerate(config.stages):
    total = rows_of(config, i)
    rows = np.unique(rng.integers(0, total, 20_000))
    for share in plan.shares[i]:
      assert 0 <= share.start < share.stop <= sizes[share.source]
      assert share.epochs == 1.0
    for name, starts in spans(config, plan, i, rows).items():
      share = next(s for s in plan.shares[i] if s.source == name)
      offsets = np.array(starts) - share.start
      assert (offsets % stage.sources[name].chunk == 0).all()
      assert offsets.min() >= 0
      assert offsets.max() + share.chunk <= share.stop - share.start
      assert len(np.unique(offsets)) == len(offsets)
      # Shares of a sample: five standard deviations of a binomial.
      weight, count = stage.sources[name].weight, len(starts) / share.per_row
      assert abs(count - weight * len(rows)) < 5 * np.sqrt(len(rows) * weight * (1 - weight)) + 1
  for name in config.data.sources:
    ranges = [(s.start, s.stop) for shares in plan.shares for s in shares if s.source == name]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ranges))


def test_fox1_needs_no_memory_to_speak_of(full):
  """A few kilobytes per row asked for, however far in; a table of 5e8 rows would be gigabytes."""
  config, plan, _ = full
  rng = np.random.default_rng(1)
  rows = [np.sort(rng.integers(0, rows_of(config, 1), 4)) for _ in range(750)]
  plan.rows(1, rows[0])
  tracemalloc.start()
  try:
    for some in rows:
      plan.rows(1, some)
    peak = tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()
  assert peak < 2**20


def test_fox1_weights_hold_after_any_prefix(full):
  config, _, _ = full
  for i, stage in enumerate(config.stages):
    mixture = stage_mixture(config, i)
    for rows in (1, 1000, 10**6 + 7, rows_of(config, i)):
      for count, m in zip(mixture.counts(rows), stage.sources.values(), strict=True):
        assert abs(count - m.weight * rows) <= mixture.pattern


def test_frozen(full):
  """The order of the training data at full size. If this fails, a resumed run would read other
  data than the run that it resumes: mend the code, never these numbers."""
  _, plan, _ = full
  found = [plan.rows(i, np.array([0, 12_345, 1_000_000])) for i in range(3)]
  assert [rows.sources.tolist() for rows in found] == SOURCES
  assert [[starts.tolist() for starts in rows.starts] for rows in found] == STARTS


SOURCES = [[2, 2, 2], [4, 3, 4], [1, 1, 1]]
STARTS = [
  [[88561979392], [404393758720], [753603268608]],
  [[1293944913920, 886489100288], [116924661760], [1350510977024, 1203073945600]],
  [[27668955136, 4201254912], [23078047744, 21307060224], [24015532032, 18880696320]],
]
