"""What a language model has to beat on the same held-out text: an interpolated bigram over the same
tokens, and xz over the same bytes."""

import dataclasses
import lzma

import numpy as np


@dataclasses.dataclass(frozen=True)
class Bigram:
  """P(next | previous) as a mixture of bigram, unigram and uniform frequencies.

  With c tokens counted after `previous`, of which u are different, the bigram gets the part
  c / (c + u) and the unigram the rest (Witten and Bell, IEEE Trans. Inf. Theory 37(4), 1991); the
  unigram in turn is mixed with the uniform distribution in the same way.

  Attributes:
    pairs: sorted int64 codes previous * vocab_size + next, with their counts.
  """

  vocab_size: int
  pairs: np.ndarray
  pair_counts: np.ndarray
  unigram: np.ndarray
  followed: np.ndarray
  followers: np.ndarray

  @classmethod
  def count(cls, tokens: np.ndarray, vocab_size: int) -> "Bigram":
    """Counts the pairs of neighbours in int32[n] tokens."""
    tokens = tokens.astype(np.int64)
    pairs, pair_counts = np.unique(tokens[:-1] * vocab_size + tokens[1:], return_counts=True)
    counts = np.bincount(tokens[1:], minlength=vocab_size)
    seen = np.count_nonzero(counts)
    mixed = (counts + seen / vocab_size) / (counts.sum() + seen)
    previous = pairs // vocab_size
    return cls(
      vocab_size=vocab_size,
      pairs=pairs,
      pair_counts=pair_counts,
      unigram=mixed,
      followed=np.bincount(previous, weights=pair_counts, minlength=vocab_size),
      followers=np.bincount(previous, minlength=vocab_size),
    )

  def bits(self, tokens: np.ndarray) -> float:
    """Bits that tokens[1:] cost, each given the one before it."""
    tokens = tokens.astype(np.int64)
    previous, following = tokens[:-1], tokens[1:]
    codes = previous * self.vocab_size + following
    place = np.minimum(np.searchsorted(self.pairs, codes), len(self.pairs) - 1)
    counts = np.where(self.pairs[place] == codes, self.pair_counts[place], 0)
    total = self.followed[previous] + self.followers[previous]
    rest = np.where(total > 0, self.followers[previous], 1) * self.unigram[following]
    return float(-np.sum(np.log2((counts + rest) / np.where(total > 0, total, 1))))


def xz_bits(text: bytes) -> float:
  """Bits of the text as one xz stream at the highest preset."""
  return 8.0 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))
