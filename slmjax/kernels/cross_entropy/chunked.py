"""Cross entropy in slices of the vocabulary, each slice as XLA computes it.

B rows, S positions, D model width, V vocabulary; per device R tokens and C columns of a slice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from slmjax.kernels import capping
from slmjax.kernels.cross_entropy import sliced
from slmjax.kernels.cross_entropy.sliced import Cotangents, Slice, Totals
from slmjax.sharding import Specs


def cross_entropy(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None,
  slice_elements: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `api.cross_entropy_and_table`, and `sliced.cross_entropy` for the memory it takes."""
  return sliced.cross_entropy(
    _Xla(),
    x_BSD,
    w_VD,
    targets_BS,
    specs=specs,
    softcap=softcap,
    slice_elements=slice_elements,
  )


@dataclasses.dataclass(frozen=True)
class _Xla:
  def fold(self, softcap: float | None, part: Slice, totals: Totals) -> Totals:
    top_R, sum_R, target_R = totals
    logits_RC = _hide_stale(part, _logits(softcap, part), -jnp.inf)
    new_top_R = jnp.maximum(top_R, logits_RC.max(axis=-1))
    sum_R = sum_R * jnp.exp(top_R - new_top_R)
    sum_R = sum_R + jnp.exp(logits_RC - new_top_R[:, None]).sum(axis=-1)
    first = 0 if part.stale is None else part.stale
    here_R = (part.columns_R >= first) & (part.columns_R < logits_RC.shape[1])
    column_R1 = jnp.where(here_R, part.columns_R, 0)[:, None]
    found_R = jnp.take_along_axis(logits_RC, column_R1, axis=1)[:, 0]
    return Totals(new_top_R, sum_R, jnp.where(here_R, found_R, target_R))

  def unfold(
    self, softcap: float | None, part: Slice, cotangents: Cotangents, dx_RD: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    logsumexp_R1, dsoftmax_R1, dnll_R1 = (x[:, None] for x in cotangents)
    logits_RC = _logits(softcap, part)
    is_target_RC = part.columns_R[:, None] == jnp.arange(logits_RC.shape[1])
    dlogits_RC = jnp.exp(logits_RC - logsumexp_R1) * dsoftmax_R1
    dlogits_RC -= jnp.where(is_target_RC, dnll_R1, 0.0)
    if softcap is not None:
      dlogits_RC *= capping.slope(logits_RC, softcap)
    dlogits_RC = _hide_stale(part, dlogits_RC, 0.0).astype(part.x_RD.dtype)
    product = "rc,cd->rd"
    dx_RD += jnp.einsum(product, dlogits_RC, part.w_CD, preferred_element_type=jnp.float32)
    dw_CD = jnp.einsum("rc,rd->cd", dlogits_RC, part.x_RD, preferred_element_type=jnp.float32)
    return dx_RD, dw_CD


def _logits(softcap: float | None, part: Slice) -> jax.Array:
  logits_RC = jnp.einsum("rd,cd->rc", part.x_RD, part.w_CD, preferred_element_type=jnp.float32)
  return capping.cap(logits_RC, softcap)


def _hide_stale(part: Slice, x_RC: jax.Array, value: float) -> jax.Array:
  if part.stale is None:
    return x_RC
  return jnp.where(jnp.arange(x_RC.shape[1]) >= part.stale, x_RC, value)
