"""Positions: rotary angles with their published stretchings, and ALiBi's slopes.

Letters: B rows, S positions, N heads, H head width, R rotation angles (half the rotated width).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from slmjax.model_config import (
  Llama3Scaling,
  LongRopeScaling,
  RotaryPositions,
  YarnScaling,
)


def rotary_angles(
  positions_BS: jax.Array, rotary: RotaryPositions, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Cosines and sines [B, S, R] in float32 of position x frequency, times the magnitude."""
  powers_R = jnp.arange(0, rotary.width, 2, dtype=jnp.float32) / rotary.width
  frequencies_R = theta**-powers_R
  scaling, magnitude = rotary.scaling, 1.0
  if isinstance(scaling, Llama3Scaling):
    frequencies_R = frequencies_R * _llama3_factors(scaling, rotary.width, theta)
  elif isinstance(scaling, YarnScaling):
    frequencies_R = frequencies_R * _yarn_factors(scaling, rotary.width, theta)
    magnitude = scaling.magnitude
  elif isinstance(scaling, LongRopeScaling):
    frequencies_R = frequencies_R / _longrope_divisors(scaling, positions_BS)
    magnitude = scaling.magnitude
  angles_BSR = positions_BS[..., None].astype(jnp.float32) * frequencies_R
  cos_BSR, sin_BSR = jnp.cos(angles_BSR), jnp.sin(angles_BSR)
  if magnitude != 1.0:
    cos_BSR, sin_BSR = magnitude * cos_BSR, magnitude * sin_BSR
  return cos_BSR, sin_BSR


def rotate(x_BSNH: jax.Array, cos_BSR: jax.Array, sin_BSR: jax.Array, layout: str) -> jax.Array:
  """Rotates the pairs in the first 2R dimensions of each head by the angles of its position, and
  leaves the rest; float32 inside, x's dtype out."""
  width = 2 * cos_BSR.shape[-1]
  cos_BS1R, sin_BS1R = cos_BSR[:, :, None, :], sin_BSR[:, :, None, :]
  rotated = x_BSNH[..., :width].astype(jnp.float32)
  if layout == "half":
    first_BSNR, second_BSNR = jnp.split(rotated, 2, axis=-1)
  else:
    first_BSNR, second_BSNR = rotated[..., 0::2], rotated[..., 1::2]
  pair = (
    first_BSNR * cos_BS1R - second_BSNR * sin_BS1R,
    second_BSNR * cos_BS1R + first_BSNR * sin_BS1R,
  )
  if layout == "half":
    rotated = jnp.concatenate(pair, axis=-1)
  else:
    rotated = jnp.stack(pair, axis=-1).reshape(rotated.shape)
  rotated = rotated.astype(x_BSNH.dtype)
  if width == x_BSNH.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BSNH[..., width:]], axis=-1)


def alibi_slopes(heads: int) -> np.ndarray:
  """Slopes [N] in float32 (arXiv 2108.12409): powers of 2^(-8/n) for n heads, n a power of two;
  otherwise those of the power of two below, then every second one of the power above."""
  below = 2 ** math.floor(math.log2(heads))
  slopes = [2.0 ** (-8.0 * (i + 1) / below) for i in range(below)]
  slopes += [2.0 ** (-4.0 * (2 * i + 1) / below) for i in range(heads - below)]
  return np.asarray(slopes, np.float32)


def _llama3_factors(scaling: Llama3Scaling, width: int, theta: float) -> np.ndarray:
  """What each frequency is multiplied by, [R]."""
  wave_R = 2 * np.pi * theta ** (np.arange(0, width, 2) / width)
  turns_R = scaling.original_length / wave_R
  kept_R = np.clip((turns_R - scaling.low) / (scaling.high - scaling.low), 0.0, 1.0)
  return (kept_R + (1.0 - kept_R) / scaling.factor).astype(np.float32)


def _yarn_factors(scaling: YarnScaling, width: int, theta: float) -> np.ndarray:
  """What each frequency is multiplied by, [R]: a ramp between the two dimensions that turn `fast`
  and `slow` times in the original length, as the paper's code rounds them."""

  def dimension(turns: float) -> float:
    length = scaling.original_length / (turns * 2 * math.pi)
    return width * math.log(length) / (2 * math.log(theta))

  low = max(math.floor(dimension(scaling.fast)), 0)
  high = min(math.ceil(dimension(scaling.slow)), width - 1)
  ramp_R = (np.arange(width // 2) - low) / (max(high - low, 1e-3))
  kept_R = 1.0 - np.clip(ramp_R, 0.0, 1.0)
  return (kept_R + (1.0 - kept_R) / scaling.factor).astype(np.float32)


def _longrope_divisors(scaling: LongRopeScaling, positions_BS: jax.Array) -> jax.Array:
  """The divisors [R] for a call: the long ones as soon as it has a position that needs them."""
  short_R = jnp.asarray(scaling.short_factors, jnp.float32)
  if scaling.short_factors == scaling.long_factors:
    return short_R
  long_R = jnp.asarray(scaling.long_factors, jnp.float32)
  return jnp.where(jnp.max(positions_BS) >= scaling.original_length, long_R, short_R)
