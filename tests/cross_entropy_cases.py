"""What tests of the cross entropy run: arrays, the expected outputs and gradients, tolerances."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from slmjax.kernels.cross_entropy import api, pallas_tpu

B, S, D, V = 4, 24, 16, 1000  # On two shards of the vocabulary 500 rows: no multiple of 128.

# Relative to the largest magnitude in the array that is compared. float32: sums of at most 1000
# products, each rounded to 2^-24. bfloat16: x and w are the same rounded numbers on both sides;
# the gradients of the logits are rounded to 2^-9 before they are multiplied, and dx is rounded.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-7}


def tolerances(dtype: str) -> list[float]:
  """Of nll, logsumexp, dx, dw. The outputs are sums of exact products of the inputs, whatever
  their dtype."""
  return [TOLERANCE["float32"]] * 2 + [TOLERANCE[dtype]] * 2


def draw(
  dtype: str, sizes: tuple[int, int, int, int] = (B, S, D, V), seed: int = 0
) -> tuple[Any, Any, Any, Any, Any]:
  """x, w, targets, and cotangents for nll and the log-sum-exp (some of them zero: masked)."""
  rng = np.random.default_rng(seed)
  B, S, D, V = sizes
  x = jnp.asarray(rng.normal(size=(B, S, D)), dtype)
  w = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
  targets = rng.integers(0, V, size=(B, S)).astype(np.int32)
  edges = [0, V - 1, V // 2 - 1, V // 2, 127, 128][:S]  # Of shards and slices.
  targets[0, : len(edges)] = np.minimum(edges, V - 1)
  dnll, dlse = rng.normal(size=(2, B, S)).astype(np.float32)
  dnll[-1, 5:] = dlse[-1, 5:] = 0.0
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
  dlogits -= np.eye(len(w))[targets] * dnll[..., None]
  if softcap is not None:
    dlogits /= np.cosh(products / softcap) ** 2
  return [nll, lse, dlogits @ w, np.einsum("bsv,bsd->vd", dlogits, x)]


def run(specs: Any, arrays: Any, dtable: Any = None, **options: Any) -> list[Any]:
  """nll, logsumexp, dx and dw on the mesh that was entered; `dtable` is the cotangent of the table
  that is passed on, none by default."""
  x, w, targets, dnll, dlse = arrays
  put = jax.reshard
  tokens = [put(a, specs.tokens_BS) for a in (targets, dnll, dlse)]
  table = None if dtable is None else put(dtable, specs.embed_VD.stored)

  @jax.jit
  def forward_backward(x: Any, w: Any, targets: Any, dnll: Any, dlse: Any, dtable: Any) -> Any:
    def plain(x: Any, w: Any) -> Any:
      return api.cross_entropy(x, w, targets, specs=specs, **options)

    def passing(x: Any, w: Any) -> Any:
      return api.cross_entropy_and_table(x, w, targets, specs=specs, **options)

    if dtable is None:
      outputs, vjp = jax.vjp(plain, x, w)
      return *outputs, *vjp((dnll, dlse))
    outputs, vjp = jax.vjp(passing, x, w)
    return *outputs[:2], *vjp((dnll, dlse, dtable))

  return list(
    forward_backward(put(x, specs.act_BSD), put(w, specs.embed_VD.stored), *tokens, table)
  )


def assert_close(got: list[Any], want: list[np.ndarray], tolerances: list[float]) -> None:
  names = ("nll", "logsumexp", "dx", "dw")
  for name, x, y, tolerance in zip(names, got, want, tolerances, strict=True):
    x = np.asarray(x, np.float64)
    assert np.isfinite(x).all(), name
    error = np.abs(x - y).max()
    assert error <= tolerance * np.abs(y).max(), f"{name}: {error} of {np.abs(y).max()}"


@pytest.fixture
def on_tpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Iterator[None]:
  """As if the devices were TPUs: kernels run in interpret mode, watched for races on one device."""

  def interpreted(*arrays: Any, **options: Any) -> Any:
    one = jax.sharding.get_abstract_mesh().size == 1
    interpret = pltpu.InterpretParams(detect_races=True) if one else True
    return kernels(*arrays, **options, interpret=interpret)

  kernels = pallas_tpu.cross_entropy
  monkeypatch.setattr(pallas_tpu, "cross_entropy", interpreted)
  monkeypatch.setattr(api, "_platform", lambda: "tpu")
  # The interpreter's own loop mixes what varies over devices with what does not. With these types
  # the kernels are compiled for real slices, in test_cross_entropy_tpu.py.
  monkeypatch.setattr(jax, "shard_map", functools.partial(jax.shard_map, check_vma=False))
  yield
  # A race is printed; newer versions of JAX raise.
  assert "RACE DETECTED" not in capsys.readouterr().out
