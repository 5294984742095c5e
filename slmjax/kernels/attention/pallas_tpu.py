"""Attention as Mosaic kernels for TPU, forward and backward, that go only where something is seen.

The online softmax and its recomputing backward are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691). The grid does not run over pairs of blocks: it runs over a list of those that see
each other, made from the segment ids and the window before the kernel starts and prefetched as
scalars, and it is as long as that list (`visible.steps`). What is not seen is neither computed nor
fetched. Forward and backward walk the same list; the backward is one kernel of five products per
pair, which keeps the gradients of a row's keys and values in the chip's memory.

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H width of queries and keys, U width of values; I query blocks of Q positions, J
key blocks of P positions; Z steps; 1 in a name is an axis of size 1.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.errors import UserError
from slmjax.kernels import manual
from slmjax.kernels.attention import pallas_tpu_kernels, visible
from slmjax.kernels.attention.blocks import Blocks, pad, round_up
from slmjax.kernels.attention.online_softmax import HIDDEN, delta
from slmjax.kernels.attention.pallas_tpu_kernels import LANES, LOG2_E, Static

# Of the 64 MiB that a core of v5p has for one kernel; v5e and v6e have 128. The compiler's own
# limit is 16 MiB.
_VMEM = 56 * 2**20

# Of these, for the gradients of keys and values. More keys than fit are done in several ranges.
_VMEM_OF_KEYS = 32 * 2**20

# The list of pairs takes 20 bytes for each that there may be, of 1 MiB of scalar memory.
_MOST_PAIRS = 40_000


class _Shared(NamedTuple):
  """What all rows of the batch share."""

  q_start: jax.Array
  window: jax.Array | None
  slopes_N: jax.Array | None


class _Inputs(NamedTuple):
  """What kernels read: heads outermost, padded to whole blocks."""

  q_BKGSH: jax.Array
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
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """See `api.attention_and_logsumexp`. Temporaries are linear in S and T.

  Products of float32 arrays have the precision of `jax.default_matmul_precision`, as in XLA: on a
  TPU they are of bfloat16 unless that says otherwise.

  Args:
    blocks: at most so many positions; shorter and uneven lengths get smaller blocks.
    interpret: runs the kernels on any platform, for tests: True, or `pltpu.InterpretParams`.

  Raises:
    UserError: what `refusal` says.
  """
  if (why := refusal(q_BSNH, k_BTKH, v_BTKU, blocks)) is not None:
    raise UserError(f"attention implementation 'pallas_tpu': {why}; use 'chunked'")
  S, T = q_BSNH.shape[1], k_BTKH.shape[1]
  even = Blocks(_even_block(S, blocks.queries), _even_block(T, blocks.keys))
  static = Static(scale, softcap, window is not None, slopes_N is not None, even, interpret)
  shared = _Shared(jnp.asarray(q_start, jnp.int32), window, slopes_N)
  arrays = (shared, q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  axes = manual.varying_axes(*jax.tree.leaves(arrays))
  return _attention(static, *jax.tree.map(lambda x: manual.vary_over(x, axes), arrays))


def refusal(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, blocks: Blocks) -> str | None:
  """What the kernels cannot do with such arrays, or None."""
  if q_BSNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q_BSNH.dtype.name} is not built, only bfloat16 and float32"
  B, S, T = *q_BSNH.shape[:2], k_BTKH.shape[1]
  pairs = B * -(-S // blocks.queries) * -(-T // blocks.keys)
  if pairs > _MOST_PAIRS:
    return f"{B} rows of {S} by {T} positions are {pairs} pairs of blocks, over {_MOST_PAIRS}"
  return None


def _even_block(length: int, largest: int) -> int:
  """The smallest block, in whole registers, of which as few are enough as of the largest."""
  blocks = -(-length // largest)
  return round_up(-(-length // blocks), LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, shared: _Shared, *batched: jax.Array) -> tuple[jax.Array, jax.Array]:
  return _forward(static, shared, *batched)[0]


def _forward(
  static: Static, shared: _Shared, *batched: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  S = batched[0].shape[1]
  o_BKGSU, lse_BKGS = _call_forward(static, _prepare(static, shared, *batched))
  o_BSNU = _heads_last(o_BKGSU, S)
  lse_BSN = _heads_last(lse_BKGS[..., None], S)[..., 0] / LOG2_E
  return (o_BSNU, lse_BSN), (shared, batched, o_BSNU, lse_BKGS)


def _backward(
  static: Static, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  shared, batched, o_BSNU, lse_BKGS = saved
  do_BSNU, dlse_BSN = cotangents
  q_BSNH, k_BTKH = batched[:2]
  inputs = _prepare(static, shared, *batched)
  K = k_BTKH.shape[2]
  delta_BSN = delta(o_BSNU, do_BSNU, dlse_BSN)
  delta_BKGS = _heads_first(delta_BSN[..., None], K, static.blocks.queries)[..., 0]
  do_BKGSU = _heads_first(do_BSNU, K, static.blocks.queries)
  # Without anything visible any number will do: the exponential of hidden scores is zero.
  of_queries = (do_BKGSU, jnp.maximum(lse_BKGS, HIDDEN / 2), delta_BKGS)

  ranges = _key_ranges(static, inputs)
  # Of several ranges each adds to the gradients of the queries.
  dtype = q_BSNH.dtype if len(ranges) == 1 else jnp.float32
  parts = [_call_backward(static, some, dtype, *of_queries) for some in ranges]
  dqs, dks, dvs = zip(*parts, strict=True)
  dq_BKGSH = functools.reduce(jnp.add, dqs).astype(q_BSNH.dtype)
  S, T = q_BSNH.shape[1], k_BTKH.shape[1]
  dk_BTKH, dv_BTKU = (jnp.swapaxes(jnp.concatenate(x, axis=2), 1, 2)[:, :T] for x in (dks, dvs))
  return None, _heads_last(dq_BKGSH, S), dk_BTKH, dv_BTKU, None, None


_attention.defvjp(_forward, _backward)


def _heads_first(x_BSNX: jax.Array, kv_heads: int, block: int) -> jax.Array:
  """[B, S, N, X] as [B, K, G, S, X], padded to whole blocks."""
  x_BNSX = jnp.swapaxes(pad(x_BSNX, 1, block), 1, 2)
  B, N, S, X = x_BNSX.shape
  return x_BNSX.reshape(B, kv_heads, N // kv_heads, S, X)


def _heads_last(x_BKGSX: jax.Array, length: int) -> jax.Array:
  """[B, K, G, S, X] as [B, S, N, X], without the padding."""
  B, K, G, S, X = x_BKGSX.shape
  return jnp.swapaxes(x_BKGSX.reshape(B, K * G, S, X), 1, 2)[:, :length]


def _prepare(static: Static, shared: _Shared, *batched: jax.Array) -> _Inputs:
  q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT = batched
  Q, P = static.blocks
  q_segments_BS, kv_segments_BT = pad(q_segments_BS, 1, Q), pad(kv_segments_BT, 1, P)
  B, K = q_BSNH.shape[0], k_BTKH.shape[2]
  visible_BIJ = jax.vmap(visible.visible_blocks, in_axes=(0, 0, None, None))(
    q_segments_BS.reshape(B, -1, Q),
    kv_segments_BT.reshape(B, -1, P),
    shared.q_start,
    shared.window,
  )
  window = shared.q_start if shared.window is None else shared.window
  return _Inputs(
    q_BKGSH=_heads_first(q_BSNH, K, Q),
    k_BKTH=jnp.swapaxes(pad(k_BTKH, 1, P), 1, 2),
    v_BKTU=jnp.swapaxes(pad(v_BTKU, 1, P), 1, 2),
    # Padding's queries get an id that no key has, so that kernels compare ids and nothing else.
    q_segments_B1S=jnp.where(q_segments_BS > 0, q_segments_BS, -1)[:, None],
    kv_segments_B1T=kv_segments_BT[:, None],
    limits=jnp.stack([shared.q_start, window]),
    slopes_N=shared.slopes_N,
    visible_BIJ=visible_BIJ,
  )


def _key_ranges(static: Static, inputs: _Inputs) -> list[_Inputs]:
  """The inputs with ranges of keys whose gradients fit into the chip's memory."""
  P = static.blocks.keys
  J, (H, U) = inputs.visible_BIJ.shape[2], (inputs.k_BKTH.shape[3], inputs.v_BKTU.shape[3])
  # Sums in float32, and two buffers of the result: while one leaves, the next row is computed.
  lanes = round_up(H, LANES) + round_up(U, LANES)
  per_block = P * lanes * (4 + 2 * inputs.k_BKTH.dtype.itemsize)
  most = max(1, _VMEM_OF_KEYS // per_block)
  even = math.ceil(J / math.ceil(J / most))
  ranges = []
  for first in range(0, J, even):
    blocks, keys = slice(first, first + even), slice(first * P, (first + even) * P)
    ranges.append(
      inputs._replace(
        k_BKTH=inputs.k_BKTH[:, :, keys],
        v_BKTU=inputs.v_BKTU[:, :, keys],
        kv_segments_B1T=inputs.kv_segments_B1T[:, :, keys],
        limits=inputs.limits - jnp.array([first * P, 0], jnp.int32),
        visible_BIJ=inputs.visible_BIJ[:, :, blocks],
      )
    )
  return ranges


def _specs(static: Static, inputs: _Inputs) -> dict[str, pl.BlockSpec]:
  """Where a step finds each array."""
  Q, P = static.blocks
  G, H, U = inputs.q_BKGSH.shape[2], inputs.k_BKTH.shape[3], inputs.v_BKTU.shape[3]
  T = inputs.k_BKTH.shape[2]

  def spec(shape: tuple[int | None, ...], place: Any) -> pl.BlockSpec:
    """`place` gives the indices of a block from the head, the step and the prefetched scalars."""

    def index(head: Any, z: Any, *refs: Any) -> tuple[Any, ...]:
      return place(head, z, pallas_tpu_kernels.read_scalars(static, refs)[0])

    return pl.BlockSpec(shape, index)

  def of_queries(width: int) -> pl.BlockSpec:
    return spec(
      (None, None, G, Q, width), lambda head, z, s: (s.row_Z[z], head, 0, s.query_block_Z[z], 0)
    )

  def of_keys(width: int) -> pl.BlockSpec:
    return spec(
      (None, None, P, width), lambda head, z, s: (s.key_row_Z[z], head, s.key_block_Z[z], 0)
    )

  def of_row(width: int) -> pl.BlockSpec:
    return spec((None, None, T, width), lambda head, z, s: (s.row_Z[z], head, 0, 0))

  sums = spec((None, None, G, Q), lambda head, z, s: (s.row_Z[z], head, 0, s.query_block_Z[z]))
  return {
    "q": of_queries(H),
    "k": of_keys(H),
    "v": of_keys(U),
    "q_segments": spec((None, 1, Q), lambda _, z, s: (s.row_Z[z], 0, s.query_block_Z[z])),
    "kv_segments": spec((None, 1, P), lambda _, z, s: (s.key_row_Z[z], 0, s.key_block_Z[z])),
    "o": of_queries(U),
    "do": of_queries(U),
    "lse": sums,
    "delta": sums,
    "dq": of_queries(H),
    "row_segments": spec((None, 1, T), lambda head, z, s: (s.row_Z[z], 0, 0)),
    "dk": of_row(H),
    "dv": of_row(U),
  }


def _call(
  static: Static,
  inputs: _Inputs,
  kernel: Any,
  more: dict[str, jax.Array],
  out: dict[str, tuple[tuple[int, ...], Any]],
  scratch: list[Any],
  products: tuple[int, int],
) -> Any:
  """Runs a kernel over the visible pairs. `more` are its inputs beside those of the forward, `out`
  shapes and dtypes of results, `products` how many products of [Q, P] by H and by U it computes per
  pair and head, for the estimate."""
  B, K, G, S, H = inputs.q_BKGSH.shape
  T, U = inputs.v_BKTU.shape[2:]
  steps = visible.steps(inputs.visible_BIJ)
  specs = _specs(static, inputs)
  arrays = {
    "q": inputs.q_BKGSH,
    "k": inputs.k_BKTH,
    "v": inputs.v_BKTU,
    "q_segments": inputs.q_segments_B1S,
    **more,
  }
  # Results vary over the mesh axes over which the inputs do.
  axes = jax.typeof(inputs.q_BKGSH).manual_axis_type
  results = {
    name: jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
    for name, (shape, dtype) in out.items()
  }
  slopes = () if inputs.slopes_N is None else (inputs.slopes_N,)
  scalars = (*steps[:-1], inputs.limits, *slopes)
  # As if rows were one document each: the compiler wants to know before the segments are.
  pairs = B * K * G * S * T // 2
  touched: list[Any] = [*arrays.values(), *results.values()]
  cost = pl.CostEstimate(
    flops=2 * pairs * (products[0] * H + products[1] * U),
    transcendentals=pairs,
    bytes_accessed=sum(x.size * x.dtype.itemsize for x in touched),
  )
  return pl.pallas_call(
    functools.partial(kernel, static),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(K, steps.total),
      in_specs=[specs[name] for name in arrays],
      out_specs=[specs[name] for name in out],
      scratch_shapes=scratch,
    ),
    out_shape=list(results.values()),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY), vmem_limit_bytes=_VMEM
    ),
    cost_estimate=cost,
    interpret=static.interpret,
    name=f"attention_{'_'.join(out)}",
  )(*scalars, *arrays.values())


def _call_forward(static: Static, inputs: _Inputs) -> Any:
  *lead, G, S, _ = inputs.q_BKGSH.shape
  U, Q = inputs.v_BKTU.shape[3], static.blocks.queries
  out = {
    "o": ((*lead, G, S, U), inputs.q_BKGSH.dtype),
    "lse": ((*lead, G, S), jnp.float32),
  }
  scratch = [pltpu.VMEM((G, Q, width), jnp.float32) for width in (U, LANES, LANES)]
  scratch.append(pltpu.VMEM((Q, LANES), jnp.int32))
  more = {"kv_segments": inputs.kv_segments_B1T}
  return _call(static, inputs, pallas_tpu_kernels.forward, more, out, scratch, (1, 1))


def _call_backward(static: Static, inputs: _Inputs, dq_dtype: Any, *of_queries: jax.Array) -> Any:
  k_BKTH, v_BKTU = inputs.k_BKTH, inputs.v_BKTU
  out = {
    "dq": (inputs.q_BKGSH.shape, dq_dtype),
    "dk": (k_BKTH.shape, k_BKTH.dtype),
    "dv": (v_BKTU.shape, v_BKTU.dtype),
  }
  names = ("row_segments", "do", "lse", "delta")
  more = dict(zip(names, (inputs.kv_segments_B1T, *of_queries), strict=True))
  shapes = (
    (inputs.q_BKGSH.shape[2], static.blocks.queries, k_BKTH.shape[3]),
    k_BKTH.shape[2:],
    v_BKTU.shape[2:],
  )
  scratch = [pltpu.VMEM(shape, jnp.float32) for shape in shapes]
  scratch.append(pltpu.VMEM((k_BKTH.shape[2], LANES), jnp.int32))
  return _call(static, inputs, pallas_tpu_kernels.backward, more, out, scratch, (3, 2))
