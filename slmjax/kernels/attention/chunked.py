"""Attention in XLA, block by block: memory linear in the length, invisible blocks skipped.

The online softmax and its recomputing backward are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691), here as loops that XLA compiles for any platform. One row of the batch at a time:
rows hold different documents, and a row's own ranges of visible blocks are much narrower than the
hull over all rows.

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H head width; I query blocks of Q positions, J key blocks of P positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.kernels import manual

# Scores of invisible pairs. Finite, so that a row of which nothing is visible yet has differences
# of scores that are numbers; far below any real score, so that its exponential is exactly zero.
_HIDDEN = -1e30


class Blocks(NamedTuple):
  """Positions per block of queries and of keys."""

  queries: int
  keys: int


class _Row(NamedTuple):
  """One row of the batch, padded to whole blocks, heads outermost for keys and values."""

  q_IQKGH: jax.Array
  k_KTH: jax.Array
  v_KTH: jax.Array
  q_segments_IQ: jax.Array
  kv_segments_T: jax.Array
  first_I: jax.Array
  last_I: jax.Array
  q_start: jax.Array


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  *,
  scale: float,
  blocks: Blocks,
) -> jax.Array:
  """See `api.attention`. Temporaries are linear in S and T.

  The blocks of keys visited for a block of queries are one range, from the first to the last that
  may hold a visible key: not after the last query, and with segment ids that overlap those of the
  queries. Ids that ascend along the row make the range tight; any others only make it wider.
  """
  S, T = q_BSNH.shape[1], k_BTKH.shape[1]
  blocks = Blocks(min(blocks.queries, S), min(blocks.keys, T))
  arrays = (q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT, jnp.asarray(q_start, jnp.int32))
  axes = manual.varying_axes(*arrays)
  return _attention(scale, blocks, *(manual.vary_over(x, axes) for x in arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(scale: float, blocks: Blocks, *arrays: jax.Array) -> jax.Array:
  return _forward(scale, blocks, *arrays)[0]


def _forward(
  scale: float, blocks: Blocks, *arrays: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  *batched, q_start = arrays

  def row(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _row_forward(_split(blocks, x, q_start), scale, blocks)

  o_BIQKGH, lse_BIKGQ = jax.lax.map(row, tuple(batched))
  o_BSNH = _join(o_BIQKGH, arrays[0].shape)
  return o_BSNH, (*arrays, o_BSNH, lse_BIKGQ)


def _backward(
  scale: float, blocks: Blocks, saved: tuple[jax.Array, ...], do_BSNH: jax.Array
) -> tuple[jax.Array | None, ...]:
  *batched, q_start, o_BSNH, lse_BIKGQ = saved
  q_BSNH, k_BTKH = batched[:2]

  def row(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    *inputs, o_SNH, lse_IKGQ, do_SNH = x
    split = _split(blocks, tuple(inputs), q_start)
    o_IQKGH, do_IQKGH = (
      _pad(y, 0, blocks.queries).reshape(split.q_IQKGH.shape) for y in (o_SNH, do_SNH)
    )
    return _row_backward(split, o_IQKGH, lse_IKGQ, do_IQKGH, scale, blocks)

  dq_BIQKGH, dk_BKTH, dv_BKTH = jax.lax.map(row, (*batched, o_BSNH, lse_BIKGQ, do_BSNH))
  T = k_BTKH.shape[1]
  dk_BTKH, dv_BTKH = (jnp.swapaxes(x[:, :, :T], 1, 2) for x in (dk_BKTH, dv_BKTH))
  return _join(dq_BIQKGH, q_BSNH.shape), dk_BTKH, dv_BTKH, None, None, None


_attention.defvjp(_forward, _backward)


def _row_forward(row: _Row, scale: float, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
  """The output [I, Q, K, G, H] and the logarithm of the sum of exponentials [I, K, G, Q]."""
  _, Q, K, G, H = row.q_IQKGH.shape

  def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_KGQH = jnp.moveaxis(row.q_IQKGH[i], 0, 2)

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      acc_KGQH, top_KGQ, sum_KGQ = carry
      k_KPH, v_KPH = _keys(row.k_KTH, j, blocks), _keys(row.v_KTH, j, blocks)
      scores_KGQP = _scores(q_KGQH, k_KPH, _visible(row, i, j, blocks), scale)
      new_top_KGQ = jnp.maximum(top_KGQ, scores_KGQP.max(axis=-1))
      shrink_KGQ = jnp.exp(top_KGQ - new_top_KGQ)
      weights_KGQP = jnp.exp(scores_KGQP - new_top_KGQ[..., None])
      sum_KGQ = sum_KGQ * shrink_KGQ + weights_KGQP.sum(axis=-1)
      acc_KGQH = acc_KGQH * shrink_KGQ[..., None] + _einsum(
        "kgqp,kph->kgqh", weights_KGQP.astype(v_KPH.dtype), v_KPH
      )
      return acc_KGQH, new_top_KGQ, sum_KGQ

    start = (
      manual.zeros((K, G, Q, H), jnp.float32, row.q_IQKGH),
      manual.zeros((K, G, Q), jnp.float32, row.q_IQKGH) + _HIDDEN,
      manual.zeros((K, G, Q), jnp.float32, row.q_IQKGH),
    )
    acc_KGQH, top_KGQ, sum_KGQ = jax.lax.fori_loop(row.first_I[i], row.last_I[i], key_block, start)
    # Where nothing was visible the sum counts hidden pairs, or is empty.
    saw_KGQ = top_KGQ > _HIDDEN / 2
    sum_KGQ = jnp.where(saw_KGQ, sum_KGQ, 1.0)
    o_KGQH = jnp.where(saw_KGQ[..., None], acc_KGQH / sum_KGQ[..., None], 0.0)
    lse_KGQ = jnp.where(saw_KGQ, top_KGQ + jnp.log(sum_KGQ), 0.0)
    return jnp.moveaxis(o_KGQH, 2, 0).astype(row.q_IQKGH.dtype), lse_KGQ

  return jax.lax.map(query_block, jnp.arange(row.q_IQKGH.shape[0]))


def _row_backward(
  row: _Row,
  o_IQKGH: jax.Array,
  lse_IKGQ: jax.Array,
  do_IQKGH: jax.Array,
  scale: float,
  blocks: Blocks,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of the row's queries [I, Q, K, G, H], keys and values [K, T, H]."""
  _, Q, K, G, H = row.q_IQKGH.shape
  dtype = row.q_IQKGH.dtype

  def query_block(
    kv_grads: tuple[jax.Array, jax.Array], i: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    q_KGQH, o_KGQH, do_KGQH = (jnp.moveaxis(x[i], 0, 2) for x in (row.q_IQKGH, o_IQKGH, do_IQKGH))
    delta_KGQ1 = jnp.sum(
      o_KGQH.astype(jnp.float32) * do_KGQH.astype(jnp.float32), axis=-1, keepdims=True
    )
    lse_KGQ1 = lse_IKGQ[i][..., None]

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      dq_KGQH, dk_KTH, dv_KTH = carry
      k_KPH, v_KPH = _keys(row.k_KTH, j, blocks), _keys(row.v_KTH, j, blocks)
      scores_KGQP = _scores(q_KGQH, k_KPH, _visible(row, i, j, blocks), scale)
      weights_KGQP = jnp.exp(scores_KGQP - lse_KGQ1)
      dweights_KGQP = _einsum("kgqh,kph->kgqp", do_KGQH, v_KPH)
      dscores_KGQP = (weights_KGQP * (dweights_KGQP - delta_KGQ1)).astype(dtype)
      dv_KPH = _einsum("kgqp,kgqh->kph", weights_KGQP.astype(dtype), do_KGQH)
      dk_KPH = _einsum("kgqp,kgqh->kph", dscores_KGQP, q_KGQH)
      dq_KGQH = dq_KGQH + _einsum("kgqp,kph->kgqh", dscores_KGQP, k_KPH)
      return dq_KGQH, _add_keys(dk_KTH, dk_KPH, j), _add_keys(dv_KTH, dv_KPH, j)

    dq_KGQH = manual.zeros((K, G, Q, H), jnp.float32, row.q_IQKGH)
    dq_KGQH, dk_KTH, dv_KTH = jax.lax.fori_loop(
      row.first_I[i], row.last_I[i], key_block, (dq_KGQH, *kv_grads)
    )
    return (dk_KTH, dv_KTH), jnp.moveaxis(dq_KGQH * scale, 2, 0).astype(dtype)

  zeros_KTH = manual.zeros(row.k_KTH.shape, jnp.float32, row.q_IQKGH)
  (dk_KTH, dv_KTH), dq_IQKGH = jax.lax.scan(
    query_block, (zeros_KTH, zeros_KTH), jnp.arange(row.q_IQKGH.shape[0])
  )
  return dq_IQKGH, (dk_KTH * scale).astype(row.k_KTH.dtype), dv_KTH.astype(row.v_KTH.dtype)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _keys(x_KTH: jax.Array, j: jax.Array, blocks: Blocks) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_KTH, j * blocks.keys, blocks.keys, axis=1)


def _add_keys(x_KTH: jax.Array, more_KPH: jax.Array, j: jax.Array) -> jax.Array:
  start, size = j * more_KPH.shape[1], more_KPH.shape[1]
  more_KPH = jax.lax.dynamic_slice_in_dim(x_KTH, start, size, axis=1) + more_KPH
  return jax.lax.dynamic_update_slice_in_dim(x_KTH, more_KPH, start, axis=1)


def _scores(q_KGQH: jax.Array, k_KPH: jax.Array, visible_QP: jax.Array, scale: float) -> jax.Array:
  scores_KGQP = scale * _einsum("kgqh,kph->kgqp", q_KGQH, k_KPH)
  return jnp.where(visible_QP, scores_KGQP, _HIDDEN)


def _visible(row: _Row, i: jax.Array, j: jax.Array, blocks: Blocks) -> jax.Array:
  q_position_Q = row.q_start + i * blocks.queries + jnp.arange(blocks.queries)
  kv_position_P = j * blocks.keys + jnp.arange(blocks.keys)
  q_segment_Q1 = row.q_segments_IQ[i][:, None]
  kv_segment_P = jax.lax.dynamic_slice_in_dim(row.kv_segments_T, j * blocks.keys, blocks.keys)
  causal_QP = kv_position_P <= q_position_Q[:, None]
  return causal_QP & (q_segment_Q1 == kv_segment_P) & (q_segment_Q1 > 0)


def _pad(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Zeros up to a whole number of blocks: segment 0, which sees nothing and is not seen."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths)


def _split(blocks: Blocks, arrays: tuple[jax.Array, ...], q_start: jax.Array) -> _Row:
  q_SNH, k_TKH, v_TKH, q_segments_S, kv_segments_T = arrays
  N, H = q_SNH.shape[1:]
  K = k_TKH.shape[1]
  q_SNH, q_segments_S = (_pad(x, 0, blocks.queries) for x in (q_SNH, q_segments_S))
  k_TKH, v_TKH, kv_segments_T = (_pad(x, 0, blocks.keys) for x in (k_TKH, v_TKH, kv_segments_T))
  q_segments_IQ = q_segments_S.reshape(-1, blocks.queries)
  first_I, last_I = _ranges(q_segments_IQ, kv_segments_T.reshape(-1, blocks.keys), q_start)
  return _Row(
    q_IQKGH=q_SNH.reshape(-1, blocks.queries, K, N // K, H),
    k_KTH=jnp.swapaxes(k_TKH, 0, 1),
    v_KTH=jnp.swapaxes(v_TKH, 0, 1),
    q_segments_IQ=q_segments_IQ,
    kv_segments_T=kv_segments_T,
    first_I=first_I,
    last_I=last_I,
    q_start=q_start,
  )


def _ranges(
  q_segments_IQ: jax.Array, kv_segments_JP: jax.Array, q_start: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Per block of queries the blocks of keys [first, last) that may hold a visible key."""
  (I, Q), (J, P) = q_segments_IQ.shape, kv_segments_JP.shape
  last_position_I = q_start + (jnp.arange(I) + 1) * Q - 1
  causal_IJ = jnp.arange(J) * P <= last_position_I[:, None]
  q_low_I, q_high_I = _extremes(q_segments_IQ)
  kv_low_J, kv_high_J = _extremes(kv_segments_JP)
  overlap_IJ = (q_low_I[:, None] <= kv_high_J) & (kv_low_J <= q_high_I[:, None])
  visible_IJ = causal_IJ & overlap_IJ
  first_I = jnp.argmax(visible_IJ, axis=1)
  last_I = J - jnp.argmax(visible_IJ[:, ::-1], axis=1)
  return first_I, jnp.where(visible_IJ.any(axis=1), last_I, first_I)


def _extremes(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Smallest and largest nonzero id along the last axis; nothing overlaps a block of zeros."""
  nonzero = jnp.where(segments > 0, segments, jnp.iinfo(segments.dtype).max)
  return nonzero.min(axis=-1), segments.max(axis=-1)


def _join(x_BIQKGH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Blocks of queries back in one row, without the padding."""
  B, S, N, H = shape
  return x_BIQKGH.reshape(B, -1, N, H)[:, :S]
