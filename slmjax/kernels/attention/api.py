"""Attention: one contract, several implementations.

B rows, S query positions, T key positions, N query heads, K key/value heads, H head width.
"""

import functools

import jax
from absl import logging

from slmjax.kernels.attention import chunked, reference

IMPLEMENTATIONS = ("reference", "chunked")

# On CPU a block of scores of all heads should stay in the second-level cache; elsewhere a block
# should be a few microseconds of matrix multiplication, to outweigh the loop around it.
_CPU_BLOCKS = chunked.Blocks(queries=128, keys=128)
_BLOCKS = chunked.Blocks(queries=512, keys=512)

# Fewer queries than this against any number of keys is cached generation: the scores are a few
# rows, and blocks would cost more than they save.
_SHORT = 64


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  *,
  scale: float,
  implementation: str = "auto",
) -> jax.Array:
  """Causal attention within segments, on the arrays of one device (inside `jax.shard_map`).

  Query i has index `q_start + i` on the key axis. It sees key j if j is not after it and both have
  the same segment id, which is not 0. Segment 0 is padding: it sees nothing and nobody sees it. A
  query that sees nothing gets zeros, and gives zero gradients.

  Args:
    q_BSNH: queries, bfloat16 or float32. Each key/value head serves N // K consecutive query heads.
    k_BTKH: keys, of the queries' dtype.
    v_BTKH: values, of the queries' dtype.
    q_segments_BS: int32, the segment of each query.
    kv_segments_BT: int32, the segment of each key.
    q_start: 0 in training, the index of the first query in the cache in generation. May be traced.
    scale: multiplies the scores before the softmax.
    implementation: one of IMPLEMENTATIONS, or "auto", which logs what it chose.

  Returns:
    The weighted sums of values, [B, S, N, H], in the queries' dtype. Scores, softmax and sums are
    float32.

  Raises:
    ValueError: an implementation that does not exist, or shapes and dtypes that do not fit.
  """
  _check(q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT)
  if implementation == "auto":
    implementation = _choose(q_BSNH.shape, k_BTKH.shape)
  arrays = (q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT, q_start)
  if implementation == "reference":
    return reference.attention(*arrays, scale=scale)
  if implementation == "chunked":
    blocks = _CPU_BLOCKS if _platform() == "cpu" else _BLOCKS
    return chunked.attention(*arrays, scale=scale, blocks=blocks)
  raise ValueError(
    f"attention implementation {implementation!r} does not exist: use 'auto' or one of "
    f"{', '.join(IMPLEMENTATIONS)}"
  )


@functools.cache  # So that each choice is logged once, not once per layer and trace.
def _choose(q_shape: tuple[int, ...], k_shape: tuple[int, ...]) -> str:
  if q_shape[1] < _SHORT:
    name, why = "reference", f"fewer than {_SHORT} queries per row"
  else:
    name, why = "chunked", "memory linear in the length; blocks that no query sees are skipped"
  logging.info("attention: %s for q %s, k %s (%s)", name, q_shape, k_shape, why)
  return name


def _platform() -> str:
  """Of the devices of the mesh that was entered, which need not be those of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def _check(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKH: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
) -> None:
  B, _, N, H = q_BSNH.shape
  T, K = k_BTKH.shape[1:3]
  fits = (
    k_BTKH.shape == v_BTKH.shape == (B, T, K, H)
    and N % K == 0
    and q_segments_BS.shape == q_BSNH.shape[:2]
    and kv_segments_BT.shape == (B, T)
  )
  if not fits:
    shapes = [x.shape for x in (q_BSNH, k_BTKH, v_BTKH, q_segments_BS, kv_segments_BT)]
    raise ValueError(f"attention: shapes of q, k, v and segments do not fit together: {shapes}")
  if not q_BSNH.dtype == k_BTKH.dtype == v_BTKH.dtype:
    dtypes = [x.dtype.name for x in (q_BSNH, k_BTKH, v_BTKH)]
    raise ValueError(f"attention: q, k and v must have one dtype, got {dtypes}")
