"""Attention: every implementation against float64 NumPy, forward and all gradients."""

import functools
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from slmjax import sharding
from slmjax.kernels.attention import api, chunked, pallas_gpu, pallas_tpu
from slmjax.kernels.attention.pallas_gpu_kernels import Tile
from tests import reference_attention
from tests.attention_cases import (
  CASES,
  TOLERANCE,
  Case,
  assert_close,
  differentiate,
  draw,
  expect,
  expect_case,
  run,
  segments,
)


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[None]:
  """As if the devices were TPUs of two cores: kernels run in interpret mode, with blocks of one
  register; where that is feasible with memory and copies simulated and watched for races."""

  def interpreted(*arrays: Any, blocks: pallas_tpu.Blocks, **options: Any) -> Any:
    blocks = pallas_tpu.Blocks(128, 128)
    # The simulation takes minutes for long rows, and no mesh of several devices.
    simulated = arrays[0].shape[1] <= 300 and jax.sharding.get_abstract_mesh().empty
    two_cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    interpret = two_cores if simulated else True
    return attend_on_tpu(*arrays, blocks=blocks, interpret=interpret, **options)

  attend_on_tpu = pallas_tpu.attention
  monkeypatch.setattr(pallas_tpu, "attention", interpreted)
  monkeypatch.setattr(api, "_platform", lambda: "tpu")
  # The interpreter's own loop mixes what varies over devices with what does not. With these types
  # the kernels are compiled for real slices, in test_pallas_tpu.py.
  monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
  yield
  # Newer versions of JAX raise.
  assert "RACE DETECTED" not in capsys.readouterr().out


# Blocks of three shapes, all shorter than most rows: there are edges, and blocks without a mask.
SMALL_TILES = pallas_gpu.Tiles(Tile(32, 16, 4, 2), Tile(16, 32, 4, 2), Tile(32, 64, 4, 2))


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
  """As if the devices were GPUs: kernels run in interpret mode, in small blocks."""
  monkeypatch.setattr(api, "_platform", lambda: "gpu")
  monkeypatch.setattr(pallas_gpu, "tiles_for", lambda *_: SMALL_TILES)
  interpreted = functools.partial(pallas_gpu.attention, interpret=True)
  monkeypatch.setattr(pallas_gpu, "attention", interpreted)
  monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))


@pytest.mark.parametrize(
  "implementation",
  # In interpret mode every call is compiled as three loops over copies of all blocks.
  [
    "reference",
    "chunked",
    pytest.param("pallas_tpu", marks=pytest.mark.medium),
    pytest.param("pallas_gpu", marks=pytest.mark.medium),
  ],
)
class TestConformance:
  """What an implementation must do to be listed in the api."""

  @pytest.fixture(autouse=True)
  def platform(self, implementation: str, request: pytest.FixtureRequest) -> None:
    if implementation.startswith("pallas"):
      request.getfixturevalue(implementation.replace("pallas", "on"))

  def attend(self, implementation: str, scale: float, **static: Any) -> Any:
    return functools.partial(api.attention, scale=scale, implementation=implementation, **static)

  @pytest.mark.parametrize("case", CASES, ids=str)
  def test_equals_the_equations(self, implementation: str, case: Case) -> None:
    arrays = draw(case)
    scale = case.H**-0.5
    attend = self.attend(implementation, scale, **case.static)
    got = run(attend, *arrays, case.q_start, **case.traced_arrays)
    assert [x.dtype.name for x in got] == [case.dtype] * 4
    assert_close(got, expect_case(case, arrays, scale), TOLERANCE[case.dtype])

  def test_one_program_serves_layers_with_and_without_a_window(self, implementation: str) -> None:
    case = Case(S=200, B=1, N=2, K=1, H=32, documents=150)
    arrays = draw(case)
    forward_backward = differentiate(self.attend(implementation, 0.2))
    for window in (0, 1, 2, 60, 199, 200, 1000, 2**31 - 1):
      got = forward_backward(*arrays, 0, window=jnp.int32(window))
      assert_close(got, expect(*arrays, 0, 0.2, window), TOLERANCE["float32"])
    assert forward_backward._cache_size() == 1

  def test_slopes_are_constants(self, implementation: str) -> None:
    case = Case(S=100, alibi=True)
    q, k, v, qs, ks, _ = draw(case)
    attend = self.attend(implementation, 0.1)
    gradient = jax.grad(lambda slopes_N: attend(q, k, v, qs, ks, 0, slopes_N=slopes_N).sum())
    np.testing.assert_array_equal(gradient(jnp.asarray(case.slopes_N)), 0.0)

  @pytest.mark.parametrize("sinks", [False, True])
  @pytest.mark.parametrize(
    "case",
    [
      Case(S=150, N=4, K=2, documents=60, padding=30),
      Case(S=200, N=2, K=1, H=80, U=48, window=40, softcap=2.0, documents=90, padding=20),
      Case(S=40, T=300, N=2, K=2, q_start=200, documents=50),
      Case(S=150, N=4, K=1, documents=60, padding=30, dtype="bfloat16"),
    ],
    ids=str,
  )
  def test_the_logsumexp_and_sinks(self, implementation: str, case: Case, sinks: bool) -> None:
    q, k, v, qs, ks, do = draw(case)
    rng = np.random.default_rng(1)
    sinks_N = jnp.asarray(rng.normal(size=case.N), jnp.float32) if sinks else None
    dlse = rng.normal(size=q.shape[:3]).astype(np.float32)
    unseen = ~reference_attention.visible(qs, ks, case.q_start, case.window).any(axis=2)
    if not sinks:
      dlse[unseen] = 0.0  # there is no log-sum-exp to differentiate
    attend = functools.partial(
      api.attention_and_logsumexp, scale=0.1, implementation=implementation, **case.static
    )

    @jax.jit
    def forward_backward(do: Any, dlse: Any, sinks_N: Any, **traced: Any) -> Any:
      (o, lse), vjp = jax.vjp(
        lambda q, k, v, sinks_N: attend(q, k, v, qs, ks, case.q_start, sinks_N=sinks_N, **traced),
        *(q, k, v, sinks_N),
      )
      return (o, lse), vjp((do, dlse))

    (o, lse), (dq, dk, dv, dsinks) = forward_backward(do, dlse, sinks_N, **case.traced_arrays)
    options = dict(softcap=case.softcap, sinks_N=sinks_N, dlse_BSN=dlse)
    want = expect(q, k, v, qs, ks, do, case.q_start, 0.1, case.window, **options)
    assert_close([o, dq, dk, dv], want, TOLERANCE[case.dtype])
    # The scores are sums of exact products of the inputs, whatever their dtype.
    np.testing.assert_array_equal(np.isinf(lse), np.isinf(want.lse))
    seen = ~np.isinf(want.lse)
    np.testing.assert_allclose(lse[seen], want.lse[seen], rtol=1e-5, atol=1e-5)
    if sinks:
      assert seen.all()
      error = np.abs(dsinks - want.dsinks).max()
      assert error <= TOLERANCE[case.dtype] * max(1.0, np.abs(want.dsinks).max())
    else:
      np.testing.assert_array_equal(np.isinf(lse), unseen[..., None] & np.ones(case.N, bool))

  def test_ids_need_not_ascend(self, implementation: str) -> None:
    q, k, v, qs, _, do = draw(Case(S=300, documents=20))
    rename = np.random.default_rng(1).permutation(qs.max() + 1) + 1
    ids = rename[qs].astype(np.int32)
    got = run(self.attend(implementation, 0.1), q, k, v, ids, ids, do, 0)
    assert_close(got, expect(q, k, v, ids, ids, do, 0, 0.1), TOLERANCE["float32"])

  @pytest.mark.parametrize("options", [{}, {"window": 30, "softcap": 3.0}], ids=str)
  def test_a_row_of_padding_gives_zeros_and_zero_gradients(
    self, implementation: str, options: dict[str, Any]
  ) -> None:
    q, k, v, qs, ks, do = draw(Case(S=200, documents=50))
    qs, ks = qs.copy(), ks.copy()
    qs[0] = ks[0] = 0
    qs[1, :60] = 0  # A whole row sees nothing, and in the other one a part of its first block.
    got = run(self.attend(implementation, 0.125, **options), q, k, v, qs, ks, do, 0)
    for x in got:
      assert (np.asarray(x[0]) == 0).all()
    for x in got[:2]:
      assert (np.asarray(x[1, :60]) == 0).all()
    assert_close(got, expect(q, k, v, qs, ks, do, 0, 0.125, **options), TOLERANCE["float32"])

  def test_a_window_that_ends_before_the_keys_of_the_segment(self, implementation: str) -> None:
    q, k, v, qs, ks, do = draw(Case(S=20, T=300, q_start=280))
    ks = np.where(np.arange(300) < 200, ks, 0).astype(np.int32)
    got = run(self.attend(implementation, 0.125, window=90), q, k, v, qs, ks, do, 280)
    # Query 9 has index 289 and sees keys from 200 on, of which none is in its segment.
    assert (np.asarray(got[0][:, 9:]) == 0).all()
    assert (np.asarray(got[0][:, :9]) != 0).any(axis=(2, 3)).all()
    want = expect(q, k, v, qs, ks, do, 280, 0.125, 90)
    assert_close(got, want, TOLERANCE["float32"])

  @pytest.mark.parametrize("window", [None, 25])
  def test_gradients_reach_exactly_the_visible_keys(
    self, implementation: str, window: int | None
  ) -> None:
    q, k, v, qs, ks, _ = draw(Case(S=300, documents=60, padding=20, B=1))
    see = reference_attention.visible(qs, ks, 0)[0]
    # Written from the words "at most so many keys, itself included" rather than as an inequality.
    after = np.cumsum(see[:, ::-1], axis=1)[:, ::-1]
    see = see & (after <= (window or 300))
    forward_backward = differentiate(self.attend(implementation, 0.1, window=window))
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

  def test_windows_and_slopes_inside_an_island(self, implementation: str, enter_mesh: Any) -> None:
    case = Case(S=150, N=4, K=2, H=24, U=16, documents=90, window=40, alibi=True)
    arrays = draw(case)
    with enter_mesh((1, 2, 1, 2)) as specs:
      heads, tokens = specs.act_BSNH, specs.tokens_BS
      attend = self.attend(implementation, 0.2)
      names = list(case.traced_arrays)
      island = jax.shard_map(
        lambda *args: attend(*args[:6], **dict(zip(names, args[6:], strict=True))),
        in_specs=(heads, heads, heads, tokens, tokens, P(), P(), P(heads[2])),
        out_specs=heads,
      )
      placed = [jax.reshard(x, tokens if x.ndim == 2 else heads) for x in arrays]
      got = run(
        lambda *args, window, slopes_N: island(*args, window, slopes_N),
        *placed,
        jnp.int32(0),
        window=jnp.int32(case.window),
        slopes_N=jax.reshard(jnp.asarray(case.slopes_N), P(heads[2])),
      )
      assert_close(got, expect_case(case, arrays, 0.2), TOLERANCE["float32"])


@pytest.mark.medium
@settings(max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_chunked_with_any_blocks_equals_the_equations(data: st.DataObject) -> None:
  K = data.draw(st.sampled_from([1, 2]))
  softcap = data.draw(st.sampled_from([None, 1.5]))
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
    U=data.draw(st.sampled_from([8, 5])),
    window=data.draw(st.sampled_from([None, 0, 1, 7, 25])),
    softcap=softcap,
    alibi=softcap is None and data.draw(st.booleans()),
    documents=data.draw(st.sampled_from([0, 1, 5, 30])),
    padding=data.draw(st.integers(0, S)),
  )
  blocks = chunked.Blocks(data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40)))
  arrays = draw(case)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(api, "_CPU_BLOCKS", blocks)
    attend = functools.partial(api.attention, scale=0.3, implementation="chunked", **case.static)
    got = run(attend, *arrays, q_start, **case.traced_arrays)
  assert_close(got, expect_case(case, arrays, 0.3), TOLERANCE["float32"])


@pytest.mark.parametrize("documents", [1, 5, 40, 0])
@pytest.mark.parametrize("q_start", [0, 37])
# 1 and 2 (q_start = 0), 6 and 7 (37): the window begins with a block of 16 keys, or with its last.
@pytest.mark.parametrize("window", [None, 1, 2, 6, 7, 40])
def test_ranges_cover_what_is_visible_and_no_more(
  documents: int, q_start: int, window: int | None
) -> None:
  I, Q, J, W = 8, 16, 12, 16
  for seed in range(5):
    ks = segments(np.random.default_rng(seed), 1, J * W, documents, padding=seed * 10)
    qs = ks[:, q_start : q_start + I * Q]
    see = reference_attention.visible(qs, ks, q_start, window)[0]
    see = see.reshape(I, Q, J, W).any(axis=(1, 3))
    width = None if window is None else jnp.int32(window)
    shared = chunked._Shared(jnp.int32(q_start), window=width, slopes_N=None)
    first, last = chunked._ranges(
      jnp.asarray(qs.reshape(I, Q)), jnp.asarray(ks.reshape(J, W)), shared
    )
    in_range = (np.arange(J) >= first[:, None]) & (np.arange(J) < last[:, None])
    # Ids ascend here, so that the blocks with something to see are one run of blocks.
    np.testing.assert_array_equal(in_range, see)


def test_a_window_makes_the_work_linear_in_the_length() -> None:
  Q, J = 16, 64

  @jax.jit
  def visited(window: Any) -> Any:
    ids = jnp.ones((J, Q), jnp.int32)
    first, last = chunked._ranges(ids, ids, chunked._Shared(jnp.int32(0), window, None))
    return (last - first).sum()

  assert visited(jnp.int32(J * Q)) == J * (J + 1) // 2
  # A block of queries reaches back two blocks: itself, one, and two; the first two have fewer.
  assert visited(jnp.int32(2 * Q)) == 3 * J - 3
  assert visited(jnp.int32(1)) == J


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
  with pytest.raises(ValueError, match=r"'pallas_npu' does not exist: .* reference, chunked"):
    api.attention(q, k, v, qs, ks, 0, scale=1.0, implementation="pallas_npu")


def test_what_is_off_leaves_no_trace() -> None:
  q, k, v, qs, ks, _ = draw(Case(S=200))

  def program(**options: Any) -> str:
    attend = functools.partial(api.attention, scale=0.1, implementation="chunked", **options)
    return str(jax.make_jaxpr(attend)(q, k, v, qs, ks, 0))

  assert program(window=None, softcap=None, slopes_N=None) == program() == program(window=0)
  assert "tanh" not in program()
  for on in ({"window": 10}, {"softcap": 1.0}, {"slopes_N": jnp.zeros(4)}):
    assert program(**on).count("\n") > program().count("\n")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"window": -1}, "window must be at least 1, or 0 for none, got -1"),
    ({"window": jnp.ones(4, jnp.int32)}, r"integer scalar, got int32\[4\]"),
    ({"window": jnp.float32(4)}, r"integer scalar, got float32\[\]"),
    ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
    ({"slopes_N": jnp.ones(3)}, r"float32\[4\], one per query head, got float32\[3\]"),
    ({"slopes_N": jnp.ones(4), "softcap": 1.0}, "not built together"),
    ({"sinks_N": jnp.ones(4, jnp.bfloat16)}, r"sinks must be float32\[4\], .* got bfloat16\[4\]"),
  ],
  ids=str,
)
def test_options_that_mean_nothing_raise(options: dict[str, Any], message: str) -> None:
  q, k, v, qs, ks, _ = draw(Case(S=4))
  with pytest.raises(ValueError, match=message):
    api.attention(q, k, v, qs, ks, 0, scale=1.0, **options)


def test_shapes_and_dtypes_that_do_not_fit_raise() -> None:
  q, k, v, qs, ks, _ = draw(Case(S=4))
  with pytest.raises(ValueError, match="do not fit together"):
    api.attention(q, k[:, :, :3], v[:, :, :3], qs, ks, 0, scale=1.0)
  with pytest.raises(ValueError, match="do not fit together"):
    api.attention(q, k, v[:, :3], qs, ks, 0, scale=1.0)
  with pytest.raises(ValueError, match="must have one dtype"):
    api.attention(q, k.astype(jnp.bfloat16), v, qs, ks, 0, scale=1.0)


def test_auto_says_once_what_it_chose(caplog: pytest.LogCaptureFixture) -> None:
  api._say.cache_clear()
  with caplog.at_level(logging.INFO, logger="absl"):
    for S in (200, 200, 1):
      q, k, v, qs, ks, _ = draw(Case(S=S, T=200))
      jax.eval_shape(functools.partial(api.attention, scale=1.0), q, k, v, qs, ks, 0)
  lines = [r.getMessage() for r in caplog.records]
  assert len(lines) == 2
  assert lines[0].startswith("attention: chunked for q (2, 200, 4, 64)")
  assert lines[1].startswith("attention: reference for q (2, 1, 4, 64)")
