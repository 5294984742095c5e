"""A keyed permutation of range(n) by index arithmetic: O(1) memory, any element at once.

A balanced Feistel network over the next power of four, walked along its cycle until the value
falls below n (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). It is our
own arithmetic, not a library's, because the order of the training data hangs on it: an upgrade
must not change what a resumed run reads.
"""

import functools
import hashlib

import numpy as np

ROUNDS = 6
# Below so many elements plain integers are faster than NumPy's fixed cost of 70 calls a pass.
FEW = 48
_M64 = (1 << 64) - 1


@functools.lru_cache(maxsize=4096)
def round_keys(*parts: object) -> np.ndarray:
  """uint64[ROUNDS] keys that depend on every part, e.g. (seed, stage, source, epoch)."""
  name = "/".join(map(str, parts)).encode()
  return np.frombuffer(hashlib.blake2b(name, digest_size=8 * ROUNDS).digest(), "<u8")


def permute(index: np.ndarray, n: int, keys: np.ndarray) -> np.ndarray:
  """Where a permutation of range(n) sends each index.

  Args:
    index: int64 array, each in [0, n).
    n: size of the domain, at most 2^62.
    keys: from `round_keys`.

  Returns:
    int64 array like `index`.

  Raises:
    ValueError: an index lies outside [0, n).
  """
  index = np.asarray(index, np.int64)
  if not index.size:
    return index.copy()
  half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
  if index.size < FEW:
    found = _permute_few(index.ravel().tolist(), n, half_bits, keys)
    return np.array(found, np.int64).reshape(index.shape)
  if not (index.min() >= 0 and index.max() < n):
    raise ValueError(f"indices must lie in [0, {n})")
  half = np.uint64(half_bits)
  value = _feistel(index.astype(np.uint64), half, keys)
  outside = value >= n
  while outside.any():  # at most four tries per element on average
    value[outside] = _feistel(value[outside], half, keys)
    outside = value >= n
  return value.astype(np.int64)


def _feistel(value: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
  mask = (np.uint64(1) << half) - np.uint64(1)
  left, right = value >> half, value & mask
  for key in keys:
    left, right = right, left ^ (_mix(right ^ key) & mask)
  return (left << half) | right


def _mix(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014); wraps modulo 2^64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def _permute_few(values: list[int], n: int, half: int, keys: np.ndarray) -> list[int]:
  """The same permutation, element by element in plain integers."""
  if not 0 <= min(values) <= max(values) < n:
    raise ValueError(f"indices must lie in [0, {n})")
  mask, ks = (1 << half) - 1, keys.tolist()
  found = []
  for value in values:
    outside = True
    while outside:
      left, right = value >> half, value & mask
      for key in ks:
        x = right ^ key
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _M64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _M64
        left, right = right, left ^ ((x ^ (x >> 31)) & mask)
      value = left << half | right
      outside = value >= n
    found.append(value)
  return found
