"""PanGu-pi's augmented shortcut (arXiv 2312.17276): a small path beside attention.

Letters: B rows, S positions, D model width, R inner width.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.model import weights
from slmjax.model_config import ModelConfig
from slmjax.sharding import Specs, gather


class AugmentedShortcut(nnx.Module):
  """up(gelu(down(x))): the cheap form, a bottleneck in the place of a full matrix. The paper leaves
  its initialisation open; ours is that of any other branch."""

  def __init__(
    self, model: ModelConfig, width: int, compute: ComputeConfig, specs: Specs, key: jax.Array
  ):
    self.specs = specs
    down, up = jax.random.split(key)
    dtype, init = jnp.dtype(compute.param_dtype), model.init
    self.down_DR = weights.normal(down, (model.width, width), specs.down_DR, init.std, dtype)
    self.up_RD = weights.normal(up, (width, model.width), specs.up_RD, init.output_std, dtype)

  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    specs, dtype = self.specs, x_BSD.dtype
    down_DR = gather(self.down_DR[...], specs.down_DR, dtype)
    inner_BSR = jax.nn.gelu(jnp.einsum("bsd,dr->bsr", x_BSD, down_DR), approximate=False)
    return jnp.einsum("bsr,rd->bsd", inner_BSR, gather(self.up_RD[...], specs.up_RD, dtype))
