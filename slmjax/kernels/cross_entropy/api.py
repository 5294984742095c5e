"""Cross entropy of a projection onto the vocabulary: one contract, several implementations.

B rows, S positions, D model width, V vocabulary.
"""

import functools

import jax
from absl import logging

from slmjax.kernels.cross_entropy import chunked, reference
from slmjax.sharding import Specs

IMPLEMENTATIONS = ("reference", "chunked")

# Logits that one device holds at a time: 256 MB in float32.
SLICE_ELEMENTS = 64 * 2**20


def cross_entropy(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None = None,
  implementation: str = "auto",
  slice_elements: int = SLICE_ELEMENTS,
) -> tuple[jax.Array, jax.Array]:
  """Negative log-likelihood of each target under softmax(x w^T), and the log-sum-exp.

  With a soft-cap c the logits are c tanh(x w^T / c), for both outputs.

  A global operation on the Explicit mesh that was entered. Masks, means and z-loss are the
  caller's, outside: both outputs are differentiable by x and w.

  Args:
    x_BSD: activations, bfloat16 or float32, with spec `act_BSD`.
    w_VD: the output projection (or tied embedding) as stored, with spec `embed_VD.stored`, usually
      float32. It is cast to x's dtype before it travels; its gradient is summed in float32.
    targets_BS: int32 in [0, V), with spec `tokens_BS`. Not checked on the device: positions that
      the caller masks must hold a valid id too (such as 0) and get weight zero.
    specs: the table of specs of the mesh.
    softcap: bounds the logits (Gemma-2, arXiv:2408.00118). None costs nothing.
    implementation: one of IMPLEMENTATIONS, or "auto", which logs what it chose.
    slice_elements: logits (tokens times columns) that one device holds at a time, rounded to at
      least 128 columns. Read by "chunked"; the reference holds all.

  Returns:
    nll_BS and logsumexp_BS, float32, in nats, with spec `tokens_BS`.

  Raises:
    ValueError: an implementation that does not exist, shapes that do not fit, or a softcap that
      is not positive.
  """
  if x_BSD.shape[:2] != targets_BS.shape or x_BSD.shape[2] != w_VD.shape[1]:
    shapes = [x.shape for x in (x_BSD, w_VD, targets_BS)]
    raise ValueError(f"cross entropy: shapes of x, w and targets do not fit together: {shapes}")
  if softcap is not None and not softcap > 0:
    raise ValueError(f"cross entropy: softcap must be positive, got {softcap}")
  if implementation == "auto":
    implementation = _choose(x_BSD.shape, w_VD.shape)
  if implementation == "reference":
    return reference.cross_entropy(x_BSD, w_VD, targets_BS, specs=specs, softcap=softcap)
  if implementation == "chunked":
    return chunked.cross_entropy(
      x_BSD, w_VD, targets_BS, specs=specs, softcap=softcap, slice_elements=slice_elements
    )[:2]
  raise ValueError(
    f"cross entropy implementation {implementation!r} does not exist: use 'auto' or one of "
    f"{', '.join(IMPLEMENTATIONS)}"
  )


@functools.cache  # So that each choice is logged once, not once per trace.
def _choose(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> str:
  why = "logits in slices, never whole"
  logging.info("cross entropy: chunked for x %s, w %s (%s)", x_shape, w_shape, why)
  return "chunked"
