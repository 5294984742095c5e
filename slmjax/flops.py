"""Parameter, FLOP and byte counts from the config, and what chips can do.

Conventions: a multiply-add is two FLOPs; the backward pass costs twice the forward; attention is
counted causal (half of the square); recomputation is not counted (it is not useful work).
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp

from slmjax.config import Config, StageConfig
from slmjax.model_config import (
  FeedForward,
  HeadsAttention,
  LatentAttention,
  ModelConfig,
  RotaryPositions,
  SegmentConfig,
)
from slmjax.parameters import block_matrices, block_parameters, parameters


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one jax device of a kind can do.

  Attributes:
    peak_flops: dense bfloat16 FLOP/s, from the vendor's data sheet.
    memory: bytes that a program may use, less than the data sheet's.
    memory_source: what sets that limit.
  """

  peak_flops: float
  memory: int
  memory_source: str


def _tpu(peak_flops: float, gib: float) -> Chip:
  # The figure that libtpu names when it refuses a program.
  return Chip(peak_flops, int(gib * 2**30), f"libtpu's limit for a program, {gib} GiB")


def _gpu(peak_flops: float, memory: int) -> Chip:
  source = (
    f"75 % of {memory / 2**30:.1f} GiB: JAX's pool, unless XLA_PYTHON_CLIENT_MEM_FRACTION is set"
  )
  return Chip(peak_flops, memory * 3 // 4, source)


# By the beginning of jax's device kind; the longest one that fits counts.
CHIPS = {
  "TPU v4": Chip(275e12, 32 * 2**30, "data sheet"),
  "TPU v5 lite": _tpu(197e12, 15.75),
  "TPU v5e": _tpu(197e12, 15.75),
  "TPU v5": _tpu(459e12, 95.74),
  "TPU v6 lite": _tpu(918e12, 31.25),
  "TPU v6e": _tpu(918e12, 31.25),
  "NVIDIA A100": _gpu(312e12, 85_100_068_864),
  "NVIDIA A100-SXM4-40GB": _gpu(312e12, 42_298_834_944),
  "NVIDIA A100-PCIE-40GB": _gpu(312e12, 42_298_834_944),
  "NVIDIA H100": _gpu(989e12, 84_942_979_072),
  "NVIDIA H100 PCIe": _gpu(756e12, 84_942_979_072),
}


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
  """Forward FLOPs per token in rows of `length` tokens without document boundaries."""
  d, e = model.width, model.embedding.width
  total = 2.0 * model.vocab_size * e + (4.0 * d * e if d != e else 0.0)
  for s in model.segments:
    attention = sum(_attention_flops(model, s.attention, i, length) for i in range(s.layers))
    total += s.repeat * (s.layers * 2.0 * block_matrices(model, s) + attention)
  return total


def _attention_flops(model: ModelConfig, attention: Any, layer: int, length: int) -> float:
  """Of scores and weighted values in one layer, averaged over the tokens of a row."""
  if isinstance(attention, HeadsAttention):
    window = attention.window(layer) or length
    window = min(window, length)
    keys = window - window * window / (2 * length)  # half of the square, the window's corner cut
    return 4.0 * attention.heads * attention.head_width * keys
  if isinstance(attention, LatentAttention):
    assert isinstance(model.positions, RotaryPositions)
    width = attention.content_width + model.positions.width + attention.value_width
    return attention.heads * width * length
  return 0.0  # RWKV: a few products per channel, nothing that grows with the length


def train_flops_per_token(model: ModelConfig, stage: StageConfig) -> float:
  """Forward and backward FLOPs per token: each source's attention spans its own chunk length."""
  total = sum(m.weight for m in stage.sources.values())
  return 3.0 * sum(
    m.weight / total * forward_flops_per_token(model, m.chunk) for m in stage.sources.values()
  )


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
  """Bytes per device that a stage's step needs, roughly; the compiler's own figure is
  `slmjax.preflight`'s."""

  state: int
  gradients: int
  activations: int
  gathered: int

  @property
  def total(self) -> int:
    return self.state + self.gradients + self.activations + self.gathered


def memory(config: Config, stage: StageConfig, mesh: tuple[int, ...]) -> MemoryEstimate:
  """Estimates a stage's memory per device on a mesh (replica, fsdp, context, tensor)."""
  model, compute = config.model, config.compute
  _, fsdp, context, tensor = mesh
  params = parameters(model)
  param_bytes = jnp.dtype(compute.param_dtype).itemsize
  item = jnp.dtype(compute.compute_dtype).itemsize
  shard = params // (fsdp * tensor)
  tokens = stage.microbatch_rows * stage.row_length // context
  passes = sum(s.layers * s.repeat for s in model.segments)
  largest = max(model.segments, key=lambda s: block_parameters(model, s))
  width = model.width * 6 + _inner_width(largest) // tensor
  saved = {"block": model.width * passes, "dots": width * passes // 2, "none": width * passes}
  return MemoryEstimate(
    state=shard * param_bytes * 3,
    gradients=shard * param_bytes * 2,
    activations=tokens * item * (saved[compute.remat] + 2 * width),
    gathered=block_parameters(model, largest) // tensor * item * 2,
  )


def _inner_width(segment: SegmentConfig) -> int:
  """Numbers per token that a block's projections produce."""
  attention, ffn = segment.attention, segment.ffn
  copies = 3 if isinstance(ffn, FeedForward) and ffn.gated else 2
  if isinstance(attention, HeadsAttention):
    return copies * ffn.width + 4 * attention.heads * attention.head_width
  if isinstance(attention, LatentAttention):
    return copies * ffn.width + 6 * attention.heads * attention.content_width
  return copies * ffn.width + 6 * attention.width


def chip(kind: str) -> Chip | None:
  """What a device kind can do, or None if the table lacks it."""
  names = sorted((name for name in CHIPS if kind.startswith(name)), key=len)
  return CHIPS[names[-1]] if names else None


def peak_flops() -> tuple[float, str]:
  """Peak FLOP/s of all devices together, and where the figure comes from.

  A CPU's is measured: the best of three float32 matrix products, over all of its devices, since
  virtual devices share the cores.
  """
  device = jax.devices()[0]
  known = chip(device.device_kind)
  if known is not None:
    return known.peak_flops * jax.device_count(), f"{device.device_kind} data sheet"
  n = 1024
  with jax.default_device(jax.local_devices()[0]):
    x = jax.jit(lambda: jnp.ones((n, n), jnp.float32))()
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):
      begin = time.perf_counter()
      product(x).block_until_ready()
      seconds.append(time.perf_counter() - begin)
  return 2.0 * n**3 / min(seconds), f"{device.device_kind}, measured matrix product"
