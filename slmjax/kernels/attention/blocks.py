"""Blocks of positions, and padding to whole ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Blocks(NamedTuple):
  """Positions per block of queries and of keys, at most."""

  queries: int
  keys: int


def round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


def pad(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Zeros up to a whole number of blocks: segment 0, which sees nothing and is not seen."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths)
