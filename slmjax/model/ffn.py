"""Feed-forward layers.

Letters: B rows, S positions, D model width, F feed-forward width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig, ModelConfig, SegmentConfig
from slmjax.model import weights
from slmjax.sharding import Specs, gather


class GatedFeedForward(nnx.Module):
  """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)), without biases."""

  def __init__(
    self,
    model: ModelConfig,
    segment: SegmentConfig,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    self.specs = specs
    gate, up, down = jax.random.split(key, 3)
    D, F = model.width, segment.ffn_width
    dtype = jnp.dtype(compute.param_dtype)
    self.gate_DF = weights.normal(gate, (D, F), specs.mlp_in_DF, model.init_std, dtype)
    self.up_DF = weights.normal(up, (D, F), specs.mlp_in_DF, model.init_std, dtype)
    self.down_FD = weights.normal(down, (F, D), specs.mlp_out_FD, model.init_std, dtype)

  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    specs, dtype = self.specs, x_BSD.dtype
    gate_BSF = jnp.einsum("bsd,df->bsf", x_BSD, gather(self.gate_DF[...], specs.mlp_in_DF, dtype))
    up_BSF = jnp.einsum("bsd,df->bsf", x_BSD, gather(self.up_DF[...], specs.mlp_in_DF, dtype))
    down_FD = gather(self.down_FD[...], specs.mlp_out_FD, dtype)
    return jnp.einsum(
      "bsf,fd->bsd", jax.nn.silu(gate_BSF) * up_BSF, down_FD, out_sharding=specs.act_BSD
    )
