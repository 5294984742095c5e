"""Attention: one contract, several implementations.

B rows, S query positions, T key positions, N query heads, K key/value heads, H width of queries
and keys, U width of values.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from slmjax.errors import UserError
from slmjax.kernels.attention import chunked, pallas_gpu, pallas_tpu, reference

IMPLEMENTATIONS = ("reference", "chunked", "pallas_tpu", "pallas_gpu")

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
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  **options: Any,
) -> jax.Array:
  """The output of `attention_and_logsumexp`, [B, S, N, U] in the queries' dtype."""
  arrays = (q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  return attention_and_logsumexp(*arrays, q_start, **options)[0]


def attention_and_logsumexp(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  *,
  scale: float,
  window: int | jax.Array | None = None,
  softcap: float | None = None,
  slopes_N: jax.Array | None = None,
  sinks_N: jax.Array | None = None,
  implementation: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Causal attention within segments, on the arrays of one device (inside `jax.shard_map`).

  Query i has index `q_start + i` on the key axis. It sees key j if j is not after it and both have
  the same segment id, which is not 0. Segment 0 is padding: it sees nothing and nobody sees it. A
  query that sees nothing gets zeros, and gives zero gradients. What is None costs nothing.

  Args:
    q_BSNH: queries, bfloat16 or float32. Each key/value head serves N // K consecutive query heads.
    k_BTKH: keys, of the queries' dtype.
    v_BTKU: values, of the queries' dtype, of the same width as keys or another.
    q_segments_BS: int32, the segment of each query.
    kv_segments_BT: int32, the segment of each key.
    q_start: 0 in training, the index of the first query in the cache in generation. May be traced.
    scale: multiplies the products of queries and keys.
    window: how many keys a query sees at most, itself included: key j only if j > i - window. May
      be a traced int32 scalar, so that layers under one scan differ; 0 is no window.
    softcap: with a value c scores become c tanh(scores / c) (Gemma-2, arXiv:2408.00118).
    slopes_N: float32, ALiBi (arXiv:2108.12409): adds slope (j - i) to the scores of query i and
      key j. Constants: their gradient is zero. Not together with softcap.
    sinks_N: float32, per query head the score of one more key, whose value is zero: it takes its
      share of the weights (gpt-oss, arXiv:2508.10925; as "attention off by one" with a score of
      0). Not scaled, not capped, visible to all queries. Differentiable.
    implementation: one of IMPLEMENTATIONS, or "auto", which logs what it chose. "pallas_tpu" is for
      TPUs and "pallas_gpu" for NVIDIA GPUs, and by name only: nobody has run them there yet.

  Returns:
    The weighted sums of values, [B, S, N, U], in the queries' dtype; and the logarithm of the sum
    of the exponentials of all scores that a query sees, sink included: float32 [B, S, N], -inf
    where there is none. Scores, softmax and sums are float32. Both are differentiable by q, k, v
    and sinks.

  Raises:
    ValueError: an implementation that does not exist, shapes and dtypes that do not fit, or
      values of window and softcap that mean nothing.
    UserError: an implementation that cannot run these shapes and dtypes, or not on this platform.
  """
  _check(q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  _check_scores(q_BSNH.shape[2], window, softcap, slopes_N, sinks_N)
  if implementation == "auto":
    implementation = _choose(q_BSNH.shape, k_BTKH.shape)
  arrays = (q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT, q_start)
  if isinstance(window, int) and (window == 0 or window >= k_BTKH.shape[1]):
    window = None  # it hides nothing
  if window is not None:
    # From here on a window has a width, also where a traced 0 says that there is none.
    window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window).astype(jnp.int32)
  if slopes_N is not None:
    slopes_N = jax.lax.stop_gradient(slopes_N)
  scores: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap, slopes_N=slopes_N)
  if implementation == "reference":
    found = reference.attention(*arrays, **scores)
  elif implementation == "chunked":
    blocks = _CPU_BLOCKS if _platform() == "cpu" else _BLOCKS
    found = chunked.attention(*arrays, **scores, blocks=blocks)
  elif implementation == "pallas_tpu":
    if _platform() != "tpu":
      raise UserError(
        f"attention implementation 'pallas_tpu' runs on TPU, not on {_platform()}: use 'auto'"
      )
    blocks_of_width = pallas_tpu.blocks_for(max(q_BSNH.shape[3], v_BTKU.shape[3]))
    found = pallas_tpu.attention(*arrays, **scores, blocks=blocks_of_width)
  elif implementation == "pallas_gpu":
    if _platform() != "gpu":
      raise UserError(
        f"attention implementation 'pallas_gpu' runs on GPU, not on {_platform()}: use 'auto'"
      )
    widest = max(q_BSNH.shape[3], v_BTKU.shape[3])
    tiles = pallas_gpu.tiles_for(_device_kind(), widest, q_BSNH.dtype)
    found = pallas_gpu.attention(*arrays, **scores, blocks=tiles)
  else:
    raise ValueError(
      f"attention implementation {implementation!r} does not exist: use 'auto' or one of "
      f"{', '.join(IMPLEMENTATIONS)}"
    )
  return found if sinks_N is None else _sink(*found, sinks_N)


def _sink(o_BSNU: jax.Array, lse_BSN: jax.Array, sinks_N: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One more key of value zero: it only makes the sum larger that weights are divided by."""
  whole_BSN = jnp.logaddexp(lse_BSN, sinks_N)
  share_BSN1 = jnp.exp(lse_BSN - whole_BSN)[..., None]
  return (o_BSNU * share_BSN1).astype(o_BSNU.dtype), whole_BSN


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


def _device_kind() -> str:
  """The name of those devices, as "NVIDIA H100 80GB HBM3"."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def _check(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
) -> None:
  B, _, N, H = q_BSNH.shape
  T, K = k_BTKH.shape[1:3]
  fits = (
    k_BTKH.shape == (B, T, K, H)
    and v_BTKU.shape[:3] == (B, T, K)
    and N % K == 0
    and q_segments_BS.shape == q_BSNH.shape[:2]
    and kv_segments_BT.shape == (B, T)
  )
  if not fits:
    shapes = [x.shape for x in (q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)]
    raise ValueError(f"attention: shapes of q, k, v and segments do not fit together: {shapes}")
  if not q_BSNH.dtype == k_BTKH.dtype == v_BTKU.dtype:
    dtypes = [x.dtype.name for x in (q_BSNH, k_BTKH, v_BTKU)]
    raise ValueError(f"attention: q, k and v must have one dtype, got {dtypes}")


def _check_scores(
  heads: int,
  window: int | jax.Array | None,
  softcap: float | None,
  slopes_N: jax.Array | None,
  sinks_N: jax.Array | None,
) -> None:
  if isinstance(window, jax.Array):
    if window.shape != () or not jnp.issubdtype(window.dtype, jnp.integer):
      raise ValueError(f"attention: window must be an integer scalar, got {jax.typeof(window)}")
  elif window is not None and window < 0:
    raise ValueError(f"attention: window must be at least 1, or 0 for none, got {window}")
  if softcap is not None and not softcap > 0:
    raise ValueError(f"attention: softcap must be positive, got {softcap}")
  for name, x_N in (("slopes", slopes_N), ("sinks", sinks_N)):
    if x_N is not None and (x_N.shape != (heads,) or x_N.dtype != jnp.float32):
      raise ValueError(
        f"attention: {name} must be float32[{heads}], one per query head, got {jax.typeof(x_N)}"
      )
  if slopes_N is not None and softcap is not None:
    raise ValueError("attention: softcap and slopes are not built together")
