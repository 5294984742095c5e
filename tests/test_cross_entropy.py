"""Cross entropy: every implementation against float64 NumPy, forward and all gradients."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from slmjax.kernels.cross_entropy import api, sliced
from tests.cross_entropy_cases import (
  TOLERANCE,
  B,
  S,
  assert_close,
  draw,
  expect,
  on_tpu,
  run,
  tolerances,
)

__all__ = ["on_tpu"]

MESHES = [(1, 1, 1, 1), (1, 4, 1, 1), (1, 2, 1, 2), (2, 1, 1, 2)]


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
class TestConformance:
  """What an implementation must do to be listed in the api."""

  @pytest.fixture(autouse=True)
  def platform(self, implementation: str, request: pytest.FixtureRequest) -> None:
    if implementation == "pallas_tpu":
      request.getfixturevalue("on_tpu")

  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  @pytest.mark.parametrize("shape", MESHES)
  def test_equals_the_equations(
    self, implementation: str, dtype: str, shape: tuple[int, ...], enter_mesh: Any
  ) -> None:
    arrays = draw(dtype)
    with enter_mesh(shape) as specs:
      # 256 columns of the logits at a time, so that neither 1000 nor 500 is a multiple.
      tokens = B * S // (shape[0] * shape[1])
      got = run(specs, arrays, implementation=implementation, slice_elements=256 * tokens)
      assert [x.dtype.name for x in got] == ["float32", "float32", dtype, "float32"]
      assert_close(got, expect(*arrays), tolerances(dtype))

  # Products of x and w are of order 4 here and at most 20: a cap of 5 bends most and flattens some.
  @pytest.mark.parametrize(
    ("dtype", "shape"),
    [("float32", (1, 1, 1, 1)), ("float32", (1, 2, 1, 2)), ("bfloat16", (2, 1, 1, 2))],
  )
  def test_softcap_equals_the_equations(
    self, implementation: str, dtype: str, shape: tuple[int, ...], enter_mesh: Any
  ) -> None:
    arrays = draw(dtype)
    with enter_mesh(shape) as specs:
      tokens = B * S // (shape[0] * shape[1])
      options = {"implementation": implementation, "slice_elements": 256 * tokens}
      got = run(specs, arrays, softcap=5.0, **options)
      assert_close(got, expect(*arrays, softcap=5.0), tolerances(dtype))

  def test_logits_far_from_zero(self, implementation: str, enter_mesh: Any) -> None:
    x, w, *rest = draw("float32")
    arrays = (100.0 * x, w, *rest)
    with enter_mesh((1, 2, 1, 2)) as specs:
      got = run(specs, arrays, implementation=implementation, slice_elements=1)
      # Exponents of differences of scores near 1000, each known to 1000 x 2^-24.
      assert_close(got, expect(*arrays), [1e-5, 1e-5, 1e-3, 1e-3])

  def test_a_masked_position_gives_and_takes_nothing(
    self, implementation: str, enter_mesh: Any
  ) -> None:
    x, w, targets, dnll, dlse = draw("float32")
    elsewhere = x.at[-1, 5:].add(1.0), w, np.where(dnll == 0.0, 0, targets), dnll, dlse
    with enter_mesh((1, 2, 1, 2)) as specs:
      options = {"implementation": implementation, "slice_elements": 256 * B * S}
      got, other = (run(specs, a, **options) for a in ((x, w, targets, dnll, dlse), elsewhere))
    assert (np.asarray(got[2])[-1, 5:] == 0.0).all()
    for a, b in zip(got[2:], other[2:], strict=True):
      np.testing.assert_array_equal(a, b)

  def test_z_loss_pulls_the_logsumexp_to_zero(self, implementation: str, enter_mesh: Any) -> None:
    x, w, targets, _, _ = draw("float32")
    want = expect(x, w, targets, np.zeros((B, S)), np.zeros((B, S)))[1]
    want = expect(x, w, targets, np.full((B, S), 1 / (B * S)), 0.2 * want / (B * S))
    with enter_mesh((1, 1, 1, 1)) as specs:

      def loss(x: Any, w: Any) -> Any:
        nll, lse = api.cross_entropy(
          x, w, jax.reshard(targets, specs.tokens_BS), specs=specs, implementation=implementation
        )
        return nll.mean() + 0.1 * jnp.square(lse).mean()

      placed = jax.reshard(x, specs.act_BSD), jax.reshard(w, specs.embed_VD.stored)
      got = jax.jit(jax.grad(loss, argnums=(0, 1)))(*placed)
    for a, b in zip(got, want[2:], strict=True):
      np.testing.assert_allclose(a, b, atol=TOLERANCE["float32"] * np.abs(b).max())

  @pytest.mark.parametrize("shape", MESHES)
  def test_adds_to_the_gradient_of_the_table_it_passes_on(
    self, implementation: str, shape: tuple[int, ...], enter_mesh: Any
  ) -> None:
    arrays = draw("float32")
    dtable = np.random.default_rng(1).normal(size=arrays[1].shape).astype(np.float32)
    with enter_mesh(shape) as specs:
      options = {"implementation": implementation, "slice_elements": 256 * B * S}
      got = run(specs, arrays, dtable, **options)
    want = expect(*arrays)
    assert_close(got, [*want[:3], want[3] + dtable], tolerances("float32"))


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.medium
@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
def test_any_sizes_equal_the_equations(implementation: str, enter_mesh: Any) -> None:
  @settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.generate,))
  @given(st.data())
  def check(data: st.DataObject) -> None:
    sizes = (
      data.draw(st.integers(1, 4), label="B"),
      data.draw(st.sampled_from([1, 7, 64, 130, 300]), label="S"),
      data.draw(st.sampled_from([1, 8, 24, 100]), label="D"),
      data.draw(st.sampled_from([2, 127, 129, 640, 1100, 1536]), label="V"),
    )
    dtype = data.draw(st.sampled_from(["float32", "bfloat16"]))
    softcap = data.draw(st.sampled_from([None, 4.0]))
    columns = data.draw(st.sampled_from([1, 256, 600, 10**6]), label="columns of a slice")
    arrays = draw(dtype, sizes, seed=data.draw(st.integers(0, 99)))
    rows = max(sizes[0] * sizes[1], sizes[2])
    got = run(
      specs, arrays, implementation=implementation, softcap=softcap, slice_elements=columns * rows
    )
    assert_close(got, expect(*arrays, softcap), tolerances(dtype))

  with enter_mesh((1, 1, 1, 1)) as specs:
    check()


@pytest.mark.parametrize("slice_elements", [1, 10**9])
def test_the_slice_width_does_not_change_the_result(slice_elements: int, enter_mesh: Any) -> None:
  arrays = draw("float32")
  with enter_mesh((1, 1, 1, 1)) as specs:
    got = run(specs, arrays, implementation="chunked", slice_elements=slice_elements)
    assert_close(got, expect(*arrays), [TOLERANCE["float32"]] * 4)


@pytest.mark.parametrize(
  ("total", "tokens", "elements"),
  [(1000, 10, 2560), (1000, 10, 1), (100, 10, 1), (4096, 8, 8 * 512), (256000, 4096, 64 * 2**20)],
)
def test_slices_cover_each_column_once_within_the_limit(
  total: int, tokens: int, elements: int
) -> None:
  slices = sliced.Slices.fit(total, tokens, elements)
  assert slices.width * tokens <= max(elements, 128 * tokens)
  seen = np.zeros(total, np.int32)
  for i in range(slices.count):
    start, stale = int(slices.start(jnp.int32(i))), slices.stale(jnp.int32(i))
    seen[start + int(stale or 0) : start + slices.width] += 1
  assert (seen == 1).all()


def temporary_bytes(specs: Any, dtype: Any, **options: Any) -> int:
  def loss(x: Any, w: Any, targets: Any) -> Any:
    nll, lse = api.cross_entropy(x, w, targets, specs=specs, **options)
    return nll.mean() + (lse**2).mean()

  mesh = jax.sharding.get_mesh()

  def shape(dims: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

  x = shape((4, 1024, 64), dtype, specs.act_BSD)
  w = shape((32000, 64), jnp.float32, specs.embed_VD.stored)
  targets = shape((4, 1024), jnp.int32, specs.tokens_BS)
  program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, w, targets).compile()
  memory = program.memory_analysis()
  assert memory is not None
  return memory.temp_size_in_bytes


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_chunked_never_holds_the_logits(dtype: Any, enter_mesh: Any) -> None:
  logits = 4 * 4096 * 32000
  with enter_mesh((1, 1, 1, 1)) as specs:
    options = {"implementation": "chunked", "slice_elements": 4096 * 512}
    assert temporary_bytes(specs, dtype, **options) < logits / 10
    assert temporary_bytes(specs, dtype, implementation="reference") > logits


def test_a_name_that_is_not_built_raises_with_the_list(enter_mesh: Any) -> None:
  with (
    enter_mesh((1, 1, 1, 1)) as specs,
    pytest.raises(ValueError, match=r"'pallas_gpu' does not exist: .* reference, chunked, pallas"),
  ):
    run(specs, draw("float32"), implementation="pallas_gpu")


def test_a_softcap_that_is_not_positive_raises(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs, pytest.raises(ValueError, match="got 0"):
    run(specs, draw("float32"), softcap=0.0)


def test_shapes_that_do_not_fit_raise(enter_mesh: Any) -> None:
  x, w, *rest = draw("float32")
  with enter_mesh((1, 1, 1, 1)) as specs, pytest.raises(ValueError, match="do not fit together"):
    run(specs, (x, w[:, :8], *rest))


def test_auto_says_once_what_it_chose(enter_mesh: Any, caplog: pytest.LogCaptureFixture) -> None:
  api._choose.cache_clear()
  with caplog.at_level(logging.INFO, logger="absl"), enter_mesh((1, 1, 1, 1)) as specs:
    for _ in range(2):
      run(specs, draw("float32"))
  lines = [r.getMessage() for r in caplog.records if r.name == "absl"]
  assert len(lines) == 1
  assert lines[0].startswith("cross entropy: chunked for x (4, 24, 16)")
