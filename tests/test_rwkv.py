"""RWKV-4 layers against float64 NumPy, forward, gradients and cached; and what they must not see.

Letters: B rows, S positions, D model width, A width of the time mix, F width of the channel mix.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from slmjax.config import ComputeConfig
from slmjax.model import rwkv
from slmjax.model.context import Context
from slmjax.model.rwkv import ChannelMix, ChannelMixState, TimeMix, TimeMixState
from slmjax.model_config import (
  BlockConfig,
  EmbeddingConfig,
  InitConfig,
  LogitsConfig,
  ModelConfig,
  NormConfig,
  RwkvChannelMix,
  RwkvTimeMix,
  SegmentConfig,
)
from slmjax.sharding import Specs

# float32: sums of up to some hundred terms of order one, each rounded to 2^-24, in another order.
TOLERANCE = 1e-5
D, A, F, S = 8, 12, 10, 21
TIME, CHANNEL = RwkvTimeMix("rwkv", A), RwkvChannelMix("rwkv", F)
# Ids need not ascend. Documents end within and at the borders of chunks and of cached pieces; one
# has one token, and the second row is padded on the left.
IDS_BS = np.array([[5] * 7 + [2] * 1 + [3] * 2 + [5] * 11, [0] * 4 + [1] * 12 + [2] * 5], np.int32)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
  """Four whole chunks and a part of one in S positions."""
  monkeypatch.setattr(rwkv, "CHUNK", 5)


def model_of(*layers: int) -> ModelConfig:
  """A model with segments of so many layers."""
  return ModelConfig(
    vocab_size=32,
    width=D,
    max_length=64,
    embedding=EmbeddingConfig(tied=False, width=D, scale=1.0, norm=True),
    positions=None,
    norm=NormConfig(kind="layer", eps=1e-5, scale=True, bias=True),
    block=BlockConfig(wiring="pre", residual_scale=1.0, shortcut=None),
    segments=tuple(SegmentConfig(n, 1, TIME, CHANNEL) for n in layers),
    logits=LogitsConfig(norm=True, scale=1.0, softcap=None),
    init=InitConfig(embedding_std=0.02, std=0.5, output_std=0.25),
  )


def layers_of(model: ModelConfig, specs: Specs, layer: jax.Array | int) -> dict[str, Any]:
  compute = ComputeConfig("float32", "float32", "none", "auto", "auto")
  common = (compute, specs, jax.random.key(0), jnp.asarray(layer, jnp.int32))
  return {"time": TimeMix(model, TIME, *common), "channel": ChannelMix(model, CHANNEL, *common)}


def drawn(specs: Specs) -> dict[str, Any]:
  """Layers whose parameters are all of them random."""
  rng = np.random.default_rng(0)
  layers = jax.eval_shape(lambda: layers_of(model_of(1), specs, 0))
  return jax.tree.map(
    lambda x: jax.reshard(jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), x.sharding.spec),
    layers,
  )


def inputs(specs: Specs) -> tuple[jax.Array, jax.Array, jax.Array]:
  """x, segment ids, and what to multiply the outputs with for a scalar."""
  rng = np.random.default_rng(1)
  x, do = rng.normal(size=(2, 2, S, D)).astype(np.float32)
  ids_BS = jax.reshard(jnp.asarray(IDS_BS), specs.tokens_BS)
  x_BSD, do_BSD = (jax.reshard(jnp.asarray(array), specs.act_BSD) for array in (x, do))
  return x_BSD, ids_BS, do_BSD


def context_of(ids_BS: jax.Array, kv_ids_BT: jax.Array, start: int) -> Context:
  return Context(ids_BS, kv_ids_BT, jnp.asarray(start, jnp.int32), None, None)


def forward(layers: Any, x_BSD: jax.Array, ids_BS: jax.Array) -> dict[str, jax.Array]:
  context = context_of(ids_BS, ids_BS, 0)
  return {name: layer(x_BSD, context, None)[0] for name, layer in layers.items()}


@jax.jit
def backward(layers: Any, x_BSD: jax.Array, ids_BS: jax.Array, do: Any) -> tuple[Any, Any]:
  """Outputs, and the gradients of their products with `do` by the layers and x."""
  y, vjp = jax.vjp(lambda layers, x_BSD: forward(layers, x_BSD, ids_BS), layers, x_BSD)
  return y, vjp(do)


def named(layers: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
  """Float64 copies of the parameters, by their names."""
  found: dict[str, dict[str, np.ndarray]] = {name: {} for name in layers}
  for path, x in jax.tree_util.tree_leaves_with_path(layers):
    keys = [str(getattr(k, "key", getattr(k, "name", None))) for k in path]
    found[keys[0]][keys[1]] = np.asarray(x, np.float64)
  return found


def types(tree: Any) -> list[Any]:
  """Shapes, dtypes and shardings."""
  return [jax.typeof(x) for x in jax.tree.leaves(tree)]


def previous(x_SD: np.ndarray, ids_S: np.ndarray) -> np.ndarray:
  out = np.zeros_like(x_SD)
  for s in range(1, len(x_SD)):
    if ids_S[s] == ids_S[s - 1]:
      out[s] = x_SD[s - 1]
  return out


def sigmoid(x: np.ndarray) -> np.ndarray:
  return 1 / (1 + np.exp(-x))


def time_mix(w: dict[str, np.ndarray], x_SD: np.ndarray, ids_S: np.ndarray) -> np.ndarray:
  """Equations 11 to 17 of the paper, token by token, on the tokens of the document so far."""
  before_SD = previous(x_SD, ids_S)
  k_SA, v_SA, r_SA = (
    (x_SD * w[f"{n}_mix_D"] + before_SD * (1 - w[f"{n}_mix_D"])) @ w[f"{n}_DA"]
    for n in ("key", "value", "receptance")
  )
  decay_A = np.exp(-np.exp(w["decay_A"]))
  wkv_SA = np.zeros_like(k_SA)
  numerator_A, denominator_A = np.zeros((2, k_SA.shape[1]))
  for t in range(len(x_SD)):
    if t and ids_S[t] != ids_S[t - 1]:
      numerator_A, denominator_A = np.zeros((2, k_SA.shape[1]))
    now_A, present_A = np.exp(k_SA[t]), np.exp(k_SA[t] + w["bonus_A"])
    wkv_SA[t] = (numerator_A + present_A * v_SA[t]) / (denominator_A + present_A)
    numerator_A = decay_A * numerator_A + now_A * v_SA[t]
    denominator_A = decay_A * denominator_A + now_A
  return (sigmoid(r_SA) * wkv_SA) @ w["out_AD"]


def channel_mix(w: dict[str, np.ndarray], x_SD: np.ndarray, ids_S: np.ndarray) -> np.ndarray:
  before_SD = previous(x_SD, ids_S)
  xk_SD, xr_SD = (
    x_SD * w[f"{n}_mix_D"] + before_SD * (1 - w[f"{n}_mix_D"]) for n in ("key", "receptance")
  )
  return sigmoid(xr_SD @ w["receptance_DD"]) * (
    np.maximum(xk_SD @ w["key_DF"], 0) ** 2 @ w["value_FD"]
  )


REFERENCES = {"time": time_mix, "channel": channel_mix}


def expected(name: str, w: dict[str, np.ndarray], x_BSD: Any, ids_BS: Any) -> np.ndarray:
  rows = zip(np.asarray(x_BSD, np.float64), np.asarray(ids_BS), strict=True)
  return np.stack([REFERENCES[name](w, x_SD, ids_S) for x_SD, ids_S in rows])


def assert_close(got: Any, want: Any, name: str = "", tolerance: float = TOLERANCE) -> None:
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  error = np.abs(got - want).max()
  assert error <= tolerance * max(1.0, np.abs(want).max()), f"{name}: {error}"


@pytest.mark.medium
def test_equals_the_equations_forward_backward_and_on_four_devices(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:
    layers = drawn(specs)
    x_BSD, ids_BS, do_BSD = inputs(specs)
    got, (grads, dx_BSD) = backward(layers, x_BSD, ids_BS, dict.fromkeys(layers, do_BSD))
    weights, slopes, do64_BSD = named(layers), named(grads), np.asarray(do_BSD, np.float64)
  assert sum(len(w) for w in weights.values()) == 9 + 5
  for name, w in weights.items():
    assert_close(got[name], expected(name, w, x_BSD, ids_BS), name)

    def scalar(changed: Any, name: str = name, w: Any = w) -> float:
      return float((expected(name, {**w, **changed}, x_BSD, ids_BS) * do64_BSD).sum())

    for key, weight in w.items():
      step = np.random.default_rng(2).normal(size=weight.shape)
      slope = (scalar({key: weight + 1e-5 * step}) - scalar({key: weight - 1e-5 * step})) / 2e-5
      assert_close((slopes[name][key] * step).sum(), slope, f"{name} {key}", 10 * TOLERANCE)
  step_BSD = np.random.default_rng(3).normal(size=x_BSD.shape)
  up, down = (
    sum(
      (expected(name, w, np.asarray(x_BSD, np.float64) + e * step_BSD, ids_BS) * do64_BSD).sum()
      for name, w in weights.items()
    )
    for e in (1e-5, -1e-5)
  )
  assert_close((np.asarray(dx_BSD) * step_BSD).sum(), (up - down) / 2e-5, "x", 10 * TOLERANCE)

  with enter_mesh((1, 2, 1, 2)) as specs:
    layers = drawn(specs)
    x_BSD, ids_BS, do_BSD = inputs(specs)
    spread, (spread_grads, spread_dx_BSD) = backward(
      layers, x_BSD, ids_BS, dict.fromkeys(layers, do_BSD)
    )
    assert types((spread_grads, spread_dx_BSD)) == types((layers, x_BSD))
  jax.tree.map(assert_close, spread, got)
  jax.tree.map(assert_close, (named(spread_grads), spread_dx_BSD), (slopes, dx_BSD))


@pytest.mark.medium
def test_a_token_sees_its_document_so_far_and_no_more(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:
    layers = drawn(specs)
    x_BSD, ids_BS, _ = inputs(specs)

    zeros_BSD = 0.0 * x_BSD
    starts = np.ones_like(IDS_BS, bool)
    starts[:, 1:] = IDS_BS[:, 1:] != IDS_BS[:, :-1]
    documents_BS = np.cumsum(starts, axis=1)
    for t in (0, 6, 7, 9, 16, S - 1):
      causal_BS = (documents_BS == documents_BS[:, t : t + 1]) & (np.arange(S) <= t)
      sees = {}
      for name in layers:
        at_BSD = zeros_BSD + (np.arange(S) == t)[:, None]
        do = {n: at_BSD if n == name else zeros_BSD for n in layers}
        _, (_, dx_BSD) = backward(layers, x_BSD, ids_BS, do)
        sees[name] = (np.asarray(dx_BSD) != 0).any(axis=-1)
      np.testing.assert_array_equal(sees["time"], causal_BS)
      np.testing.assert_array_equal(sees["channel"], causal_BS & (np.arange(S) >= t - 1))


def test_a_packed_document_equals_the_same_alone(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:
    layers = drawn(specs)
    x_BSD, ids_BS, do_BSD = inputs(specs)
    do = dict.fromkeys(layers, do_BSD)
    packed, _ = backward(layers, x_BSD, ids_BS, do)
    turned_BSD = jax.reshard(jnp.asarray(np.roll(x_BSD, -10, axis=1)), specs.act_BSD)
    alone, _ = backward(layers, turned_BSD, 7 + 0 * ids_BS, do)
  for name in packed:
    assert_close(alone[name][0, :11], packed[name][0, 10:], name)


@jax.jit
def append(layers: Any, cache: Any, x_BSD: Any, kv_ids_BT: Any, start: Any) -> Any:
  """The layers' outputs for x at `start`, and their caches."""
  ids_BS = jax.lax.dynamic_slice_in_dim(kv_ids_BT, start, x_BSD.shape[1], axis=1)
  seen_BT = jnp.where(jnp.arange(kv_ids_BT.shape[1]) < start + x_BSD.shape[1], kv_ids_BT, 0)
  context = context_of(ids_BS, seen_BT, start)
  both = {name: layer(x_BSD, context, cache[name]) for name, layer in layers.items()}
  return {name: y for name, (y, _) in both.items()}, {name: c for name, (_, c) in both.items()}


@pytest.mark.medium
def test_cached_pieces_equal_the_whole(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:
    layers = drawn(specs)
    x_BSD, ids_BS, do_BSD = inputs(specs)
    model, lead, dtype = model_of(1), (1, 1, 2), jnp.dtype("float32")
    empty = {
      "time": TimeMixState.empty(model, TIME, specs, lead, dtype),
      "channel": ChannelMixState.empty(model, specs, lead, dtype),
    }
    cache = jax.tree.map(lambda x: x[0, 0], empty)
    kv_ids_BT = jnp.pad(ids_BS, ((0, 0), (0, 3)))
    whole, _ = backward(layers, x_BSD, ids_BS, dict.fromkeys(layers, do_BSD))
    pieces = []
    for start, stop in [(0, 7), (7, 14), *((t, t + 1) for t in range(14, S))]:
      y, cache = append(layers, cache, x_BSD[:, start:stop], kv_ids_BT, jnp.asarray(start))
      pieces.append(y)
    for name in whole:
      assert_close(jnp.concatenate([y[name] for y in pieces], axis=1), whole[name], name)
    # A cache of length zero has nothing to see, whatever its arrays hold.
    again, _ = append(layers, cache, x_BSD[:, :7], kv_ids_BT, jnp.asarray(0))
    jax.tree.map(assert_close, again, pieces[0])


def test_caches_keep_their_types(enter_mesh: Any) -> None:
  """On four devices in bfloat16: `jax.lax.scan` over layers takes no other."""
  with enter_mesh((1, 2, 1, 2)) as specs:
    layers = jax.eval_shape(lambda: drawn(specs))
    model, lead, dtype = model_of(1), (1, 1, 2), jnp.dtype("bfloat16")
    x_BSD = jnp.zeros((2, 1, D), dtype, out_sharding=specs.act_BSD)
    kv_ids_BT = jnp.zeros((2, 4), jnp.int32, out_sharding=specs.tokens_BS)

    def step(layers: Any) -> tuple[Any, Any]:
      cache = {
        "time": TimeMixState.empty(model, TIME, specs, lead, dtype),
        "channel": ChannelMixState.empty(model, specs, lead, dtype),
      }
      cache = jax.tree.map(lambda x: x[0, 0], cache)
      y, after = append(layers, cache, x_BSD, kv_ids_BT, jnp.asarray(2))
      assert types(after) == types(cache)
      assert types(y) == [jax.typeof(x_BSD)] * 2
      return y, after

    jax.eval_shape(step, layers)


@pytest.mark.medium
def test_long_rows_stay_exact(enter_mesh: Any) -> None:
  """2000 tokens, keys up to exp(100) apart, decays from next to none to all at once."""
  rng = np.random.default_rng(4)
  with enter_mesh((1, 1, 1, 1)) as specs:
    layer = drawn(specs)["time"]
    layer.decay_A[...] = jnp.linspace(-9.0, 5.0, A, dtype=jnp.float32)
    layer.key_DA[...] = 15.0 * layer.key_DA[...]
    x_BSD = jnp.asarray(rng.normal(size=(1, 2000, D)), jnp.float32, out_sharding=specs.act_BSD)
    ids_BS = jnp.asarray(np.cumsum(rng.random((1, 2000)) < 0.001, axis=1), jnp.int32)
    ids_BS = jax.reshard(ids_BS, specs.tokens_BS)
    got, grads = backward({"time": layer}, x_BSD, ids_BS, {"time": x_BSD})
    w = named({"time": layer})["time"]
  # Keys reach 100: rounding their sums to 2^-24 of that changes exp(key) by a few 1e-5.
  assert_close(got["time"], expected("time", w, x_BSD, ids_BS), tolerance=1e-4)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


MIXES = {"key_mix_D", "receptance_mix_D"}


def test_initial_values_are_the_published_ones(enter_mesh: Any) -> None:
  with enter_mesh((1, 1, 1, 1)) as specs:

    def made(model: ModelConfig, layer: jax.Array) -> Any:
      # Compiling a normal draw takes longer than all else here: only two of them.
      layers = layers_of(model, specs, layer)
      return {
        name: {k: x[...] for k, x in vars(layers[name]).items() if k in wanted}
        for name, wanted in (
          ("time", {*MIXES, "value_mix_D", "decay_A", "bonus_A", "key_DA", "out_AD"}),
          ("channel", MIXES),
        )
      }

    found = jax.jit(jax.vmap(lambda layer: made(model_of(2, 1), layer)))(jnp.arange(3))
    alone_A = jax.jit(lambda: layers_of(model_of(1), specs, jnp.int32(0))["time"].decay_A[...])()
  time, channel = (
    [{key: np.asarray(x[layer]) for key, x in found[name].items()} for layer in range(3)]
    for name in ("time", "channel")
  )
  for layer, exponent in enumerate((0.7, 1.35, 2.0)):
    decay_A = time[layer]["decay_A"]
    np.testing.assert_allclose(decay_A[[0, -1]], [-5, 3], rtol=1e-6)
    np.testing.assert_allclose(decay_A[4], -5 + 8 * (4 / 11) ** exponent, rtol=1e-6)
    zigzag = math.log(0.3) + np.array([0, 0.5, -0.5, 0])
    np.testing.assert_allclose(time[layer]["bonus_A"][:4], zigzag, rtol=1e-6)
  for layer, rest in enumerate((1, 2 / 3, 1 / 3)):
    for mix in (
      time[layer]["key_mix_D"],
      *(channel[layer][f"{n}_mix_D"] for n in ("key", "receptance")),
    ):
      np.testing.assert_allclose(mix[[0, 2]], [0, 0.25**rest], rtol=1e-6)
    value_D, receptance_D = time[layer]["value_mix_D"], time[layer]["receptance_mix_D"]
    np.testing.assert_allclose(value_D[2], 0.25**rest + 0.15 * layer, rtol=1e-6)
    np.testing.assert_allclose(receptance_D[2], 0.25 ** (rest / 2), rtol=1e-6)
  np.testing.assert_allclose(alone_A, time[0]["decay_A"])
  for name, std in (("key_DA", 0.5), ("out_AD", 0.25)):
    assert abs(time[0][name].std() / std - 1) < 0.3, name
