"""The baselines: the bigram is a distribution and counts what it says; xz is xz."""

import collections
import itertools
import lzma
import math

import numpy as np

from slmjax.baselines import Bigram, xz_bits

VOCAB = 12


def brute_force(train: list[int], previous: int, following: int) -> float:
  """Witten-Bell by counting one by one."""
  unigram = collections.Counter(train[1:])
  seen, total = len(unigram), len(train) - 1
  base = (unigram[following] + seen / VOCAB) / (total + seen)
  after = collections.Counter(b for a, b in itertools.pairwise(train) if a == previous)
  if not after:
    return base
  return (after[following] + len(after) * base) / (sum(after.values()) + len(after))


def test_equals_counting_one_by_one() -> None:
  rng = np.random.default_rng(0)
  train = rng.integers(0, VOCAB - 3, 200).astype(np.int32)  # three tokens are never seen
  test = rng.integers(0, VOCAB, 50).astype(np.int32)
  expected = -sum(
    math.log2(brute_force(train.tolist(), int(a), int(b))) for a, b in itertools.pairwise(test)
  )
  np.testing.assert_allclose(Bigram.count(train, VOCAB).bits(test), expected, rtol=1e-12)


def test_probabilities_sum_to_one() -> None:
  train = np.random.default_rng(1).integers(0, VOCAB - 3, 300).astype(np.int32)
  bigram = Bigram.count(train, VOCAB)
  for previous in range(VOCAB):
    bits = [bigram.bits(np.array([previous, following], np.int32)) for following in range(VOCAB)]
    np.testing.assert_allclose(sum(2.0**-b for b in bits), 1.0, rtol=1e-12)


def test_xz_counts_the_whole_stream() -> None:
  text = b"the same words again and again, " * 50
  compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
  assert xz_bits(text) == 8 * len(compressed)
  assert lzma.decompress(compressed) == text
