"""The decoder of configs/fox1.py:tiny in plain PyTorch: what someone would write without us.

Letters: B rows, S positions, D width, N heads, K key/value heads, H head width.
"""

import torch
from torch import nn
from torch.nn import functional

from slmjax.model_config import FeedForward, HeadsAttention, ModelConfig


class Block(nn.Module):
  def __init__(self, model: ModelConfig):
    super().__init__()
    attention, ffn = model.segments[0].attention, model.segments[0].ffn
    assert isinstance(attention, HeadsAttention)
    assert isinstance(ffn, FeedForward)
    d, self.h = model.width, attention.head_width
    self.n, self.k = attention.heads, attention.kv_heads
    self.norm1 = nn.RMSNorm(d, eps=model.norm.eps)
    self.qkv = nn.Linear(d, (self.n + 2 * self.k) * self.h, bias=False)
    self.out = nn.Linear(self.n * self.h, d, bias=False)
    self.norm2 = nn.RMSNorm(d, eps=model.norm.eps)
    self.gate_up = nn.Linear(d, 2 * ffn.width, bias=False)
    self.down = nn.Linear(ffn.width, d, bias=False)

  def forward(
    self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor
  ) -> torch.Tensor:
    b, s, _ = x.shape
    qkv = self.qkv(self.norm1(x)).view(b, s, self.n + 2 * self.k, self.h).transpose(1, 2)
    q, k, v = qkv.split((self.n, self.k, self.k), dim=1)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    x = x + self.out(attended.transpose(1, 2).reshape(b, s, -1))
    gate, up = self.gate_up(self.norm2(x)).chunk(2, dim=-1)
    return x + self.down(functional.silu(gate) * up)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  low, high = x.chunk(2, dim=-1)
  return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Decoder(nn.Module):
  """Llama-type, tied embeddings, one run of equal blocks."""

  frequencies: torch.Tensor

  def __init__(self, model: ModelConfig, theta: float):
    super().__init__()
    (segment,) = model.segments
    self.embed = nn.Embedding(model.vocab_size, model.width)
    nn.init.normal_(self.embed.weight, std=model.init.std)
    blocks = [Block(model) for _ in range(segment.layers)]
    self.blocks = nn.ModuleList(blocks)
    self.norm = nn.RMSNorm(model.width, eps=model.norm.eps)
    head_width = blocks[0].h
    powers = torch.arange(0, head_width, 2) / head_width
    self.register_buffer("frequencies", theta**-powers)

  def loss(
    self,
    tokens: torch.Tensor,
    targets: torch.Tensor,
    segments: torch.Tensor,
    positions: torch.Tensor,
    *,
    z_loss: float,
  ) -> torch.Tensor:
    """Mean cross entropy and z-loss of [B, S] rows with documents."""
    angles = (positions[..., None] * self.frequencies)[:, None]
    cos, sin = angles.cos(), angles.sin()
    s = tokens.shape[1]
    causal = torch.ones(s, s, dtype=torch.bool).tril()
    mask = (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x, cos, sin, mask)
    logits = functional.linear(self.norm(x), self.embed.weight).flatten(0, 1)
    return (
      functional.cross_entropy(logits, targets.flatten())
      + z_loss * logits.logsumexp(-1).square().mean()
    )
