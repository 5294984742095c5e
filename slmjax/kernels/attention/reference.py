"""Attention as its definition says: the whole [S, T] score matrix, differentiated by JAX.

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H width of queries and keys, U width of values.
"""

import jax
import jax.numpy as jnp

from slmjax.kernels import capping


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
) -> tuple[jax.Array, jax.Array]:
  """See `api.attention_and_logsumexp`. Memory is B x N x S x T float32."""
  B, S, N, H = q_BSNH.shape
  T, K = k_BTKH.shape[1:3]
  q_BSKGH = q_BSNH.reshape(B, S, K, N // K, H)

  q_position_S1, kv_position_T = q_start + jnp.arange(S)[:, None], jnp.arange(T)
  reach_ST = kv_position_T <= q_position_S1
  if window is not None:
    reach_ST &= kv_position_T > q_position_S1 - window
  same_BST = q_segments_BS[:, :, None] == kv_segments_BT[:, None, :]
  visible_BST = reach_ST & same_BST & (q_segments_BS > 0)[:, :, None]
  visible_BKGST = visible_BST[:, None, None]

  scores_BKGST = scale * jnp.einsum(
    "bskgh,btkh->bkgst", q_BSKGH, k_BTKH, preferred_element_type=jnp.float32
  )
  scores_BKGST = capping.cap(scores_BKGST, softcap)
  if slopes_N is not None:
    scores_BKGST -= slopes_N.reshape(K, N // K, 1, 1) * (q_position_S1 - kv_position_T)
  # A row that sees nothing has no largest score and no sum: give it finite ones, so that neither
  # its zeros nor their gradients pass through an infinity.
  scores_BKGST = jnp.where(visible_BKGST, scores_BKGST, jnp.finfo(jnp.float32).min)
  top_BKGS1 = jax.lax.stop_gradient(scores_BKGST.max(axis=-1, keepdims=True))
  weights_BKGST = jnp.where(visible_BKGST, jnp.exp(scores_BKGST - top_BKGS1), 0.0)
  sum_BKGS1 = weights_BKGST.sum(axis=-1, keepdims=True)
  safe_sum_BKGS1 = jnp.where(sum_BKGS1 == 0.0, 1.0, sum_BKGS1)
  weights_BKGST = weights_BKGST / safe_sum_BKGS1
  o_BKGSU = jnp.einsum("bkgst,btku->bkgsu", weights_BKGST, v_BTKU.astype(jnp.float32))
  o_BSNU = jnp.moveaxis(o_BKGSU, 3, 1).reshape(B, S, N, -1).astype(q_BSNH.dtype)
  lse_BKGS1 = jnp.where(sum_BKGS1 == 0.0, -jnp.inf, top_BKGS1 + jnp.log(safe_sum_BKGS1))
  return o_BSNU, jnp.moveaxis(lse_BKGS1, 3, 1).reshape(B, S, N)
