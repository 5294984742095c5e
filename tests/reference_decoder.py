"""A Llama-type decoder in float64 NumPy, written from the equations, one token pair at a time.

With what models have that no library implements: layer-wise widths and normed queries and keys
(OpenELM, arXiv 2404.14619), series activations and augmented shortcuts (PanGu-pi, arXiv
2312.17276), blocks run several times in a row (MobileLLM-LS, arXiv 2402.14905).

Letters: S positions, D model width, N query heads, K key/value heads, H head width, P terms.
"""

import math
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
        attended = _attention(
          block.attention, normed, segments_S, positions_S, theta, segment.attention.qk_norm, eps
        )
        if model.model.block.shortcut:
          inner = normed @ _f64(block.shortcut.down_DR)
          attended = attended + _gelu(inner) @ _f64(block.shortcut.up_RD)
        x_SD = x_SD + attended
        normed = _norm(x_SD, block.ffn_norm.scale_D, eps)
        x_SD = x_SD + _feed_forward(block.ffn, normed, segment.ffn.series)
  return _norm(x_SD, model.final_norm.scale_D, eps)


def _f64(weight: Any) -> np.ndarray:
  return np.asarray(jax.tree.leaves(weight)[0], np.float64)


def _norm(x: np.ndarray, scale: Any, eps: float) -> np.ndarray:
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * _f64(scale)


def _gelu(x: np.ndarray) -> np.ndarray:
  return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def _silu(x: np.ndarray) -> np.ndarray:
  return x / (1 + np.exp(-x))


def _feed_forward(layer: Any, x_SD: np.ndarray, series: int | None) -> np.ndarray:
  gate, up = x_SD @ _f64(layer.gate_DF), x_SD @ _f64(layer.up_DF)
  if series is None:
    activated = _silu(gate)
  else:
    scales_PF, biases_PF = _f64(layer.series_scale_PF), _f64(layer.series_bias_PF)
    activated = sum(_silu(scales_PF[p] * gate + biases_PF[p]) for p in range(series))
  return (activated * up) @ _f64(layer.down_FD)


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
  layer: Any,
  x_SD: np.ndarray,
  segments_S: np.ndarray,
  positions_S: np.ndarray,
  theta: float,
  qk_norm: str,
  eps: float,
) -> np.ndarray:
  q_DNH, k_DKH, v_DKH, out_NHD = map(_f64, (layer.q_DNH, layer.k_DKH, layer.v_DKH, layer.out_NHD))
  heads, group = q_DNH.shape[1], q_DNH.shape[1] // k_DKH.shape[1]
  result = np.zeros_like(x_SD)
  for n in range(heads):
    q_SH, k_SH = x_SD @ q_DNH[:, n], x_SD @ k_DKH[:, n // group]
    if qk_norm == "head":
      q_SH, k_SH = _norm(q_SH, layer.q_norm.scale_H, eps), _norm(k_SH, layer.k_norm.scale_H, eps)
    q_SH, k_SH = _rotate(q_SH, positions_S, theta), _rotate(k_SH, positions_S, theta)
    v_SH = x_SD @ v_DKH[:, n // group]
    for i in range(len(x_SD)):
      seen = [j for j in range(i + 1) if segments_S[j] == segments_S[i] != 0]
      if seen:
        scores = k_SH[seen] @ q_SH[i] / np.sqrt(q_SH.shape[1])
        weights = np.exp(scores - scores.max())
        result[i] += weights @ v_SH[seen] / weights.sum() @ out_NHD[n]
  return result
