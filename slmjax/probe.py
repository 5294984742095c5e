"""Checks the kernels of a run against their definition, on its devices and shapes, before step 0.

A kernel that is right in its tests may still be compiled wrongly for a chip or a shape, and the run
would go on with wrong gradients. So every run on an accelerator first computes attention and cross
entropy once at its own shapes, forward and gradients, with whatever implementation it is going to
use and as the definition says, and is refused if they differ. Random arrays; the definition in
float32, in parts small enough for any chip.

B rows, S positions, N query heads, K key/value heads, H width of queries and keys, U width of
values, Q positions of a part, D model width, V vocabulary.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from slmjax import sharding
from slmjax.config import ComputeConfig, Config
from slmjax.errors import UserError
from slmjax.kernels.attention import reference
from slmjax.kernels.attention.api import attention
from slmjax.kernels.cross_entropy.api import cross_entropy
from slmjax.kernels.platform import platform as _platform
from slmjax.model.position import alibi_slopes
from slmjax.model_config import (
  AlibiPositions,
  HeadsAttention,
  LatentAttention,
  ModelConfig,
  RotaryPositions,
  SegmentConfig,
)
from slmjax.sharding import Specs, shard_attention

# Largest error over the largest magnitude of the array. Inputs are the same rounded numbers on both
# sides; weights, their gradients and results are rounded to 2^-9, or products to that where float32
# is multiplied so. The conformance tests, on shorter rows, pass with half of it.
TOLERANCE = 2.0**-6

_PART = 512  # query positions that the definition computes at a time
_SAMPLES = 4  # positions per row whose logits are computed whole


class AttentionUse(NamedTuple):
  """Attention as some layers of a run call it: global rows and heads."""

  rows: int
  length: int
  heads: int
  kv_heads: int
  width: int
  value_width: int
  scale: float
  window: int
  softcap: float | None
  alibi: bool


class CrossEntropyUse(NamedTuple):
  """Cross entropy as some stages of a run call it: global rows."""

  rows: int
  length: int
  width: int
  vocabulary: int
  softcap: float | None


def check(model: ModelConfig, compute: ComputeConfig, shapes: Sequence[tuple[int, int]]) -> None:
  """Probes the kernels of a model for batches of such rows and lengths, and logs what it found. On
  a CPU all is XLA, as in the tests, and nothing is probed.

  Raises:
    UserError: an implementation and its definition differ.
  """
  if _platform() != "cpu":
    for line in probe(model, compute, shapes):
      logging.info("%s", line)


def probe(
  model: ModelConfig, compute: ComputeConfig, shapes: Sequence[tuple[int, int]]
) -> Iterator[str]:
  """Probes every distinct use of a kernel on the mesh that was entered; yields what it found."""
  dtype = jnp.dtype(compute.compute_dtype)
  for attention_use in attention_uses(model, shapes):
    yield probe_attention(attention_use, dtype, compute.attention)
  for use in cross_entropy_uses(model, shapes):
    yield probe_cross_entropy(use, dtype, compute.cross_entropy)


def shapes_of(config: Config) -> list[tuple[int, int]]:
  """Global rows and length of all batches of a run, training's and evaluation's."""
  shards = sharding.data_shards(jax.sharding.get_abstract_mesh())
  training = [(stage.microbatch_rows * shards, stage.row_length) for stage in config.stages]
  return list(dict.fromkeys([*training, (config.eval.rows, config.eval.row_length)]))


def attention_uses(model: ModelConfig, shapes: Sequence[tuple[int, int]]) -> list[AttentionUse]:
  found = [
    AttentionUse(rows, length, *call)
    for rows, length in shapes
    for segment in model.segments
    for call in _calls(model, segment)
  ]
  return list(dict.fromkeys(found))


def _calls(model: ModelConfig, segment: SegmentConfig) -> Iterator[tuple[Any, ...]]:
  kind = segment.attention
  if isinstance(kind, HeadsAttention):
    heads = (kind.heads, kind.kv_heads, kind.head_width, kind.head_width, kind.scale)
    for window in dict.fromkeys(kind.windows):
      yield *heads, window, kind.softcap, isinstance(model.positions, AlibiPositions)
  elif isinstance(kind, LatentAttention):
    assert isinstance(model.positions, RotaryPositions)
    width = kind.content_width + model.positions.width
    yield kind.heads, kind.heads, width, kind.value_width, kind.scale, 0, None, False


def cross_entropy_uses(
  model: ModelConfig, shapes: Sequence[tuple[int, int]]
) -> list[CrossEntropyUse]:
  width, softcap = model.embedding.width, model.logits.softcap
  return [CrossEntropyUse(*shape, width, model.vocab_size, softcap) for shape in shapes]


def documents(length: int) -> np.ndarray:
  """Segment ids [length] of documents of all sorts of lengths, and padding at the end."""
  lengths = np.random.default_rng(0).lognormal(np.log(length / 24), 1.5, size=256)
  ends = np.cumsum(np.maximum(1, lengths.astype(np.int64)))
  ids = 1 + np.searchsorted(ends, np.arange(length), side="right")
  return np.where(np.arange(length) < length - length // 32, ids, 0).astype(np.int32)


def probe_attention(use: AttentionUse, dtype: Any, implementation: str) -> str:
  errors = jax.jit(functools.partial(attention_errors, use, dtype, implementation))()
  return _judge("attention", use, implementation, ("o", "dq", "dk", "dv"), errors)


def attention_errors(use: AttentionUse, dtype: Any, implementation: str) -> jax.Array:
  """Of output and gradients: the largest error over the largest magnitude, float32 [4]."""
  specs = Specs.of_mesh()
  shape = (use.rows, use.length)
  q_spec, kv_spec = specs.act_BSNH, specs.act_BTKH(use.kv_heads)
  ids_BS = jnp.broadcast_to(documents(use.length), shape, out_sharding=specs.tokens_BS)
  slopes_N = jnp.asarray(alibi_slopes(use.heads)) if use.alibi else None

  def call(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
    attend = functools.partial(attend, scale=use.scale, softcap=use.softcap)
    island = shard_attention(attend, specs, use.kv_heads)
    start = jnp.zeros((), jnp.int32)
    o, vjp = jax.vjp(
      lambda q, k, v: island(q, k, v, ids_BS, ids_BS, start, window=use.window, slopes_N=slopes_N),
      *(q, k, v),
    )
    return o, *vjp(do)

  kinds = (
    (use.heads, use.width, q_spec),
    (use.kv_heads, use.width, kv_spec),
    (use.kv_heads, use.value_width, kv_spec),
    (use.heads, use.value_width, q_spec),
  )
  arrays = [
    jax.random.normal(key, (*shape, heads, width), dtype, out_sharding=spec)
    for key, (heads, width, spec) in zip(jax.random.split(jax.random.key(0), 4), kinds, strict=True)
  ]
  got = call(functools.partial(attention, implementation=implementation), *arrays)
  with jax.default_matmul_precision("highest"):
    want = call(_attention_in_parts, *arrays)
  return _errors(got, want)


def _attention_in_parts(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: jax.Array,
  *,
  scale: float,
  softcap: float | None,
  window: int,
  slopes_N: jax.Array | None = None,
) -> jax.Array:
  """The reference in float32, for one row, key/value head and part of the queries at a time."""
  (B, S, N, _), K = q_BSNH.shape, k_BTKH.shape[2]
  part = math.gcd(S, _PART)

  def heads(x_BSNX: jax.Array) -> jax.Array:
    """[B, S, N, X] as [B x K, S, N / K, X] in float32."""
    x_BSKGX = x_BSNX.astype(jnp.float32).reshape(B, x_BSNX.shape[1], K, -1, x_BSNX.shape[-1])
    return jnp.moveaxis(x_BSKGX, 2, 1).reshape(B * K, x_BSNX.shape[1], -1, x_BSNX.shape[-1])

  def head(x: tuple[jax.Array, ...]) -> jax.Array:
    q_SGH, k_T1H, v_T1U, q_segments_S, kv_segments_T, *slopes = x
    arrays = k_T1H[None], v_T1U[None]
    options: dict[str, Any] = dict(
      scale=scale, softcap=softcap, window=jnp.int32(window) if window else None
    )

    @jax.checkpoint
    def some(i: jax.Array) -> jax.Array:
      q_QGH, ids_Q = (
        jax.lax.dynamic_slice_in_dim(y, i * part, part) for y in (q_SGH, q_segments_S)
      )
      o, _ = reference.attention(
        q_QGH[None],
        *arrays,
        ids_Q[None],
        kv_segments_T[None],
        q_start + i * part,
        slopes_N=slopes[0] if slopes else None,
        **options,
      )
      return o[0]

    o_IQGU = jax.lax.map(some, jnp.arange(S // part))
    return o_IQGU.reshape(S, *o_IQGU.shape[2:])

  ids = (jnp.repeat(x, K, axis=0) for x in (q_segments_BS, kv_segments_BT))
  slopes = () if slopes_N is None else (jnp.tile(slopes_N.reshape(K, N // K), (B, 1)),)
  o = jax.lax.map(head, (heads(q_BSNH), heads(k_BTKH), heads(v_BTKU), *ids, *slopes))
  o_BSKGU = jnp.moveaxis(o.reshape(B, K, *o.shape[1:]), 1, 2)
  return o_BSKGU.reshape(B, S, N, -1).astype(q_BSNH.dtype)


def probe_cross_entropy(use: CrossEntropyUse, dtype: Any, implementation: str) -> str:
  errors = jax.jit(functools.partial(cross_entropy_errors, use, dtype, implementation))()
  names = ("nll", "logsumexp", "dx", "dw", "dx of masked positions")
  return _judge("cross_entropy", use, implementation, names, errors)


def cross_entropy_errors(use: CrossEntropyUse, dtype: Any, implementation: str) -> jax.Array:
  """Of outputs and gradients: the largest error over the largest magnitude, float32 [5].

  All positions go through the implementation; a few of each row have cotangents and are compared.
  """
  specs = Specs.of_mesh()
  shape = (use.rows, use.length)
  keys = jax.random.split(jax.random.key(0), 5)
  stride = math.ceil(use.length / _SAMPLES)
  sampled_S = np.arange(use.length) % stride == 0

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, shape, out_sharding=specs.tokens_BS)

  cotangents_BS = [jnp.where(sampled_S, draw(key), 0.0) for key in keys[:2]]
  targets_BS = (jnp.abs(draw(keys[2])) * use.vocabulary).astype(jnp.int32) % use.vocabulary
  x_BSD = jax.random.normal(keys[3], (*shape, use.width), dtype, out_sharding=specs.act_BSD)
  w_VD = jax.random.normal(keys[4], (use.vocabulary, use.width), out_sharding=specs.embed_VD.stored)
  # Logits with a standard deviation of 2; numbers that the cast to the compute dtype leaves alone.
  w_VD = (2.0 * use.width**-0.5 * w_VD).astype(dtype).astype(jnp.float32)

  def some(x: jax.Array, every: int) -> jax.Array:
    return jax.lax.slice_in_dim(x, 0, use.length, every, axis=1)

  def call(name: str, every: int, x_BSD: jax.Array) -> Any:
    targets = some(targets_BS, every)
    outputs, vjp = jax.vjp(
      lambda x, w: cross_entropy(
        x, w, targets, specs=specs, softcap=use.softcap, implementation=name
      ),
      *(some(x_BSD, every), w_VD),
    )
    return outputs, vjp(tuple(some(x, every) for x in cotangents_BS))

  (nll, lse), (dx, dw) = call(implementation, 1, x_BSD)
  with jax.default_matmul_precision("highest"):
    wanted, (want_dx, want_dw) = call("reference", stride, x_BSD.astype(jnp.float32))
  got = [*(some(y, stride) for y in (nll, lse, dx)), dw, jnp.where(sampled_S[:, None], 0.0, dx)]
  return _errors(got, [*wanted, want_dx, want_dw, jnp.zeros_like(dx)])


def _errors(got: Sequence[jax.Array], want: Sequence[jax.Array]) -> jax.Array:
  """Of each array the largest error over the largest magnitude; NaN if one is not finite."""

  def error(x: jax.Array, y: jax.Array) -> jax.Array:
    x, y = (z.astype(jnp.float32) for z in (x, y))
    largest = jnp.abs(y).max()
    return jnp.abs(x - y).max() / jnp.where(largest > 0, largest, 1.0)

  return jnp.stack([error(x, y) for x, y in zip(got, want, strict=True)])


def _judge(
  op: str, use: NamedTuple, implementation: str, names: Sequence[str], errors: jax.Array
) -> str:
  shape = ", ".join(f"{name} {x}" for name, x in use._asdict().items() if x is not None)
  for name, error in zip(names, np.asarray(errors), strict=True):
    if not error <= TOLERANCE:
      raise UserError(
        f"{op} implementation {implementation!r} is wrong on {jax.devices()[0].device_kind}: "
        f"{name} is off by {error:.2g} of its largest magnitude, over {TOLERANCE:.2g} ({shape}). "
        f"Use --config.compute.{op}=chunked, and report this"
      )
  return f"probe: {op} {implementation} agrees with its definition to {errors.max():.1g} ({shape})"
