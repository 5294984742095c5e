"""The GPU attention kernels: ranges of blocks, refusals, that they compile for GPUs, and to what.

That they equal the equations is in test_attention.py, and here for any tiles; the tests that
compile (slow) skip without the compilers of requirements-compile.txt.
"""

import dataclasses
import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from slmjax import sharding, topology
from slmjax.errors import UserError
from slmjax.kernels.attention import api, pallas_gpu, pallas_gpu_kernels, ranges, visible
from slmjax.kernels.attention.pallas_gpu_kernels import Tile
from slmjax.kernels.inspect import gpu as inspect_gpu
from slmjax.kernels.shapes import ATTENTION
from slmjax.recipe import load_recipe
from slmjax.train import compile_step
from tests import reference_attention
from tests.attention_cases import TOLERANCE, Case, assert_close, draw, expect_case, run, segments

# Of JAX 0.12: it is going to remove the compiler of these kernels, see docs/design.md.
pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

_FOX1 = Path(__file__).parent.parent / "configs" / "fox1.py"
_KERNELS = ("attention_backward_keys", "attention_backward_queries", "attention_forward")
_CHIPS = {"a100": "NVIDIA A100-SXM4-80GB", "h100": "NVIDIA H100 80GB HBM3"}
_SHAPES = {name: shape for name, shape in ATTENTION.items() if name != "splash"}


@pytest.mark.parametrize("ascending", [True, False])
@pytest.mark.parametrize(("q_start", "window"), [(0, None), (37, None), (0, 40), (0, 7), (37, 50)])
@pytest.mark.parametrize("documents", [0, 60, 5])
def test_bounds_hold_what_is_visible_and_where_all_of_it_is(
  documents: int, q_start: int, window: int | None, ascending: bool
) -> None:
  I, Q, J, W = 16, 8, 12, 16
  for seed in range(5):
    rng = np.random.default_rng(seed)
    ks = segments(rng, 1, J * W, documents, padding=seed * 10)
    if not ascending:
      ks = np.concatenate([[0], 1 + rng.permutation(ks.max())])[ks].astype(np.int32)
    qs = ks[:, q_start : q_start + I * Q]
    see = reference_attention.visible(qs, ks, q_start, window)[0].reshape(I, Q, J, W)
    width = None if window is None else jnp.int32(window)
    arguments = (jnp.asarray(qs.reshape(I, Q)), jnp.asarray(ks.reshape(J, W)))
    arguments = (*arguments, jnp.int32(q_start), width)
    some_IJ = np.asarray(visible.visible_blocks(*arguments))
    whole_IJ = np.asarray(ranges.whole_blocks(*arguments))
    np.testing.assert_array_equal(whole_IJ, see.all(axis=(1, 3)))
    for some_XY, whole_XY in ((some_IJ, whole_IJ), (some_IJ.T, whole_IJ.T)):
      index_Y = np.arange(some_XY.shape[1])
      found = np.asarray(ranges.bounds(jnp.asarray(some_XY), jnp.asarray(whole_XY)))
      for some_Y, whole_Y, (first, start, stop, end) in zip(some_XY, whole_XY, found, strict=True):
        assert first <= start <= stop <= end
        np.testing.assert_array_equal(
          np.flatnonzero(some_Y)[[0, -1]] if some_Y.any() else [],
          [*([first, end - 1] if first < end else [])],
        )
        assert whole_Y[start:stop].all()
        if ascending:  # whole blocks are one run then
          np.testing.assert_array_equal(whole_Y, (start <= index_Y) & (index_Y < stop))
        else:
          assert whole_Y.any() == (start < stop)


@pytest.mark.parametrize("width", [1, 5, 16, 24, 64, 80, 96, 128, 192, 256, 576])
def test_parts_of_a_head_cover_it_once(width: int) -> None:
  parts = list(pallas_gpu_kernels.parts(width))
  assert all(w >= 16 and w & (w - 1) == 0 for _, w in parts)
  covered = [x for start, w in parts for x in range(start, start + w)]
  assert covered == list(range(len(covered)))
  assert width <= len(covered) < width + 16
  assert len(set(parts)) == len({w for _, w in parts})  # as few as there can be


@pytest.mark.medium
@settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_any_tiles_equal_the_equations(data: st.DataObject) -> None:
  K = data.draw(st.sampled_from([1, 2]))
  softcap = data.draw(st.sampled_from([None, 1.5]))
  S = data.draw(st.integers(1, 70))
  q_start = data.draw(st.sampled_from([0, 0, 21]))
  case = Case(
    S=S,
    T=q_start + S + data.draw(st.integers(0, 30)) if q_start else S,
    q_start=q_start,
    B=1,
    N=K * data.draw(st.sampled_from([1, 3])),
    K=K,
    H=data.draw(st.sampled_from([8, 48])),
    U=data.draw(st.sampled_from([None, 5])),
    window=data.draw(st.sampled_from([None, 0, 1, 7, 25])),
    softcap=softcap,
    alibi=softcap is None and data.draw(st.booleans()),
    documents=data.draw(st.sampled_from([0, 1, 5, 30])),
    padding=data.draw(st.integers(0, S)),
  )
  sizes = st.sampled_from([16, 32, 64])
  tiles = pallas_gpu.Tiles(*(Tile(data.draw(sizes), data.draw(sizes), 4, 2) for _ in range(3)))
  arrays = draw(case)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(api, "_platform", lambda: "gpu")
    patch.setattr(pallas_gpu, "tiles_for", lambda *_: tiles)
    interpreted = functools.partial(pallas_gpu.attention, interpret=True)
    patch.setattr(pallas_gpu, "attention", interpreted)
    attend = functools.partial(api.attention, scale=0.3, implementation="pallas_gpu", **case.static)
    got = run(attend, *arrays, q_start, **case.traced_arrays)
  assert_close(got, expect_case(case, arrays, 0.3), TOLERANCE["float32"])


def traced(scale: float = 1.0, dtype: str = "bfloat16") -> None:
  q, kv = (jax.ShapeDtypeStruct((1, 128, heads, 128), dtype) for heads in (4, 2))
  ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
  attend = functools.partial(api.attention, scale=scale, implementation="pallas_gpu")
  jax.eval_shape(lambda *arrays: attend(*arrays, 0), q, kv, kv, ids, ids)


def test_by_name_it_runs_on_gpus_that_it_knows_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(UserError, match="'pallas_gpu' runs on GPU, not on cpu: use 'auto'"):
    traced()
  monkeypatch.setattr(api, "_platform", lambda: "gpu")
  with pytest.raises(UserError, match="'pallas_gpu': has no tiles for 'cpu', only for A100, A800"):
    traced()
  monkeypatch.setattr(api, "_device_kind", lambda: _CHIPS["h100"])
  traced()
  with pytest.raises(UserError, match="'pallas_gpu': float16 is not built"):
    traced(dtype="float16")
  with pytest.raises(UserError, match=r"'pallas_gpu': scale must be positive, got 0\.0"):
    traced(scale=0.0)


@pytest.mark.parametrize("kind", _CHIPS.values())
def test_tiles_of_any_width_are_what_the_kernels_take(kind: str) -> None:
  for width in (1, 64, 65, 192, 256, 576):
    for tile in pallas_gpu.tiles_for(kind, width, jnp.bfloat16):
      for size in tile[:2]:
        assert size >= 16
        assert size & (size - 1) == 0
  tiles = functools.partial(pallas_gpu.tiles_for, kind)
  assert tiles(64, jnp.bfloat16) == tiles(1, jnp.bfloat16)
  assert tiles(64, jnp.float32) == tiles(128, jnp.bfloat16) != tiles(64, jnp.bfloat16)
  with pytest.raises(UserError, match="'pallas_gpu': heads of 577 are wider than 576"):
    tiles(577, jnp.bfloat16)
  with pytest.raises(UserError, match="'pallas_gpu': heads of 289 are wider than 288"):
    tiles(289, jnp.float32)


def lower(
  target: str,
  shape: str,
  length: int,
  mesh_shape: tuple[int, ...] = (1, 1, 1, 1),
  sloped: bool = False,
  dtype: Any = jnp.bfloat16,
  **options: Any,
) -> jax.stages.Lowered:
  """Forward and backward, in the island of the model."""
  if missing := topology.missing_compiler(target):
    pytest.skip(f"{target}: {missing}")
  N, K, H, U = _SHAPES[shape]
  mesh = sharding.make_mesh(mesh_shape, topology.devices(target))

  def forward_backward(q: Any, k: Any, v: Any, ids: Any, do: Any, window: Any, slopes: Any) -> Any:
    attend = functools.partial(api.attention, scale=H**-0.5, implementation="pallas_gpu", **options)
    island = sharding.shard_attention(attend, sharding.Specs.of_mesh(), K)
    extra = {"slopes_N": slopes} if sloped else {}
    if "softcap" in options:
      extra["window"] = window
    o, vjp = jax.vjp(lambda *qkv: island(*qkv, ids, ids, jnp.int32(0), **extra), q, k, v)
    return o, *vjp(do)

  with jax.set_mesh(mesh):
    specs = sharding.Specs.of_mesh()

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    B = 2 * mesh_shape[1]
    q = array((B, length, N, H), dtype, specs.act_BSNH)
    k, v = (array((B, length, K, x), dtype, specs.act_BTKH(K)) for x in (H, U))
    do = array((B, length, N, U), dtype, specs.act_BSNH)
    ids = array((B, length), jnp.int32, specs.tokens_BS)
    scalar, slopes = array((), jnp.int32, P()), array((N,), jnp.float32, P())
    return jax.jit(forward_backward).lower(q, k, v, ids, do, scalar, slopes)


@pytest.mark.slow
@pytest.mark.parametrize("chip", _CHIPS)
@pytest.mark.parametrize("shape", _SHAPES)
def test_it_compiles_without_spills(chip: str, shape: str) -> None:
  """At three lengths, and what the compiler made of the first: kernels that keep to registers."""
  for length in (4096, 8192):
    lowered = lower(f"{chip}:1", shape, length)
    assert inspect_gpu.kernels_in(lowered.as_text()) == list(_KERNELS)
    assert inspect_gpu.kernels_in(lowered.compile().as_text()) == list(_KERNELS)
  lowered = lower(f"{chip}:1", shape, 2048)
  assert inspect_gpu.kernels_in(lowered.as_text()) == list(_KERNELS)
  if missing := inspect_gpu.missing_tool():
    pytest.skip(missing)
  kernels = inspect_gpu.report(lowered)
  assert [x.name for x in kernels] == list(_KERNELS)
  for x in kernels:
    assert not x.serialized, x
    assert x.spilled == 0, x
    assert len(x.loops) == 2, x  # whole blocks and edges
    assert all(loop.tensor_share > 0.4 for loop in x.loops), x


@pytest.mark.slow
@pytest.mark.parametrize("chip", _CHIPS)
@pytest.mark.parametrize(
  ("length", "options"),
  [
    (2048, {"softcap": 50.0}),
    (1000, {"softcap": 50.0}),
    (1, {}),
    (127, {"sloped": True}),
    (2048, {"dtype": jnp.float32}),
  ],
)
def test_options_and_uneven_lengths_compile(
  chip: str, length: int, options: dict[str, Any]
) -> None:
  text = lower(f"{chip}:1", "fox1", length, **options).compile().as_text()
  assert inspect_gpu.kernels_in(text) == list(_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("mesh_shape", [(1, 8, 1, 1), (1, 2, 1, 4), (1, 1, 1, 8)])
def test_it_compiles_on_eight_gpus(mesh_shape: tuple[int, ...]) -> None:
  """Rows and heads spread; in the last one two devices share each key/value head."""
  text = lower("h100:8", "fox1", 2048, mesh_shape).compile().as_text()
  assert inspect_gpu.kernels_in(text) == list(_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_train_steps_of_full_fox1_contain_it(stage: int) -> None:
  if missing := topology.missing_compiler("h100:8"):
    pytest.skip(missing)
  config = load_recipe(str(_FOX1))
  compute = dataclasses.replace(config.compute, attention="pallas_gpu")
  config = dataclasses.replace(config, compute=compute)
  mesh = sharding.make_mesh((1, 8, 1, 1), topology.devices("h100:8"))
  with jax.set_mesh(mesh):
    text = compile_step(config, stage, mesh).as_text()
  assert set(inspect_gpu.kernels_in(text)) == set(_KERNELS)


@pytest.mark.slow
def test_full_fox1_trains_on_eight_h100() -> None:
  """All three stages, and not more memory than 'chunked' needs but for a hundredth."""
  if missing := topology.missing_compiler("h100:8"):
    pytest.skip(missing)
  need = {}
  for name in ("pallas_gpu", "chunked"):
    flags = [f"--config={_FOX1}", "--topology=h100:8", f"--config.compute.attention={name}"]
    command = [sys.executable, "-m", "slmjax.preflight", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    need[name] = [stage["need"] for stage in json.loads(done.stdout)["stages"]]
  assert len(need["pallas_gpu"]) == 3
  for ours, theirs in zip(*need.values(), strict=True):
    assert ours <= 1.01 * theirs
