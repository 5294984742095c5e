"""Feed-forward layers.

Letters: B rows, S positions, D model width, F feed-forward width, P terms of a series activation.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from slmjax.config import ComputeConfig
from slmjax.model import weights
from slmjax.model_config import FeedForward, ModelConfig
from slmjax.sharding import Specs, gather

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "silu": jax.nn.silu,
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForwardLayer(nnx.Module):
  """down(act(up(x))), or gated (arXiv 2002.05202) down(act(gate(x)) * up(x))."""

  def __init__(
    self,
    model: ModelConfig,
    ffn: FeedForward,
    compute: ComputeConfig,
    specs: Specs,
    key: jax.Array,
  ):
    self.config = ffn
    self.specs = specs
    gate, up, down, series = jax.random.split(key, 4)
    D, F = model.width, ffn.width
    dtype, init = jnp.dtype(compute.param_dtype), model.init
    if ffn.gated:
      self.gate_DF = weights.normal(gate, (D, F), specs.mlp_in_DF, init.std, dtype)
    self.up_DF = weights.normal(up, (D, F), specs.mlp_in_DF, init.std, dtype)
    self.down_FD = weights.normal(down, (F, D), specs.mlp_out_FD, init.output_std, dtype)
    if ffn.bias:
      if ffn.gated:
        self.gate_bias_F = weights.zeros((F,), specs.bias_F, dtype)
      self.up_bias_F = weights.zeros((F,), specs.bias_F, dtype)
      self.down_bias_D = weights.zeros((D,), specs.norm_D, dtype)
    if ffn.series is not None:
      # The first term begins as the plain activation and the others near zero, so that training
      # starts from the usual layer and no two terms are alike.
      P = ffn.series
      draw_PF = jax.random.normal(series, (P, F), jnp.float32, out_sharding=specs.series_PF)
      first_PF = (jnp.arange(P) == 0)[:, None]
      self.series_scale_PF = nnx.Param(jnp.where(first_PF, 1.0, init.std * draw_PF).astype(dtype))
      self.series_bias_PF = weights.zeros((P, F), specs.series_PF, dtype)

  def __call__(self, x_BSD: jax.Array) -> jax.Array:
    ffn, specs, dtype = self.config, self.specs, x_BSD.dtype
    up_DF = gather(self.up_DF[...], specs.mlp_in_DF, dtype)
    hidden_BSF = jnp.einsum("bsd,df->bsf", x_BSD, up_DF)
    if ffn.bias:
      hidden_BSF = hidden_BSF + self.up_bias_F[...].astype(dtype)
    if ffn.gated:
      gate_DF = gather(self.gate_DF[...], specs.mlp_in_DF, dtype)
      gate_BSF = jnp.einsum("bsd,df->bsf", x_BSD, gate_DF)
      if ffn.bias:
        gate_BSF = gate_BSF + self.gate_bias_F[...].astype(dtype)
      hidden_BSF = self._activation(gate_BSF) * hidden_BSF
    else:
      hidden_BSF = self._activation(hidden_BSF)
    down_FD = gather(self.down_FD[...], specs.mlp_out_FD, dtype)
    out_BSD = jnp.einsum("bsf,fd->bsd", hidden_BSF, down_FD, out_sharding=specs.act_BSD)
    return out_BSD + self.down_bias_D[...].astype(dtype) if ffn.bias else out_BSD

  def _activation(self, x_BSF: jax.Array) -> jax.Array:
    """The activation, or PanGu-pi's sum over terms act(a x + b) (arXiv 2312.17276), with a and b
    per channel."""
    activation = ACTIVATIONS[self.config.activation]
    if self.config.series is None:
      return activation(x_BSF)
    scale_PF = self.series_scale_PF[...].astype(x_BSF.dtype)
    bias_PF = self.series_bias_PF[...].astype(x_BSF.dtype)
    terms = [activation(x_BSF * scale_PF[p] + bias_PF[p]) for p in range(self.config.series)]
    return sum(terms[1:], start=terms[0])
