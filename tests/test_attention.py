"""Attention: every implementation against float64 NumPy, forward and all gradients."""

import dataclasses
import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slmjax import sharding
from slmjax.kernels.attention import api, chunked
from tests import reference_attention

# Relative to the largest magnitude in the array that is compared, at least one. float32: sums of
# up to 1000 products, each rounded to 2^-24, in another order than NumPy's. bfloat16: inputs are
# the same rounded numbers on both sides, but weights and their gradients are rounded to 2^-9
# before they are multiplied, and so is the result: a few such roundings that do not cancel.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


@dataclasses.dataclass(frozen=True)
class Case:
  """`documents` is the mean length of documents; 0 is one document as long as the row."""

  S: int
  H: int = 64
  N: int = 4
  K: int = 4
  B: int = 2
  T: int | None = None
  q_start: int = 0
  documents: int = 0
  padding: int = 0
  dtype: str = "float32"

  @property
  def keys(self) -> int:
    return self.S if self.T is None else self.T


CASES = [
  Case(S=1),
  Case(S=1, H=80, N=8, K=1, dtype="bfloat16"),
  Case(S=127, H=80, N=4, K=1, documents=20, padding=30),
  Case(S=127, H=128, N=8, K=8, documents=1),
  Case(S=128, H=128, N=8, K=1, documents=40),
  Case(S=128, H=64, N=8, K=2, documents=128, dtype="bfloat16"),
  Case(S=1000, H=64, N=4, K=4, documents=150, padding=300),
  Case(S=1000, H=80, N=8, K=1, B=1, documents=500, dtype="bfloat16"),
  Case(S=1000, H=128, N=4, K=1, B=1),
  Case(S=1, H=64, N=8, K=2, T=127, q_start=99),
  Case(S=128, H=128, N=4, K=1, T=1000, q_start=500, documents=300),
  Case(S=127, H=80, N=4, K=4, T=300, q_start=130, documents=60, padding=40, dtype="bfloat16"),
]


def segments(rng: np.random.Generator, B: int, length: int, documents: int, padding: int) -> Any:
  """Segment ids that ascend from 1 along each row, the last `padding` positions 0."""
  new = rng.random((B, length)) < (1 / documents if documents else 0)
  ids = 1 + np.cumsum(new, axis=1)
  ids[:, length - padding :] = 0
  return ids.astype(np.int32)


def draw(case: Case) -> tuple[Any, Any, Any, Any, Any, Any]:
  """q, k, v, segments of queries and of keys, and a cotangent for the output."""
  rng = np.random.default_rng(0)
  T = case.keys

  def normal(*shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), case.dtype)

  kv_segments = segments(rng, case.B, T, case.documents, case.padding)
  at = np.minimum(case.q_start + np.arange(case.S), T - 1)
  return (
    normal(case.B, case.S, case.N, case.H),
    normal(case.B, T, case.K, case.H),
    normal(case.B, T, case.K, case.H),
    kv_segments[:, at],
    kv_segments,
    normal(case.B, case.S, case.N, case.H),
  )


def differentiate(attend: Any) -> Any:
  """A function to the output and the gradients of q, k and v."""

  @jax.jit
  def forward_backward(q: Any, k: Any, v: Any, qs: Any, ks: Any, do: Any, q_start: Any) -> Any:
    o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, qs, ks, q_start), q, k, v)
    return o, *vjp(do)

  return forward_backward


def run(attend: Any, *arrays: Any) -> list[Any]:
  return list(differentiate(attend)(*arrays))


def assert_close(got: list[Any], want: Any, tolerance: float) -> None:
  for name, x, y in zip(("o", "dq", "dk", "dv"), got, want, strict=True):
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all(), name
    error = np.abs(x - y).max()
    # Inputs are of order one. Where documents have one token the gradients of q and k are the
    # difference of two equal numbers of that order: exactly zero, and rounding on this side.
    assert error <= tolerance * max(1.0, np.abs(y).max()), f"{name}: {error}"


def expect(q: Any, k: Any, v: Any, qs: Any, ks: Any, do: Any, q_start: int, scale: float) -> Any:
  q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
  see = reference_attention.visible(qs, ks, q_start)
  return reference_attention.attention(q, k, v, see, scale, do)


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
class TestConformance:
  """What an implementation must do to be listed in the api."""

  def attend(self, implementation: str, scale: float) -> Any:
    return functools.partial(api.attention, scale=scale, implementation=implementation)

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_equals_the_equations(self, implementation: str, case: Case) -> None:
    arrays = draw(case)
    scale = case.H**-0.5
    got = run(self.attend(implementation, scale), *arrays, case.q_start)
    assert [x.dtype.name for x in got] == [case.dtype] * 4
    assert_close(got, expect(*arrays, case.q_start, scale), TOLERANCE[case.dtype])

  def test_ids_need_not_ascend(self, implementation: str) -> None:
    q, k, v, qs, _, do = draw(Case(S=300, documents=20))
    rename = np.random.default_rng(1).permutation(qs.max() + 1) + 1
    ids = rename[qs].astype(np.int32)
    got = run(self.attend(implementation, 0.1), q, k, v, ids, ids, do, 0)
    assert_close(got, expect(q, k, v, ids, ids, do, 0, 0.1), TOLERANCE["float32"])

  def test_a_row_of_padding_gives_zeros_and_zero_gradients(self, implementation: str) -> None:
    q, k, v, qs, ks, do = draw(Case(S=200, documents=50))
    qs, ks = qs.copy(), ks.copy()
    qs[0] = ks[0] = 0
    qs[1, :60] = 0  # A whole row sees nothing, and in the other one a part of its first block.
    got = run(self.attend(implementation, 0.125), q, k, v, qs, ks, do, 0)
    for x in got:
      assert (np.asarray(x[0]) == 0).all()
    for x in got[:2]:
      assert (np.asarray(x[1, :60]) == 0).all()
    assert_close(got, expect(q, k, v, qs, ks, do, 0, 0.125), TOLERANCE["float32"])

  def test_gradients_reach_exactly_the_visible_keys(self, implementation: str) -> None:
    q, k, v, qs, ks, _ = draw(Case(S=300, documents=60, padding=20, B=1))
    see = reference_attention.visible(qs, ks, 0)[0]
    forward_backward = differentiate(self.attend(implementation, 0.1))
    for i in (0, 127, 128, 200, 279, 290):
      do = jnp.zeros_like(q).at[:, i].set(1.0)
      _, dq, _, dv = forward_backward(q, k, v, qs, ks, do, 0)
      np.testing.assert_array_equal(np.any(np.asarray(dv[0]) != 0, axis=(1, 2)), see[i])
      moved = np.flatnonzero(np.any(np.asarray(dq[0]) != 0, axis=(1, 2)))
      assert set(moved) <= {i}

  def test_invisible_keys_do_not_change_a_bit(self, implementation: str) -> None:
    q, k, v, qs, ks, _ = draw(Case(S=300, documents=60, B=1))
    attend = jax.jit(self.attend(implementation, 0.1))
    see = reference_attention.visible(qs, ks, 0)[0, 200]
    hidden = jnp.asarray(~see)[None, :, None, None]
    before = attend(q, k, v, qs, ks, 0)[0, 200]
    after = attend(q, jnp.where(hidden, 50.0, k), jnp.where(hidden, 50.0, v), qs, ks, 0)[0, 200]
    np.testing.assert_array_equal(before, after)

  @pytest.mark.parametrize(
    # The last one has fewer key/value heads than devices for them.
    ("shape", "K"),
    [((1, 2, 1, 2), 2), ((2, 1, 1, 4), 2)],
  )
  def test_equals_the_equations_inside_an_island(
    self, implementation: str, enter_mesh: Any, shape: tuple[int, ...], K: int
  ) -> None:
    q, k, v, qs, ks, do = draw(Case(S=150, N=4, K=K, documents=40))
    attend = self.attend(implementation, 0.125)
    want = expect(q, k, v, qs, ks, do, 0, 0.125)
    with enter_mesh(shape) as specs:
      put = jax.reshard
      kv = specs.act_BTKH(K)
      got = run(
        sharding.shard_attention(attend, specs, K),
        put(q, specs.act_BSNH),
        put(k, kv),
        put(v, kv),
        put(qs, specs.tokens_BS),
        put(ks, specs.tokens_BS),
        put(do, specs.act_BSNH),
        jnp.int32(0),
      )
      assert_close(got, want, TOLERANCE["float32"])


@pytest.mark.medium
@settings(max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_chunked_with_any_blocks_equals_the_equations(data: st.DataObject) -> None:
  K = data.draw(st.sampled_from([1, 2]))
  S = data.draw(st.integers(1, 70))
  cached = data.draw(st.booleans())
  q_start = data.draw(st.integers(0, 40)) if cached else 0
  T = q_start + S + data.draw(st.integers(0, 30)) if cached else S
  case = Case(
    S=S,
    T=T,
    q_start=q_start,
    N=K * data.draw(st.sampled_from([1, 3])),
    K=K,
    H=8,
    documents=data.draw(st.sampled_from([0, 1, 5, 30])),
    padding=data.draw(st.integers(0, S)),
  )
  blocks = chunked.Blocks(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
  arrays = draw(case)
  attend = functools.partial(
    chunked.attention, scale=0.3, window=None, softcap=None, slopes_N=None, blocks=blocks
  )
  got = run(attend, *arrays, q_start)
  assert_close(got, expect(*arrays, q_start, 0.3), TOLERANCE["float32"])


@pytest.mark.parametrize("documents", [1, 5, 40, 0])
@pytest.mark.parametrize("q_start", [0, 37])
def test_ranges_cover_what_is_visible_and_no_more(documents: int, q_start: int) -> None:
  I, Q, J, P = 8, 16, 12, 16
  for seed in range(5):
    ks = segments(np.random.default_rng(seed), 1, J * P, documents, padding=seed * 10)
    qs = ks[:, q_start : q_start + I * Q]
    see = reference_attention.visible(qs, ks, q_start)[0].reshape(I, Q, J, P).any(axis=(1, 3))
    shared = chunked._Shared(jnp.int32(q_start), window=None, slopes_N=None)
    first, last = chunked._ranges(
      jnp.asarray(qs.reshape(I, Q)), jnp.asarray(ks.reshape(J, P)), shared
    )
    in_range = (np.arange(J) >= first[:, None]) & (np.arange(J) < last[:, None])
    # Ids ascend here, so that the blocks with something to see are one run of blocks.
    np.testing.assert_array_equal(in_range, see)


def temporary_bytes(implementation: str, S: int) -> int:
  def loss(q: Any, k: Any, v: Any, segments: Any) -> Any:
    attend = functools.partial(api.attention, scale=0.1, implementation=implementation)
    return attend(q, k, v, segments, segments, 0).sum()

  q, kv = (jax.ShapeDtypeStruct((1, S, heads, 64), jnp.float32) for heads in (4, 2))
  segment = jax.ShapeDtypeStruct((1, S), jnp.int32)
  program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, kv, kv, segment).compile()
  memory = program.memory_analysis()
  assert memory is not None
  return memory.temp_size_in_bytes


def test_memory_of_chunked_is_linear_in_the_length() -> None:
  assert temporary_bytes("chunked", 8192) < 4.5 * temporary_bytes("chunked", 2048)
  assert temporary_bytes("reference", 2048) > 10 * temporary_bytes("chunked", 2048)


def test_a_name_that_is_not_built_raises_with_the_list() -> None:
  q, k, v, qs, ks, _ = draw(Case(S=4))
  with pytest.raises(ValueError, match=r"'pallas_tpu' does not exist: .* reference, chunked"):
    api.attention(q, k, v, qs, ks, 0, scale=1.0, implementation="pallas_tpu")


def test_shapes_and_dtypes_that_do_not_fit_raise() -> None:
  q, k, v, qs, ks, _ = draw(Case(S=4))
  with pytest.raises(ValueError, match="do not fit together"):
    api.attention(q, k[:, :, :3], v[:, :, :3], qs, ks, 0, scale=1.0)
  with pytest.raises(ValueError, match="must have one dtype"):
    api.attention(q, k.astype(jnp.bfloat16), v, qs, ks, 0, scale=1.0)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
  api._choose.cache_clear()
  with caplog.at_level(logging.INFO, logger="absl"):
    for S in (200, 200, 1):
      q, k, v, qs, ks, _ = draw(Case(S=S, T=200))
      jax.eval_shape(functools.partial(api.attention, scale=1.0), q, k, v, qs, ks, 0)
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == 2
  assert lines[0].startswith("attention: chunked for q (2, 200, 4, 64)")
  assert lines[1].startswith("attention: reference for q (2, 1, 4, 64)")
