"""The bodies of the TPU attention kernels: what one step of the walk computes. See pallas_tpu.py.

All query heads of a key/value head are computed together: their queries are rows of one matrix, so
that few positions make a large product, and keys and values are read once for all of them. In the
forward scores lie as [queries, keys], in the backward as [keys, queries]: then three of its five
products have their operands as they are, one transposes what it holds, and only the gradient of the
queries transposes scores.

G query heads of a key/value head, Q query positions and P key positions of a block, R rows of some
heads' queries (heads times Q), T key positions, H width of queries and keys, U width of values, L
lanes of a register, Z steps; 1 in a name is an axis of size 1.
"""

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from slmjax.kernels import capping
from slmjax.kernels.attention import visible
from slmjax.kernels.attention.blocks import Blocks
from slmjax.kernels.attention.online_softmax import HIDDEN

LANES = 128

# Scores are kept as powers of two: the exponential unit computes those.
LOG2_E = math.log2(math.e)

# Heads are computed together up to so many rows: the compiler then has enough independent work to
# keep the matrix units busy, and no more scores than it can keep near.
_FORWARD_ROWS = 512
_BACKWARD_ROWS = 2048


class Static(NamedTuple):
  """What the compiled program depends on. Blocks are whole vector registers here."""

  scale: float
  softcap: float | None
  windowed: bool
  sloped: bool
  blocks: Blocks
  interpret: Any


class Scalars(NamedTuple):
  """The prefetched scalars that a kernel and its index maps read."""

  row_Z: Any
  query_block_Z: Any
  key_row_Z: Any
  key_block_Z: Any
  kind_Z: Any
  limits: Any  # q_start and window
  slopes_N: Any  # None without slopes


def read_scalars(static: Static, refs: Any) -> tuple[Scalars, Any]:
  """The first refs by name, and those that follow them."""
  count = 6 + static.sloped
  return Scalars(*(*refs[:count], None)[:7]), tuple(refs[count:])


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
# Contracted axes: of both the last, of both the first, or as in an ordinary matrix product.
_LAST_LAST, _FIRST_FIRST, _PLAIN = ((((i,), (j,)), ((), ())) for i, j in ((1, 1), (0, 0), (1, 0)))


class _Pair:
  """A block of queries and one of keys at a step: what its pairs of positions add to scores."""

  def __init__(
    self,
    static: Static,
    step: Scalars,
    z: jax.Array,
    first_head: jax.Array,
    q_segments: jax.Array,
    kv_segments: jax.Array,
  ):
    """Segment ids as columns and a row; the queries' are the row if keys are the first axis."""
    self._static, self._step, self._first_head = static, step, first_head
    Q, P = static.blocks
    keys_first = q_segments.shape[0] == 1
    shape, query_axis = ((P, Q), 1) if keys_first else ((Q, P), 0)
    # How far each key is in its query's past.
    past = jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    past -= jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    past += step.limits[0] + step.query_block_Z[z] * Q - step.key_block_Z[z] * P
    visible_pairs = (past >= 0) & (q_segments == kv_segments)
    if static.windowed:
      visible_pairs &= past < step.limits[1]
    self._past, self._query_axis = past, query_axis
    self._hide = jnp.where(visible_pairs, 0.0, HIDDEN)

  def scores(self, products: jax.Array, heads: range) -> tuple[jax.Array, jax.Array]:
    """Of some heads, as powers of two, from products of queries and keys; and, with a soft-cap,
    what they were before masking."""
    static = self._static
    if static.softcap is None:
      capped, scores = products, products * (static.scale * LOG2_E)
    else:
      capped = capping.cap(static.scale * products, static.softcap)
      scores = capped * LOG2_E
    return scores + _stack([self._added(head) for head in heads], self._query_axis), capped

  def _added(self, head: int) -> jax.Array:
    """To a head's scores: what hides invisible pairs, and what ALiBi takes away."""
    if self._step.slopes_N is None:
      return self._hide
    slope = self._step.slopes_N[self._first_head + head] * LOG2_E
    return self._hide - slope * self._past.astype(jnp.float32)


def _stack(blocks: list[jax.Array], axis: int) -> jax.Array:
  """The heads' blocks after each other along the axis of the queries."""
  return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=axis)


def _heads_at_once(heads: int, queries: int, rows: int) -> Iterator[range]:
  at_once = max(1, rows // queries)
  for first in range(0, heads, at_once):
    yield range(first, min(first + at_once, heads))


def _column(x_1X: jax.Array) -> jax.Array:
  """A row of lanes as a column of sublanes, by way of a shape that the compiler transposes."""
  return jnp.broadcast_to(x_1X, (8, x_1X.shape[1])).T[:, :1]


def _row(x_X1: jax.Array) -> jax.Array:
  """A column of sublanes as a row of lanes."""
  return jnp.broadcast_to(x_X1, (x_X1.shape[0], LANES)).T[:1]


def forward(static: Static, *refs: Any) -> None:
  step, refs = read_scalars(static, refs)
  q_GQH, k_PH, v_PU, q_segments_1Q, kv_segments_1P, o_GQU, lse_GQ, *scratch = refs
  acc_GQU, top_GQL, sum_GQL, q_segments_QL = scratch
  G, Q, _ = q_GQH.shape
  first_head, z = pl.program_id(0) * G, pl.program_id(1)
  kind = step.kind_Z[z]

  @pl.when(kind & visible.FIRST != 0)
  def begin() -> None:
    acc_GQU[...] = jnp.zeros_like(acc_GQU)
    top_GQL[...] = jnp.full_like(top_GQL, HIDDEN)
    sum_GQL[...] = jnp.zeros_like(sum_GQL)
    q_segments_QL[...] = jnp.broadcast_to(_column(q_segments_1Q[...]), q_segments_QL.shape)

  @pl.when(kind & visible.SEES != 0)
  def add() -> None:
    q_segments_QP = _widen(q_segments_QL[...], k_PH.shape[0])
    pair = _Pair(static, step, z, first_head, q_segments_QP, kv_segments_1P[...])
    for heads in _heads_at_once(G, Q, _FORWARD_ROWS):
      _forward_heads(pair, heads, q_GQH, k_PH, v_PU, acc_GQU, top_GQL, sum_GQL)

  @pl.when(kind & visible.LAST != 0)
  def finish() -> None:
    for head in range(G):
      # Where nothing was visible the sum counts hidden pairs, or is empty.
      saw_Q1 = top_GQL[head, :, :1] > HIDDEN / 2
      sum_Q1 = jnp.where(saw_Q1, sum_GQL[head].sum(axis=1, keepdims=True), 1.0)
      o_GQU[head] = jnp.where(saw_Q1, acc_GQU[head] / sum_Q1, 0.0).astype(o_GQU.dtype)
      lse_Q1 = jnp.where(saw_Q1, top_GQL[head, :, :1] + jnp.log2(sum_Q1), -jnp.inf)
      lse_GQ[head : head + 1] = _row(lse_Q1)


def _forward_heads(
  pair: _Pair, heads: range, q_GQH: Any, k_PH: Any, v_PU: Any, acc: Any, top: Any, total: Any
) -> None:
  at = slice(heads.start, heads.stop)

  def rows(x_GQX: jax.Array) -> jax.Array:
    return x_GQX.reshape(-1, x_GQX.shape[-1])

  def put(ref: Any, x_RX: jax.Array) -> None:
    ref[at] = x_RX.reshape(len(heads), -1, x_RX.shape[-1])

  scores_RP, _ = pair.scores(_dot(rows(q_GQH[at]), k_PH[...], _LAST_LAST), heads)
  old_top_RL = rows(top[at])
  top_RL = jnp.maximum(old_top_RL, scores_RP.max(axis=1, keepdims=True))
  shrink_RL = jnp.exp2(old_top_RL - top_RL)
  weights_RP = jnp.exp2(scores_RP - _widen(top_RL, scores_RP.shape[1]))
  put(top, top_RL)
  # Each lane sums its own columns; the lanes are summed once, at the end.
  put(total, rows(total[at]) * shrink_RL + _sum_to_lanes(weights_RP))
  more_RU = _dot(weights_RP.astype(v_PU.dtype), v_PU[...], _PLAIN)
  put(acc, rows(acc[at]) * _widen(shrink_RL, more_RU.shape[1]) + more_RU)


def _widen(x_RL: jax.Array, width: int) -> jax.Array:
  """Columns that are all equal, `width` of them."""
  lanes = x_RL.shape[1]
  return x_RL[:, :width] if width < lanes else jnp.tile(x_RL, (1, -(-width // lanes)))[:, :width]


def _sum_to_lanes(x_RP: jax.Array) -> jax.Array:
  parts = (x_RP[:, i : i + LANES] for i in range(0, x_RP.shape[1], LANES))
  return functools.reduce(jnp.add, parts)


def backward(static: Static, *refs: Any) -> None:
  """The gradients of a block of queries are summed while the walk is at it, those of all keys and
  values of a row while it is in the row."""
  step, refs = read_scalars(static, refs)
  q_GQH, k_PH, v_PU, q_segments_1Q, kv_segments_1T, do_GQU, lse_GQ, delta_GQ, *results = refs
  dq_GQH, dk_TH, dv_TU, dq_acc_GQH, dk_acc_TH, dv_acc_TU, kv_segments_TL = results
  G, Q, _ = q_GQH.shape
  P = k_PH.shape[0]
  first_head, z = pl.program_id(0) * G, pl.program_id(1)
  kind = step.kind_Z[z]

  def each_key_block(do: Any) -> None:
    jax.lax.fori_loop(
      0, dk_TH.shape[0] // P, lambda j, _: do(pl.ds(pl.multiple_of(j * P, P), P)), None
    )

  @pl.when(kind & visible.FIRST_OF_ROW != 0)
  def begin_row() -> None:
    def clear(at: Any) -> None:
      dk_acc_TH[at] = jnp.zeros_like(dk_acc_TH[at])
      dv_acc_TU[at] = jnp.zeros_like(dv_acc_TU[at])
      kv_segments_P1 = _column(kv_segments_1T[:, at])
      kv_segments_TL[at] = jnp.broadcast_to(kv_segments_P1, kv_segments_TL[at].shape)

    each_key_block(clear)

  @pl.when(kind & visible.FIRST != 0)
  def begin() -> None:
    dq_acc_GQH[...] = jnp.zeros_like(dq_acc_GQH)

  @pl.when(kind & visible.SEES != 0)
  def add() -> None:
    at = pl.ds(pl.multiple_of(step.key_block_Z[z] * P, P), P)
    kv_segments_PQ = _widen(kv_segments_TL[at], Q)
    pair = _Pair(static, step, z, first_head, q_segments_1Q[...], kv_segments_PQ)
    for heads in _heads_at_once(G, Q, _BACKWARD_ROWS):
      some = slice(heads.start, heads.stop)
      q_RH, do_RU = (x[some].reshape(-1, x.shape[-1]) for x in (q_GQH, do_GQU))
      lse_1R, delta_1R = (_stack([x[i : i + 1] for i in heads], 1) for x in (lse_GQ, delta_GQ))
      scores_PR, capped_PR = pair.scores(_dot(k_PH[...], q_RH, _LAST_LAST), heads)
      weights_PR = jnp.exp2(scores_PR - lse_1R)
      dscores_PR = weights_PR * (_dot(v_PU[...], do_RU, _LAST_LAST) - delta_1R)
      if static.softcap is not None:
        dscores_PR *= capping.slope(capped_PR, static.softcap)
      dscores_PR = dscores_PR.astype(q_RH.dtype)
      dv_acc_TU[at] += _dot(weights_PR.astype(do_RU.dtype), do_RU, _PLAIN)
      dk_acc_TH[at] += _dot(dscores_PR, q_RH, _PLAIN)
      dq_RH = _dot(dscores_PR, k_PH[...], _FIRST_FIRST)
      dq_acc_GQH[some] += dq_RH.reshape(len(heads), Q, -1)

  @pl.when(kind & visible.LAST != 0)
  def finish() -> None:
    dq_GQH[...] = (dq_acc_GQH[...] * static.scale).astype(dq_GQH.dtype)

  @pl.when(kind & visible.LAST_OF_ROW != 0)
  def finish_row() -> None:
    def write(at: Any) -> None:
      dk_TH[at] = (dk_acc_TH[at] * static.scale).astype(dk_TH.dtype)
      dv_TU[at] = dv_acc_TU[at].astype(dv_TU.dtype)

    each_key_block(write)
