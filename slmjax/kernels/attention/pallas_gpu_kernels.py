"""The bodies of the GPU attention kernels: what a program of the grid computes. See pallas_gpu.py.

S query positions, T key positions, Q query positions and P key positions of a block, G query heads
per key/value head, H width of queries and keys, U width of values, X and Y the rows and columns of
a block of scores: queries and keys, or the other way round; 1 in a name is an axis of size 1.
"""

import functools
import math
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from slmjax.kernels.attention.online_softmax import HIDDEN

_LOG2E = math.log2(math.e)
_LN2 = math.log(2.0)

# The narrowest product that tensor cores compute.
NARROWEST = 16


class Tile(NamedTuple):
  """Positions of a block of queries and of keys, powers of two from 16 on; threads / 32; and how
  many blocks are in flight from memory."""

  queries: int
  keys: int
  warps: int
  stages: int


class Sizes(NamedTuple):
  """Of the arrays of a call. Rows and heads may be shorter than the blocks that cover them."""

  S: int
  T: int
  G: int
  H: int
  U: int


class Static(NamedTuple):
  """What a compiled kernel depends on."""

  scale: float
  softcap: float | None
  windowed: bool
  sloped: bool
  interpret: bool
  tile: Tile
  sizes: Sizes

  @property
  def unit(self) -> float:
    """What the kernels' scores are multiplied by to be exponents of 2. They are products of queries
    and keys, the logistic function that gives the soft-cap, or exponents with slopes already."""
    if self.softcap is not None:
      return 2.0 * self.softcap * _LOG2E
    return 1.0 if self.sloped else self.scale * _LOG2E


class Scalars(NamedTuple):
  """What a program reads before it starts. `limits`: q_start and window."""

  ranges: Any
  limits: Any
  slopes: Any  # None without slopes


def _shift(softcap: float | None) -> float:
  """How far scores times `Static.unit`, as exponents of e, are above those that they stand for."""
  return 0.0 if softcap is None else softcap


def powers_of_logsumexp(lse: jax.Array, softcap: float | None) -> jax.Array:
  """What the backward kernels subtract from scores times `Static.unit`.

  Where nothing is visible any number will do: the exponential of hidden scores is zero.
  """
  return jnp.where(lse == -jnp.inf, 0.0, (lse + _shift(softcap)) * _LOG2E)


def read_scalars(static: Static, refs: Any) -> tuple[Scalars, tuple[Any, ...]]:
  """The first refs by name, and those that follow them."""
  ranges, limits, *rest = refs
  return Scalars(ranges, limits, rest.pop(0) if static.sloped else None), tuple(rest)


def parts(width: int) -> Iterator[tuple[int, int]]:
  """Start and width of slices that cover a head: powers of two, as Triton wants all its shapes, so
  that 96 is 64 + 32 and 192 is 128 + 64 rather than 128 and 256. The last may reach behind it."""
  start, rest = 0, -(-width // NARROWEST) * NARROWEST
  while rest:
    slice_width = 1 << (rest.bit_length() - 1)
    yield start, slice_width
    start, rest = start + slice_width, rest - slice_width


def _masks(
  width: int, positions: tuple[Any, int, int] | None
) -> Iterator[tuple[slice, jax.Array | None]]:
  """Per part of a head its slice, and which elements are there if not all. `positions`: the first
  one's index, how many there are, and the length of the row that they may reach behind."""
  for start, slice_width in parts(width):
    mask = None
    if start + slice_width > width:
      mask = (start + jnp.arange(slice_width) < width)[None, :]
    if positions is not None:
      first, count, length = positions
      rows = (first + jnp.arange(count) < length)[:, None]
      mask = rows if mask is None else rows & mask
    yield slice(start, start + slice_width), mask


def _load(ref: Any, at: Any, width: int, positions: tuple[Any, int, int] | None) -> list[jax.Array]:
  """The parts of the heads at `at`, which indexes all axes but the last; zeros for what is not
  there."""
  found = []
  for columns, mask in _masks(width, positions):
    other = None if mask is None else 0.0
    found.append(plgpu.load(ref.at[(*at, columns)], mask=mask, other=other))
  return found


def _store(
  ref: Any, values: list[jax.Array], width: int, positions: tuple[Any, int, int] | None
) -> None:
  for (columns, mask), x in zip(_masks(width, positions), values, strict=True):
    plgpu.store(ref.at[:, columns], x.astype(ref.dtype), mask=mask)


def _rows(first: Any, count: int, length: int) -> tuple[Any, int, int] | None:
  """For `_load`: None where every block is whole."""
  return (first, count, length) if length % count else None


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


def _products(x_XH: list[jax.Array], y_YH: list[jax.Array]) -> jax.Array:
  """[X, Y]: the sums over the width, part by part."""
  last_last = (((1,), (1,)), ((), ()))
  products = [_dot(x, y, last_last) for x, y in zip(x_XH, y_YH, strict=True)]
  return functools.reduce(jnp.add, products)


def _add_products(
  acc_XH: list[jax.Array], weights_XY: jax.Array, y_YH: list[jax.Array]
) -> list[jax.Array]:
  plain = (((1,), (0,)), ((), ()))
  weights_XY = weights_XY.astype(y_YH[0].dtype)
  return [acc + _dot(weights_XY, y, plain) for acc, y in zip(acc_XH, y_YH, strict=True)]


def _zeros(rows: int, width: int) -> list[jax.Array]:
  return [jnp.zeros((rows, slice_width), jnp.float32) for _, slice_width in parts(width)]


def _exp2(static: Static, x: jax.Array, times: float, minus: jax.Array) -> jax.Array:
  """2 to the power of `x * times - minus`, with `minus` of the rank of `x`.

  In two instructions, for which the compiler, left alone, takes three and for the exponential of
  what may be below the normal numbers four more: here that is zero.
  """
  if static.interpret:
    return jnp.exp2(x * times - minus)
  power = f"fma.rn.f32 power, $1, {_constant(times)}, $2;"
  return _instructions(f"{power} ex2.approx.ftz.f32 $0, power;", x, -minus)


def _logistic(static: Static, x: jax.Array, times: float) -> jax.Array:
  """1 / (1 + 2 to the power of `x * times`), with the approximations of the special units."""
  if static.interpret:
    return 1.0 / (1.0 + jnp.exp2(x * times))
  return _instructions(
    f"mul.f32 power, $1, {_constant(times)}; ex2.approx.ftz.f32 power, power; "
    "add.f32 power, power, 0f3f800000; rcp.approx.ftz.f32 $0, power;",
    x,
  )


def _constant(x: float) -> str:
  """A float32 in PTX."""
  return "0f" + struct.pack(">f", x).hex()


def _instructions(code: str, x: jax.Array, *more: jax.Array) -> jax.Array:
  """PTX for each element: $0 is the result, $1 and so on the arguments, `power` a register."""
  (y,) = plgpu.elementwise_inline_asm(
    f"{{ .reg .f32 power; {code} }}",
    args=[x, *(jnp.broadcast_to(y, x.shape) for y in more)],
    constraints=",".join(["=f", "f", *("f" for _ in more)]),
    pack=1,
    result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
  )
  return y


class _Positions(NamedTuple):
  """Of one axis of a block of scores: where the block starts on the queries' or the keys' axis; and
  [X, 1] or [1, Y], how far each position is from there, and its segment id. Padding's queries have
  an id that no key has."""

  first: Any
  offset: jax.Array
  segments: jax.Array


def _scores(
  static: Static,
  products_XY: jax.Array,
  scalars: Scalars,
  slope: Any,
  queries: _Positions,
  keys: _Positions,
  edge: bool,
) -> tuple[jax.Array, jax.Array | None]:
  """Scores in the sense of `Static.unit`, and the derivative of the soft-cap.

  `edge`: with pairs hidden that do not see each other; otherwise all of the block do.
  """
  scores_XY, slope_XY = products_XY, None
  if static.softcap is not None:
    # tanh(x) = 2 / (1 + exp(-2x)) - 1. The error is absolute, as that of a score may be.
    scores_XY = _logistic(static, products_XY, -2.0 * static.scale * _LOG2E / static.softcap)
    slope_XY = 4.0 * scores_XY * (1.0 - scores_XY)
  ahead = scalars.limits[0] + queries.first - keys.first
  if static.sloped:
    past_XY = (queries.offset + ahead).astype(jnp.float32) - keys.offset.astype(jnp.float32)
    scores_XY = products_XY * (static.scale * _LOG2E) - (slope * _LOG2E) * past_XY
  if edge:
    seen_XY = (keys.segments == queries.segments) & (keys.offset <= queries.offset + ahead)
    if static.windowed:
      seen_XY &= keys.offset > queries.offset + (ahead - scalars.limits[1])
    scores_XY = jnp.where(seen_XY, scores_XY, HIDDEN)
  return scores_XY, slope_XY


def _over_blocks(
  ranges: Any, repeats: int, step: Callable[[Any, Any, Any, bool], Any], carry: Any
) -> Any:
  """Runs `step(repeat, block, carry, edge)` over the visible blocks, `repeats` times.

  Two loops: over blocks of which all is visible, and over those before and after them.
  """
  first, whole, whole_end, end = (ranges[i] for i in range(4))
  before = whole - first

  def run(edge: bool, count: Any, block_of: Callable[[Any], Any], carry: Any) -> Any:
    if repeats == 1:
      once = functools.partial(step, None)
      return jax.lax.fori_loop(0, count, lambda at, x: once(block_of(at), x, edge), carry)

    # One loop rather than one in another, so that loads are under way across its turns.
    def body(_: Any, state: Any) -> Any:
      repeat, at, carry = state
      carry = step(repeat, block_of(at), carry, edge)
      last = at + 1 == count
      return jnp.where(last, repeat + 1, repeat), jnp.where(last, 0, at + 1), carry

    zero = count - count
    return jax.lax.fori_loop(0, count * repeats, body, (zero, zero, carry))[2]

  def outer(at: Any) -> Any:
    return jnp.where(at < before, first + at, whole_end + at - before)

  carry = run(False, whole_end - whole, lambda at: whole + at, carry)
  return run(True, before + end - whole_end, outer, carry)


def _query_block() -> jax.Array:
  """Late queries see most keys, so programs start with the last block: the long ones first."""
  return pl.num_programs(2) - 1 - pl.program_id(2)


def attention_forward(static: Static, *refs: Any) -> None:
  """Output and log-sum-exp of a block of queries."""
  scalars, refs = read_scalars(static, refs)
  q_QH, k_TH, v_TU, q_segments_Q, kv_segments_T, o_QU, lse_Q = refs
  (Q, P), (S, T, _, H, U), unit = static.tile[:2], static.sizes, static.unit
  first = _query_block() * Q
  rows = _rows(first, Q, S)
  slope = scalars.slopes[0] if static.sloped else None
  queries = _Positions(first, jnp.arange(Q)[:, None], q_segments_Q[...][:, None])
  q_H = _load(q_QH, (slice(None),), H, rows)

  def step(_: Any, block: Any, carry: Any, edge: bool) -> Any:
    top_Q, sum_Q, acc_U = carry
    here = pl.ds(block * P, P)
    there = _rows(block * P, P, T) if edge else None
    k_H = _load(k_TH, (here,), H, there)
    keys = _Positions(block * P, jnp.arange(P)[None, :], kv_segments_T[here][None, :])
    scores_QP, _ = _scores(static, _products(q_H, k_H), scalars, slope, queries, keys, edge)
    new_top_Q = jnp.maximum(top_Q, scores_QP.max(axis=1))
    # Hidden scores are no exponent to subtract from themselves: their rounding errors are large.
    power_Q = unit * (jnp.where(new_top_Q > HIDDEN / 2, new_top_Q, 0.0) if edge else new_top_Q)
    weights_QP = _exp2(static, scores_QP, unit, power_Q[:, None])
    shrink_Q = _exp2(static, top_Q, unit, power_Q)
    acc_U = [acc_QU * shrink_Q[:, None] for acc_QU in acc_U]
    acc_U = _add_products(acc_U, weights_QP, _load(v_TU, (here,), U, there))
    return new_top_Q, sum_Q * shrink_Q + weights_QP.sum(axis=1), acc_U

  start = (jnp.full(Q, HIDDEN), jnp.zeros(Q), _zeros(Q, U))
  top_Q, sum_Q, acc_U = _over_blocks(scalars.ranges, 1, step, start)
  saw_Q = top_Q > HIDDEN / 2
  safe_sum_Q = jnp.where(saw_Q, sum_Q, 1.0)
  share_Q1 = jnp.where(saw_Q, 1.0 / safe_sum_Q, 0.0)[:, None]
  _store(o_QU, [acc_QU * share_Q1 for acc_QU in acc_U], U, rows)
  top_Q = top_Q * (unit * _LN2) - _shift(static.softcap)
  lse_Q[...] = jnp.where(saw_Q, top_Q + jnp.log(safe_sum_Q), -jnp.inf)


def _weights(
  static: Static,
  scores: tuple[jax.Array, jax.Array | None],
  powers_XY: jax.Array,
  dweights_XY: jax.Array,
  delta_XY: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """The weights again, and the gradient of the products of queries and keys before scaling. The
  powers of the log-sum-exp and delta have an axis of size 1."""
  scores_XY, slope_XY = scores
  weights_XY = _exp2(static, scores_XY, static.unit, powers_XY)
  dscores_XY = weights_XY * (dweights_XY - delta_XY)
  return weights_XY, dscores_XY if slope_XY is None else dscores_XY * slope_XY


def attention_backward_queries(static: Static, *refs: Any) -> None:
  """The gradient of a block of queries."""
  scalars, refs = read_scalars(static, refs)
  q_QH, k_TH, v_TU, q_segments_Q, kv_segments_T, do_QU, powers_Q, delta_Q, dq_QH = refs
  (Q, P), (S, T, _, H, U) = static.tile[:2], static.sizes
  first = _query_block() * Q
  rows = _rows(first, Q, S)
  slope = scalars.slopes[0] if static.sloped else None
  queries = _Positions(first, jnp.arange(Q)[:, None], q_segments_Q[...][:, None])
  q_H = _load(q_QH, (slice(None),), H, rows)
  do_U = _load(do_QU, (slice(None),), U, rows)
  powers_Q1, delta_Q1 = powers_Q[...][:, None], delta_Q[...][:, None]

  def step(_: Any, block: Any, acc_H: Any, edge: bool) -> Any:
    here = pl.ds(block * P, P)
    there = _rows(block * P, P, T) if edge else None
    k_H = _load(k_TH, (here,), H, there)
    keys = _Positions(block * P, jnp.arange(P)[None, :], kv_segments_T[here][None, :])
    scores = _scores(static, _products(q_H, k_H), scalars, slope, queries, keys, edge)
    dweights_QP = _products(do_U, _load(v_TU, (here,), U, there))
    _, dscores_QP = _weights(static, scores, powers_Q1, dweights_QP, delta_Q1)
    return _add_products(acc_H, dscores_QP, k_H)

  acc_H = _over_blocks(scalars.ranges, 1, step, _zeros(Q, H))
  _store(dq_QH, [acc_QH * static.scale for acc_QH in acc_H], H, rows)


def attention_backward_keys(static: Static, *refs: Any) -> None:
  """The gradients of a block of keys and values, over all query heads that they serve."""
  scalars, refs = read_scalars(static, refs)
  q_SGH, k_PH, v_PU, q_segments_S, kv_segments_P, do_SGU, powers_GS, delta_GS, dk_PH, dv_PU = refs
  (Q, P), (S, T, G, H, U) = static.tile[:2], static.sizes
  first = pl.program_id(2) * P
  rows = _rows(first, P, T)
  keys = _Positions(first, jnp.arange(P)[:, None], kv_segments_P[...][:, None])
  k_H = _load(k_PH, (slice(None),), H, rows)
  v_U = _load(v_PU, (slice(None),), U, rows)

  def step(head: Any, block: Any, carry: Any, edge: bool) -> Any:
    dk_H, dv_U = carry
    here = pl.ds(block * Q, Q)
    there = _rows(block * Q, Q, S) if edge else None
    head = np.int32(0) if head is None else head
    slope = scalars.slopes[head] if static.sloped else None
    q_H = _load(q_SGH, (here, head), H, there)
    queries = _Positions(block * Q, jnp.arange(Q)[None, :], q_segments_S[here][None, :])
    scores = _scores(static, _products(k_H, q_H), scalars, slope, queries, keys, edge)
    do_U = _load(do_SGU, (here, head), U, there)
    powers_1Q, delta_1Q = powers_GS[head, here][None, :], delta_GS[head, here][None, :]
    dweights_PQ = _products(v_U, do_U)
    weights_PQ, dscores_PQ = _weights(static, scores, powers_1Q, dweights_PQ, delta_1Q)
    return _add_products(dk_H, dscores_PQ, q_H), _add_products(dv_U, weights_PQ, do_U)

  dk_H, dv_U = _over_blocks(scalars.ranges, G, step, (_zeros(P, H), _zeros(P, U)))
  _store(dk_PH, [dk * static.scale for dk in dk_H], H, rows)
  _store(dv_PU, dv_U, U, rows)
