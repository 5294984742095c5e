"""The mixture: shares hold after any number of rows, exactly and without state."""

import fractions
import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from slmjax.data.mixture import Mixture

# Tiny, zero, awkward in binary, and far apart.
WEIGHTS = st.lists(
  st.one_of(
    st.sampled_from([0.0, 1e-9, 0.1, 1 / 3, 1.0, 3.0]),
    st.floats(0, 100, allow_subnormal=False).map(lambda x: round(x, 6)),
  ),
  min_size=1,
  max_size=12,
).filter(any)


def shares(weights):
  """Exact shares of the weights as they are written: 0.1 is one tenth."""
  exact = [fractions.Fraction(str(w)) for w in weights]
  return [w / sum(exact) for w in exact]


def check_prefix(mixture, exact, rows, counts):
  """Each source within one pattern of its exact share, and the tighter bound that holds: floors
  take less than one row from each source, the heaviest gets what they lose, and spreading evenly
  inside a pattern is off by at most one row for each source."""
  assert sum(counts) == rows
  for count, share in zip(counts, exact, strict=True):
    assert abs(count - share * rows) <= min(mixture.pattern, 2 * len(exact))
    assert share or count == 0


def check_consistent(mixture, weights, first, count, every=1):
  """locate() against counts() over the rows [first, first + count), shares at `every` prefix."""
  exact = shares(weights)
  rows = np.arange(first, first + count)
  sources, numbers = mixture.locate(rows)
  running = list(mixture.counts(first))
  for row, source, number in zip(rows.tolist(), sources, numbers, strict=True):
    assert weights[source] > 0
    assert number == running[source]  # consecutive numbers for each source
    running[source] += 1
    if row % every == 0:
      check_prefix(mixture, exact, row + 1, running)
  assert tuple(running) == mixture.counts(first + count)


@pytest.mark.parametrize("sources", [1, 2, 3])
def test_every_prefix_of_small_weights(sources):
  for weights in itertools.product([0.0, 0.05, 0.3, 1.0, 2.0], repeat=sources):
    if any(weights):
      mixture = Mixture(weights)
      check_consistent(mixture, weights, 0, 3 * mixture.pattern + 5)


@hypothesis.given(WEIGHTS, st.integers(0, 10**12))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_weights_anywhere(weights, first):
  mixture = Mixture(tuple(weights))
  check_consistent(mixture, weights, first, mixture.pattern + 10)


def test_many_sources():
  """With more sources than rows in the smallest pattern the pattern grows."""
  weights = [1.0] * 40 + [1e-6] * 10 + [0.0]
  mixture = Mixture(tuple(weights))
  check_consistent(mixture, weights, 0, 2 * mixture.pattern, every=53)


def test_fox1_scale():
  weights = (0.40, 0.15, 0.05, 0.20, 0.08, 0.12)
  mixture = Mixture(weights)
  for first in [0, 63, 10**6 + 1, 192_871_093, 5 * 10**8]:
    check_consistent(mixture, weights, first, 500)
  # Exact after whole multiples of 100 patterns: the weights have two decimals.
  rows = 64 * 100 * 78_125
  assert mixture.counts(rows) == tuple(round(w * 100) * rows // 100 for w in weights)


@hypothesis.given(WEIGHTS, st.lists(st.integers(0, 5000), min_size=1, max_size=40))
@hypothesis.settings(max_examples=40, deadline=None)
def test_locate_is_a_pure_function_of_the_row(weights, rows):
  mixture = Mixture(tuple(weights))
  sources, numbers = mixture.locate(np.array(rows))
  for row, source, number in zip(rows, sources, numbers, strict=True):
    alone = Mixture(tuple(weights)).locate(np.array([row]))
    assert (alone[0][0], alone[1][0]) == (source, number)


def test_sources_alternate_inside_a_pattern():
  """Not in blocks: of two equal sources, each pair of rows has both."""
  sources, _ = Mixture((0.5, 0.5)).locate(np.arange(640))
  assert set(map(frozenset, sources.reshape(-1, 2))) == {frozenset({0, 1})}


@pytest.mark.parametrize("weights", [(0.0,), (0.0, 0.0), (1.0, -0.1)])
def test_refuses(weights):
  with pytest.raises(ValueError, match="weights must not be negative and must sum to more than 0"):
    Mixture(weights)


def test_frozen():
  """The order of the sources is the order of the training data. Never change these numbers."""
  sources, numbers = Mixture((0.8, 0.15, 0.05)).locate(np.arange(6400, 6424))
  assert sources.tolist() == SOURCES
  assert numbers.tolist() == NUMBERS


SOURCES = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
NUMBERS = [
  5120,
  5121,
  5122,
  960,
  5123,
  5124,
  5125,
  5126,
  5127,
  5128,
  961,
  320,
  5129,
  5130,
  5131,
  5132,
  5133,
  962,
  5134,
  5135,
  5136,
  5137,
  5138,
  5139,
]
