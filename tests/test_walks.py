"""Counts of the pairs of blocks that rows of packed documents take, ours among them."""

import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels.attention import visible, walks
from tests import reference_attention


def test_rows_hold_the_documents_in_order_and_break_at_their_ends() -> None:
  rows = list(walks.row_segments([3, 6, 1, 2, 20], 4))
  assert [row.tolist() for row in rows] == [
    [1, 1, 1, 2],
    [1, 1, 1, 1],
    [1, 2, 3, 3],
    *[[1, 1, 1, 1]] * 5,
  ]


def test_lognormal_lengths_have_their_mean_and_total() -> None:
  lengths = np.array(list(walks.lognormal_lengths(600, 3_000_000)))
  assert lengths.sum() == 3_000_000
  assert lengths.min() >= 1
  # 5,000 draws of a standard deviation of 787: the mean is known to 11, and rounding is in it.
  assert abs(lengths.mean() - 600) < 40


@pytest.mark.parametrize(("queries", "keys"), [(16, 32), (32, 16), (64, 64)])
@pytest.mark.parametrize("mean", [1, 7, 60, 1000])
def test_the_minimum_is_that_of_the_equations_and_what_our_walk_visits(
  mean: int, queries: int, keys: int
) -> None:
  rows = list(walks.row_segments(walks.lognormal_lengths(mean, 8 * 256), 256))
  found = walks.visits(rows, queries, keys)
  ids = np.stack(rows)
  see = reference_attention.visible(ids, ids, 0)
  pairs = see.reshape(len(ids), 256 // queries, queries, 256 // keys, keys).any(axis=(2, 4))
  assert found.minimum == pairs.sum()
  causal = np.tril(np.ones((256, 256), bool)).reshape(256 // queries, queries, 256 // keys, keys)
  assert found.causal == len(ids) * causal.any(axis=(1, 3)).sum()

  visited = 0
  for row in rows:
    blocks = (jnp.asarray(row.reshape(-1, queries)), jnp.asarray(row.reshape(-1, keys)))
    steps = visible.steps(visible.visible_blocks(*blocks, jnp.int32(0), None)[None])
    visited += int((steps.kind_Z[: int(steps.total)] & visible.SEES > 0).sum())
  assert visited == found.minimum
