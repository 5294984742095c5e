"""RWKV-4 (arXiv 2305.13048): time mixing in the place of attention, channel mixing in that of the
feed-forward layer.

Letters: B rows, S positions, T cached positions, D model width, A width of the time mix, F width of
the channel mix, C positions of a chunk, M chunks.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.model import weights
from slmjax.model.context import Context
from slmjax.model_config import ModelConfig, RwkvChannelMix, RwkvTimeMix
from slmjax.sharding import Specs, gather

# Positions whose states are in memory at once.
CHUNK = 128

# The logarithm of zero. Finite, so that no difference of two is NaN, and far enough from the end of
# float32 that a row may add up one for each of its documents.
_NOTHING = -1e30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TimeMixState:
  """What a time mix keeps of the tokens of a row.

  `x_BD` is the last one's input, in the compute dtype; the rest is float32. The sums over tokens of
  decayed exp(key) * value and exp(key) are `numerator_BA` and `denominator_BA`, times
  exp(`exponent_BA`).
  """

  x_BD: jax.Array
  numerator_BA: jax.Array
  denominator_BA: jax.Array
  exponent_BA: jax.Array

  @classmethod
  def empty(
    cls,
    model: ModelConfig,
    time_mix: RwkvTimeMix,
    specs: Specs,
    lead: tuple[int, ...],
    dtype: jnp.dtype,
  ) -> "TimeMixState":
    """No tokens; `lead` is layers, passes and rows."""
    x = _no_input(model, specs, lead, dtype)
    spec = jax.P(None, None, *_state_spec(specs))
    return cls(x, *_no_tokens((*lead, time_mix.width), spec))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChannelMixState:
  """What a channel mix keeps of the tokens of a row: the last one's input, in the compute dtype."""

  x_BD: jax.Array

  @classmethod
  def empty(
    cls, model: ModelConfig, specs: Specs, lead: tuple[int, ...], dtype: jnp.dtype
  ) -> "ChannelMixState":
    """No tokens; `lead` is layers, passes and rows."""
    return cls(_no_input(model, specs, lead, dtype))


class TimeMix(nnx.Module):
  """W_out (sigmoid(r) * wkv): wkv is a mean of the values so far, each weighted by exp(key) and by
  exp(-exp(decay)) for every token since, the present one's by exp(key + bonus) instead.

  Receptance r, keys and values are projections of the token's input mixed with the one before it.
  Decays, bonuses and mixes begin as the authors' RWKV-4 has them; in Hugging Face's code all
  bonuses begin at one, by a slip. Matrices are drawn from normal distributions as in other layers.
  """

  def __init__(
    self,
    model: ModelConfig,
    time_mix: RwkvTimeMix,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
    layer: jax.Array,
  ):
    """`layer` is the block's index in the whole model, int32."""
    self.specs = specs
    D, A = model.width, time_mix.width
    dtype, std = jnp.dtype(compute.param_dtype), model.init.std
    depth, rest = _depths(model, layer)
    channel_A = np.arange(A)
    position_A = channel_A / max(A - 1, 1)
    decay_A = -5.0 + 8.0 * position_A ** (0.7 + 1.3 * depth)
    bonus_A = np.log(0.3) + 0.5 * ((channel_A + 1) % 3 - 1)
    input_D = np.arange(D) / D
    self.decay_A = _vector(decay_A, specs.bias_F, dtype)
    self.bonus_A = _vector(bonus_A, specs.bias_F, dtype)
    self.key_mix_D = _vector(input_D**rest, specs.norm_D, dtype)
    self.value_mix_D = _vector(input_D**rest + 0.3 * depth, specs.norm_D, dtype)
    self.receptance_mix_D = _vector(input_D ** (0.5 * rest), specs.norm_D, dtype)
    k, v, r, out = jax.random.split(key, 4)
    self.key_DA = weights.normal(k, (D, A), specs.mlp_in_DF, std, dtype)
    self.value_DA = weights.normal(v, (D, A), specs.mlp_in_DF, std, dtype)
    self.receptance_DA = weights.normal(r, (D, A), specs.mlp_in_DF, std, dtype)
    self.out_AD = weights.normal(out, (A, D), specs.mlp_out_FD, model.init.output_std, dtype)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: TimeMixState | None
  ) -> tuple[jax.Array, TimeMixState | None]:
    """Mixes within x (no cache), or goes on from the tokens in the cache."""
    specs, dtype = self.specs, x_BSD.dtype
    first_BS = _first_of_document(context, cache is not None)
    before_BSD = _before(x_BSD, first_BS, None if cache is None else cache.x_BD)
    k_BSA = self._project(x_BSD, before_BSD, self.key_mix_D, self.key_DA)
    v_BSA = self._project(x_BSD, before_BSD, self.value_mix_D, self.value_DA)
    r_BSA = self._project(x_BSD, before_BSD, self.receptance_mix_D, self.receptance_DA)

    rows, _, width = k_BSA.shape
    if cache is None:
      state = _no_tokens((rows, width), _state_spec(specs))
    else:
      state = (cache.numerator_BA, cache.denominator_BA, cache.exponent_BA)
    split, by_row = jax.typeof(k_BSA).sharding.spec, _state_spec(specs)
    k_BSA, v_BSA = _whole_rows(k_BSA), _whole_rows(v_BSA)
    by_token, by_id = (jax.typeof(x).sharding.spec for x in (k_BSA, first_BS))
    island = jax.shard_map(
      _wkv,
      in_specs=(by_token, by_token, by_id, specs.bias_F, specs.bias_F, by_row),
      out_specs=(by_token, by_row),
    )
    decay_A, bonus_A = self.decay_A[...], self.bonus_A[...]
    wkv_BSA, state = island(k_BSA, v_BSA, first_BS, decay_A, bonus_A, state)
    wkv_BSA = jax.reshard(wkv_BSA, split)

    mixed_BSA = jax.nn.sigmoid(r_BSA) * wkv_BSA
    out_AD = gather(self.out_AD[...], specs.mlp_out_FD, dtype)
    out_BSD = jnp.einsum("bsa,ad->bsd", mixed_BSA, out_AD, out_sharding=specs.act_BSD)
    return out_BSD, None if cache is None else TimeMixState(_whole_rows(x_BSD)[:, -1], *state)

  def _project(
    self, x_BSD: jax.Array, before_BSD: jax.Array, mix_D: nnx.Param, weight_DA: nnx.Param
  ) -> jax.Array:
    spec, dtype = self.specs.mlp_in_DF, x_BSD.dtype
    mixed_BSD = _mix(x_BSD, before_BSD, mix_D)
    return jnp.einsum("bsd,da->bsa", mixed_BSD, gather(weight_DA[...], spec, dtype))


class ChannelMix(nnx.Module):
  """sigmoid(W_r xr) * W_v relu(W_k xk)^2, where xr and xk are a token's input mixed with the one
  before it. Mixes begin as the authors' RWKV-4 has them, matrices as in other layers."""

  def __init__(
    self,
    model: ModelConfig,
    channel_mix: RwkvChannelMix,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
    layer: jax.Array,
  ):
    """`layer` is the block's index in the whole model, int32."""
    self.specs = specs
    D, F = model.width, channel_mix.width
    dtype, std = jnp.dtype(compute.param_dtype), model.init.std
    _, rest = _depths(model, layer)
    mix_D = (np.arange(D) / D) ** rest
    self.key_mix_D = _vector(mix_D, specs.norm_D, dtype)
    self.receptance_mix_D = _vector(mix_D, specs.norm_D, dtype)
    k, r, v = jax.random.split(key, 3)
    self.key_DF = weights.normal(k, (D, F), specs.mlp_in_DF, std, dtype)
    self.receptance_DD = weights.normal(r, (D, D), specs.down_DR, std, dtype)
    self.value_FD = weights.normal(v, (F, D), specs.mlp_out_FD, model.init.output_std, dtype)

  def __call__(
    self, x_BSD: jax.Array, context: Context, cache: ChannelMixState | None
  ) -> tuple[jax.Array, ChannelMixState | None]:
    """Mixes within x (no cache), or goes on from the token in the cache."""
    specs, dtype = self.specs, x_BSD.dtype
    first_BS = _first_of_document(context, cache is not None)
    before_BSD = _before(x_BSD, first_BS, None if cache is None else cache.x_BD)
    key_DF = gather(self.key_DF[...], specs.mlp_in_DF, dtype)
    k_BSF = jnp.einsum("bsd,df->bsf", _mix(x_BSD, before_BSD, self.key_mix_D), key_DF)
    k_BSF = jnp.square(jax.nn.relu(k_BSF))
    value_FD = gather(self.value_FD[...], specs.mlp_out_FD, dtype)
    v_BSD = jnp.einsum("bsf,fd->bsd", k_BSF, value_FD, out_sharding=specs.act_BSD)
    receptance_DD = gather(self.receptance_DD[...], specs.down_DR, dtype)
    mixed_BSD = _mix(x_BSD, before_BSD, self.receptance_mix_D)
    r_BSD = jnp.einsum("bsd,de->bse", mixed_BSD, receptance_DD)
    out_BSD = jax.nn.sigmoid(r_BSD) * v_BSD
    return out_BSD, None if cache is None else ChannelMixState(_whole_rows(x_BSD)[:, -1])


def _state_spec(specs: Specs) -> jax.P:
  """Of arrays [B, A]: rows as activations have them, channels as feed-forward widths."""
  return jax.P(specs.act_BSD[0], *specs.bias_F)


def _no_input(
  model: ModelConfig, specs: Specs, lead: tuple[int, ...], dtype: jnp.dtype
) -> jax.Array:
  rows, _, width = specs.act_BSD
  return jnp.zeros((*lead, model.width), dtype, out_sharding=jax.P(None, None, rows, width))


def _vector(x: jax.Array | np.ndarray, spec: jax.P, dtype: jnp.dtype) -> nnx.Param:
  return nnx.Param(jax.reshard(jnp.asarray(x, jnp.float32), spec).astype(dtype))


def _depths(model: ModelConfig, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
  """How deep a block lies, from 0 in the first to 1 in the last, and from 1 to 1/L; float32."""
  layers = model.depth
  return layer / max(layers - 1, 1), 1.0 - layer / layers


def _whole_rows(x: jax.Array) -> jax.Array:
  """[B, S, ...] with all positions of a row on one device: a token needs the one before it."""
  rows, _, *rest = jax.typeof(x).sharding.spec
  return jax.reshard(x, jax.P(rows, None, *rest))


def _first_of_document(context: Context, cached: bool) -> jax.Array:
  """Which tokens must not see those before them: bool [B, S]."""
  segments_BS = _whole_rows(context.segments_BS)
  if cached:
    kv_segments_BT = _whole_rows(context.kv_segments_BT)
    last = jnp.maximum(context.start - 1, 0)
    last_B1 = jax.lax.dynamic_slice_in_dim(kv_segments_BT, last, 1, axis=1)
    first_B1 = (last_B1 != segments_BS[:, :1]) | (context.start == 0)
  else:
    first_B1 = jnp.ones((len(segments_BS), 1), bool, out_sharding=jax.typeof(segments_BS).sharding)
  return jnp.concatenate([first_B1, segments_BS[:, 1:] != segments_BS[:, :-1]], axis=1)


def _before(x_BSD: jax.Array, first_BS: jax.Array, last_BD: jax.Array | None) -> jax.Array:
  """Each token's predecessor in its document, zeros for the first."""
  B, _, D = x_BSD.shape
  rows_BSD = _whole_rows(x_BSD)
  if last_BD is None:
    rows_spec = jax.typeof(rows_BSD).sharding
    last_B1D = jnp.zeros((B, 1, D), x_BSD.dtype, out_sharding=rows_spec)
  else:
    last_B1D = last_BD[:, None]
  before_BSD = jnp.concatenate([last_B1D, rows_BSD[:, :-1]], axis=1)
  before_BSD = jnp.where(first_BS[..., None], 0, before_BSD)
  return jax.reshard(before_BSD, jax.typeof(x_BSD).sharding.spec)


def _mix(x_BSD: jax.Array, before_BSD: jax.Array, mix_D: nnx.Param) -> jax.Array:
  """Computed in float32, so that the gradient of the mix is summed over all tokens in float32."""
  mix32_D = mix_D[...].astype(jnp.float32)
  x32_BSD, before32_BSD = x_BSD.astype(jnp.float32), before_BSD.astype(jnp.float32)
  return (x32_BSD * mix32_D + before32_BSD * (1.0 - mix32_D)).astype(x_BSD.dtype)


# Sums of values and of ones, weighted by exponentials: (numerator, denominator, exponent) stands
# for the first two times exp(exponent). The exponent only keeps them in range; any would do.
_State = tuple[jax.Array, jax.Array, jax.Array]


def _no_tokens(shape: tuple[int, ...], spec: jax.P) -> _State:
  zeros, nothing = (
    jnp.full(shape, value, jnp.float32, out_sharding=spec) for value in (0.0, _NOTHING)
  )
  return zeros, zeros, nothing


def _add(old: Sequence[jax.Array], log_decay: jax.Array, new: Sequence[jax.Array]) -> _State:
  """exp(log_decay) * old + new."""
  decayed = old[2] + log_decay
  exponent = jax.lax.stop_gradient(jnp.maximum(decayed, new[2]))
  old_weight, new_weight = jnp.exp(decayed - exponent), jnp.exp(new[2] - exponent)
  numerator = old_weight * old[0] + new_weight * new[0]
  return numerator, old_weight * old[1] + new_weight * new[1], exponent


def _join(left: Sequence[jax.Array], right: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
  """Two adjacent runs of tokens as one: their state, and by how much they decay what was before."""
  return (*_add(left[:3], right[3], right[:3]), left[3] + right[3])


def _wkv(
  k_BSA: jax.Array,
  v_BSA: jax.Array,
  first_BS: jax.Array,
  decay_A: jax.Array,
  bonus_A: jax.Array,
  state: _State,
) -> tuple[jax.Array, _State]:
  """The weighted means [B, S, A] in the dtype of the values, and the state after the last token.

  A state is linear in the one before it, so states of many tokens can be had in parallel, by an
  associative scan. Over a whole row that would keep some dozen float32 arrays [B, S, A] for the
  backward pass. So the scan is over one chunk at a time, and the backward pass recomputes a chunk
  from the state before it: what is kept is one state per chunk.
  """
  B, S, A = k_BSA.shape
  C = min(CHUNK, S)
  log_decay_A, bonus_A = -jnp.exp(decay_A.astype(jnp.float32)), bonus_A.astype(jnp.float32)

  def chunks(x: jax.Array, padding: float) -> jax.Array:
    x = jnp.pad(x, [(0, 0), (0, -S % C)] + [(0, 0)] * (x.ndim - 2), constant_values=padding)
    return jnp.moveaxis(x.reshape(B, -1, C, *x.shape[2:]), 1, 0)

  # The loop itself keeps XLA from merging the recomputation with the forward.
  @functools.partial(jax.checkpoint, prevent_cse=False)
  def step(state: _State, chunk: tuple[jax.Array, ...]) -> tuple[_State, jax.Array]:
    k_BCA, v_BCA, first_BC, padding_C = chunk
    k_BCA, v32_BCA = k_BCA.astype(jnp.float32), v_BCA.astype(jnp.float32)
    cut_BC1 = jnp.where(first_BC, _NOTHING, 0.0)[..., None]
    # Padding at the end of the row leaves the state as it is.
    decay_BCA = cut_BC1 + jnp.where(padding_C[:, None], 0.0, log_decay_A)
    one_BCA = jnp.ones_like(k_BCA)
    token = (v32_BCA, one_BCA, k_BCA)
    # What token i finds are the state before the chunk and the tokens up to i - 1.
    first = (*state, jnp.zeros_like(state[2]))
    elements = tuple(
      jnp.concatenate([x_BA[:, None], x_BCA[:, :-1]], axis=1)
      for x_BA, x_BCA in zip(first, (*token, decay_BCA), strict=True)
    )
    *found, _ = jax.lax.associative_scan(_join, elements, axis=1)
    numerator, denominator, _ = _add(found, cut_BC1, (v32_BCA, one_BCA, k_BCA + bonus_A))
    last = [[x_BCA[:, -1] for x_BCA in part] for part in (found, token)]
    state = _add(last[0], decay_BCA[:, -1], last[1])
    return state, (numerator / denominator).astype(v_BCA.dtype)

  padding_MC = (jnp.arange(S + -S % C) >= S).reshape(-1, C)
  inputs = (chunks(k_BSA, _NOTHING), chunks(v_BSA, 0.0), chunks(first_BS, False), padding_MC)
  state, wkv_MBCA = jax.lax.scan(step, state, inputs)
  return jnp.moveaxis(wkv_MBCA, 0, 1).reshape(B, -1, A)[:, :S], state
