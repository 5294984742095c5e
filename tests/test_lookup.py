"""Rows of a spread table, and the gradient that starts from what others have summed up."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels.lookup import take_rows

B, S, D, V = 4, 6, 8, 40


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 4, 1, 1), (1, 2, 1, 2), (2, 2, 1, 2)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_takes_rows_and_adds_their_gradients_to_the_tables(
  shape: tuple[int, ...], dtype: str, enter_mesh: Any
) -> None:
  rng = np.random.default_rng(0)
  # Numbers of few bits, so that sums are exact in float32 and rows in bfloat16.
  table, dtable = rng.integers(-8, 8, (2, V, D)).astype(np.float32)
  drows = rng.integers(-8, 8, (B, S, D)).astype(np.float32)
  ids = rng.integers(0, V, (B, S)).astype(np.int32)
  ids[0] = (0, V - 1, V // 2 - 1, V // 2, 0, 0)  # edges of shards, and one row many times
  with enter_mesh(shape) as specs:
    stored = specs.embed_VD.stored
    rows, passed, got = jax.jit(
      lambda table, ids, drows, dtable: (
        *(outputs := jax.vjp(lambda t: take_rows(t, ids, specs, jnp.dtype(dtype)), table))[0],
        outputs[1]((drows, dtable))[0],
      )
    )(
      jax.reshard(table, stored),
      jax.reshard(ids, specs.tokens_BS),
      jax.reshard(jnp.asarray(drows, dtype), specs.act_BSD),
      jax.reshard(dtable, stored),
    )
  assert rows.dtype == dtype
  np.testing.assert_array_equal(np.asarray(rows, np.float32), table[ids])
  np.testing.assert_array_equal(passed, table)
  want = dtable.copy()
  np.add.at(want, ids, drows)
  np.testing.assert_array_equal(got, want)
