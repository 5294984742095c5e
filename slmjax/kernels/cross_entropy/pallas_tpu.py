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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from slmjax.errors import UserError
from slmjax.kernels import capping, manual
from slmjax.kernels.cross_entropy import sliced
from slmjax.kernels.cross_entropy.sliced import Cotangents, Slice, Totals
from slmjax.sharding import Specs

# The lanes of a vector register; and a block to which padding is worth while, if otherwise they
# were smaller than half of it.
_LANES = 128
_GOOD = 512

# The compiler's own limit for the memory of one kernel is 16 MiB; every chip since v5e has 64 MiB
# and more. Of that, what blocks of tokens and of columns take at most at full width, with what is
# fetched ahead; the rest is for blocks of logits.
_VMEM = 48 * 2**20
_TOKENS_BYTES = 26 * 2**20
_COLUMNS_BYTES = 8 * 2**20

# No larger blocks than these: blocks of logits have to fit too.
_MOST_TOKENS = 1024
_MOST_COLUMNS = 640

# The widest of which 128 tokens and 128 columns fit.
_MOST_WIDTH = 8192


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
    UserError: what `refusal` says.
  """
  if (why := refusal(x_BSD)) is not None:
    raise UserError(f"cross entropy implementation 'pallas_tpu': {why}; use 'chunked'")
  return sliced.cross_entropy(
    _Mosaic(interpret),
    x_BSD,
    w_VD,
    targets_BS,
    specs=specs,
    softcap=softcap,
    slice_elements=slice_elements,
  )


def refusal(x_BSD: jax.Array) -> str | None:
  """What the kernels cannot do with such activations, or None."""
  if x_BSD.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{x_BSD.dtype.name} is not built, only bfloat16 and float32"
  if x_BSD.shape[2] > _MOST_WIDTH:
    return f"width {x_BSD.shape[2]} is over {_MOST_WIDTH}"
  return None


@dataclasses.dataclass(frozen=True)
class _Mosaic:
  interpret: Any

  def fold(self, softcap: float | None, part: Slice, totals: Totals) -> Totals:
    R, D = part.x_RD.shape
    blocked = _blocked(part, totals, bytes_per_token=2 * D * part.x_RD.dtype.itemsize)
    out = [(jax.ShapeDtypeStruct(x.shape, x.dtype), blocked.row) for x in blocked.rows[1:]]
    totals = self._call(functools.partial(_fold, softcap, blocked.columns), blocked, [], out)
    return Totals(*(x[0, :R] for x in totals))

  def unfold(
    self, softcap: float | None, part: Slice, cotangents: Cotangents, dx_RD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    (R, D), C = part.x_RD.shape, part.w_CD.shape[0]
    sizes = 2 * part.x_RD.dtype.itemsize + 4 * dx_RD.dtype.itemsize  # dx comes and goes
    blocked = _blocked(part, cotangents, bytes_per_token=D * sizes)
    dx_RD = _pad(dx_RD, blocked.x_RD.shape[0])
    dlogits = (blocked.w_CD.shape[0], dx_RD.shape[0])
    out = [
      (jax.ShapeDtypeStruct(dx_RD.shape, dx_RD.dtype), blocked.tokens),
      (jax.ShapeDtypeStruct(dlogits, part.x_RD.dtype), blocked.logits),
    ]
    kernel = functools.partial(_unfold, softcap, blocked.columns)
    dx_RD, dlogits_CR = self._call(kernel, blocked, [(dx_RD, blocked.tokens)], out)
    dlogits_CR = dlogits_CR[:C, :R]
    dw_CD = jnp.einsum("cr,rd->cd", dlogits_CR, part.x_RD, preferred_element_type=jnp.float32)
    return dx_RD[:R], dw_CD

  def _call(
    self,
    kernel: functools.partial,
    blocked: "_Blocked",
    in_place: list[tuple[jax.Array, pl.BlockSpec]],
    out: list[tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
  ) -> Any:
    """Runs a kernel over all blocks. The arrays `in_place` are inputs whose memory the first
    outputs take; for each the kernel has a product more."""
    inputs = [blocked.stale_1, *blocked.rows, blocked.x_RD, blocked.w_CD, *(x for x, _ in in_place)]
    axes = manual.varying_axes(*inputs)
    inputs = [manual.vary_over(x, axes) for x in inputs]
    types = jax.typeof(inputs[0]).manual_axis_type
    (R, D), C = blocked.x_RD.shape, blocked.w_CD.shape[0]
    touched: list[Any] = [*inputs, *(x for x, _ in out), *[blocked.w_CD] * (blocked.grid[0] - 1)]
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=blocked.grid,
        in_specs=[
          *[blocked.row] * len(blocked.rows),
          blocked.tokens,
          blocked.table,
          *(spec for _, spec in in_place),
        ],
        out_specs=[spec for _, spec in out],
      ),
      out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype, manual_axis_type=types) for x, _ in out],
      input_output_aliases={len(inputs) - len(in_place) + i: i for i in range(len(in_place))},
      compiler_params=pltpu.CompilerParams(
        # Blocks of tokens are independent, those of columns follow each other.
        dimension_semantics=(pltpu.PARALLEL, pltpu.ARBITRARY),
        vmem_limit_bytes=_VMEM,
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * R * C * D * (1 + len(in_place)),
        transcendentals=R * C,
        bytes_accessed=sum(x.size * x.dtype.itemsize for x in touched),
      ),
      interpret=self.interpret,
      name=f"cross_entropy{kernel.func.__name__}",
    )(*inputs)


class _Blocked(NamedTuple):
  """A slice padded to whole blocks, and where a step finds each array.

  `rows` are the targets' columns, and then what an implementation is given per token. `columns` is
  how many count, None if all do.
  """

  stale_1: jax.Array
  rows: list[jax.Array]
  x_RD: jax.Array
  w_CD: jax.Array
  columns: int | None
  grid: tuple[int, int]
  row: pl.BlockSpec
  tokens: pl.BlockSpec
  table: pl.BlockSpec
  logits: pl.BlockSpec


def _blocked(part: Slice, per_token: Totals | Cotangents, bytes_per_token: int) -> _Blocked:
  D = part.x_RD.shape[1]
  bytes_per_column = 2 * D * part.w_CD.dtype.itemsize
  R, Q = _blocks(part.x_RD.shape[0], min(_TOKENS_BYTES // bytes_per_token, _MOST_TOKENS))
  C, P = _blocks(part.w_CD.shape[0], min(_COLUMNS_BYTES // bytes_per_column, _MOST_COLUMNS))
  stale = jnp.int32(0) if part.stale is None else part.stale
  # A target among the stale columns was found in the slice before.
  columns_R = jnp.where(part.columns_R >= stale, part.columns_R, -1)
  # The index maps' arguments: block of tokens, block of columns, the prefetched scalar.
  return _Blocked(
    stale_1=stale[None],
    rows=[_pad(x, R)[None] for x in (columns_R, *per_token)],
    x_RD=_pad(part.x_RD, R),
    w_CD=_pad(part.w_CD, C),
    columns=None if part.stale is None and part.w_CD.shape[0] == C else part.w_CD.shape[0],
    grid=(R // Q, C // P),
    row=pl.BlockSpec((1, Q), lambda i, j, _: (0, i)),
    tokens=pl.BlockSpec((Q, D), lambda i, j, _: (i, 0)),
    table=pl.BlockSpec((P, D), lambda i, j, _: (j, 0)),
    logits=pl.BlockSpec((P, Q), lambda i, j, _: (j, i)),
  )


def _blocks(length: int, largest: int) -> tuple[int, int]:
  """The length and the largest block of whole registers that divides it. It is padded if it is no
  multiple of a register, or if only small blocks divide it."""
  largest = largest // _LANES * _LANES
  for multiple in (1, _LANES, min(largest, _GOOD)):
    padded = -(-length // multiple) * multiple
    block = next((b for b in range(largest, 0, -_LANES) if padded % b == 0), 0)
    if block >= min(_GOOD // 2, largest, padded):
      break
  return padded, block


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
