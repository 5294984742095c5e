"""The shapes of known models, at which kernels are compiled, inspected and tuned."""

from typing import NamedTuple


class AttentionShape(NamedTuple):
  """Query heads, key/value heads, width of queries and keys, width of values."""

  heads: int
  kv_heads: int
  width: int
  value_width: int


ATTENTION = {
  "fox1": AttentionShape(16, 4, 128, 128),
  "tinyllama": AttentionShape(32, 4, 64, 64),
  "mobilellm": AttentionShape(9, 3, 64, 64),
  "gemma_2b": AttentionShape(8, 1, 256, 256),
  "mla": AttentionShape(16, 16, 192, 128),  # DeepSeek-V2-Lite, expanded as in training
  "minicpm3": AttentionShape(40, 40, 96, 64),
  "splash": AttentionShape(16, 16, 128, 128),  # what JAX's splash attention is compared at
}
