"""How many pairs of blocks a row takes: ours, the fewest possible, and what others visit.

Rows are described by their documents' lengths, so that real corpora can be put in.
"""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np


def row_segments(lengths: Iterable[int], row_length: int) -> Iterator[np.ndarray]:
  """Segment ids of whole rows, int32 [row_length], of documents laid end to end.

  A document that does not fit into a row goes on in the next, as the plan's chunks do.
  """
  ids: list[np.ndarray] = []
  missing = row_length
  for length in lengths:
    while length > 0:
      part = min(length, missing)
      ids.append(np.full(part, len(ids) + 1, np.int32))
      length, missing = length - part, missing - part
      if missing == 0:
        yield np.concatenate(ids)
        ids, missing = [], row_length


def lognormal_lengths(mean: float, total: int, sigma: float = 1.0, seed: int = 0) -> Iterator[int]:
  """Lengths of documents, at least 1, of a lognormal distribution, up to `total` tokens."""
  rng = np.random.default_rng(seed)
  while total > 0:
    length = max(1, round(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma)))
    yield min(length, total)
    total -= length


@dataclasses.dataclass(frozen=True)
class Visits:
  """Pairs of blocks of one or more rows.

  Attributes:
    minimum: those that hold a visible pair of positions: no method with these blocks does with
      fewer. Found position by position.
    causal: those that are not wholly in the future: what is visited without looking at documents.
  """

  minimum: int
  causal: int


def visits(rows: Iterable[np.ndarray], queries: int, keys: int) -> Visits:
  minimum = causal = 0
  for ids_S in rows:
    # Ids ascend, so a query sees the keys from the first of its document to itself.
    first_S = np.searchsorted(ids_S, ids_S)
    last_S = np.arange(len(ids_S))
    for start in range(0, len(ids_S), queries):
      some = slice(start, start + queries)
      seen = np.zeros(-(-len(ids_S) // keys), bool)
      for first, last in zip(first_S[some], last_S[some], strict=True):
        seen[first // keys : last // keys + 1] = True
      minimum += int(seen.sum())
      causal += -(-min(start + queries, len(ids_S)) // keys)
  return Visits(minimum, causal)
