"""The shapes of known models, at which kernels are compiled, inspected and tuned."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
  """Query heads, key/value heads, width of queries and keys, width of values."""

  heads: int
  kv_heads: int
  width: int
  value_width: int

  @property
  def group(self) -> int:
    """Query heads per key/value head."""
    return self.heads // self.kv_heads


class TableShape(NamedTuple):
  """Width and vocabulary of an output table."""

  width: int
  vocabulary: int


ATTENTION = {
  "fox1": AttentionShape(16, 4, 128, 128),
  "tinyllama": AttentionShape(32, 4, 64, 64),
  "mobilellm": AttentionShape(9, 3, 64, 64),
  "gemma_2b": AttentionShape(8, 1, 256, 256),
  "deepseek_v2_lite": AttentionShape(16, 16, 192, 128),  # latent, expanded as in training
  "minicpm3": AttentionShape(40, 40, 96, 64),  # latent too
  "splash": AttentionShape(16, 16, 128, 128),  # what JAX's splash attention is compared at
}

CROSS_ENTROPY = {
  "fox1": TableShape(2048, 256_000),
  "tinyllama": TableShape(2048, 32_000),
  "mobilellm": TableShape(576, 32_000),
  "gemma_2b": TableShape(2048, 256_000),
  "deepseek_v2_lite": TableShape(2048, 102_400),
  "minicpm3": TableShape(2560, 73_448),
}
