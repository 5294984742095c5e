"""Cross entropy in slices of the vocabulary, each slice in Mosaic kernels for TPU.

The forward kernel folds blocks of logits into the totals where they are made, in VMEM. The backward
kernel makes them again, turns them into their gradient, multiplies that by the table for dx at once
and writes it, in x's dtype, for the table's gradient. That last product is XLA's, which does it as
fast as the matrix units go.

Logits are transposed, [columns, tokens]: everything that there is one of per token then is a row of
lanes, and sums over the vocabulary add registers.

B rows, S positions, D model width, V vocabulary; per device R tokens and C columns of a slice; a
step of a kernel computes a block of P columns by Q tokens; 1 in a name is an axis of size 1.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.errors import UserError
from slmjax.kernels import capping, manual
from slmjax.kernels.cross_entropy import sliced
from slmjax.kernels.cross_entropy.sliced import Cotangents, Slice, Totals
from slmjax.sharding import Specs

# The lanes of a vector register.
_LANES = 128

# The compiler's own limit for the memory of one kernel is 16 MiB; every chip since v5e has 64 MiB
# and more.
_VMEM = 48 * 2**20

# A block has at most so many columns, and so many tokens, and at full width so many bytes of the
# widest array of tokens: many products per byte of the table, which each block of tokens reads.
_COLUMNS = 640
_TOKENS = 1024
_BYTES = 4 * 2**20


def cross_entropy(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None,
  slice_elements: int,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `api.cross_entropy_and_table`, and `sliced.cross_entropy` for the memory it takes, without
  the float32 logits.

  Products of float32 arrays have the precision of `jax.default_matmul_precision`, as in XLA: on a
  TPU they are of bfloat16 unless that says otherwise.

  Args:
    interpret: runs the kernels on any platform, for tests: True or `pltpu.InterpretParams`.

  Raises:
    UserError: x is neither bfloat16 nor float32.
  """
  if x_BSD.dtype not in (jnp.bfloat16, jnp.float32):
    raise UserError(
      f"cross entropy implementation 'pallas_tpu': {x_BSD.dtype.name} is not built, only bfloat16 "
      "and float32; use 'chunked'"
    )
  return sliced.cross_entropy(
    _Mosaic(interpret),
    x_BSD,
    w_VD,
    targets_BS,
    specs=specs,
    softcap=softcap,
    slice_elements=slice_elements,
  )


@dataclasses.dataclass(frozen=True)
class _Mosaic:
  interpret: Any

  def fold(self, softcap: float | None, part: Slice, totals: Totals) -> Totals:
    R, C = part.x_RD.shape[0], part.w_CD.shape[0]
    out = [jax.ShapeDtypeStruct((1, _whole(R)), jnp.float32)] * 3
    kernel = functools.partial(_fold, softcap, None if _is_whole(part) else C)
    totals = self._call(kernel, "fold", part, totals, None, out)
    return Totals(*(x[0, :R] for x in totals))

  def unfold(
    self, softcap: float | None, part: Slice, cotangents: Cotangents, dx_RD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    R, C = part.x_RD.shape[0], part.w_CD.shape[0]
    dlogits = jax.ShapeDtypeStruct((_whole_blocks(C), _whole(R)), part.x_RD.dtype)
    kernel = functools.partial(_unfold, softcap, None if _is_whole(part) else C)
    dx_RD, dlogits_CR = self._call(kernel, "unfold", part, cotangents, dx_RD, [dlogits])
    dlogits_CR = dlogits_CR[:C, :R]
    dw_CD = jnp.einsum("cr,rd->cd", dlogits_CR, part.x_RD, preferred_element_type=jnp.float32)
    return dx_RD[:R], dw_CD

  def _call(
    self,
    kernel: Any,
    name: str,
    part: Slice,
    per_token: Totals | Cotangents,
    dx_RD: jax.Array | None,
    out: list[jax.ShapeDtypeStruct],
  ) -> Any:
    """Runs a kernel over all blocks. With `dx_RD` that is its first output too, in its place."""
    R, D = part.x_RD.shape
    x_RD, w_CD = _pad(part.x_RD, _whole(R)), _pad(part.w_CD, _whole_blocks(part.w_CD.shape[0]))
    stale = jnp.int32(0) if part.stale is None else part.stale
    # A target among the stale columns was found in the slice before.
    columns_R = jnp.where(part.columns_R >= stale, part.columns_R, -1)
    rows = [_pad(x, _whole(R))[None] for x in (columns_R, *per_token)]
    tokens_bytes = D * (x_RD if dx_RD is None else dx_RD).dtype.itemsize
    P, Q = _block(w_CD.shape[0]), _even_block(x_RD.shape[0], min(_TOKENS, _BYTES // tokens_bytes))

    # Of the grid (blocks of tokens, blocks of columns), and the prefetched scalar.
    row = pl.BlockSpec((1, Q), lambda i, j, _: (0, i))
    tokens = pl.BlockSpec((Q, D), lambda i, j, _: (i, 0))
    columns = pl.BlockSpec((P, D), lambda i, j, _: (j, 0))
    logits = pl.BlockSpec((P, Q), lambda i, j, _: (j, i))
    inputs = [stale[None], *rows, x_RD, w_CD]
    in_specs = [*[row] * len(rows), tokens, columns]
    out_specs = [row if x.shape[0] == 1 else logits for x in out]
    in_place = {}
    if dx_RD is not None:
      in_place = {len(inputs): 0}
      inputs, in_specs = [*inputs, _pad(dx_RD, _whole(R))], [*in_specs, tokens]
      out, out_specs = (
        [jax.ShapeDtypeStruct(inputs[-1].shape, dx_RD.dtype), *out],
        [tokens, *out_specs],
      )
    axes = manual.varying_axes(*inputs)
    inputs = [manual.vary_over(x, axes) for x in inputs]
    types = jax.typeof(inputs[0]).manual_axis_type
    grid = (pl.cdiv(x_RD.shape[0], Q), w_CD.shape[0] // P)
    pairs = x_RD.shape[0] * w_CD.shape[0]
    touched = [*inputs, *out, *[w_CD] * (grid[0] - 1)]
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=out_specs
      ),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=types) for x in out],
      input_output_aliases=in_place,
      compiler_params=pltpu.CompilerParams(
        # Blocks of tokens are independent, those of columns follow each other.
        dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY),
        vmem_limit_bytes=_VMEM,
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * pairs * D * (1 if dx_RD is None else 2),
        transcendentals=pairs,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in touched),
      ),
      interpret=self.interpret,
      name=f"cross_entropy_{name}",
    )(*inputs)


def _whole(tokens: int) -> int:
  return -(-tokens // _LANES) * _LANES


def _whole_blocks(columns: int) -> int:
  """So many columns that they have blocks which are not small."""
  unit = 512 if columns > 512 else _LANES
  whole = columns % _LANES == 0 and _block(columns) >= min(256, columns)
  return columns if whole else -(-columns // unit) * unit


def _block(columns: int) -> int:
  """The largest block of whole registers that divides the columns."""
  return next(p for p in range(_COLUMNS, 0, -_LANES) if columns % p == 0)


def _even_block(length: int, largest: int) -> int:
  """The smallest block, in whole registers, of which as few are enough as of the largest."""
  blocks = -(-length // max(largest // _LANES * _LANES, _LANES))
  return _whole(-(-length // blocks))


def _is_whole(part: Slice) -> bool:
  """Whether every column that a kernel computes counts."""
  C = part.w_CD.shape[0]
  return part.stale is None and _whole_blocks(C) == C


def _pad(x: jax.Array, length: int) -> jax.Array:
  return jnp.pad(x, [(0, length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


_dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
_LAST_LAST, _FIRST_FIRST = ((((i,), (i,)), ((), ())) for i in (1, 0))


def _logits(softcap: float | None, x_QD: Any, w_PD: Any) -> jax.Array:
  return capping.cap(_dot(w_PD[...], x_QD[...], _LAST_LAST), softcap)


def _hide(columns: int | None, stale: Any, x_PQ: jax.Array, value: float) -> jax.Array:
  """`value` in the columns that do not count; None says that all do."""
  if columns is None:
    return x_PQ
  P = x_PQ.shape[0]
  column_PQ = jax.lax.broadcasted_iota(jnp.int32, x_PQ.shape, 0) + pl.program_id(1) * P
  return jnp.where((column_PQ >= stale[0]) & (column_PQ < columns), x_PQ, value)


def _is_target(columns_1Q: Any, shape: tuple[int, ...]) -> jax.Array:
  column_1Q = columns_1Q[...] - pl.program_id(1) * shape[0]
  return jax.lax.broadcasted_iota(jnp.int32, shape, 0) == column_1Q


def _fold(softcap: float | None, columns: int | None, stale: Any, *refs: Any) -> None:
  columns_1Q, old_top_1Q, old_sum_1Q, old_target_1Q, x_QD, w_PD, top_1Q, sum_1Q, target_1Q = refs

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    top_1Q[...], sum_1Q[...], target_1Q[...] = old_top_1Q[...], old_sum_1Q[...], old_target_1Q[...]

  logits_PQ = _logits(softcap, x_QD, w_PD)
  is_target_PQ = _is_target(columns_1Q, logits_PQ.shape)
  target_1Q[...] += jnp.where(is_target_PQ, logits_PQ, 0.0).sum(axis=0, keepdims=True)
  logits_PQ = _hide(columns, stale, logits_PQ, -jnp.inf)
  new_top_1Q = jnp.maximum(top_1Q[...], logits_PQ.max(axis=0, keepdims=True))
  shrink_1Q = jnp.exp(top_1Q[...] - new_top_1Q)
  more_1Q = jnp.exp(logits_PQ - new_top_1Q).sum(axis=0, keepdims=True)
  sum_1Q[...] = sum_1Q[...] * shrink_1Q + more_1Q
  top_1Q[...] = new_top_1Q


def _unfold(softcap: float | None, columns: int | None, stale: Any, *refs: Any) -> None:
  columns_1Q, lse_1Q, dsoftmax_1Q, dnll_1Q, x_QD, w_PD, old_dx_QD, dx_QD, dlogits_PQ = refs

  @pl.when(pl.program_id(1) == 0)
  def _() -> None:
    dx_QD[...] = old_dx_QD[...]

  logits_PQ = _logits(softcap, x_QD, w_PD)
  is_target_PQ = _is_target(columns_1Q, logits_PQ.shape)
  gradient_PQ = jnp.exp(logits_PQ - lse_1Q[...]) * dsoftmax_1Q[...]
  gradient_PQ -= jnp.where(is_target_PQ, dnll_1Q[...], 0.0)
  if softcap is not None:
    gradient_PQ *= capping.slope(logits_PQ, softcap)
  gradient_PQ = _hide(columns, stale, gradient_PQ, 0.0).astype(dlogits_PQ.dtype)
  dlogits_PQ[...] = gradient_PQ
  dx_QD[...] += _dot(gradient_PQ, w_PD[...], _FIRST_FIRST)
