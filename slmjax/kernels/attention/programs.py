"""Attention and its gradients as programs that compile for a chip that need not be there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import sharding, topology
from slmjax.kernels.attention.api import attention
from slmjax.kernels.shapes import AttentionShape


def lower(
  target: str,
  shape: AttentionShape,
  length: int,
  *,
  rows: int,
  attend: Any = attention,
  **options: Any,
) -> Any:
  """The lowered program of `attend`'s output and gradients, in bfloat16 on one device.

  Args:
    target: the name of a topology, such as v5e:2x2; its first device is compiled for.
    shape: heads and widths.
    length: of queries and keys, in positions.
    rows: of the batch.
    attend: a function with the contract of `api.attention`, called with `options`.
  """
  mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(target)[:1])

  def array(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, jax.P()))

  def forward_backward(q: Any, k: Any, v: Any, segments: Any, do: Any) -> Any:
    local = functools.partial(attend, scale=shape.width**-0.5, **options)
    o, vjp = jax.vjp(lambda q, k, v: local(q, k, v, segments, segments, 0), q, k, v)
    return o, *vjp(do)

  bf16 = functools.partial(array, jnp.bfloat16, rows, length)
  q, do = bf16(shape.heads, shape.width), bf16(shape.heads, shape.value_width)
  k, v = bf16(shape.kv_heads, shape.width), bf16(shape.kv_heads, shape.value_width)
  segments = array(jnp.int32, rows, length)
  with jax.set_mesh(mesh):
    island = jax.shard_map(forward_backward, in_specs=(jax.P(),) * 5, out_specs=jax.P())
    return jax.jit(island).lower(q, k, v, segments, do)
