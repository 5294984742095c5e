"""The TPU cross entropy kernels: races, choice by name and platform, blocks, compiled programs.

That they equal the equations is in test_cross_entropy.py; the tests that compile for real slices
(slow) skip without the compilers of requirements-compile.txt.
"""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from slmjax import sharding, topology
from slmjax.errors import UserError
from slmjax.kernels.cross_entropy import api, pallas_tpu
from slmjax.kernels.cross_entropy.sliced import Cotangents, Slice, Totals
from tests.cross_entropy_cases import assert_close, draw, expect, tolerances


def on_two_cores(arrays: Any) -> list[np.ndarray]:
  """nll, logsumexp, dx and dw by the kernels alone, on a chip whose cores share the tokens out."""
  x, w, targets, dnll, dlse = arrays
  passes = pallas_tpu._Mosaic(pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2))
  x_RD = x.reshape(-1, x.shape[-1])
  part = Slice(x_RD, w, jnp.asarray(targets.reshape(-1)), None)
  zeros_R = jnp.zeros(len(x_RD))
  top_R, sum_R, target_R = passes.fold(None, part, Totals(zeros_R - jnp.inf, zeros_R, zeros_R))
  lse_R = top_R + jnp.log(sum_R)
  cotangents = Cotangents(lse_R, jnp.asarray((dnll + dlse).reshape(-1)), jnp.asarray(dnll.ravel()))
  dx_RD, dw_VD = passes.unfold(None, part, cotangents, jnp.zeros(x_RD.shape))
  nll_R = lse_R - target_R
  return [
    np.asarray(a)
    for a in (*(a.reshape(dnll.shape) for a in (nll_R, lse_R)), dx_RD.reshape(x.shape), dw_VD)
  ]


# Three blocks of tokens by two of columns.
SIZES = (9, 128, 16, 1000)


def test_two_cores_do_not_race(capsys: pytest.CaptureFixture) -> None:
  arrays = draw("float32", SIZES)
  assert_close(on_two_cores(arrays), expect(*arrays), tolerances("float32"))
  assert "RACE DETECTED" not in capsys.readouterr().out


def test_a_race_would_be_seen(
  capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
  """If the cores shared out the columns too, they would add to the same sums."""
  monkeypatch.setattr(pltpu, "ARBITRARY", pltpu.PARALLEL)
  raised = ""
  try:
    on_two_cores(draw("float32", SIZES))
  except jax.errors.JaxRuntimeError as error:  # as newer versions of JAX report a race
    raised = str(error)
    pltpu.reset_tpu_interpret_mode_state()
  assert "RACE DETECTED" in capsys.readouterr().out + raised


@pytest.mark.parametrize(
  ("length", "largest", "padded", "block"),
  [
    (24, 1024, 128, 128),
    (1000, 640, 1024, 512),
    (4096, 640, 4096, 512),
    (32000, 640, 32000, 640),
    (16384, 532, 16384, 512),
    (131 * 128, 640, 33 * 512, 512),  # 131 is prime: only blocks of 128 divide it
    (131 * 128, 128, 131 * 128, 128),
  ],
)
def test_blocks_divide_what_they_cover(length: int, largest: int, padded: int, block: int) -> None:
  assert pallas_tpu._blocks(length, largest) == (padded, block)


def traced(specs: Any, implementation: str, dtype: str = "bfloat16", width: int = 16) -> None:
  x, w, targets, _, _ = draw("float32", (2, 8, width, 300))
  arguments = jax.reshard(x, specs.act_BSD).astype(dtype), jax.reshard(w, specs.embed_VD.stored)
  jax.eval_shape(
    lambda x, w, t: api.cross_entropy(x, w, t, specs=specs, implementation=implementation),
    *arguments,
    jax.reshard(targets, specs.tokens_BS),
  )


def test_by_name_it_runs_on_tpu_or_raises(monkeypatch: pytest.MonkeyPatch, enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:
    with pytest.raises(UserError, match="'pallas_tpu' runs on TPU, not on cpu: use 'auto'"):
      traced(specs, "pallas_tpu")
    monkeypatch.setattr(api, "_platform", lambda: "tpu")
    traced(specs, "pallas_tpu")
    with pytest.raises(UserError, match=r"float16 is not built, .*; use 'chunked'"):
      traced(specs, "pallas_tpu", "float16")
    with pytest.raises(UserError, match="width 8448 is over 8192; use 'chunked'"):
      traced(specs, "pallas_tpu", width=8448)


def test_auto_takes_it_on_tpu_where_it_can(
  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, enter_mesh: Any
) -> None:
  api._choose.cache_clear()
  with caplog.at_level(logging.INFO, logger="absl"), enter_mesh((1, 1, 1, 1)) as specs:
    traced(specs, "auto")
    monkeypatch.setattr(api, "_platform", lambda: "tpu")
    for width in (16, 16, 8448):
      traced(specs, "auto", width=width)
  lines = [r.getMessage() for r in caplog.records if r.name == "absl"]
  assert [line.split()[2] for line in lines] == ["chunked", "pallas_tpu", "chunked"]
  assert "width 8448 is over 8192" in lines[2]


def compiled(
  target: str, mesh: tuple[int, ...], sizes: tuple[int, ...], implementation: str
) -> Any:
  """The value and gradient of a loss with z-loss, lowered and compiled; skips without libtpu."""
  if missing := topology.missing_compiler(target):
    pytest.skip(f"{target}: {missing}")
  B, S, D, V = sizes
  entered = sharding.make_mesh(mesh, topology.devices(target)[: int(np.prod(mesh))])
  with jax.set_mesh(entered):
    specs = sharding.Specs.of_mesh()

    def loss(x: Any, w: Any, targets: Any) -> Any:
      nll, lse = api.cross_entropy(x, w, targets, specs=specs, implementation=implementation)
      return nll.mean() + 1e-4 * jnp.square(lse).mean()

    def array(shape: tuple[int, ...], dtype: Any, spec: Any) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(entered, spec))

    lowered = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(
      array((B, S, D), jnp.bfloat16, specs.act_BSD),
      array((V, D), jnp.float32, specs.embed_VD.stored),
      array((B, S), jnp.int32, specs.tokens_BS),
    )
    return lowered, lowered.compile()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("S", [2048, 4096, 8192])
@pytest.mark.parametrize(
  ("D", "V"),
  [
    (2048, 256_000),  # Fox-1, Gemma-2B
    (2048, 32_000),  # TinyLlama
    (576, 32_000),  # MobileLLM-125M
    (2560, 73_448),  # MiniCPM3
  ],
)
def test_compiles_for_tpu(target: str, S: int, D: int, V: int) -> None:
  """On four devices, with the vocabulary over two of them; the program really has the kernels."""
  lowered, program = compiled(target, (1, 2, 1, 2), (4, S, D, V), "pallas_tpu")
  for kernel in ("cross_entropy_fold", "cross_entropy_unfold"):
    assert f'kernel_name = "{kernel}"' in lowered.as_text()
  assert program.as_text().count('custom_call_target="tpu_custom_call"') == 2


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["chunked", "pallas_tpu"])
def test_temporaries_of_full_size_are_a_few_slices(implementation: str) -> None:
  """8 rows of 2048 on one v5e, whose float32 logits would be 16.8 GB and a bfloat16 table 1 GB."""
  _, program = compiled("v5e:2x2", (1, 1, 1, 1), (8, 2048, 2048, 256_000), implementation)
  assert program.memory_analysis().temp_size_in_bytes < 0.5e9
