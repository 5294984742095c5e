"""Positions: rotary embedding (arXiv 2104.09864), half layout (pairs i and i + H/2) as in Llama.

Letters: B rows, S positions, N heads, H head width, R = H / 2 rotation angles.
"""

import jax
import jax.numpy as jnp


def rotary_angles(positions_BS: jax.Array, head_width: int, theta: float) -> tuple[jax.Array, ...]:
  """Cosines and sines [B, S, R] in float32 of position x theta^(-2r/H)."""
  powers_R = jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width
  angles_BSR = positions_BS[..., None].astype(jnp.float32) * theta**-powers_R
  return jnp.cos(angles_BSR), jnp.sin(angles_BSR)


def rotate(x_BSNH: jax.Array, cos_BSR: jax.Array, sin_BSR: jax.Array) -> jax.Array:
  """Rotates each head's pairs by the angles of its position; float32 inside, x's dtype out."""
  low_BSNR, high_BSNR = jnp.split(x_BSNH.astype(jnp.float32), 2, axis=-1)
  cos_BS1R, sin_BS1R = cos_BSR[:, :, None, :], sin_BSR[:, :, None, :]
  rotated_BSNH = jnp.concatenate(
    [low_BSNR * cos_BS1R - high_BSNR * sin_BS1R, high_BSNR * cos_BS1R + low_BSNR * sin_BS1R], -1
  )
  return rotated_BSNH.astype(x_BSNH.dtype)
