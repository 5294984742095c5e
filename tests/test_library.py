"""The model library: published sizes to the last parameter, trees without what is not used, and
every architecture learns."""

import json

import jax
import numpy as np
import pytest

from slmjax import checkpoint, sharding
from slmjax.data.loader import Batch
from slmjax.model_config import HeadsAttention, RotaryPositions
from slmjax.parameters import parameters
from slmjax.recipe import load_recipe
from slmjax.state import abstract_state, init_state
from slmjax.step import train_step
from tests import shrunken, small

# Computed from the published configurations; where the publisher counts differently, the recipe's
# docstring says how.
TOTALS = {
  "fox1": 1_665_271_808,
  "tinyllama:1b": 1_100_048_384,
  "litellama:460m": 461_685_760,
  "mobilellm:125m": 124_635_456,
  "mobilellm:350m": 345_355_200,
  "mobilellm:600m": 603_188_352,
  "mobilellm:1b": 1_005_461_760,
  "mobilellm:1_5b": 1_511_188_800,
  "mobilellm:125m_ls": 124_635_456,
  "mobilellm:350m_ls": 345_355_200,
  "openelm:270m": 271_527_168,
  "openelm:450m": 457_179_136,
  "openelm:1_1b": 1_079_891_456,
  "openelm:3b": 3_036_647_424,
  "minicpm3:4b": 4_073_875_968,
  "gemma:2b": 2_506_172_416,
  "gemma2:2b": 2_614_341_888,
  "qwen:1_5_1_8b": 1_836_828_672,
  "qwen:2_5_1_5b": 1_543_714_304,
  "qwen:3_0_6b": 596_049_920,
  "stablelm:2_1_6b": 1_644_515_328,
  "phi3:mini": 3_821_079_552,
  "llama:2_7b": 6_738_415_616,
  "llama:3_2_1b": 1_235_814_400,
  "smollm2:135m": 134_515_008,
  "smollm2:360m": 361_821_120,
  "smollm2:1_7b": 1_711_376_384,
  "opt:125m": 125_239_296,
  "opt:350m": 331_196_416,
  "opt:1_3b": 1_315_758_080,
  "galactica:125m": 125_030_400,
  "gpt2:124m": 124_439_808,
  "cerebras_gpt:111m": 111_050_496,
  "cerebras_gpt:256m": 255_977_024,
  "cerebras_gpt:590m": 590_310_912,
  "cerebras_gpt:1_3b": 1_315_723_264,
  "gpt_neo:125m": 125_198_592,
  "bloom:560m": 559_214_592,
  "pythia:160m": 162_322_944,
  "pythia:410m": 405_334_016,
  "pythia:1b": 1_011_781_632,
  "pythia:1_4b": 1_414_647_808,
  "dolly:v2_3b": 2_775_086_080,
  "olmo:1b": 1_176_764_416,
  "rwkv4:169m": 169_342_464,
}
# Ours in part, or shrunk: no published total.
WITHOUT_TOTAL = {"fox1:tiny", "pangu_pi:1b", "deepseek_v2_lite:dense"}


def test_every_recipe_has_its_total() -> None:
  assert set(TOTALS) | WITHOUT_TOTAL == set(shrunken.RECIPES)


@pytest.mark.parametrize("name", TOTALS)
def test_published_totals(name: str) -> None:
  assert parameters(load_recipe(shrunken.recipe_path(name)).model) == TOTALS[name]


def _runs(*pairs: tuple[int, int]) -> list[int]:
  return [value for value, count in pairs for _ in range(count)]


_FFN_270M = "768 1024 1280 1536 1792 2048 2560 2816 3072 3328 3584 3840 4352 4608 4864 5120"
_FFN_450M = (
  "768 1024 1280 1536 1792 2304 2560 2816 3072 3328 3584 3840 4096 4352 4608 5120 5376 5632 5888 "
  "6144"
)
_FFN_3B = (
  "1536 1792 2048 2560 2816 3072 3328 3584 4096 4352 4608 4864 5120 5632 5888 6144 6400 6656 7168 "
  "7424 7680 7936 8192 8704 8960 9216 9472 9728 10240 10496 10752 11008 11264 11776 12032 12288"
)
OPENELM = {
  "270m": (_runs((12, 5), (16, 7), (20, 4)), [int(n) for n in _FFN_270M.split()]),
  "450m": (_runs((12, 3), (16, 7), (20, 6), (24, 4)), [int(n) for n in _FFN_450M.split()]),
  "1_1b": (
    _runs((16, 3), (20, 7), (24, 8), (28, 6), (32, 4)),
    [*range(1024, 4097, 256), 4608, 4608, *range(5120, 8193, 256)],
  ),
  "3b": (_runs((12, 4), (16, 14), (20, 12), (24, 6)), [int(n) for n in _FFN_3B.split()]),
}


@pytest.mark.parametrize("size", OPENELM)
def test_openelm_layers(size: str) -> None:
  segments = load_recipe(shrunken.recipe_path(f"openelm:{size}")).model.segments
  heads, ffn = OPENELM[size]
  assert [s.attention.heads for s in segments] == heads
  assert [s.attention.kv_heads for s in segments] == [n // 4 for n in heads]
  assert [s.ffn.width for s in segments] == ffn


def test_a_llama_shows_no_switch_that_it_does_not_use(enter_mesh) -> None:
  with enter_mesh((1, 1, 1, 1)):
    names = set(checkpoint.by_name(abstract_state(shrunken.config("tinyllama:1b")).model))
  block = "attention_norm/scale_D attention/q_DNH attention/k_DKH attention/v_DKH attention/out_NHD"
  block += " ffn_norm/scale_D ffn/gate_DF ffn/up_DF ffn/down_FD"
  assert names == {
    "embed_VE",
    "head_VE",
    "final_norm/scale_D",
    *(f"segments/0/{name}" for name in block.split()),
  }


def test_alternating_windows_in_order() -> None:
  """GPT-Neo begins with a global layer, Gemma 2 with a local one."""
  neo = load_recipe(shrunken.recipe_path("gpt_neo:125m")).model.segments[0].attention
  gemma = load_recipe(shrunken.recipe_path("gemma2:2b")).model.segments[0].attention
  assert isinstance(neo, HeadsAttention)
  assert isinstance(gemma, HeadsAttention)
  assert (neo.windows, neo.scale) == ((0, 256), 1.0)
  assert (gemma.windows, gemma.scale) == ((4096, 0), 1 / 16)


def test_partial_rotary_widths() -> None:
  """A quarter of each head in Pythia and StableLM 2."""
  for name, width in {
    "pythia:160m": 16,
    "pythia:1b": 64,
    "dolly:v2_3b": 20,
    "stablelm:2_1_6b": 16,
  }.items():
    positions = load_recipe(shrunken.recipe_path(name)).model.positions
    assert isinstance(positions, RotaryPositions)
    assert positions.width == width


def _distinct() -> dict[str, str]:
  """One recipe for each architecture that is left once sizes are shrunk."""
  found: dict[str, str] = {}
  for name in shrunken.RECIPES:
    found.setdefault(json.dumps(shrunken.model(name), sort_keys=True), name)
  return {name: settings for settings, name in found.items()}


@pytest.mark.medium
@pytest.mark.parametrize("name", _distinct())
def test_learns(name: str, enter_mesh) -> None:
  """Twenty steps on eight rows of repeated words: the loss falls, in a model whose logits are
  scaled down (MiniCPM3) by a twentieth, in the others by more."""
  raw = shrunken.raw_config(name)
  stage = raw.stages[0]
  stage.tokens = 20 * stage.batch_tokens
  stage.microbatch_rows = 8
  stage.learning_rate.update(peak=4e-3, end=4e-3)
  # What compiles fastest.
  raw.compute.update(remat="none", attention="reference", cross_entropy="reference")
  config = shrunken.resolve(raw)
  rng = np.random.default_rng(0)
  # A few words over and over: easily learnt, by looking back as well as by heart.
  words = rng.integers(0, small.VOCAB, (6, 4))
  ids = words[rng.integers(0, 6, (8, 9))].reshape(8, -1)[:, :33].astype(np.int32)
  ones = np.ones((1, 8, 32), np.int32)
  losses = []
  with enter_mesh((1, 1, 1, 1)):
    state = jax.jit(lambda: init_state(config))()
    step = jax.jit(lambda s, b: train_step(s, b, config=config, stage_index=0))
    batch = Batch(
      tokens=ids[None, :, :-1],
      targets=ids[None, :, 1:],
      segments=ones,
      positions=np.broadcast_to(np.arange(32, dtype=np.int32), ones.shape),
      weights=ones.astype(np.float32),
    )
    mesh = jax.sharding.get_mesh()
    batch = jax.device_put(batch, sharding.batch_sharding(mesh))
    for _ in range(20):
      state, metrics = step(state, batch)
      losses.append(float(metrics.loss_sum / metrics.count))
  assert all(np.isfinite(losses))
  assert losses[-1] < 0.95 * losses[0], losses
