"""Attention as Mosaic kernels for TPU, forward and backward, that go only where something is seen.

The online softmax and its recomputing backward are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691). The grid does not run over pairs of blocks: it runs over a list of those that see
each other, made from the segment ids and the window before the kernel starts and prefetched as
scalars, and it is as long as that list (`visible.steps`). What is not seen is neither computed nor
fetched.

Scores are transposed, [keys, queries]: everything that there is one of per query (segment, largest
score, sum) then is a row of lanes, in memory and in registers, and the softmax reduces over
sublanes. The outputs of queries therefore come out as [width, queries].

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H width of queries and keys, U width of values; I query blocks of Q positions, J
key blocks of P positions; Z steps; 1 in a name is an axis of size 1.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.errors import UserError
from slmjax.kernels import manual
from slmjax.kernels.attention import pallas_tpu_kernels, visible
from slmjax.kernels.attention.online_softmax import HIDDEN, delta
from slmjax.kernels.attention.pallas_tpu_kernels import Blocks, Static

# The lanes of a vector register: positions run along them.
_LANES = 128

# The compiler's own limit for the memory of one kernel is 16 MiB; every chip since v5e has 64 MiB
# and more.
_VMEM = 48 * 2**20

# The list of pairs takes 20 bytes for each that there may be, of 1 MiB of scalar memory.
_MOST_PAIRS = 40_000


def blocks_for(width: int) -> Blocks:
  """Blocks for the wider one of keys and values: few steps, and all that a step needs fits."""
  if width <= 128:
    return Blocks(512, 512)
  return Blocks(512, 256) if width <= 256 else Blocks(256, 256)


class _Shared(NamedTuple):
  """What all rows of the batch share."""

  q_start: jax.Array
  window: jax.Array | None
  slopes_N: jax.Array | None


class _Inputs(NamedTuple):
  """What kernels read: heads outermost, padded to whole blocks."""

  q_BNSH: jax.Array
  k_BKTH: jax.Array
  v_BKTU: jax.Array
  q_segments_B1S: jax.Array
  kv_segments_B1T: jax.Array
  limits: jax.Array  # q_start and window; without a window the second means nothing
  slopes_N: jax.Array | None
  visible_BIJ: jax.Array


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
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `api.attention_and_logsumexp`. Temporaries are linear in S and T.

  Products of float32 arrays have the precision of `jax.default_matmul_precision`, as in XLA: on a
  TPU they are of bfloat16 unless that says otherwise.

  Args:
    blocks: at most so many positions; shorter and uneven lengths get smaller blocks.
    interpret: runs the kernels as XLA programs on any platform, for tests.

  Raises:
    UserError: what `refusal` says.
  """
  if (why := refusal(q_BSNH, k_BTKH, v_BTKU)) is not None:
    raise UserError(f"attention implementation 'pallas_tpu': {why}; use 'chunked'")
  S, T = q_BSNH.shape[1], k_BTKH.shape[1]
  even = Blocks(_even_block(S, blocks.queries), _even_block(T, blocks.keys))
  static = Static(scale, softcap, window is not None, slopes_N is not None, even, interpret)
  shared = _Shared(jnp.asarray(q_start, jnp.int32), window, slopes_N)
  arrays = (shared, q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  axes = manual.varying_axes(*jax.tree.leaves(arrays))
  return _attention(static, *jax.tree.map(lambda x: manual.vary_over(x, axes), arrays))


def refusal(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array) -> str | None:
  """What the kernels cannot do with such arrays, or None."""
  if q_BSNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q_BSNH.dtype.name} is not built, only bfloat16 and float32"
  B, S, T = *q_BSNH.shape[:2], k_BTKH.shape[1]
  largest = blocks_for(max(q_BSNH.shape[3], v_BTKU.shape[3]))
  pairs = B * -(-S // largest.queries) * -(-T // largest.keys)
  if pairs > _MOST_PAIRS:
    return f"{B} rows of {S} by {T} positions are {pairs} pairs of blocks, over {_MOST_PAIRS}"
  return None


def _even_block(length: int, largest: int) -> int:
  """The smallest block, in whole registers, of which as few are enough as of the largest."""
  blocks = -(-length // largest)
  return _round_up(-(-length // blocks), _LANES)


def _round_up(x: int, multiple: int) -> int:
  return -(-x // multiple) * multiple


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, shared: _Shared, *batched: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _forward(static, shared, *batched)[0]


def _forward(
  static: Static, shared: _Shared, *batched: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  S = batched[0].shape[1]
  o_BNUS, lse_BN1S = _call_forward(static, _prepare(static, shared, *batched))
  o_BSNU = jnp.moveaxis(o_BNUS, 3, 1)[:, :S]
  lse_BSN = jnp.swapaxes(lse_BN1S[:, :, 0], 1, 2)[:, :S]
  return (o_BSNU, lse_BSN), (shared, batched, o_BSNU, lse_BN1S)


def _backward(
  static: Static, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  shared, batched, o_BSNU, lse_BN1S = saved
  do_BSNU, dlse_BSN = cotangents
  inputs = _prepare(static, shared, *batched)
  S, T = batched[0].shape[1], batched[1].shape[1]
  delta_BNS = jnp.swapaxes(delta(o_BSNU, do_BSNU, dlse_BSN), 1, 2)
  delta_BN1S = _pad(delta_BNS, 2, static.blocks.queries)[:, :, None]
  # Without anything visible any number will do: the exponential of hidden scores is zero.
  lse_BN1S = jnp.maximum(lse_BN1S, HIDDEN / 2)
  do_BNSU = _heads_first(do_BSNU, static.blocks.queries)
  of_queries = (do_BNSU, lse_BN1S, delta_BN1S)
  dq_BNHS = _call_backward_queries(static, inputs, *of_queries)
  dk_BKTH, dv_BKTU = _call_backward_keys(static, inputs, *of_queries)
  dk_BTKH, dv_BTKU = (jnp.swapaxes(x, 1, 2)[:, :T] for x in (dk_BKTH, dv_BKTU))
  return None, jnp.moveaxis(dq_BNHS, 3, 1)[:, :S], dk_BTKH, dv_BTKU, None, None


_attention.defvjp(_forward, _backward)


def _pad(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Zeros up to a whole number of blocks: segment 0, which sees nothing and is not seen."""
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, widths)


def _heads_first(x_BSNH: jax.Array, block: int) -> jax.Array:
  return jnp.swapaxes(_pad(x_BSNH, 1, block), 1, 2)


def _prepare(static: Static, shared: _Shared, *batched: jax.Array) -> _Inputs:
  q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT = batched
  Q, P = static.blocks
  q_segments_BS, kv_segments_BT = _pad(q_segments_BS, 1, Q), _pad(kv_segments_BT, 1, P)
  B = q_BSNH.shape[0]
  visible_BIJ = jax.vmap(visible.visible_blocks, in_axes=(0, 0, None, None))(
    q_segments_BS.reshape(B, -1, Q),
    kv_segments_BT.reshape(B, -1, P),
    shared.q_start,
    shared.window,
  )
  window = shared.q_start if shared.window is None else shared.window
  return _Inputs(
    q_BNSH=_heads_first(q_BSNH, Q),
    k_BKTH=_heads_first(k_BTKH, P),
    v_BKTU=_heads_first(v_BTKU, P),
    # Padding's queries get an id that no key has, so that kernels compare ids and nothing else.
    q_segments_B1S=jnp.where(q_segments_BS > 0, q_segments_BS, -1)[:, None],
    kv_segments_B1T=kv_segments_BT[:, None],
    limits=jnp.stack([shared.q_start, window]),
    slopes_N=shared.slopes_N,
    visible_BIJ=visible_BIJ,
  )


def _specs(static: Static, inputs: _Inputs, own: str, group: int) -> dict[str, pl.BlockSpec]:
  """Where a step finds each array. `own` is "queries" or "keys": whose blocks the walk is over."""
  Q, P = static.blocks
  H, U = inputs.q_BNSH.shape[3], inputs.v_BKTU.shape[3]

  def at(side: str) -> Any:
    """The row and the block of that side at a step, and the head."""

    def index(*grid_and_refs: Any) -> tuple[Any, Any, Any]:
      ids, refs = grid_and_refs[: 2 + (own == "keys")], grid_and_refs[2 + (own == "keys") :]
      step, _ = pallas_tpu_kernels.read_scalars(static, refs)
      rows, blocks = (
        (step.own_row_Z, step.own_Z) if side == own else (step.other_row_Z, step.other_Z)
      )
      if own == "keys":
        head = ids[0] * group + ids[2] if side == "queries" else ids[0]
      else:
        head = ids[0] if side == "queries" else ids[0] // group
      return rows[ids[1]], head, blocks[ids[1]]

    return index

  def positions_first(side: str, block: int, width: int) -> pl.BlockSpec:
    def index(*args: Any) -> tuple[Any, ...]:
      return (*at(side)(*args), 0)

    return pl.BlockSpec((None, None, block, width), index)

  def positions_last(side: str, block: int, width: int) -> pl.BlockSpec:
    def index(*args: Any) -> tuple[Any, ...]:
      row, head, place = at(side)(*args)
      return row, head, 0, place

    return pl.BlockSpec((None, None, width, block), index)

  def ids_of(side: str, block: int) -> pl.BlockSpec:
    def index(*args: Any) -> tuple[Any, ...]:
      row, _, place = at(side)(*args)
      return row, 0, place

    return pl.BlockSpec((None, 1, block), index)

  return {
    "q": positions_first("queries", Q, H),
    "k": positions_first("keys", P, H),
    "v": positions_first("keys", P, U),
    "q_segments": ids_of("queries", Q),
    "kv_segments": ids_of("keys", P),
    "o": positions_last("queries", Q, U),
    "do": positions_first("queries", Q, U),
    "lse": positions_last("queries", Q, 1),
    "delta": positions_last("queries", Q, 1),
    "dq": positions_last("queries", Q, H),
    "dk": positions_first("keys", P, H),
    "dv": positions_first("keys", P, U),
  }


def _call(
  static: Static,
  inputs: _Inputs,
  own: str,
  kernel: Any,
  more: dict[str, jax.Array],
  out: dict[str, jax.ShapeDtypeStruct],
  scratch: list[tuple[int, int]],
  products: tuple[int, int],
) -> Any:
  """Runs a kernel over the visible pairs. `more` are its inputs beside those of the forward,
  `products` how many products of [Q, P] by H and by U it computes per pair, for the estimate."""
  B, N, S, H = inputs.q_BNSH.shape
  K, T, U = inputs.v_BKTU.shape[1:]
  by_queries = own == "queries"
  visible_BXY = inputs.visible_BIJ if by_queries else jnp.swapaxes(inputs.visible_BIJ, 1, 2)
  steps = visible.steps(visible_BXY)
  specs = _specs(static, inputs, own, N // K)
  arrays = {
    "q": inputs.q_BNSH,
    "k": inputs.k_BKTH,
    "v": inputs.v_BKTU,
    "q_segments": inputs.q_segments_B1S,
    "kv_segments": inputs.kv_segments_B1T,
    **more,
  }
  slopes = () if inputs.slopes_N is None else (inputs.slopes_N,)
  scalars = (*steps[:-1], inputs.limits, *slopes)
  # As if rows were one document each: the compiler wants to know before the segments are.
  pairs = B * N * S * T // 2
  by_head = (pltpu.PARALLEL, pltpu.ARBITRARY)  # heads are independent, steps follow each other
  touched: list[Any] = [*arrays.values(), *out.values()]
  cost = pl.CostEstimate(
    flops=2 * pairs * (products[0] * H + products[1] * U),
    transcendentals=pairs,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in touched),
  )
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(N, steps.total) if by_queries else (K, steps.total, N // K),
      in_specs=[specs[name] for name in arrays],
      out_specs=[specs[name] for name in out],
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=list(out.values()),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=by_head if by_queries else (*by_head, pltpu.ARBITRARY),
      vmem_limit_bytes=_VMEM,
    ),
    cost_estimate=cost,
    interpret=static.interpret,
    name=f"attention_{'_'.join(out)}",
  )(*scalars, *arrays.values())


def _like(inputs: _Inputs, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes over which the inputs do."""
  axes = jax.typeof(inputs.q_BNSH).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _call_forward(static: Static, inputs: _Inputs) -> Any:
  B, N, S, _ = inputs.q_BNSH.shape
  U = inputs.v_BKTU.shape[3]
  Q = static.blocks.queries
  out = {
    "o": _like(inputs, (B, N, U, S), inputs.q_BNSH.dtype),
    "lse": _like(inputs, (B, N, 1, S), jnp.float32),
  }
  kernel = functools.partial(pallas_tpu_kernels.forward, static)
  return _call(static, inputs, "queries", kernel, {}, out, [(U, Q), (1, Q), (1, Q)], (1, 1))


def _call_backward_queries(static: Static, inputs: _Inputs, *of_queries: jax.Array) -> jax.Array:
  B, N, S, H = inputs.q_BNSH.shape
  out = {"dq": _like(inputs, (B, N, H, S), inputs.q_BNSH.dtype)}
  more = dict(zip(("do", "lse", "delta"), of_queries, strict=True))
  kernel = functools.partial(pallas_tpu_kernels.backward_queries, static)
  scratch = [(H, static.blocks.queries)]
  (dq_BNHS,) = _call(static, inputs, "queries", kernel, more, out, scratch, (2, 1))
  return dq_BNHS


def _call_backward_keys(static: Static, inputs: _Inputs, *of_queries: jax.Array) -> Any:
  group = inputs.q_BNSH.shape[1] // inputs.k_BKTH.shape[1]
  out = {
    "dk": _like(inputs, inputs.k_BKTH.shape, inputs.k_BKTH.dtype),
    "dv": _like(inputs, inputs.v_BKTU.shape, inputs.v_BKTU.dtype),
  }
  more = dict(zip(("do", "lse", "delta"), of_queries, strict=True))
  kernel = functools.partial(pallas_tpu_kernels.backward_keys, static, group)
  P = static.blocks.keys
  scratch = [(P, x.shape[3]) for x in (inputs.k_BKTH, inputs.v_BKTU)]
  return _call(static, inputs, "keys", kernel, more, out, scratch, (2, 2))
