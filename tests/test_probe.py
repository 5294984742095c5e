"""The start-up probe: what it tries, that it passes what is right, and refuses what is not."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax import evaluate, flops, probe, sharding, topology, train
from slmjax.errors import UserError
from slmjax.kernels.attention import chunked as chunked_attention
from slmjax.kernels.cross_entropy import chunked as chunked_cross_entropy
from slmjax.probe import AttentionUse, CrossEntropyUse
from slmjax.recipe import load_recipe
from tests import small
from tests.shrunken import recipe_path

ATTENTION = AttentionUse(4, 64, 4, 2, 16, 16, 0.25, window=0, softcap=None, alibi=False)
CROSS_ENTROPY = CrossEntropyUse(rows=4, length=24, width=32, vocabulary=300, softcap=None)


def test_every_use_of_a_run_is_tried(enter_mesh: Any) -> None:
  with enter_mesh((1, 2, 1, 1)):
    config = small.config()
    shapes = probe.shapes_of(config)
    # Microbatches of 2 rows on each of two data shards, in rows of 32 and twice of 64; 8 of 64 in
    # evaluations.
    assert [use[:6] for use in probe.attention_uses(config.model, shapes)] == [
      (4, 32, 4, 2, 8, 8),
      (4, 64, 4, 2, 8, 8),
      (8, 64, 4, 2, 8, 8),
    ]
    assert shapes == [(4, 32), (4, 64), (8, 64)]
    assert probe.cross_entropy_uses(config.model, shapes)[1] == (4, 64, 32, 384, None)


@pytest.mark.parametrize(
  ("recipe", "want"),
  [
    ("gemma2:2b", {(256, 256, 0, 50.0, False), (256, 256, 4096, 50.0, False)}),
    ("bloom:560m", {(64, 64, 0, None, True)}),
    ("minicpm3:4b", {(96, 64, 0, None, False)}),
    ("rwkv4:169m", set()),
  ],
)
def test_windows_caps_slopes_and_latent_attention_are_tried(
  recipe: str, want: set[Any], enter_mesh: Any
) -> None:
  with enter_mesh((1, 1, 1, 1)):
    uses = probe.attention_uses(load_recipe(recipe_path(recipe)).model, [(8, 128)])
  assert {(u.width, u.value_width, u.window, u.softcap, u.alibi) for u in uses} == want


# float32: the same products in another order. bfloat16: half of what the probe allows.
CLOSE = {"float32": 1e-5, "bfloat16": probe.TOLERANCE / 2}


@pytest.mark.medium
@pytest.mark.parametrize(
  ("dtype", "change"),
  [("bfloat16", {}), ("float32", {"window": 20, "softcap": 2.0}), ("float32", {"alibi": True})],
  ids=str,
)
def test_what_is_right_passes(dtype: str, change: dict[str, Any], enter_mesh: Any) -> None:
  use = ATTENTION._replace(**change)
  with enter_mesh((1, 2, 1, 2)):
    errors = jax.jit(functools.partial(probe.attention_errors, use, dtype, "chunked"))()
    assert (np.asarray(errors) <= CLOSE[dtype]).all()


@pytest.mark.medium
@pytest.mark.parametrize(("dtype", "softcap"), [("bfloat16", None), ("float32", 3.0)])
def test_a_right_cross_entropy_passes(dtype: str, softcap: float | None, enter_mesh: Any) -> None:
  use = CROSS_ENTROPY._replace(softcap=softcap)
  with enter_mesh((1, 2, 1, 2)):
    errors = jax.jit(functools.partial(probe.cross_entropy_errors, use, dtype, "chunked"))()
    assert (np.asarray(errors) <= CLOSE[dtype]).all()
    assert "agrees" in probe.probe_cross_entropy(use, dtype, "chunked")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["o", "dq", "dk", "dv"])
def test_a_wrong_attention_is_refused(
  name: str, enter_mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  """One head of one row is wrong by a fifth."""
  right = chunked_attention.attention

  def wrong(x: Any) -> Any:
    return x.at[1, :, 0].multiply(1.2)

  @jax.custom_vjp
  def spoil_gradient(x: Any) -> Any:
    return x

  spoil_gradient.defvjp(lambda x: (x, None), lambda _, dx: (wrong(dx),))

  def attention(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> Any:
    arrays = {"dq": q, "dk": k, "dv": v}
    if name != "o":
      arrays[name] = spoil_gradient(arrays[name])
    o, lse = right(*arrays.values(), *rest, **options)
    return (wrong(o) if name == "o" else o), lse

  monkeypatch.setattr(chunked_attention, "attention", attention)
  with (
    enter_mesh((1, 1, 1, 1)),
    pytest.raises(
      UserError, match=rf"attention implementation 'chunked' is wrong on .*: {name} is"
    ),
  ):
    probe.probe_attention(ATTENTION, "bfloat16", "chunked")


@pytest.mark.medium
@pytest.mark.parametrize("factor", [1.1, np.nan])
def test_a_wrong_cross_entropy_is_refused(
  factor: float, enter_mesh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
  right = chunked_cross_entropy.cross_entropy

  def cross_entropy(*arrays: Any, **options: Any) -> Any:
    nll, lse, table = right(*arrays, **options)
    return nll, lse * factor, table

  monkeypatch.setattr(chunked_cross_entropy, "cross_entropy", cross_entropy)
  with (
    enter_mesh((1, 1, 1, 1)),
    pytest.raises(
      UserError, match=r"logsumexp is off by .* --config\.compute\.cross_entropy=chunked"
    ),
  ):
    probe.probe_cross_entropy(CROSS_ENTROPY, "float32", "chunked")


def test_documents_are_of_all_sorts_and_end_in_padding() -> None:
  ids = probe.documents(8192)
  lengths = np.bincount(ids)[1:]
  assert (np.diff(ids[ids > 0]) >= 0).all()
  assert (ids[-256:] == 0).all()
  assert lengths.min() < 600 < 2000 < lengths.max()


@pytest.mark.medium
def test_a_run_on_an_accelerator_probes_before_it_has_a_state(
  text_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  config = small.config(text_store)

  def refuse(model: Any, compute: Any, shapes: Any) -> Any:
    assert (model, compute) == (config.model, config.compute)
    raise UserError(f"attention is wrong for {shapes}")
    yield

  monkeypatch.setattr(probe, "probe", refuse)
  stages = tuple(dataclasses.replace(stage, microbatch_rows=1) for stage in config.stages)
  config = dataclasses.replace(config, stages=stages)
  assert train.run(config, tmp_path / "cpu") == 0
  monkeypatch.setattr(probe, "_platform", lambda: "tpu")
  with pytest.raises(UserError, match=r"wrong for \[\(8, 32\), \(8, 64\)\]"):
    train.run(config, tmp_path / "tpu")
  assert not list((tmp_path / "tpu").glob("checkpoints/*"))

  monkeypatch.setattr(sys, "argv", ["evaluate", f"--checkpoint={tmp_path / 'cpu'}", "--window=16"])
  with pytest.raises(UserError, match=r"wrong for \[\(8, 16\)\]"):
    evaluate.main()


@pytest.mark.slow
@pytest.mark.parametrize("length", [2048, 8192])
def test_the_probe_of_full_fox1_fits_a_v5e(length: int) -> None:
  if missing := topology.missing_compiler("v5e:2x2"):
    pytest.skip(missing)
  chip = flops.chip("TPU v5e")
  assert chip is not None
  with jax.set_mesh(sharding.make_mesh((1, 4, 1, 1), topology.devices("v5e:2x2"))):
    attention = AttentionUse(16, length, 16, 4, 128, 128, 128**-0.5, 0, None, False)
    cross_entropy = CrossEntropyUse(16, length, 2048, 256_000, None)
    for errors, use in (
      (probe.attention_errors, attention),
      (probe.cross_entropy_errors, cross_entropy),
    ):
      program = jax.jit(functools.partial(errors, use, jnp.bfloat16, "auto")).lower()
      assert "tpu_custom_call" in program.as_text()
      memory = program.compile().memory_analysis()
      assert memory.temp_size_in_bytes < chip.memory
