"""Attention and its gradients in float64 NumPy, written from the equations, one head at a time.

B rows, S query positions, T key positions, N query heads, K key/value heads, H width of queries and
keys, U width of values.
"""

from typing import NamedTuple

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


class Result(NamedTuple):
  """The output, the gradients of queries, keys and values, the logarithm of the sum of the
  exponentials of scores [B, S, N] (-inf where there is none), and the gradient of sinks [N]."""

  o: np.ndarray
  dq: np.ndarray
  dk: np.ndarray
  dv: np.ndarray
  lse: np.ndarray
  dsinks: np.ndarray


def attention(
  q_BSNH: np.ndarray,
  k_BTKH: np.ndarray,
  v_BTKU: np.ndarray,
  visible_BST: np.ndarray,
  scale: float,
  do_BSNU: np.ndarray,
  softcap: float | None = None,
  slopes_N: np.ndarray | None = None,
  sinks_N: np.ndarray | None = None,
  dlse_BSN: np.ndarray | None = None,
) -> Result:
  """For the cotangents of the output and, if given, of the logarithm. Scores are compared with the
  key's index: shifting a row's ALiBi scores by the query's index leaves all but the logarithm, so
  slopes and dlse are not for one call."""
  q, k, v, do = (x.astype(np.float64) for x in (q_BSNH, k_BTKH, v_BTKU, do_BSNU))
  o, dq, dk, dv = (np.zeros_like(x) for x in (do, q, k, v))
  lse, dsinks = np.full(q.shape[:3], -np.inf), np.zeros(q.shape[2])
  dlse_BSN = np.zeros_like(lse) if dlse_BSN is None else dlse_BSN
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
      sink = np.full((len(scores), 1), -np.inf if sinks_N is None else float(sinks_N[n]))
      top = np.maximum(scores.max(axis=1, keepdims=True), sink)
      top = np.where(np.isinf(top), 0.0, top)
      weights, sink = np.exp(scores - top), np.exp(sink - top)
      total = weights.sum(axis=1, keepdims=True) + sink
      weights, sink = (x / np.where(total == 0.0, 1.0, total) for x in (weights, sink))
      lse[b, :, n] = np.log(total, out=np.full_like(total, -np.inf), where=total > 0)[:, 0]
      lse[b, :, n] += top[:, 0]
      o[b, :, n] = weights @ v[b, :, h]
      dweights = do[b, :, n] @ v[b, :, h].T
      shift = dlse_BSN[b, :, n, None] - (weights * dweights).sum(axis=1, keepdims=True)
      dscores = weights * (dweights + shift)
      dsinks[n] += (sink * shift).sum()
      if softcap is not None:
        dscores = dscores / np.cosh(products / softcap) ** 2
      dq[b, :, n] = scale * dscores @ k[b, :, h]
      dk[b, :, h] += scale * dscores.T @ q[b, :, n]
      dv[b, :, h] += weights.T @ do[b, :, n]
  return Result(o, dq, dk, dv, lse, dsinks)
