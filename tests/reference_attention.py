"""Attention and its gradients in float64 NumPy, written from the equations, one head at a time.

B rows, S query positions, T key positions, N query heads, K key/value heads, H width of queries and
keys, U width of values.
"""

import numpy as np


def visible(
  q_segments_BS: np.ndarray, kv_segments_BT: np.ndarray, q_start: int, window: int | None = None
) -> np.ndarray:
  """Which queries see which keys: [B, S, T]. A window counts the query's own key."""
  S, T = q_segments_BS.shape[1], kv_segments_BT.shape[1]
  past_ST = q_start + np.arange(S)[:, None] - np.arange(T)[None, :]
  near_ST = (past_ST >= 0) & (past_ST < (window or np.inf))
  same_BST = q_segments_BS[:, :, None] == kv_segments_BT[:, None, :]
  return near_ST & same_BST & (q_segments_BS != 0)[:, :, None]


def attention(
  q_BSNH: np.ndarray,
  k_BTKH: np.ndarray,
  v_BTKU: np.ndarray,
  visible_BST: np.ndarray,
  scale: float,
  do_BSNU: np.ndarray,
  softcap: float | None = None,
  slopes_N: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
  """The output, and the gradients of queries, keys and values for the output's cotangent."""
  q, k, v, do = (x.astype(np.float64) for x in (q_BSNH, k_BTKH, v_BTKU, do_BSNU))
  o, dq, dk, dv = (np.zeros_like(x) for x in (do, q, k, v))
  group = q.shape[2] // k.shape[2]
  for b in range(q.shape[0]):
    for n in range(q.shape[2]):
      h = n // group
      products = scale * q[b, :, n] @ k[b, :, h].T
      scores = products if softcap is None else softcap * np.tanh(products / softcap)
      if slopes_N is not None:
        # The softmax of a row forgets the index of the row's own query.
        scores = scores + float(slopes_N[n]) * np.arange(k.shape[1])
      scores = np.where(visible_BST[b], scores, -np.inf)
      top = scores.max(axis=1, keepdims=True)
      weights = np.exp(scores - np.where(np.isinf(top), 0.0, top))
      total = weights.sum(axis=1, keepdims=True)
      weights = weights / np.where(total == 0.0, 1.0, total)
      o[b, :, n] = weights @ v[b, :, h]
      dweights = do[b, :, n] @ v[b, :, h].T
      dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
      if softcap is not None:
        dscores = dscores / np.cosh(products / softcap) ** 2
      dq[b, :, n] = scale * dscores @ k[b, :, h]
      dk[b, :, h] += scale * dscores.T @ q[b, :, n]
      dv[b, :, h] += weights.T @ do[b, :, n]
  return o, dq, dk, dv
