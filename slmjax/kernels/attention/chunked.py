"""Attention in XLA, block by block: memory linear in the length, invisible blocks skipped.

The online softmax and its recomputing backward are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691), here as loops that XLA compiles for any platform. One row of the batch at a time:
rows hold different documents, and a row's own ranges of visible blocks are much narrower than the
hull over all rows.

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H width of queries and keys, U width of values; I query blocks of Q positions, J
key blocks of P positions.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from slmjax.kernels import capping, manual
from slmjax.kernels.attention import visible
from slmjax.kernels.attention.blocks import Blocks, pad
from slmjax.kernels.attention.online_softmax import HIDDEN, delta


class _Static(NamedTuple):
  """What the compiled program depends on."""

  scale: float
  softcap: float | None
  blocks: Blocks


class _Shared(NamedTuple):
  """What all rows of the batch share."""

  q_start: jax.Array
  window: jax.Array | None
  slopes_N: jax.Array | None


class _Row(NamedTuple):
  """One row of the batch, padded to whole blocks, heads outermost for keys and values."""

  q_IQKGH: jax.Array
  k_KTH: jax.Array
  v_KTU: jax.Array
  q_segments_IQ: jax.Array
  kv_segments_T: jax.Array
  first_I: jax.Array
  last_I: jax.Array
  shared: _Shared


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  *,
  scale: float,
  window: jax.Array | None,
  softcap: float | None,
  slopes_N: jax.Array | None,
  blocks: Blocks,
) -> tuple[jax.Array, jax.Array]:
  """See `api.attention_and_logsumexp`. Temporaries are linear in S and T.

  The blocks of keys visited for a block of queries are one range, from the first to the last that
  may hold a visible key: not after the last query, not out of the first query's window, and with
  segment ids that overlap those of the queries. Ids that ascend along the row make the range tight;
  any others only make it wider.
  """
  S, T = q_BSNH.shape[1], k_BTKH.shape[1]
  static = _Static(scale, softcap, Blocks(min(blocks.queries, S), min(blocks.keys, T)))
  shared = _Shared(jnp.asarray(q_start, jnp.int32), window, slopes_N)
  arrays = (shared, q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  axes = manual.varying_axes(*jax.tree.leaves(arrays))
  return _attention(static, *jax.tree.map(lambda x: manual.vary_over(x, axes), arrays))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  static: _Static, shared: _Shared, *batched: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _forward(static, shared, *batched)[0]


def _forward(
  static: _Static, shared: _Shared, *batched: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[_Shared, tuple[jax.Array, ...]]]:
  def row(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return _row_forward(static, _split(static.blocks, x, shared))

  o_BIQKGU, lse_BIKGQ = jax.lax.map(row, batched)
  o_BSNU = _join(o_BIQKGU, batched[0])
  lse_BSN1 = _join(jnp.moveaxis(lse_BIKGQ, -1, 2)[..., None], batched[0])
  return (o_BSNU, lse_BSN1[..., 0]), (shared, (*batched, o_BSNU, lse_BIKGQ))


def _backward(
  static: _Static,
  saved: tuple[_Shared, tuple[jax.Array, ...]],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
  shared, batched = saved
  q_BSNH, k_BTKH = batched[:2]

  def row(x: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    *inputs, o_SNU, lse_IKGQ, do_SNU, dlse_SN = x
    split = _split(static.blocks, tuple(inputs), shared)
    delta_SN = delta(o_SNU, do_SNU, dlse_SN)
    heads = split.q_IQKGH.shape[:-1]
    delta_IQKG1, do_IQKGU = (
      pad(y, 0, static.blocks.queries).reshape(*heads, -1) for y in (delta_SN, do_SNU)
    )
    return _row_backward(static, split, delta_IQKG1, lse_IKGQ, do_IQKGU)

  dq_BIQKGH, dk_BKTH, dv_BKTU = jax.lax.map(row, (*batched, *cotangents))
  T = k_BTKH.shape[1]
  dk_BTKH, dv_BTKU = (jnp.swapaxes(x[:, :, :T], 1, 2) for x in (dk_BKTH, dv_BKTU))
  return None, _join(dq_BIQKGH, q_BSNH), dk_BTKH, dv_BTKU, None, None


_attention.defvjp(_forward, _backward)


def _row_forward(static: _Static, row: _Row) -> tuple[jax.Array, jax.Array]:
  """The output [I, Q, K, G, U] and the logarithm of the sum of exponentials [I, K, G, Q]."""
  _, Q, K, G, _ = row.q_IQKGH.shape
  U = row.v_KTU.shape[-1]

  def query_block(i: jax.Array) -> tuple[jax.Array, jax.Array]:
    q_KGQH = jnp.moveaxis(row.q_IQKGH[i], 0, 2)

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      acc_KGQU, top_KGQ, sum_KGQ = carry
      k_KPH, v_KPU = _keys(row.k_KTH, j, static.blocks), _keys(row.v_KTU, j, static.blocks)
      scores_KGQP, _ = _scores(static, row, i, j, q_KGQH, k_KPH)
      new_top_KGQ = jnp.maximum(top_KGQ, scores_KGQP.max(axis=-1))
      shrink_KGQ = jnp.exp(top_KGQ - new_top_KGQ)
      weights_KGQP = jnp.exp(scores_KGQP - new_top_KGQ[..., None])
      sum_KGQ = sum_KGQ * shrink_KGQ + weights_KGQP.sum(axis=-1)
      acc_KGQU = acc_KGQU * shrink_KGQ[..., None] + _einsum(
        "kgqp,kpu->kgqu", weights_KGQP.astype(v_KPU.dtype), v_KPU
      )
      return acc_KGQU, new_top_KGQ, sum_KGQ

    start = (
      manual.zeros((K, G, Q, U), jnp.float32, row.q_IQKGH),
      manual.zeros((K, G, Q), jnp.float32, row.q_IQKGH) + HIDDEN,
      manual.zeros((K, G, Q), jnp.float32, row.q_IQKGH),
    )
    acc_KGQU, top_KGQ, sum_KGQ = jax.lax.fori_loop(row.first_I[i], row.last_I[i], key_block, start)
    # Where nothing was visible the sum counts hidden pairs, or is empty.
    saw_KGQ = top_KGQ > HIDDEN / 2
    sum_KGQ = jnp.where(saw_KGQ, sum_KGQ, 1.0)
    o_KGQU = jnp.where(saw_KGQ[..., None], acc_KGQU / sum_KGQ[..., None], 0.0)
    lse_KGQ = jnp.where(saw_KGQ, top_KGQ + jnp.log(sum_KGQ), -jnp.inf)
    return jnp.moveaxis(o_KGQU, 2, 0).astype(row.q_IQKGH.dtype), lse_KGQ

  return jax.lax.map(query_block, jnp.arange(row.q_IQKGH.shape[0]))


def _row_backward(
  static: _Static,
  row: _Row,
  delta_IQKG1: jax.Array,
  lse_IKGQ: jax.Array,
  do_IQKGU: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of the row's queries [I, Q, K, G, H], keys [K, T, H] and values [K, T, U]."""
  _, Q, K, G, H = row.q_IQKGH.shape
  dtype = row.q_IQKGH.dtype

  def query_block(
    kv_grads: tuple[jax.Array, jax.Array], i: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    of_queries = (row.q_IQKGH, delta_IQKG1, do_IQKGU)
    q_KGQH, delta_KGQ1, do_KGQU = (jnp.moveaxis(x[i], 0, 2) for x in of_queries)
    # Without anything visible any number will do: the exponential of hidden scores is zero.
    lse_KGQ1 = jnp.maximum(lse_IKGQ[i], HIDDEN / 2)[..., None]

    def key_block(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
      dq_KGQH, dk_KTH, dv_KTU = carry
      k_KPH, v_KPU = _keys(row.k_KTH, j, static.blocks), _keys(row.v_KTU, j, static.blocks)
      scores_KGQP, capped_KGQP = _scores(static, row, i, j, q_KGQH, k_KPH)
      weights_KGQP = jnp.exp(scores_KGQP - lse_KGQ1)
      dweights_KGQP = _einsum("kgqu,kpu->kgqp", do_KGQU, v_KPU)
      dscores_KGQP = weights_KGQP * (dweights_KGQP - delta_KGQ1)
      if static.softcap is not None:
        dscores_KGQP *= capping.slope(capped_KGQP, static.softcap)
      dscores_KGQP = dscores_KGQP.astype(dtype)
      dv_KPU = _einsum("kgqp,kgqu->kpu", weights_KGQP.astype(dtype), do_KGQU)
      dk_KPH = _einsum("kgqp,kgqh->kph", dscores_KGQP, q_KGQH)
      dq_KGQH = dq_KGQH + _einsum("kgqp,kph->kgqh", dscores_KGQP, k_KPH)
      return dq_KGQH, _add_keys(dk_KTH, dk_KPH, j), _add_keys(dv_KTU, dv_KPU, j)

    dq_KGQH = manual.zeros((K, G, Q, H), jnp.float32, row.q_IQKGH)
    dq_KGQH, dk_KTH, dv_KTU = jax.lax.fori_loop(
      row.first_I[i], row.last_I[i], key_block, (dq_KGQH, *kv_grads)
    )
    return (dk_KTH, dv_KTU), jnp.moveaxis(dq_KGQH * static.scale, 2, 0).astype(dtype)

  zeros_KTH = manual.zeros(row.k_KTH.shape, jnp.float32, row.q_IQKGH)
  zeros_KTU = manual.zeros(row.v_KTU.shape, jnp.float32, row.q_IQKGH)
  (dk_KTH, dv_KTU), dq_IQKGH = jax.lax.scan(
    query_block, (zeros_KTH, zeros_KTU), jnp.arange(row.q_IQKGH.shape[0])
  )
  return dq_IQKGH, (dk_KTH * static.scale).astype(dtype), dv_KTU.astype(dtype)


_einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _keys(x_KTH: jax.Array, j: jax.Array, blocks: Blocks) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x_KTH, j * blocks.keys, blocks.keys, axis=1)


def _add_keys(x_KTH: jax.Array, more_KPH: jax.Array, j: jax.Array) -> jax.Array:
  start, size = j * more_KPH.shape[1], more_KPH.shape[1]
  more_KPH = jax.lax.dynamic_slice_in_dim(x_KTH, start, size, axis=1) + more_KPH
  return jax.lax.dynamic_update_slice_in_dim(x_KTH, more_KPH, start, axis=1)


def _scores(
  static: _Static, row: _Row, i: jax.Array, j: jax.Array, q_KGQH: jax.Array, k_KPH: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """The scores of a block of queries and one of keys, and what they were before masking."""
  K, G = q_KGQH.shape[:2]
  scores_KGQP = static.scale * _einsum("kgqh,kph->kgqp", q_KGQH, k_KPH)
  scores_KGQP = capping.cap(scores_KGQP, static.softcap)
  q_position_Q = row.shared.q_start + i * static.blocks.queries + jnp.arange(static.blocks.queries)
  q_position_Q1 = q_position_Q[:, None]
  kv_position_P = j * static.blocks.keys + jnp.arange(static.blocks.keys)
  if row.shared.slopes_N is not None:
    distance_QP = q_position_Q1 - kv_position_P
    scores_KGQP -= row.shared.slopes_N.reshape(K, G, 1, 1) * distance_QP
  q_segment_Q1 = row.q_segments_IQ[i][:, None]
  kv_segment_P = jax.lax.dynamic_slice_in_dim(
    row.kv_segments_T, j * static.blocks.keys, static.blocks.keys
  )
  reach_QP = kv_position_P <= q_position_Q1
  if row.shared.window is not None:
    reach_QP &= kv_position_P > q_position_Q1 - row.shared.window
  visible_QP = reach_QP & (q_segment_Q1 == kv_segment_P) & (q_segment_Q1 > 0)
  return jnp.where(visible_QP, scores_KGQP, HIDDEN), scores_KGQP


def _split(blocks: Blocks, arrays: tuple[jax.Array, ...], shared: _Shared) -> _Row:
  q_SNH, k_TKH, v_TKU, q_segments_S, kv_segments_T = arrays
  N, H = q_SNH.shape[1:]
  K = k_TKH.shape[1]
  q_SNH, q_segments_S = (pad(x, 0, blocks.queries) for x in (q_SNH, q_segments_S))
  k_TKH, v_TKU, kv_segments_T = (pad(x, 0, blocks.keys) for x in (k_TKH, v_TKU, kv_segments_T))
  q_segments_IQ = q_segments_S.reshape(-1, blocks.queries)
  first_I, last_I = _ranges(q_segments_IQ, kv_segments_T.reshape(-1, blocks.keys), shared)
  return _Row(
    q_IQKGH=q_SNH.reshape(-1, blocks.queries, K, N // K, H),
    k_KTH=jnp.swapaxes(k_TKH, 0, 1),
    v_KTU=jnp.swapaxes(v_TKU, 0, 1),
    q_segments_IQ=q_segments_IQ,
    kv_segments_T=kv_segments_T,
    first_I=first_I,
    last_I=last_I,
    shared=shared,
  )


def _ranges(
  q_segments_IQ: jax.Array, kv_segments_JP: jax.Array, shared: _Shared
) -> tuple[jax.Array, jax.Array]:
  """Per block of queries the blocks of keys [first, last) that may hold a visible key."""
  visible_IJ = visible.visible_blocks(q_segments_IQ, kv_segments_JP, shared.q_start, shared.window)
  J = visible_IJ.shape[1]
  first_I = jnp.argmax(visible_IJ, axis=1)
  last_I = J - jnp.argmax(visible_IJ[:, ::-1], axis=1)
  return first_I, jnp.where(visible_IJ.any(axis=1), last_I, first_I)


def _join(x_BIQKGU: jax.Array, q_BSNH: jax.Array) -> jax.Array:
  """Blocks of queries back in one row, without the padding."""
  B, S, N, _ = q_BSNH.shape
  return x_BIQKGU.reshape(B, -1, N, x_BIQKGU.shape[-1])[:, :S]
