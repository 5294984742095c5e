"""Which source each row of a stage comes from: a pattern that never strays from the weights.

Rows come in patterns of a fixed length. After k patterns, source i has had floor(w_i k P) rows
(P rows a pattern, w_i its share as an exact fraction), and the heaviest source the rest. So shares
are exact over any length of run, whatever the weights, and inside a pattern the sources are spread
evenly. Everything is integer arithmetic on the row's number.
"""

import fractions
import functools
import math

import numpy as np

MIN_PATTERN = 64


class Mixture:
  """The order of sources for given weights.

  Attributes:
    weights: each source's exact share; they sum to 1.
    pattern: rows per pattern. After any number of rows each source is within one pattern of its
      share.
  """

  def __init__(self, weights: tuple[float, ...]):
    # A float's decimal form is what the config says: 0.1 is one tenth, not the nearest binary.
    exact = [fractions.Fraction(repr(float(w))) for w in weights]
    total = sum(exact)
    if min(exact) < 0 or total <= 0:
      raise ValueError(f"weights must not be negative and must sum to more than 0, got {weights}")
    self.weights = tuple(w / total for w in exact)
    # The heaviest source has at least 1/m of P = m^2 rows, so what rounding takes from it (less
    # than one row for each other source) never makes its count negative.
    self.pattern = max(MIN_PATTERN, len(weights) ** 2)
    self._heaviest = max(range(len(weights)), key=lambda i: self.weights[i])
    # Per pattern in units of 1/scale rows, so that counts are one multiplication and a shift away.
    self._scale = math.lcm(*(w.denominator for w in self.weights))
    self._units = [int(w * self._scale) * self.pattern for w in self.weights]

  def counts(self, rows: int) -> tuple[int, ...]:
    """How many of the first `rows` rows each source has."""
    full, rest = divmod(rows, self.pattern)
    done = self._counts_before(full)
    if not rest:
      return done
    order, _ = self._pattern(full)
    partial = np.bincount(order[:rest], minlength=len(done))
    return tuple(int(d + p) for d, p in zip(done, partial, strict=True))

  def locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For row numbers int64[n]: each row's source, and its number among that source's rows."""
    sources = np.empty(len(rows), np.int64)
    numbers = np.empty(len(rows), np.int64)
    patterns, places = np.divmod(rows, self.pattern)
    for k in np.unique(patterns):
      here = patterns == k
      order, rank = self._pattern(int(k))
      place = places[here]
      sources[here] = order[place]
      numbers[here] = np.asarray(self._counts_before(int(k)))[order[place]] + rank[place]
    return sources, numbers

  def _counts_before(self, k: int) -> tuple[int, ...]:
    counts = [units * k // self._scale for units in self._units]
    counts[self._heaviest] += k * self.pattern - sum(counts)
    return tuple(counts)

  def _pattern(self, k: int) -> tuple[np.ndarray, np.ndarray]:
    before, after = self._counts_before(k), self._counts_before(k + 1)
    return _interleave(tuple(b - a for a, b in zip(before, after, strict=True)))


@functools.lru_cache(maxsize=4096)
def _interleave(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
  """Sources spread evenly over one pattern, and each place's rank among its source's places."""
  places = [((r + 0.5) / count, i, r) for i, count in enumerate(counts) for r in range(count)]
  places.sort()
  _, order, rank = zip(*places, strict=True)
  return np.asarray(order, np.int64), np.asarray(rank, np.int64)
