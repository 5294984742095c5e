"""The keyed permutation: a bijection for every size, different for every key, frozen for good."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from slmjax.data import permutation
from slmjax.data.permutation import permute, round_keys

KEYS = [round_keys(0, "general", "web", 0), round_keys(0, "general", "web", 1), round_keys("x")]


@pytest.fixture(params=["few", "many"])
def path(request, monkeypatch):
  """Each of the two implementations, whatever the number of elements."""
  monkeypatch.setattr(permutation, "FEW", 1 << 62 if request.param == "few" else 0)


@pytest.mark.usefixtures("path")
def test_bijection_for_every_small_size():
  for n in range(1, 301):
    for keys in KEYS:
      order = permute(np.arange(n), n, keys)
      assert order.dtype == np.int64
      np.testing.assert_array_equal(np.sort(order), np.arange(n))


@pytest.mark.parametrize(
  ("n", "count"),
  [(10**9, 10**6), (2**40, 10**6), (2**40 - 1, 10**5), (4**15 + 1, 10**5), (2**62, 10**5)],
)
def test_large_domains_by_sampling(n, count):
  rng = np.random.default_rng(n)
  index = np.unique(np.concatenate([rng.integers(0, n, count // 2), np.arange(count // 2)]))
  order = permute(index, n, KEYS[0])
  assert order.min() >= 0
  assert order.max() < n
  assert len(np.unique(order)) == len(index)
  # Rough uniformity: a bin of x expected samples has a standard deviation of sqrt(x). Eight of
  # those make a false alarm impossible (2 * 64 * 6e-16), and a clumped order fails.
  bins = np.bincount(order // (n // 64 + 1), minlength=64)
  expected = len(index) / 64
  assert np.abs(bins - expected).max() < 8 * np.sqrt(expected)
  # Neighbours do not stay neighbours: differences of neighbours are uniform too, in sign at least.
  steps = np.diff(order[: count // 2])
  assert abs(np.mean(steps > 0) - 0.5) < 0.01
  assert np.mean(np.abs(steps) < n // 1000) < 0.01


@hypothesis.given(n=st.integers(1, 2**62), data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_both_implementations_agree(n, data):
  index = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=10))
  keys = round_keys(data.draw(st.integers()))
  many = np.resize(np.array(index, np.int64), permutation.FEW + 1)
  alone = permute(np.array(index), n, keys)
  np.testing.assert_array_equal(permute(many, n, keys), np.resize(alone, len(many)))


def test_keys_depend_on_every_part_and_change_the_order():
  parts = [(0, "a", "b", 0), (1, "a", "b", 0), (0, "c", "b", 0), (0, "a", "c", 0), (0, "a", "b", 1)]
  orders = [permute(np.arange(100), 100, round_keys(*p)).tolist() for p in parts]
  assert len({tuple(order) for order in orders}) == len(parts)
  # Two independent orders of 100 agree in one place on average (Poisson): ten is 1 in 1e7.
  for i, a in enumerate(orders):
    for b in orders[:i]:
      assert sum(x == y for x, y in zip(a, b, strict=True)) < 10


def test_every_order_of_three_comes_up():
  """A permutation of three must reach all six orders, each about as often."""
  found = [tuple(permute(np.arange(3), 3, round_keys(key))) for key in range(1200)]
  counts = [found.count(order) for order in set(found)]
  assert len(counts) == 6
  assert min(counts) > 130  # 200 expected, standard deviation 13


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("index", [[-1], [10], [0, 10], [-1, 5]])
def test_refuses_indices_outside(index):
  with pytest.raises(ValueError, match=r"indices must lie in \[0, 10\)"):
    permute(np.array(index), 10, KEYS[0])


def test_no_indices():
  assert permute(np.empty(0, np.int64), 10, KEYS[0]).shape == (0,)


@pytest.mark.usefixtures("path")
def test_frozen():
  """The order of the training data: if this fails, a resumed run would read other data than the
  run that it resumes. Mend the code, never these numbers."""
  keys = round_keys(0, "general", "web", 0)
  assert [f"{key:016x}" for key in keys.tolist()] == KEY_HEX
  assert permute(np.arange(10), 10, keys).tolist() == TEN
  assert permute(np.arange(4), 10**9, keys).tolist() == BILLION
  assert permute(np.array([2**40 - 1, 0]), 2**40, keys).tolist() == BIG


KEY_HEX = [
  "412df23d303d211d",
  "2632d4289d32595b",
  "39dd4c0b7e83622e",
  "677eadf5147b85f9",
  "52c455edd07577ba",
  "b85e05ae55cf7d3f",
]
TEN = [8, 3, 1, 6, 5, 9, 7, 0, 2, 4]
BILLION = [43243154, 179658874, 716398352, 78674292]
BIG = [993693967614, 19299225106]
