"""The plan: which tokens each row of each step holds. Pure integer arithmetic, no file.

Per source, the stages divide its token store among themselves: stage after stage, each gets a run
of consecutive tokens, its *range*. Inside a stage the range is cut into chunks, each epoch visits
the chunks in a new keyed order, and rows take them as they come. A chunk at [start, start + L) is
what the model learns to predict: its inputs are one token earlier, at [start - 1, start + L - 1),
so that every token is predicted exactly once.
"""

import dataclasses
import fractions
from collections.abc import Mapping

import numpy as np

from slmjax.config import Config, ConfigError
from slmjax.data.mixture import Mixture
from slmjax.data.permutation import permute, round_keys


@dataclasses.dataclass(frozen=True)
class Share:
  """What one stage takes of one source.

  Attributes:
    chunk: tokens per chunk; per_row: chunks per row.
    start, stop: the stage's range of the source's tokens, whole chunks.
    rows: rows of the whole stage that come from the source.
  """

  source: str
  chunk: int
  per_row: int
  start: int
  stop: int
  rows: int

  @property
  def chunks(self) -> int:
    """Chunks of one epoch."""
    return (self.stop - self.start) // self.chunk

  @property
  def epochs(self) -> float:
    """How often the whole stage goes through its range."""
    return self.rows * self.per_row / self.chunks if self.chunks else 0.0


@dataclasses.dataclass(frozen=True)
class Rows:
  """Some rows of a stage. `sources[r]` indexes the stage's shares; `starts[r]` are the token
  offsets of the row's chunks in that source, int64[shares[sources[r]].per_row]."""

  sources: np.ndarray
  starts: tuple[np.ndarray, ...]


class Plan:
  """Maps (stage, row) to tokens for a config and the sizes of its sources.

  Attributes:
    shares: per stage, what it takes of each of its sources.
  """

  def __init__(self, config: Config, tokens: Mapping[str, int]):
    """`tokens` are the sizes of the sources' training stores.

    Raises:
      ConfigError: a source is too small for what the stages take and its `max_epochs`.
    """
    self._config = config
    self._mixtures = tuple(stage_mixture(config, i) for i in range(len(config.stages)))
    self.shares = _divide(config, demand(config), tokens)

  def rows(self, stage: int, rows: np.ndarray) -> Rows:
    """The tokens of the given rows (int64, numbers within the stage)."""
    rows = np.asarray(rows, np.int64)
    limit = self._config.stages[stage].steps * self._config.stages[stage].rows
    if rows.size and not (rows.min() >= 0 and rows.max() < limit):
      raise ValueError(f"rows must lie in [0, {limit}), the rows of stage {stage}")
    shares = self.shares[stage]
    sources, numbers = self._mixtures[stage].locate(rows)
    starts: list[np.ndarray] = [np.empty(0, np.int64)] * len(rows)
    for i in np.unique(sources):
      here = np.flatnonzero(sources == i)
      per_row = shares[i].per_row
      visits = numbers[here, None] * per_row + np.arange(per_row)
      spans = self.chunk_starts(stage, int(i), visits.ravel()).reshape(visits.shape)
      for r, span in zip(here, spans, strict=True):
        starts[r] = span
    return Rows(sources, tuple(starts))

  def chunk_starts(self, stage: int, share_index: int, visits: np.ndarray) -> np.ndarray:
    """Token offsets of a share's chunks by order of visit: int64 in, int64 out."""
    share = self.shares[stage][share_index]
    epochs, index = np.divmod(np.asarray(visits, np.int64), share.chunks)
    starts = np.empty_like(index)
    stage_name = self._config.stages[stage].name
    for epoch in np.unique(epochs):
      here = epochs == epoch
      keys = round_keys(self._config.seed, stage_name, share.source, int(epoch))
      starts[here] = share.start + share.chunk * permute(index[here], share.chunks, keys)
    return starts

  def visits(self, stage: int, share_index: int, rows: int) -> int:
    """Chunks of a share that the stage's first `rows` rows visit."""
    return self._mixtures[stage].counts(rows)[share_index] * self.shares[stage][share_index].per_row


def stage_mixture(config: Config, stage: int) -> Mixture:
  return Mixture(tuple(m.weight for m in config.stages[stage].sources.values()))


def demand(config: Config) -> dict[str, list[int]]:
  """Tokens that each stage takes of each source of the config, repeats counted."""
  wanted = {name: [0] * len(config.stages) for name in config.data.sources}
  for i, stage in enumerate(config.stages):
    counts = stage_mixture(config, i).counts(stage.steps * stage.rows)
    for name, rows in zip(stage.sources, counts, strict=True):
      wanted[name][i] = rows * stage.row_length
  return wanted


def _divide(
  config: Config, wanted: Mapping[str, list[int]], tokens: Mapping[str, int]
) -> tuple[tuple[Share, ...], ...]:
  """Gives each stage its range of each source: what it takes, or, of a source that has to be
  repeated, a part in proportion to what it takes."""
  cursor = dict.fromkeys(wanted, 0)
  divided = []
  for i, stage in enumerate(config.stages):
    shares = []
    for name, mixture in stage.sources.items():
      takes, total, size = wanted[name][i], sum(wanted[name]), tokens[name]
      _check_size(config, name, wanted[name], size)
      length = takes if total <= size else int(fractions.Fraction(takes, total) * size)
      length -= length % mixture.chunk
      if takes and not length:
        raise ConfigError(
          f"config.stages[{i}] ({stage.name}).sources.{name}: the source's {size} tokens leave the "
          f"stage less than one chunk of {mixture.chunk}; add text or shorten the chunk"
        )
      allowed = config.data.sources[name].max_epochs
      if takes > length * allowed:  # whole chunks are fewer tokens than the check above counts on
        raise ConfigError(
          f"config.stages[{i}] ({stage.name}).sources.{name}: takes {takes} tokens of a range of "
          f"{length}, whole chunks of {mixture.chunk}, and max_epochs is {allowed:g}; lower the "
          f"weight or tokens, add text, or allow {_enough_epochs(takes, length)} epochs"
        )
      start = cursor[name]
      cursor[name] = start + length
      shares.append(
        Share(
          source=name,
          chunk=mixture.chunk,
          per_row=stage.row_length // mixture.chunk,
          start=start,
          stop=start + length,
          rows=takes // stage.row_length,
        )
      )
    divided.append(tuple(shares))
  return tuple(divided)


def _check_size(config: Config, name: str, wanted: list[int], size: int) -> None:
  allowed = config.data.sources[name].max_epochs
  total = sum(wanted)
  if total > size * allowed:
    parts = " + ".join(
      f"{count} ({stage.name})" for count, stage in zip(wanted, config.stages, strict=True) if count
    )
    raise ConfigError(
      f"config.data.sources.{name}: the stages take {parts} = {total} tokens, but the store has "
      f"{size} and max_epochs is {allowed:g}; lower the weights or tokens, add text, or allow "
      f"{_enough_epochs(total, size)} epochs"
      if size
      else f"config.data.sources.{name}: the store is empty"
    )


def _enough_epochs(takes: int, size: int) -> str:
  """Rounded up: what is printed suffices."""
  return f"{-(-100 * takes // size) / 100:.2f}"
