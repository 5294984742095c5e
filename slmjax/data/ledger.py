"""The ledger: what each source has given to each stage. Derived from the plan, for any step.

`between` counts a span of steps and ledgers of adjoining spans add up, so a checkpoint's ledger
costs the steps since the last one.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from slmjax.config import Config
from slmjax.data.plan import Plan
from slmjax.data.store import TokenStore

BLOCK = 1 << 20  # chunks looked up at a time: bounds the memory


@dataclasses.dataclass(frozen=True)
class Entry:
  """One source in one stage.

  Attributes:
    tokens, chunks: what the model was trained on.
    documents: documents whose first token was among them, repeats counted.
    masked: tokens that were read but kept out of the loss.
    range_chunks: chunks in the stage's range of the source, one epoch.
  """

  stage: str
  source: str
  tokens: int
  chunks: int
  documents: int
  masked: int
  range_chunks: int

  @property
  def epochs(self) -> float:
    """How often the stage has gone through its range of the source."""
    return self.chunks / self.range_chunks if self.range_chunks else 0.0


Ledger = tuple[Entry, ...]


def between(
  config: Config, plan: Plan, stores: Mapping[str, TokenStore], first: int, stop: int
) -> Ledger:
  """The ledger of steps [first, stop): an entry for each stage and source of the config."""
  entries = []
  for i, stage in enumerate(config.stages):
    begin, end = config.boundaries[i], config.boundaries[i + 1]
    rows = [(min(max(step, begin), end) - begin) * stage.rows for step in (first, stop)]
    for j, share in enumerate(plan.shares[i]):
      visits = [plan.visits(i, j, r) for r in rows]
      chunks = visits[1] - visits[0]
      documents = 0
      for block in range(visits[0], visits[1], BLOCK):
        starts = plan.chunk_starts(i, j, np.arange(block, min(block + BLOCK, visits[1])))
        begun = stores[share.source].documents_begun(starts, starts + share.chunk)
        documents += int(np.sum(begun))
      entries.append(
        Entry(
          stage=stage.name,
          source=share.source,
          tokens=chunks * share.chunk,
          chunks=chunks,
          documents=documents,
          masked=0,
          range_chunks=share.chunks,
        )
      )
  return tuple(entries)


def add(a: Ledger, b: Ledger) -> Ledger:
  """The ledger of two adjoining spans of one run."""

  def merge(x: Entry, y: Entry) -> Entry:
    if (x.stage, x.source) != (y.stage, y.source):
      raise ValueError(f"ledgers of different runs: {x.stage}/{x.source} and {y.stage}/{y.source}")
    counts = {
      name: getattr(x, name) + getattr(y, name)
      for name in ("tokens", "chunks", "documents", "masked")
    }
    return dataclasses.replace(x, **counts)

  return tuple(merge(x, y) for x, y in zip(a, b, strict=True))
