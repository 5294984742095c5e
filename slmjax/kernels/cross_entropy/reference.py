"""Cross entropy as its definition says: the whole [B, S, V] logits, differentiated by JAX.

B rows, S positions, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from slmjax import sharding
from slmjax.kernels import capping


def cross_entropy(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: sharding.Specs,
  softcap: float | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """See `api.cross_entropy_and_table`. Memory is B x S x V float32, spread like tokens and
  vocabulary."""
  used_VD = sharding.gather(w_VD, specs.embed_VD, x_BSD.dtype)
  logits_BSV = jnp.einsum("bsd,vd->bsv", x_BSD, used_VD, preferred_element_type=jnp.float32)
  logits_BSV = capping.cap(logits_BSV, softcap)
  logsumexp_BS = jax.nn.logsumexp(logits_BSV, axis=-1)
  is_target_BSV = targets_BS[..., None] == jnp.arange(w_VD.shape[0])
  target_BS = jnp.where(is_target_BSV, logits_BSV, 0.0).sum(axis=-1)
  return logsumexp_BS - target_BS, logsumexp_BS, w_VD
