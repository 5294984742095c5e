"""Encodes documents in worker processes: the tasks, their order, and the pool."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from slmjax.data import documents
from slmjax.data.tokenizer import Tokenizer

# A batch is what a process gets at once: enough to forget the cost of handing it over, small enough
# that a few for each process are little memory. (A longer document is a batch of its own.)
BATCH_BYTES = 1 << 20
BATCH_DOCUMENTS = 512

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Batch:
  """Documents to encode; the first `round_trips` of them are decoded too and compared."""

  documents: list[documents.Location]
  text_key: str
  round_trips: int


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Per document the ids (int32) and the UTF-8 bytes of its text; how many came back changed."""

  ids: list[np.ndarray]
  text_bytes: list[int]
  lossy: int


class Map(Protocol):
  """map() of a function over tasks: the results in the order of the tasks."""

  def __call__(
    self, function: Callable[[Task], Result], tasks: Iterable[Task], /
  ) -> Iterator[Result]: ...


def batches(
  corpus: documents.Corpus, order_N: np.ndarray, text_key: str, round_trips: int
) -> Iterator[Batch]:
  """The documents in order, cut into batches that depend on nothing but their lengths.

  The first `round_trips` documents are marked for decoding.
  """
  batch: list[documents.Location] = []
  size = 0
  for taken, i in enumerate(order_N, start=1):
    batch.append(corpus.location(i))
    size += batch[-1].length
    if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS or taken == len(order_N):
      yield Batch(batch, text_key, max(0, round_trips - (taken - len(batch))))
      batch, size = [], 0


@contextlib.contextmanager
def workers(processes: int, tokenizer: Tokenizer) -> Iterator[Map]:
  """Gives a map over tasks that keeps their order and has few of them in memory.

  One process works in place. More are spawned, since forking is unsafe where JAX is loaded.

  Raises:
    InputError: a worker died.
  """
  if processes == 1:
    _load(tokenizer)
    yield map
    return
  with ProcessPoolExecutor(
    processes, multiprocessing.get_context("spawn"), _start_worker, (tokenizer,)
  ) as pool:

    def mapped(function: Callable[[Task], Result], tasks: Iterable[Task], /) -> Iterator[Result]:
      waiting: deque[Future[Result]] = deque()
      for task in tasks:
        waiting.append(pool.submit(function, task))
        if len(waiting) > 3 * processes:
          yield waiting.popleft().result()
      while waiting:
        yield waiting.popleft().result()

    try:
      yield mapped
    except BrokenProcessPool:
      raise documents.InputError(
        "a tokenizing process died, perhaps for lack of memory; try fewer --processes"
      ) from None
    finally:
      pool.shutdown(cancel_futures=True)


# What follows runs in the workers, each of which has loaded the tokenizer before its first task.
_tokenizer: Tokenizer


def scan(task: tuple[Path, str]) -> documents.Found:
  """A task: the documents of one file (see documents.scan)."""
  return documents.scan(*task)


def encode(batch: Batch) -> Encoded:
  """A task: reads and encodes a batch of documents."""
  texts = [documents.read(location, batch.text_key) for location in batch.documents]
  ids = _tokenizer.encode_batch(texts)
  sample = zip(texts[: batch.round_trips], ids, strict=False)
  return Encoded(
    ids=[np.array(document, np.int32) for document in ids],
    text_bytes=[len(text.encode()) for text in texts],
    lossy=sum(_tokenizer.decode(document) != text for text, document in sample),
  )


def _load(tokenizer: Tokenizer) -> None:
  global _tokenizer
  _tokenizer = tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
  _load(tokenizer)
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
  parent = multiprocessing.parent_process()
  assert parent is not None

  # A parent that is killed can't tell its pool, whose processes would wait for ever.
  def follow() -> None:
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
