"""Cross entropy in slices of the vocabulary: what every implementation that never holds the logits
shares.

Each device scans over slices of its shard of the vocabulary, for its own tokens. A slice of the
table is gathered over its width, multiplied, folded into a running log-sum-exp and dropped; the
backward gathers and multiplies again, and scatters the slice's gradient back to where it is stored.
How one slice is folded, and unfolded again in the backward, is the implementation's.

B rows, S positions, D model width, V vocabulary; per device R tokens (rows times positions) and
slices of C columns of the logits. Inside an island these letters are sizes on one device.
"""

import dataclasses
import functools
import math
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from slmjax.kernels import manual
from slmjax.sharding import Specs

# A slice's width is a multiple of the first, a whole number of lanes and of matrix unit columns; or
# of the second, where it is wider, so that kernels find large blocks that divide it.
_LANES = 128
_BLOCK = 512


class Slice(NamedTuple):
  """A slice of the logits on one device: its factors, and where the targets are.

  `w_CD` has x's dtype. `columns_R` are the targets as columns of this slice, outside [0, C) where
  they are elsewhere. The first `stale` columns have been in another slice; None says that no slice
  of this program has any.
  """

  x_RD: jax.Array
  w_CD: jax.Array
  columns_R: jax.Array
  stale: jax.Array | None


class Totals(NamedTuple):
  """Over the columns so far, float32: the largest logit, the sum of exponentials of differences to
  it, the target's logit (0 while it has not come by)."""

  top_R: jax.Array
  sum_R: jax.Array
  target_R: jax.Array


class Cotangents(NamedTuple):
  """What a slice's gradient depends on, float32: softmax times `dsoftmax_R`, minus `dnll_R` at the
  target."""

  logsumexp_R: jax.Array
  dsoftmax_R: jax.Array
  dnll_R: jax.Array


class Passes(Protocol):
  """How an implementation computes a slice, on the arrays of one device. Hashable."""

  def fold(self, softcap: float | None, part: Slice, totals: Totals) -> Totals:
    """The totals with this slice in them."""

  def unfold(
    self, softcap: float | None, part: Slice, cotangents: Cotangents, dx_RD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """The float32 `dx_RD` with this slice's part added, and the slice's gradient [C, D] (float32),
    whose stale columns are zero."""


@dataclasses.dataclass(frozen=True)
class _Static:
  """What the compiled program depends on."""

  passes: Passes
  specs: Specs
  softcap: float | None
  slice_elements: int


@dataclasses.dataclass(frozen=True)
class Slices:
  """`count` slices of `width` columns over `total`. Where they do not fit, the last one begins
  earlier, and its first columns, which the slice before it has already had, are stale."""

  count: int
  width: int
  total: int

  @classmethod
  def fit(cls, total: int, per_column: int, elements: int) -> "Slices":
    """Slices of at most so many elements, so many to each column; but of 128 columns at least."""
    widest = max(elements // per_column // _LANES, 1) * _LANES
    unit = _BLOCK if widest >= _BLOCK else _LANES
    count = math.ceil(total / (widest // unit * unit))
    width = min(math.ceil(total / count / unit) * unit, total)
    return cls(math.ceil(total / width), width, total)

  def start(self, i: jax.Array) -> jax.Array:
    return jnp.minimum(i * self.width, self.total - self.width)

  def stale(self, i: jax.Array) -> jax.Array | None:
    return None if self.total % self.width == 0 else i * self.width - self.start(i)


def cross_entropy(
  passes: Passes,
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None,
  slice_elements: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `api.cross_entropy_and_table`.

  Temporaries on each device: a few slices of logits, a slice of the table at full width, and for
  the backward float32 gradients of its own tokens and of its own shard of the table; the latter is
  the cotangent of the table that was passed on, if that is float32.
  """
  return _cross_entropy(_Static(passes, specs, softcap, slice_elements), x_BSD, w_VD, targets_BS)


_Outputs = tuple[jax.Array, jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> _Outputs:
  specs = static.specs
  island = jax.shard_map(
    functools.partial(_local_forward, static),
    in_specs=(specs.act_BSD, specs.embed_VD.stored, specs.tokens_BS),
    out_specs=(specs.tokens_BS, specs.tokens_BS),
  )
  return *island(x_BSD, w_VD, targets_BS), w_VD


def _forward(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> tuple[_Outputs, tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
  outputs = _cross_entropy(static, x_BSD, w_VD, targets_BS)
  return outputs, (x_BSD, w_VD, targets_BS, outputs[1])


def _backward(
  static: _Static,
  saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
  cotangents: _Outputs,
) -> tuple[jax.Array, jax.Array, None]:
  specs = static.specs
  tokens_BS, table_VD = specs.tokens_BS, specs.embed_VD.stored
  island = jax.shard_map(
    functools.partial(_local_backward, static),
    in_specs=(specs.act_BSD, table_VD, *[tokens_BS] * 4, table_VD),
    out_specs=(specs.act_BSD, table_VD),
  )
  return *island(*saved, *cotangents), None


_cross_entropy.defvjp(_forward, _backward)


def _local_forward(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  specs = static.specs
  x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
  slices = Slices.fit(w_VD.shape[0], max(x_RD.shape), static.slice_elements)  # logits and table
  columns_R = _columns(specs, targets_BS, w_VD)

  def fold(totals: Totals, i: jax.Array) -> tuple[Totals, None]:
    part = _slice(specs, slices, x_RD, w_VD, columns_R, i)
    return static.passes.fold(static.softcap, part, totals), None

  axes = manual.varying_axes(x_BSD, w_VD, targets_BS)
  zeros_R = manual.vary_over(jnp.zeros(x_RD.shape[0], jnp.float32), axes)
  start = Totals(zeros_R - jnp.inf, zeros_R, zeros_R)
  (top_R, sum_R, target_R), _ = jax.lax.scan(fold, start, jnp.arange(slices.count))

  whole_top_R = jax.lax.pmax(top_R, specs.vocab_axis)
  sum_R = jax.lax.psum(sum_R * jnp.exp(top_R - whole_top_R), specs.vocab_axis)
  logsumexp_R = whole_top_R + jnp.log(sum_R)
  nll_R = logsumexp_R - jax.lax.psum(target_R, specs.vocab_axis)
  return nll_R.reshape(targets_BS.shape), logsumexp_R.reshape(targets_BS.shape)


def _local_backward(
  static: _Static,
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  logsumexp_BS: jax.Array,
  dnll_BS: jax.Array,
  dlogsumexp_BS: jax.Array,
  dtable_VD: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  specs = static.specs
  x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
  slices = Slices.fit(w_VD.shape[0], max(x_RD.shape), static.slice_elements)  # logits and table
  columns_R = _columns(specs, targets_BS, w_VD)
  # Each output's derivative by the logits has the softmax; that of nll also minus the target's 1.
  cotangents = Cotangents(
    logsumexp_BS.reshape(-1), (dnll_BS + dlogsumexp_BS).reshape(-1), dnll_BS.reshape(-1)
  )

  def unfold(
    carry: tuple[jax.Array, jax.Array], i: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    dx_RD, dw_VD = carry
    part = _slice(specs, slices, x_RD, w_VD, columns_R, i)
    dx_RD, dw_CD = static.passes.unfold(static.softcap, part, cotangents, dx_RD)
    dw_CD = jax.lax.psum_scatter(dw_CD, specs.fsdp_axis, scatter_dimension=1, tiled=True)
    start = slices.start(i)
    # Added apart from the product, which is slower if it also adds.
    dw_CD = jax.lax.optimization_barrier(dw_CD)
    dw_CD += jax.lax.dynamic_slice_in_dim(dw_VD, start, slices.width, axis=0)
    return (dx_RD, jax.lax.dynamic_update_slice_in_dim(dw_VD, dw_CD, start, axis=0)), None

  axes = manual.varying_axes(x_BSD, w_VD, targets_BS)
  dx_RD = manual.vary_over(jnp.zeros(x_RD.shape, jnp.float32), axes)
  # What others have summed up is what the sum starts from. The scatters sum over fsdp; the other
  # axes that spread tokens are summed over in the end, in one collective.
  others = tuple(axis for axis in specs.row_axes if axis != specs.fsdp_axis)
  dw_VD = manual.vary_over(manual.on_first(dtable_VD, others).astype(jnp.float32), axes)
  (dx_RD, dw_VD), _ = jax.lax.scan(unfold, (dx_RD, dw_VD), jnp.arange(slices.count))

  dx_RD = jax.lax.psum(dx_RD, specs.vocab_axis)
  dw_VD = jax.lax.psum(dw_VD, others)
  return dx_RD.reshape(x_BSD.shape).astype(x_BSD.dtype), dw_VD.astype(w_VD.dtype)


def _columns(specs: Specs, targets_BS: jax.Array, w_VD: jax.Array) -> jax.Array:
  """The targets as row numbers of this device's shard of the table; outside it where not here."""
  return targets_BS.reshape(-1) - jax.lax.axis_index(specs.vocab_axis) * w_VD.shape[0]


def _slice(
  specs: Specs,
  slices: Slices,
  x_RD: jax.Array,
  w_VD: jax.Array,
  columns_R: jax.Array,
  i: jax.Array,
) -> Slice:
  """Slice i, of the table at its full width. Cast first, so that fsdp moves the narrow type."""
  w_CD = jax.lax.dynamic_slice_in_dim(w_VD, slices.start(i), slices.width, axis=0)
  # XLA for TPU moves a cast out of the loop, and holds the whole table in x's dtype; a rounding it
  # does not. The barrier makes the slice an array of its own: else each block of the product casts
  # it anew.
  info = jnp.finfo(x_RD.dtype)
  w_CD = jax.lax.reduce_precision(w_CD, info.nexp, info.nmant).astype(x_RD.dtype)
  w_CD = jax.lax.optimization_barrier(w_CD)
  w_CD = jax.lax.all_gather(w_CD, specs.fsdp_axis, axis=1, tiled=True)
  return Slice(x_RD, w_CD, columns_R - slices.start(i), slices.stale(i))
