"""The bodies of the TPU attention kernels: what one step of the walk computes. See pallas_tpu.py.

Q query positions and P key positions of a block, H width of queries and keys, U width of values, Z
steps; 1 in a name is an axis of size 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from slmjax.kernels import capping
from slmjax.kernels.attention import visible
from slmjax.kernels.attention.online_softmax import HIDDEN


class Blocks(NamedTuple):
  """Positions per block of queries and of keys, at most."""

  queries: int
  keys: int


class Static(NamedTuple):
  """What the compiled program depends on. Blocks are whole vector registers here."""

  scale: float
  softcap: float | None
  windowed: bool
  sloped: bool
  blocks: Blocks
  interpret: bool


class Scalars(NamedTuple):
  """The prefetched scalars that a kernel and its index maps read."""

  own_row_Z: Any
  own_Z: Any
  other_row_Z: Any
  other_Z: Any
  kind_Z: Any
  limits: Any
  slopes_N: Any  # None without slopes


def read_scalars(static: Static, refs: Any) -> tuple[Scalars, Any]:
  """The first refs by name, and those that follow them."""
  own_row_Z, own_Z, other_row_Z, other_Z, kind_Z, limits, *rest = refs
  named = Scalars(own_row_Z, own_Z, other_row_Z, other_Z, kind_Z, limits, slopes_N=None)
  if static.sloped:
    named, rest = named._replace(slopes_N=rest[0]), rest[1:]
  return named, tuple(rest)


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
# Contracted axes: of both the last, of both the first, or as in an ordinary matrix product.
_LAST_LAST, _FIRST_FIRST, _PLAIN = (((i,), (j,)) for i, j in ((1, 1), (0, 0), (1, 0)))


def _scores(
  static: Static,
  step: Scalars,
  head: jax.Array,
  query_block: jax.Array,
  key_block: jax.Array,
  q_QH: jax.Array,
  k_PH: jax.Array,
  q_segments_1Q: jax.Array,
  kv_segments_1P: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The scores of a block of queries and one of keys, [P, Q], and what they were before masking."""
  Q, P = static.blocks
  scores_PQ = static.scale * _dot(k_PH, q_QH, (_LAST_LAST, ((), ())))
  scores_PQ = capping.cap(scores_PQ, static.softcap)
  # How far each key is in its query's past.
  past_PQ = jax.lax.broadcasted_iota(jnp.int32, (P, Q), 1)
  past_PQ -= jax.lax.broadcasted_iota(jnp.int32, (P, Q), 0)
  past_PQ += step.limits[0] + query_block * Q - key_block * P
  if step.slopes_N is not None:
    scores_PQ -= step.slopes_N[head] * past_PQ.astype(jnp.float32)
  # A row of lanes becomes a column of sublanes, by way of a shape that the compiler transposes.
  kv_segments_P1 = jnp.broadcast_to(kv_segments_1P, (8, P)).T[:, :1]
  visible_PQ = (past_PQ >= 0) & (kv_segments_P1 == q_segments_1Q)
  if static.windowed:
    visible_PQ &= past_PQ < step.limits[1]
  return jnp.where(visible_PQ, scores_PQ, HIDDEN), scores_PQ


def forward(static: Static, *refs: Any) -> None:
  step, refs = read_scalars(static, refs)
  q_QH, k_PH, v_PU, q_segments_1Q, kv_segments_1P, o_UQ, lse_1Q, acc_UQ, top_1Q, sum_1Q = refs
  head, z = pl.program_id(0), pl.program_id(1)
  kind = step.kind_Z[z]

  @pl.when(kind & visible.FIRST != 0)
  def _() -> None:
    acc_UQ[...] = jnp.zeros_like(acc_UQ)
    top_1Q[...] = jnp.full_like(top_1Q, HIDDEN)
    sum_1Q[...] = jnp.zeros_like(sum_1Q)

  @pl.when(kind & visible.SEES != 0)
  def _() -> None:
    blocks = (head, step.own_Z[z], step.other_Z[z])
    ids = (q_segments_1Q[...], kv_segments_1P[...])
    scores_PQ, _ = _scores(static, step, *blocks, q_QH[...], k_PH[...], *ids)
    new_top_1Q = jnp.maximum(top_1Q[...], scores_PQ.max(axis=0, keepdims=True))
    shrink_1Q = jnp.exp(top_1Q[...] - new_top_1Q)
    weights_PQ = jnp.exp(scores_PQ - new_top_1Q)
    top_1Q[...] = new_top_1Q
    sum_1Q[...] = sum_1Q[...] * shrink_1Q + weights_PQ.sum(axis=0, keepdims=True)
    more_UQ = _dot(v_PU[...], weights_PQ.astype(v_PU.dtype), (_FIRST_FIRST, ((), ())))
    acc_UQ[...] = acc_UQ[...] * shrink_1Q + more_UQ

  @pl.when(kind & visible.LAST != 0)
  def _() -> None:
    # Where nothing was visible the sum counts hidden pairs, or is empty.
    saw_1Q = top_1Q[...] > HIDDEN / 2
    safe_sum_1Q = jnp.where(saw_1Q, sum_1Q[...], 1.0)
    o_UQ[...] = jnp.where(saw_1Q, acc_UQ[...] / safe_sum_1Q, 0.0).astype(o_UQ.dtype)
    lse_1Q[...] = jnp.where(saw_1Q, top_1Q[...] + jnp.log(safe_sum_1Q), -jnp.inf)


def _weights(
  static: Static, scores_PQ: jax.Array, capped_PQ: jax.Array, refs: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array]:
  """The weights again, and the gradient of the products of queries and keys before scaling."""
  do_QU, lse_1Q, delta_1Q, v_PU = (ref[...] for ref in refs)
  weights_PQ = jnp.exp(scores_PQ - lse_1Q)
  dweights_PQ = _dot(v_PU, do_QU, (_LAST_LAST, ((), ())))
  dscores_PQ = weights_PQ * (dweights_PQ - delta_1Q)
  if static.softcap is not None:
    dscores_PQ *= capping.slope(capped_PQ, static.softcap)
  return weights_PQ, dscores_PQ


def backward_queries(static: Static, *refs: Any) -> None:
  step, refs = read_scalars(static, refs)
  q_QH, k_PH, v_PU, q_segments_1Q, kv_segments_1P, do_QU, lse_1Q, delta_1Q, dq_HQ, acc_HQ = refs
  head, z = pl.program_id(0), pl.program_id(1)
  kind = step.kind_Z[z]

  @pl.when(kind & visible.FIRST != 0)
  def _() -> None:
    acc_HQ[...] = jnp.zeros_like(acc_HQ)

  @pl.when(kind & visible.SEES != 0)
  def _() -> None:
    blocks = (head, step.own_Z[z], step.other_Z[z])
    ids = (q_segments_1Q[...], kv_segments_1P[...])
    scores = _scores(static, step, *blocks, q_QH[...], k_PH[...], *ids)
    _, dscores_PQ = _weights(static, *scores, (do_QU, lse_1Q, delta_1Q, v_PU))
    acc_HQ[...] += _dot(k_PH[...], dscores_PQ.astype(k_PH.dtype), (_FIRST_FIRST, ((), ())))

  @pl.when(kind & visible.LAST != 0)
  def _() -> None:
    dq_HQ[...] = (acc_HQ[...] * static.scale).astype(dq_HQ.dtype)


def backward_keys(static: Static, group: int, *refs: Any) -> None:
  step, refs = read_scalars(static, refs)
  q_QH, k_PH, v_PU, q_segments_1Q, kv_segments_1P, do_QU, lse_1Q, delta_1Q, *results = refs
  dk_PH, dv_PU, dk_acc_PH, dv_acc_PU = results
  z, member = pl.program_id(1), pl.program_id(2)
  head = pl.program_id(0) * group + member
  kind = step.kind_Z[z]

  @pl.when((kind & visible.FIRST != 0) & (member == 0))
  def _() -> None:
    dk_acc_PH[...] = jnp.zeros_like(dk_acc_PH)
    dv_acc_PU[...] = jnp.zeros_like(dv_acc_PU)

  @pl.when(kind & visible.SEES != 0)
  def _() -> None:
    blocks = (head, step.other_Z[z], step.own_Z[z])
    ids = (q_segments_1Q[...], kv_segments_1P[...])
    scores = _scores(static, step, *blocks, q_QH[...], k_PH[...], *ids)
    weights_PQ, dscores_PQ = _weights(static, *scores, (do_QU, lse_1Q, delta_1Q, v_PU))
    dv_acc_PU[...] += _dot(weights_PQ.astype(do_QU.dtype), do_QU[...], (_PLAIN, ((), ())))
    dk_acc_PH[...] += _dot(dscores_PQ.astype(q_QH.dtype), q_QH[...], (_PLAIN, ((), ())))

  @pl.when((kind & visible.LAST != 0) & (member == group - 1))
  def _() -> None:
    dk_PH[...] = (dk_acc_PH[...] * static.scale).astype(dk_PH.dtype)
    dv_PU[...] = dv_acc_PU[...].astype(dv_PU.dtype)
