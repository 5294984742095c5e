"""Cross entropy in slices of the vocabulary: neither the logits nor a gathered table ever exist.

Each device scans over slices of its shard of the vocabulary, for its own tokens. A slice of the
table is gathered over its width, multiplied, folded into a running log-sum-exp and dropped; the
backward gathers and multiplies again, and scatters the slice's gradient back to where it is stored.

B rows, S positions, D model width, V vocabulary; per device R tokens (rows times positions) and
slices of C columns of the logits. Inside an island these letters are sizes on one device.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from slmjax.kernels import capping, manual
from slmjax.sharding import Specs

_Three = tuple[jax.Array, jax.Array, jax.Array]

# A slice's width is a multiple of this: a whole number of lanes and of matrix unit columns.
_LANES = 128


@dataclasses.dataclass(frozen=True)
class _Static:
  """What the compiled program depends on."""

  specs: Specs
  softcap: float | None
  slice_elements: int


@dataclasses.dataclass(frozen=True)
class _Slices:
  """`count` slices of `width` columns over `total`. Where they do not fit, the last one begins
  earlier, and its first columns, which the slice before it has already had, are `stale`."""

  count: int
  width: int
  total: int

  @classmethod
  def fit(cls, total: int, tokens: int, elements: int) -> "_Slices":
    widest = max(elements // tokens // _LANES, 1) * _LANES
    count = math.ceil(total / widest)
    width = min(math.ceil(total / count / _LANES) * _LANES, total)
    return cls(math.ceil(total / width), width, total)

  def start(self, i: jax.Array) -> jax.Array:
    return jnp.minimum(i * self.width, self.total - self.width)

  def hide_stale(self, i: jax.Array, x_RC: jax.Array, value: float) -> jax.Array:
    if self.total % self.width == 0:
      return x_RC
    return jnp.where(jnp.arange(self.width) >= i * self.width - self.start(i), x_RC, value)


def cross_entropy(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None,
  slice_elements: int,
) -> tuple[jax.Array, jax.Array]:
  """See `api.cross_entropy`.

  Temporaries on each device: a few slices of logits, a slice of the table at full width, and for
  the backward float32 gradients of its own tokens and of its own shard of the table.
  """
  return _cross_entropy(_Static(specs, softcap, slice_elements), x_BSD, w_VD, targets_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  specs = static.specs
  island = jax.shard_map(
    functools.partial(_local_forward, static),
    in_specs=(specs.act_BSD, specs.embed_VD.stored, specs.tokens_BS),
    out_specs=(specs.tokens_BS, specs.tokens_BS),
  )
  return island(x_BSD, w_VD, targets_BS)


def _forward(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array, jax.Array]]:
  nll_BS, logsumexp_BS = _cross_entropy(static, x_BSD, w_VD, targets_BS)
  return (nll_BS, logsumexp_BS), (x_BSD, w_VD, targets_BS, logsumexp_BS)


def _backward(
  static: _Static,
  saved: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None]:
  specs = static.specs
  tokens_BS = specs.tokens_BS
  island = jax.shard_map(
    functools.partial(_local_backward, static),
    in_specs=(specs.act_BSD, specs.embed_VD.stored, *[tokens_BS] * 4),
    out_specs=(specs.act_BSD, specs.embed_VD.stored),
  )
  return *island(*saved, *cotangents), None


_cross_entropy.defvjp(_forward, _backward)


def _local_forward(
  static: _Static, x_BSD: jax.Array, w_VD: jax.Array, targets_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  specs = static.specs
  x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
  slices = _Slices.fit(w_VD.shape[0], x_RD.shape[0], static.slice_elements)
  columns_R = _columns(specs, targets_BS, w_VD)

  def fold(carry: _Three, i: jax.Array) -> tuple[_Three, None]:
    top_R, sum_R, target_R = carry
    w_CD = _gather_slice(specs, slices, w_VD, i, x_RD.dtype)
    logits_RC = slices.hide_stale(i, _logits(static, x_RD, w_CD), -jnp.inf)
    new_top_R = jnp.maximum(top_R, logits_RC.max(axis=-1))
    sum_R = sum_R * jnp.exp(top_R - new_top_R)
    sum_R = sum_R + jnp.exp(logits_RC - new_top_R[:, None]).sum(axis=-1)
    column_R = columns_R - slices.start(i)
    here_R = (column_R >= i * slices.width - slices.start(i)) & (column_R < slices.width)
    found_R1 = jnp.take_along_axis(logits_RC, jnp.where(here_R, column_R, 0)[:, None], axis=1)
    return (new_top_R, sum_R, jnp.where(here_R, found_R1[:, 0], target_R)), None

  axes = manual.varying_axes(x_BSD, w_VD, targets_BS)
  zeros_R = manual.vary_over(jnp.zeros(x_RD.shape[0], jnp.float32), axes)
  start = (zeros_R - jnp.inf, zeros_R, zeros_R)
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
) -> tuple[jax.Array, jax.Array]:
  specs = static.specs
  x_RD = x_BSD.reshape(-1, x_BSD.shape[-1])
  slices = _Slices.fit(w_VD.shape[0], x_RD.shape[0], static.slice_elements)
  columns_R = _columns(specs, targets_BS, w_VD)
  logsumexp_R1, dnll_R1 = logsumexp_BS.reshape(-1, 1), dnll_BS.reshape(-1, 1)
  # Each output's derivative by the logits has the softmax; that of nll also minus the target's 1.
  dsoftmax_R1 = dnll_R1 + dlogsumexp_BS.reshape(-1, 1)

  def unfold(
    carry: tuple[jax.Array, jax.Array], i: jax.Array
  ) -> tuple[tuple[jax.Array, jax.Array], None]:
    dx_RD, dw_VD = carry
    w_CD = _gather_slice(specs, slices, w_VD, i, x_RD.dtype)
    logits_RC = _logits(static, x_RD, w_CD)
    softmax_RC = jnp.exp(logits_RC - logsumexp_R1)
    is_target_RC = (columns_R - slices.start(i))[:, None] == jnp.arange(slices.width)
    dlogits_RC = softmax_RC * dsoftmax_R1 - jnp.where(is_target_RC, dnll_R1, 0.0)
    if static.softcap is not None:
      dlogits_RC *= capping.slope(logits_RC, static.softcap)
    dlogits_RC = slices.hide_stale(i, dlogits_RC, 0.0).astype(x_RD.dtype)
    dx_RD = dx_RD + jnp.einsum("rc,cd->rd", dlogits_RC, w_CD, preferred_element_type=jnp.float32)
    dw_CD = jnp.einsum("rc,rd->cd", dlogits_RC, x_RD, preferred_element_type=jnp.float32)
    dw_CD = jax.lax.psum_scatter(dw_CD, specs.fsdp_axis, scatter_dimension=1, tiled=True)
    dw_VD = jax.lax.dynamic_update_slice_in_dim(dw_VD, dw_CD, slices.start(i), axis=0)
    return (dx_RD, dw_VD), None

  axes = manual.varying_axes(x_BSD, w_VD, targets_BS)
  dx_RD = manual.vary_over(jnp.zeros(x_RD.shape, jnp.float32), axes)
  dw_VD = manual.vary_over(jnp.zeros(w_VD.shape, jnp.float32), axes)
  # From the last slice to the first: what a last slice that overlaps writes over its stale columns
  # (zeros) is then overwritten by the slice that they belong to.
  (dx_RD, dw_VD), _ = jax.lax.scan(unfold, (dx_RD, dw_VD), jnp.arange(slices.count), reverse=True)

  dx_RD = jax.lax.psum(dx_RD, specs.vocab_axis)
  # The scatter has summed over fsdp; the other axes that spread tokens remain, in one collective.
  dw_VD = jax.lax.psum(dw_VD, tuple(a for a in specs.row_axes if a != specs.fsdp_axis))
  return dx_RD.reshape(x_BSD.shape).astype(x_BSD.dtype), dw_VD.astype(w_VD.dtype)


def _columns(specs: Specs, targets_BS: jax.Array, w_VD: jax.Array) -> jax.Array:
  """The targets as row numbers of this device's shard of the table; outside it where not here."""
  return targets_BS.reshape(-1) - jax.lax.axis_index(specs.vocab_axis) * w_VD.shape[0]


def _gather_slice(
  specs: Specs, slices: _Slices, w_VD: jax.Array, i: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Slice i of the table at its full width. Cast first, so that fsdp moves the narrow type."""
  w_CD = jax.lax.dynamic_slice_in_dim(w_VD, slices.start(i), slices.width, axis=0)
  return jax.lax.all_gather(w_CD.astype(dtype), specs.fsdp_axis, axis=1, tiled=True)


def _logits(static: _Static, x_RD: jax.Array, w_CD: jax.Array) -> jax.Array:
  logits_RC = jnp.einsum("rd,cd->rc", x_RD, w_CD, preferred_element_type=jnp.float32)
  return capping.cap(logits_RC, static.softcap)
