"""Cross entropy of a projection onto the vocabulary: one contract, several implementations.

B rows, S positions, D model width, V vocabulary.
"""

import functools

import jax
from absl import logging

from slmjax.errors import UserError
from slmjax.kernels.cross_entropy import chunked, pallas_tpu, reference
from slmjax.kernels.platform import platform as _platform
from slmjax.sharding import Specs

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu")

# Logits, or elements of the table, that one device works on at a time: 256 MB in float32.
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
    implementation: one of IMPLEMENTATIONS, or "auto", which logs what it chose. "pallas_tpu" is for
      TPUs.
    slice_elements: logits (tokens times columns) that one device works on at a time, and elements
      of the table, rounded to at least 128 columns. The reference does not read it: it holds all.

  Returns:
    nll_BS and logsumexp_BS, float32, in nats, with spec `tokens_BS`.

  Raises:
    ValueError: an implementation that does not exist, shapes that do not fit, or a softcap that
      is not positive.
    UserError: an implementation that cannot run this dtype, or not on this platform.
  """
  nll_BS, logsumexp_BS, _ = cross_entropy_and_table(
    x_BSD,
    w_VD,
    targets_BS,
    specs=specs,
    softcap=softcap,
    implementation=implementation,
    slice_elements=slice_elements,
  )
  return nll_BS, logsumexp_BS


def cross_entropy_and_table(
  x_BSD: jax.Array,
  w_VD: jax.Array,
  targets_BS: jax.Array,
  *,
  specs: Specs,
  softcap: float | None = None,
  implementation: str = "auto",
  slice_elements: int = SLICE_ELEMENTS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`cross_entropy`, which passes the table on as a third output.

  Whoever uses the table again uses that one: the cotangent that arrives for it is the array that
  the table's gradient is then added to, slice by slice, and no second array of its size is needed.
  """
  if x_BSD.shape[:2] != targets_BS.shape or x_BSD.shape[2] != w_VD.shape[1]:
    shapes = [x.shape for x in (x_BSD, w_VD, targets_BS)]
    raise ValueError(f"cross entropy: shapes of x, w and targets do not fit together: {shapes}")
  if softcap is not None and not softcap > 0:
    raise ValueError(f"cross entropy: softcap must be positive, got {softcap}")
  if implementation == "auto":
    implementation = _choose(x_BSD.shape, w_VD.shape, _platform(), pallas_tpu.refusal(x_BSD))
  if implementation == "reference":
    return reference.cross_entropy(x_BSD, w_VD, targets_BS, specs=specs, softcap=softcap)
  if implementation == "chunked":
    return chunked.cross_entropy(
      x_BSD, w_VD, targets_BS, specs=specs, softcap=softcap, slice_elements=slice_elements
    )
  if implementation == "pallas_tpu":
    if _platform() != "tpu":
      raise UserError(
        f"cross entropy implementation 'pallas_tpu' runs on TPU, not on {_platform()}: use 'auto'"
      )
    return pallas_tpu.cross_entropy(
      x_BSD, w_VD, targets_BS, specs=specs, softcap=softcap, slice_elements=slice_elements
    )
  raise ValueError(
    f"cross entropy implementation {implementation!r} does not exist: use 'auto' or one of "
    f"{', '.join(IMPLEMENTATIONS)}"
  )


@functools.cache  # So that each choice is logged once, not once per trace.
def _choose(
  x_shape: tuple[int, ...], w_shape: tuple[int, ...], platform: str, refusal: str | None
) -> str:
  name, why = "chunked", "logits in slices, never whole"
  if platform == "tpu":
    if refusal is None:
      name, why = "pallas_tpu", "logits stay in the memory of kernels"
    else:
      why = f"{why}; pallas_tpu: {refusal}"
  logging.info("cross entropy: %s for x %s, w %s (%s)", name, x_shape, w_shape, why)
  return name
