"""Speed and memory of the XLA kernels on the CPU, beside what JAX has and plain logits.

  python benchmarks/kernels_cpu.py [--seconds=2]

Prints one table: tokens per second, forward and backward together, and the megabytes of temporaries
that the compiled program asks for. `ratio` is the speed over that of the plain version at the same
shape, in the same run. Every version gets the same arrays and the same mask: causal inside
documents of a mean length of 300 tokens. For attention, `plain` is
`jax.nn.dot_product_attention`; for cross entropy it is the whole logits and JAX's derivative.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from slmjax import sharding
from slmjax.kernels.attention import api as attention
from slmjax.kernels.cross_entropy import api as cross_entropy

_SECONDS = flags.DEFINE_float("seconds", 2.0, "How long to run each version at each shape.", 0.1)

MEAN_DOCUMENT = 300
Shapes = list[tuple[int, ...]]
# Rows, positions, query heads, key/value heads, head width.
ATTENTION: Shapes = [
  (16, 256, 8, 4, 32),
  (8, 512, 4, 4, 64),
  (8, 1024, 8, 4, 32),
  (1, 4096, 8, 2, 64),
]
# Rows, positions, model width, vocabulary.
CROSS_ENTROPY: Shapes = [(16, 256, 256, 4096), (8, 1024, 128, 4096), (2, 1024, 256, 32000)]
ROW = "{:14} {:22} {:9} {:8} {:>9} {:>6} {:>8}"


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"takes no arguments, got {argv[1:]}")
  print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
  print(ROW.format("op", "shape", "dtype", "version", "tokens/s", "ratio", "temp MB"))
  with jax.set_mesh(sharding.make_mesh((1, 1, 1, 1), jax.devices()[:1])):
    specs = sharding.Specs.of_mesh()
    for dtype in ("float32", "bfloat16"):
      for shape in ATTENTION:
        compare("attention", shape, dtype, *attention_versions(shape, dtype))
      for shape in CROSS_ENTROPY:
        compare("cross entropy", shape, dtype, *cross_entropy_versions(shape, dtype, specs))


def compare(
  op: str,
  shape: tuple[int, ...],
  dtype: str,
  versions: dict[str, Callable[..., Any]],
  arrays: list[jax.Array],
) -> None:
  plain = 0.0
  for name, function in versions.items():
    compiled = jax.jit(function).lower(*arrays).compile()
    memory = compiled.memory_analysis()
    assert memory is not None  # The CPU backend has it.
    speed = shape[0] * shape[1] / seconds(compiled, arrays)
    plain = plain or speed
    row = (f"{speed:.0f}", f"{speed / plain:.2f}", f"{memory.temp_size_in_bytes / 1e6:.1f}")
    print(ROW.format(op, "x".join(map(str, shape)), dtype, name, *row), flush=True)


def seconds(function: Callable[..., Any], arrays: list[jax.Array]) -> float:
  """The fastest call: what other processes on the machine take is no property of the kernel."""
  jax.block_until_ready(function(*arrays))
  times: list[float] = []
  while sum(times) < _SECONDS.value:
    begin = time.perf_counter()
    jax.block_until_ready(function(*arrays))
    times.append(time.perf_counter() - begin)
  return min(times)


def attention_versions(
  shape: tuple[int, ...], dtype: str
) -> tuple[dict[str, Callable[..., Any]], list[jax.Array]]:
  B, S, N, K, H = shape
  rng = np.random.default_rng(0)
  q, k, v, do = (jnp.asarray(rng.normal(size=(B, S, heads, H)), dtype) for heads in (N, K, K, N))
  segments = jnp.asarray(1 + np.cumsum(rng.random((B, S)) < 1 / MEAN_DOCUMENT, axis=1), jnp.int32)

  def ours(segments: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return attention.attention(
      q, k, v, segments, segments, 0, scale=H**-0.5, implementation="chunked"
    )

  def plain(segments: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=same, is_causal=True)

  def forward_backward(function: Any, segments: Any, q: Any, k: Any, v: Any, do: Any) -> Any:
    o, vjp = jax.vjp(functools.partial(function, segments), q, k, v)
    return o, vjp(do)

  versions = {"plain": plain, "chunked": ours}
  partial = functools.partial
  return {n: partial(forward_backward, f) for n, f in versions.items()}, [segments, q, k, v, do]


def cross_entropy_versions(
  shape: tuple[int, ...], dtype: str, specs: sharding.Specs
) -> tuple[dict[str, Callable[..., Any]], list[jax.Array]]:
  B, S, D, V = shape
  rng = np.random.default_rng(0)
  x = jax.reshard(jnp.asarray(rng.normal(size=(B, S, D)), dtype), specs.act_BSD)
  w = jnp.asarray(0.05 * rng.normal(size=(V, D)), jnp.float32)
  w = jax.reshard(w, specs.embed_VD.stored)
  targets = jax.reshard(rng.integers(0, V, size=(B, S)).astype(np.int32), specs.tokens_BS)

  def forward_backward(name: str, x: Any, w: Any, targets: Any) -> Any:
    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
      nll, lse = cross_entropy.cross_entropy(x, w, targets, specs=specs, implementation=name)
      return nll.mean() + 1e-4 * (lse**2).mean()

    return jax.value_and_grad(loss, argnums=(0, 1))(x, w)

  names = {"plain": "reference", "chunked": "chunked"}
  return {n: functools.partial(forward_backward, f) for n, f in names.items()}, [x, w, targets]


if __name__ == "__main__":
  app.run(main)
