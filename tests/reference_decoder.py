"""A Llama-type decoder in float64 NumPy, written from the equations, one token pair at a time.

Letters: S positions, D model width, N query heads, K key/value heads, H head width.
"""

from typing import Any

import jax
import numpy as np


def hidden_states(
  model: Any, tokens_S: np.ndarray, segments_S: np.ndarray, positions_S: np.ndarray, theta: float
) -> np.ndarray:
  """Final hidden states [S, D] of one row of a `slmjax.model.decoder.Decoder`."""
  x_SD = _f64(model.embed_VE)[tokens_S]
  eps = model.model.norm.eps
  for segment, stack in zip(model.model.segments, model.segments, strict=True):
    for layer in range(segment.layers):
      block = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stack)
      for _ in range(segment.repeat):
        normed = _norm(x_SD, block.attention_norm.scale_D, eps)
        x_SD = x_SD + _attention(block.attention, normed, segments_S, positions_S, theta)
        normed = _norm(x_SD, block.ffn_norm.scale_D, eps)
        gate, up = normed @ _f64(block.ffn.gate_DF), normed @ _f64(block.ffn.up_DF)
        x_SD = x_SD + (gate / (1 + np.exp(-gate)) * up) @ _f64(block.ffn.down_FD)
  return _norm(x_SD, model.final_norm.scale_D, eps)


def _f64(weight: Any) -> np.ndarray:
  return np.asarray(jax.tree.leaves(weight)[0], np.float64)


def _norm(x_SD: np.ndarray, scale: Any, eps: float) -> np.ndarray:
  return x_SD / np.sqrt((x_SD**2).mean(-1, keepdims=True) + eps) * _f64(scale)


def _rotate(x_SH: np.ndarray, positions_S: np.ndarray, theta: float) -> np.ndarray:
  half = x_SH.shape[1] // 2
  out = np.empty_like(x_SH)
  for s, position in enumerate(positions_S):
    for r in range(half):
      angle = position * theta ** (-2 * r / x_SH.shape[1])
      a, b = x_SH[s, r], x_SH[s, r + half]
      out[s, r] = a * np.cos(angle) - b * np.sin(angle)
      out[s, r + half] = b * np.cos(angle) + a * np.sin(angle)
  return out


def _attention(
  layer: Any, x_SD: np.ndarray, segments_S: np.ndarray, positions_S: np.ndarray, theta: float
) -> np.ndarray:
  q_DNH, k_DKH, v_DKH, out_NHD = map(_f64, (layer.q_DNH, layer.k_DKH, layer.v_DKH, layer.out_NHD))
  heads, group = q_DNH.shape[1], q_DNH.shape[1] // k_DKH.shape[1]
  result = np.zeros_like(x_SD)
  for n in range(heads):
    q_SH = _rotate(x_SD @ q_DNH[:, n], positions_S, theta)
    k_SH = _rotate(x_SD @ k_DKH[:, n // group], positions_S, theta)
    v_SH = x_SD @ v_DKH[:, n // group]
    for i in range(len(x_SD)):
      seen = [j for j in range(i + 1) if segments_S[j] == segments_S[i] != 0]
      if seen:
        scores = k_SH[seen] @ q_SH[i] / np.sqrt(q_SH.shape[1])
        weights = np.exp(scores - scores.max())
        result[i] += weights @ v_SH[seen] / weights.sum() @ out_NHD[n]
  return result
