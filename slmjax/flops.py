"""Parameter, FLOP and byte counts from the config, and what chips can do.

Conventions: a multiply-add is two FLOPs; the backward pass costs twice the forward; attention is
counted causal (half of the square); recomputation is not counted (it is not useful work).
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from slmjax.config import Config, ModelConfig, SegmentConfig, StageConfig


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


def block_parameters(model: ModelConfig, segment: SegmentConfig) -> int:
  """Parameters of one block: projections, gated feed-forward, two norms."""
  d, h = model.width, segment.head_width
  attention = d * h * (2 * segment.heads + 2 * segment.kv_heads)
  return attention + 3 * d * segment.ffn_width + 2 * d


def parameters(model: ModelConfig) -> int:
  """Every trained number, counted once."""
  tables = model.vocab_size * model.width * (1 if model.tie_embeddings else 2)
  blocks = sum(s.layers * block_parameters(model, s) for s in model.segments)
  return tables + blocks + model.width


def forward_flops_per_token(model: ModelConfig, length: int) -> float:
  """Forward FLOPs per token in rows of `length` tokens without document boundaries."""
  total = 2.0 * model.vocab_size * model.width
  for s in model.segments:
    passes = s.layers * s.repeat
    weights = block_parameters(model, s) - 2 * model.width
    attention = 2 * s.heads * s.head_width * length  # scores and values, half of the square
    total += passes * (2.0 * weights + attention)
  return total


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
  width = (
    model.width * 6 + (3 * largest.ffn_width + 4 * largest.heads * largest.head_width) // tensor
  )
  saved = {"block": model.width * passes, "dots": width * passes // 2, "none": width * passes}
  return MemoryEstimate(
    state=shard * param_bytes * 3,
    gradients=shard * param_bytes * 2,
    activations=tokens * item * (saved[compute.remat] + 2 * width),
    gathered=block_parameters(model, largest) // tensor * item * 2,
  )


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
