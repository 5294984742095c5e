"""Cross entropy: every implementation against float64 NumPy, forward and all gradients."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.kernels.cross_entropy import api, sliced

MESHES = [(1, 1, 1, 1), (1, 4, 1, 1), (1, 2, 1, 2), (2, 1, 1, 2)]
B, S, D, V = 4, 24, 16, 1000  # On two shards of the vocabulary 500 rows: no multiple of 128.

# Relative to the largest magnitude in the array that is compared. float32: sums of at most 1000
# products, each rounded to 2^-24. bfloat16: x and w are the same rounded numbers on both sides;
# the gradients of the logits are rounded to 2^-9 before they are multiplied, and dx is rounded.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def draw(dtype: str) -> tuple[Any, Any, Any, Any, Any]:
  """x, w, targets, and cotangents for nll and the log-sum-exp (some of them zero: masked)."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
  w = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  targets = rng.integers(0, V, size=(B, S)).astype(np.int32)
  targets[0, :6] = (0, V - 1, 499, 500, 127, 128)  # Edges of shards and slices.
  dnll, dlse = rng.normal(size=(2, B, S)).astype(np.float32)
  dnll[1, 5:] = dlse[1, 5:] = 0.0
  return x, w, targets, dnll, dlse


def expect(
  x: Any, w: Any, targets: Any, dnll: Any, dlse: Any, softcap: float | None = None
) -> list[np.ndarray]:
  """nll, logsumexp, dx, dw from the equations."""
  w = w.astype(x.dtype)
  x, w, dnll, dlse = (np.asarray(a, np.float64) for a in (x, w, dnll, dlse))
  products = x @ w.T
  logits = products if softcap is None else softcap * np.tanh(products / softcap)
  top = logits.max(axis=-1, keepdims=True)
  lse = (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))[..., 0]
  nll = lse - np.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
  softmax = np.exp(logits - lse[..., None])
  dlogits = softmax * (dnll + dlse)[..., None]
  dlogits -= np.eye(V)[targets] * dnll[..., None]
  if softcap is not None:
    dlogits /= np.cosh(products / softcap) ** 2
  return [nll, lse, dlogits @ w, np.einsum("bsv,bsd->vd", dlogits, x)]


def run(specs: Any, arrays: Any, **options: Any) -> list[Any]:
  """nll, logsumexp, dx and dw on the mesh that was entered."""
  x, w, targets, dnll, dlse = arrays
  put = jax.reshard
  tokens = [put(a, specs.tokens_BS) for a in (targets, dnll, dlse)]

  @jax.jit
  def forward_backward(x: Any, w: Any, targets: Any, dnll: Any, dlse: Any) -> Any:
    outputs, vjp = jax.vjp(
      lambda x, w: api.cross_entropy(x, w, targets, specs=specs, **options), x, w
    )
    return *outputs, *vjp((dnll, dlse))

  return list(forward_backward(put(x, specs.act_BSD), put(w, specs.embed_VD.stored), *tokens))


def assert_close(got: list[Any], want: list[np.ndarray], tolerances: list[float]) -> None:
  names = ("nll", "logsumexp", "dx", "dw")
  for name, x, y, tolerance in zip(names, got, want, tolerances, strict=True):
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all(), name
    error = np.abs(x - y).max()
    assert error <= tolerance * np.abs(y).max(), f"{name}: {error} of {np.abs(y).max()}"


@pytest.mark.parametrize("implementation", api.IMPLEMENTATIONS)
class TestConformance:
  """What an implementation must do to be listed in the api."""

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
      # The outputs are sums of exact products of the inputs, whatever their dtype.
      tolerances = [TOLERANCE["float32"]] * 2 + [TOLERANCE[dtype]] * 2
      assert_close(got, expect(*arrays), tolerances)

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
      tolerances = [TOLERANCE["float32"]] * 2 + [TOLERANCE[dtype]] * 2
      assert_close(got, expect(*arrays, softcap=5.0), tolerances)

  def test_logits_far_from_zero(self, implementation: str, enter_mesh: Any) -> None:
    x, w, *rest = draw("float32")
    arrays = (100.0 * x, w, *rest)
    with enter_mesh((1, 2, 1, 2)) as specs:
      got = run(specs, arrays, implementation=implementation, slice_elements=1)
      # Exponents of differences of scores near 1000, each known to 1000 x 2^-24.
      assert_close(got, expect(*arrays), [1e-5, 1e-5, 1e-3, 1e-3])


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
    pytest.raises(ValueError, match=r"'pallas_tpu' does not exist: .* reference, chunked"),
  ):
    run(specs, draw("float32"), implementation="pallas_tpu")


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
