"""The TPU attention kernels: where they go, that they run by name, and that they compile for TPU.

That they equal the equations is in test_attention.py; the tests that compile for real slices (slow)
skip without the compilers of requirements-compile.txt.
"""

import functools
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from slmjax import sharding, topology
from slmjax.errors import UserError
from slmjax.kernels import programs
from slmjax.kernels.attention import api, pallas_tpu, tiles, visible
from slmjax.kernels.attention.blocks import Blocks
from slmjax.kernels.shapes import ATTENTION
from tests import reference_attention
from tests.attention_cases import (
  TOLERANCE,
  Case,
  assert_close,
  draw,
  expect_case,
  run,
  segments,
)
from tests.test_attention import on_tpu

__all__ = ["on_tpu"]


def walk(steps: visible.Steps) -> list[tuple[int, ...]]:
  """The steps as row, block of queries, row and block of keys, and kind."""
  rows = np.stack([np.asarray(x) for x in steps[:-1]], axis=1)[: int(steps.total)]
  return [tuple(int(x) for x in row) for row in rows]


@pytest.mark.parametrize(("documents", "window"), [(0, None), (40, None), (5, 30), (90, 17)])
def test_the_walk_visits_each_visible_pair_once_and_no_other(
  documents: int, window: int | None
) -> None:
  B, Q, W, length = 3, 16, 32, 192
  ids = segments(np.random.default_rng(documents), B, length, documents, padding=70)
  ids[1] = 0
  see = reference_attention.visible(ids, ids, 0, window)
  want = see.reshape(B, length // Q, Q, length // W, W).any(axis=(2, 4))
  width = None if window is None else jnp.int32(window)
  blocks = jax.vmap(lambda q, k: visible.visible_blocks(q, k, jnp.int32(0), width))(
    ids.reshape(B, -1, Q), ids.reshape(B, -1, W)
  )
  steps = walk(jax.jit(visible.steps)(blocks))

  visited = [step[:4] for step in steps if step[4] & visible.SEES]
  assert visited == [(b, x, b, y) for b, x, y in np.argwhere(want)]
  empty = [step for step in steps if not step[4] & visible.SEES]
  assert [step[:2] for step in empty] == [tuple(x) for x in np.argwhere(~want.any(axis=2))]
  # An empty block fetches nothing: it names what the step before it has fetched.
  for before, step in itertools.pairwise(steps):
    if not step[4] & visible.SEES:
      assert step[2:4] == before[2:4]
  assert len({step[:2] for step in steps}) == want.shape[0] * want.shape[1]
  for begins, ends, parts in (
    (visible.FIRST, visible.LAST, slice(2)),
    (visible.FIRST_OF_ROW, visible.LAST_OF_ROW, slice(1)),
  ):
    groups = [step[parts] for step in steps]
    for i, step in enumerate(steps):
      assert bool(step[4] & begins) == (i == 0 or groups[i - 1] != groups[i])
      assert bool(step[4] & ends) == (i == len(steps) - 1 or groups[i + 1] != groups[i])


@pytest.mark.usefixtures("on_tpu")
@pytest.mark.parametrize(
  "case",
  [
    Case(S=280, B=2, N=4, K=2, H=24, U=40, documents=60, padding=150, window=50, alibi=True),
    Case(S=150, B=1, N=2, K=1, softcap=2.0, dtype="bfloat16"),
  ],
  ids=str,
)
def test_equals_the_equations(case: Case) -> None:
  arrays = draw(case)
  attend = functools.partial(api.attention, scale=0.15, implementation="pallas_tpu", **case.static)
  got = run(attend, *arrays, case.q_start, **case.traced_arrays)
  assert_close(got, expect_case(case, arrays, 0.15), TOLERANCE[case.dtype])


@pytest.mark.parametrize(
  ("length", "largest", "block"),
  [(1, 512, 128), (128, 512, 128), (200, 512, 256), (512, 512, 512), (640, 512, 384)],
)
def test_uneven_lengths_get_even_blocks(length: int, largest: int, block: int) -> None:
  assert pallas_tpu._even_block(length, largest) == block


def shapes(B: int, S: int, dtype: str = "bfloat16") -> tuple[jax.ShapeDtypeStruct, ...]:
  q, kv = (jax.ShapeDtypeStruct((B, S, heads, 128), dtype) for heads in (4, 2))
  ids = jax.ShapeDtypeStruct((B, S), jnp.int32)
  return q, kv, kv, ids, ids


def traced(implementation: str, *arrays: jax.ShapeDtypeStruct) -> None:
  attend = functools.partial(api.attention, scale=1.0, implementation=implementation)
  jax.eval_shape(lambda *arrays: attend(*arrays, 0), *arrays)


def test_by_name_it_runs_on_tpu_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
  with pytest.raises(UserError, match="'pallas_tpu' runs on TPU, not on cpu: use 'auto'"):
    traced("pallas_tpu", *shapes(1, 128))
  monkeypatch.setattr(api, "_platform", lambda: "tpu")
  traced("pallas_tpu", *shapes(1, 128))
  with pytest.raises(UserError, match="'pallas_tpu': float16 is not built"):
    traced("pallas_tpu", *shapes(1, 128, "float16"))
  with pytest.raises(UserError, match="41472 pairs of blocks, over 40000; use 'chunked'"):
    traced("pallas_tpu", *shapes(2, 72 * 1024))


@pytest.mark.parametrize(("platform", "kind"), [("tpu", "TPU v5 lite"), ("gpu", "NVIDIA H100")])
def test_auto_takes_our_kernels_for_training_and_says_why_not_elsewhere(
  platform: str, kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  api._say.cache_clear()
  monkeypatch.setattr(api, "_platform", lambda: platform)
  monkeypatch.setattr(api, "_device_kind", lambda: kind)
  q, kv, _, ids, _ = shapes(2, 256)
  half = [jax.ShapeDtypeStruct(x.shape, "float16") for x in (q, kv, kv)]
  longer = [jax.ShapeDtypeStruct((2, 512, *x.shape[2:]), x.dtype) for x in (kv, kv, ids)]
  with caplog.at_level(logging.INFO, logger="absl"):
    traced("auto", *shapes(2, 256))
    traced("auto", *shapes(2, 63))
    traced("auto", *half, ids, ids)
    traced("auto", q, longer[0], longer[1], ids, longer[2])
  chosen = [r.getMessage() for r in caplog.records if " for q " in r.getMessage()]
  names = [line.split()[1] for line in chosen]
  assert names == [f"pallas_{platform}", "reference", "chunked", "chunked"]
  assert "float16 is not built" in chosen[2]
  assert "queries of a cache" in chosen[3]


def test_blocks_come_from_the_table_or_by_rule() -> None:
  tuned = tiles.table()["v5e"][tiles.key(4, 128, 128)]
  assert tiles.blocks_for("TPU v5 lite", 4, 128, 128) == (
    pallas_tpu.Blocks(*tuned),
    "tuned for v5e",
  )
  for group, queries in ((1, 512), (3, 256), (4, 256), (8, 128), (32, 128)):
    assert tiles.blocks_for("TPU v9", group, 128, 128) == (Blocks(queries, 512), "by rule")
  assert tiles.blocks_for("TPU v5 lite", 1, 576, 512) == (Blocks(512, 256), "by rule")
  with pytest.raises(UserError, match=r"TPU v4 has too little vector memory, .*; use 'chunked'"):
    tiles.blocks_for("TPU v4", 4, 128, 128)


def test_the_table_covers_every_known_shape_of_every_chip() -> None:
  assert tiles.table().keys() == set(tiles.CHIPS.values())
  shapes = {tiles.key(s.group, s.width, s.value_width) for s in ATTENTION.values()}
  for chip, found in tiles.table().items():
    assert found.keys() == shapes, f"run python -m slmjax.kernels.tune --chip={chip}"


def test_a_chip_is_written_into_the_table_beside_the_others(
  tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  monkeypatch.setattr(tiles, "TABLE", tmp_path / "tiles.json")
  tiles.write("v5e", {"4x128x128": [128, 512]})
  tiles.write("v6e", {"1x64x64": [512, 512]})
  tiles.write("v5e", {"8x64x64": [256, 512]})
  assert json.loads((tmp_path / "tiles.json").read_text()) == {
    "v5e": {"8x64x64": [256, 512]},
    "v6e": {"1x64x64": [512, 512]},
  }


def on_two_cores(case: Case, arrays: Any) -> list[Any]:
  """Output and gradients by the kernels, on a chip whose cores share the key/value heads out."""
  two_cores = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)

  def attend(q: Any, k: Any, v: Any, qs: Any, ks: Any, q_start: Any) -> Any:
    nothing: dict[str, Any] = dict(window=None, softcap=None, slopes_N=None)
    options = dict(scale=0.1, blocks=Blocks(128, 128), interpret=two_cores)
    return pallas_tpu.attention(
      q, k, v, jnp.asarray(qs), jnp.asarray(ks), q_start, **nothing, **options
    )[0]

  return run(attend, *arrays, case.q_start)


ON_TWO_CORES = Case(S=200, N=4, K=2, B=1, documents=90, padding=20)


@pytest.mark.medium
def test_two_cores_do_not_race(capsys: pytest.CaptureFixture[str]) -> None:
  arrays = draw(ON_TWO_CORES)
  got = on_two_cores(ON_TWO_CORES, arrays)
  assert_close(got, expect_case(ON_TWO_CORES, arrays, 0.1), TOLERANCE["float32"])
  assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.medium
def test_a_race_would_be_seen(
  capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
  """If both cores wrote the output of the first head, they would write the same blocks."""
  right = pallas_tpu._specs

  def wrong(*arguments: Any) -> dict[str, pl.BlockSpec]:
    specs = right(*arguments)
    place = specs["o"].index_map
    assert place is not None
    first = pl.BlockSpec(specs["o"].block_shape, lambda head, *rest: place(0 * head, *rest))
    return {**specs, "o": first}

  monkeypatch.setattr(pallas_tpu, "_specs", wrong)
  raised = ""
  try:
    on_two_cores(ON_TWO_CORES, draw(ON_TWO_CORES))
  except jax.errors.JaxRuntimeError as error:  # as newer versions of JAX report a race
    raised = str(error)
    pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" in capsys.readouterr().out + raised


@pytest.mark.medium
@settings(max_examples=8, deadline=None, derandomize=True, phases=(Phase.generate,))
@given(st.data())
def test_any_case_equals_the_equations(data: st.DataObject) -> None:
  K = data.draw(st.sampled_from([1, 2]))
  softcap = data.draw(st.sampled_from([None, 1.5]))
  S = data.draw(st.integers(1, 300))
  q_start = data.draw(st.sampled_from([0, 0, 150]))
  case = Case(
    S=S,
    T=q_start + S + data.draw(st.integers(0, 130)) if q_start else S,
    q_start=q_start,
    B=data.draw(st.sampled_from([1, 2])),
    N=K * data.draw(st.sampled_from([1, 3, 5])),
    K=K,
    H=data.draw(st.sampled_from([8, 48, 130])),
    U=data.draw(st.sampled_from([None, 5, 136])),
    window=data.draw(st.sampled_from([None, 0, 1, 20, 140])),
    softcap=softcap,
    alibi=softcap is None and data.draw(st.booleans()),
    documents=data.draw(st.sampled_from([0, 1, 40, 150])),
    padding=data.draw(st.integers(0, S)),
  )
  sizes = st.sampled_from([128, 256])
  blocks = Blocks(data.draw(sizes), data.draw(sizes))
  arrays = draw(case)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(api, "_platform", lambda: "tpu")
    patch.setattr(tiles, "blocks_for", lambda *_: (blocks, "drawn"))
    interpreted = functools.partial(pallas_tpu.attention, interpret=True)
    patch.setattr(pallas_tpu, "attention", interpreted)
    attend = functools.partial(api.attention, scale=0.3, implementation="pallas_tpu", **case.static)
    got = run(attend, *arrays, q_start, **case.traced_arrays)
  assert_close(got, expect_case(case, arrays, 0.3), TOLERANCE["float32"])


@pytest.mark.medium
@pytest.mark.usefixtures("on_tpu")
def test_keys_that_do_not_fit_go_in_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
  """Five blocks of keys, two at a time: their gradients are those of all at once."""
  two_blocks = 2 * 128 * 2 * 128 * (4 + 2 * 4)
  monkeypatch.setattr(pallas_tpu, "_VMEM_OF_KEYS", two_blocks)
  case = Case(S=130, T=600, q_start=400, N=4, K=2, B=1, documents=200, window=350, softcap=3.0)
  arrays = draw(case)
  attend = functools.partial(api.attention, scale=0.15, implementation="pallas_tpu", **case.static)
  got = run(attend, *arrays, case.q_start, **case.traced_arrays)
  assert_close(got, expect_case(case, arrays, 0.15), TOLERANCE["float32"])


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 4096, 8192])
@pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
@pytest.mark.parametrize("shape", [name for name in ATTENTION if name != "splash"])
def test_it_compiles_for_every_chip_and_shape(shape: str, chip: str, length: int) -> None:
  if missing := topology.missing_compiler(programs.TARGETS[chip]):
    pytest.skip(missing)
  lowered = programs.lower_attention(chip, ATTENTION[shape], length, rows=1)
  text = lowered.as_text()
  assert text.count("@tpu_custom_call") == 2, "auto takes the kernels"
  assert all(name in text for name in ("attention_o_lse", "attention_dq_dk_dv"))
  compiled = lowered.compile()
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.slow
def test_rows_longer_than_the_memory_of_a_core_compile() -> None:
  """32K positions: the gradients of keys and values in two ranges."""
  if missing := topology.missing_compiler("v5p:2x2x1"):
    pytest.skip(missing)
  lowered = programs.lower_attention("v5p", ATTENTION["fox1"], 32768, rows=1)
  assert lowered.as_text().count("@tpu_custom_call") == 3
  lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize(
  ("target", "S", "options"),
  [
    ("v5e:2x2", 2048, {}),
    ("v5e:2x2", 8192, {}),
    ("v5e:2x2", 2048, {"window": 1024, "softcap": 50.0}),
    ("v5p:2x2x1", 2048, {}),
  ],
)
def test_fox1_attention_compiles_for_tpu(target: str, S: int, options: dict[str, Any]) -> None:
  """On four devices, two of which share each row's heads."""
  if missing := topology.missing_compiler(target):
    pytest.skip(f"{target}: {missing}")
  mesh = sharding.make_mesh((1, 2, 1, 2), topology.devices(target))

  def forward_backward(q: Any, k: Any, v: Any, ids: Any, do: Any, start: Any) -> Any:
    specs = sharding.Specs.of_mesh()
    attend = functools.partial(
      api.attention, scale=128**-0.5, implementation="pallas_tpu", **options
    )
    island = sharding.shard_attention(attend, specs, 8)
    o, vjp = jax.vjp(lambda *qkv: island(*qkv, ids, ids, start), q, k, v)
    return o, *vjp(do)

  with jax.set_mesh(mesh):
    specs = sharding.Specs.of_mesh()

    def array(shape: tuple[int, ...], dtype: Any, spec: P) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))

    q = array((4, S, 32, 128), jnp.bfloat16, specs.act_BSNH)
    kv = array((4, S, 8, 128), jnp.bfloat16, specs.act_BTKH(8))
    ids = array((4, S), jnp.int32, specs.tokens_BS)
    lowered = jax.jit(forward_backward).lower(q, kv, kv, ids, q, array((), jnp.int32, P()))
    assert lowered.as_text().count("@tpu_custom_call") == 2
    assert lowered.compile().as_text().count('custom_call_target="tpu_custom_call"') == 2
