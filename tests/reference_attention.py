"""Attention and its gradients in float64 NumPy, written from the equations, one head at a time.

B rows, S query positions, T key positions, N query heads, K key/value heads, H head width.
"""

import numpy as np


def visible(q_segments_BS: np.ndarray, kv_segments_BT: np.ndarray, q_start: int) -> np.ndarray:
  """Which queries see which keys: [B, S, T]."""
  S, T = q_segments_BS.shape[1], kv_segments_BT.shape[1]
  causal_ST = np.arange(T)[None, :] <= q_start + np.arange(S)[:, None]
  same_BST = q_segments_BS[:, :, None] == kv_segments_BT[:, None, :]
  return causal_ST & same_BST & (q_segments_BS != 0)[:, :, None]


def attention(
  q_BSNH: np.ndarray,
  k_BTKH: np.ndarray,
  v_BTKH: np.ndarray,
  visible_BST: np.ndarray,
  scale: float,
  do_BSNH: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The output, and the gradients of queries, keys and values for the output's cotangent."""
  q, k, v, do = (x.astype(np.float64) for x in (q_BSNH, k_BTKH, v_BTKH, do_BSNH))
  o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
  group = q.shape[2] // k.shape[2]
  for b in range(q.shape[0]):
    for n in range(q.shape[2]):
      h = n // group
      scores = np.where(visible_BST[b], scale * q[b, :, n] @ k[b, :, h].T, -np.inf)
      top = scores.max(axis=1, keepdims=True)
      weights = np.exp(scores - np.where(np.isinf(top), 0.0, top))
      total = weights.sum(axis=1, keepdims=True)
      weights = weights / np.where(total == 0.0, 1.0, total)
      o[b, :, n] = weights @ v[b, :, h]
      dweights = do[b, :, n] @ v[b, :, h].T
      dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
      dq[b, :, n] = scale * dscores @ k[b, :, h]
      dk[b, :, h] += scale * dscores.T @ q[b, :, n]
      dv[b, :, h] += weights.T @ do[b, :, n]
  return o, dq, dk, dv
