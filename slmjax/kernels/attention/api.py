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
from slmjax.kernels.attention import chunked, pallas_gpu, pallas_tpu, reference, tiles
from slmjax.kernels.platform import device_kind as _device_kind
from slmjax.kernels.platform import platform as _platform

# Our kernels, and the platforms that they are for.
_PALLAS = {"pallas_tpu": "tpu", "pallas_gpu": "gpu"}

IMPLEMENTATIONS = ("reference", "chunked", *_PALLAS)

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
      TPUs and "pallas_gpu" for NVIDIA GPUs from compute capability 8.0.

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
    implementation = _choose(q_BSNH, k_BTKH, v_BTKU, scale)
  arrays = (q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT, q_start)
  if isinstance(window, int) and (window == 0 or window >= k_BTKH.shape[1]):
    window = None  # it hides nothing
  if window is not None:
    # From here on a window has a width, also where a traced 0 says that there is none.
    window = jnp.where(window == 0, jnp.iinfo(jnp.int32).max, window).astype(jnp.int32)
  if slopes_N is not None:
    slopes_N = jax.lax.stop_gradient(slopes_N)
  scores: dict[str, Any] = dict(scale=scale, window=window, softcap=softcap, slopes_N=slopes_N)
  found = _run(implementation, arrays, scores)
  return found if sinks_N is None else _sink(*found, sinks_N)


def _run(implementation: str, arrays: Any, scores: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
  if implementation == "reference":
    return reference.attention(*arrays, **scores)
  if implementation == "chunked":
    blocks = _CPU_BLOCKS if _platform() == "cpu" else _BLOCKS
    return chunked.attention(*arrays, **scores, blocks=blocks)
  q_BSNH, k_BTKH, v_BTKU = arrays[:3]
  if implementation in _PALLAS:
    if _platform() != _PALLAS[implementation]:
      raise UserError(
        f"attention implementation {implementation!r} runs on {_PALLAS[implementation].upper()}, "
        f"not on {_platform()}: use 'auto'"
      )
    if implementation == "pallas_tpu":
      blocks_of_tpu, why = _tpu_tiles(q_BSNH, k_BTKH, v_BTKU)
      sizes = f"{blocks_of_tpu.queries} by {blocks_of_tpu.keys} positions"
      _say(f"attention: pallas_tpu in blocks of {sizes}, {why}")
      return pallas_tpu.attention(*arrays, **scores, blocks=blocks_of_tpu)
    return pallas_gpu.attention(*arrays, **scores, blocks=_gpu_tiles(q_BSNH, v_BTKU))
  raise ValueError(
    f"attention implementation {implementation!r} does not exist: use 'auto' or one of "
    f"{', '.join(IMPLEMENTATIONS)}"
  )


def _tpu_tiles(
  q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array
) -> tuple[pallas_tpu.Blocks, str]:
  group = q_BSNH.shape[2] // k_BTKH.shape[2]
  return tiles.blocks_for(_device_kind(), group, q_BSNH.shape[3], v_BTKU.shape[3])


def _gpu_tiles(q_BSNH: jax.Array, v_BTKU: jax.Array) -> pallas_gpu.Tiles:
  widest = max(q_BSNH.shape[3], v_BTKU.shape[3])
  return pallas_gpu.tiles_for(_device_kind(), widest, q_BSNH.dtype)


def _sink(o_BSNU: jax.Array, lse_BSN: jax.Array, sinks_N: jax.Array) -> tuple[jax.Array, jax.Array]:
  """One more key of value zero: it only makes the sum larger that weights are divided by."""
  whole_BSN = jnp.logaddexp(lse_BSN, sinks_N)
  share_BSN1 = jnp.exp(lse_BSN - whole_BSN)[..., None]
  return (o_BSNU * share_BSN1).astype(o_BSNU.dtype), whole_BSN


def _choose(q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, scale: float) -> str:
  name, why = "chunked", "memory linear in the length; blocks that no query sees are skipped"
  if q_BSNH.shape[1] < _SHORT:
    name, why = "reference", f"fewer than {_SHORT} queries per row"
  elif q_BSNH.shape[1] != k_BTKH.shape[1]:
    why = f"{why}; queries of a cache, which no start-up probe has tried"
  else:
    for kernel, its_platform in _PALLAS.items():
      if its_platform == _platform():
        refusal = _refusal(kernel, q_BSNH, k_BTKH, v_BTKU, scale)
        if refusal is None:
          name, why = kernel, "our kernel for this platform"
        else:
          why = f"{why}; {kernel}: {refusal}"
  _say(f"attention: {name} for q {q_BSNH.shape}, k {k_BTKH.shape} ({why})")
  return name


def _refusal(
  kernel: str, q_BSNH: jax.Array, k_BTKH: jax.Array, v_BTKU: jax.Array, scale: float
) -> str | None:
  """What a kernel cannot do with such arrays on such devices, or None."""
  arrays = (q_BSNH, k_BTKH, v_BTKU)
  try:
    if kernel == "pallas_tpu":
      return pallas_tpu.refusal(*arrays, _tpu_tiles(*arrays)[0])
    _gpu_tiles(q_BSNH, v_BTKU)
    return pallas_gpu.refusal(q_BSNH, scale)
  except UserError as error:
    return str(error)


@functools.cache  # So that each choice is logged once, not once per layer and trace.
def _say(line: str) -> None:
  logging.info("%s", line)


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
