"""Ops and their gradients as programs that compile for a chip that need not be there."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from slmjax import sharding, topology
from slmjax.kernels.attention.api import attention
from slmjax.kernels.cross_entropy.api import cross_entropy
from slmjax.kernels.shapes import AttentionShape, TableShape

# One device of each chip; the smallest slice that libtpu knows has four.
TARGETS = {
  "v5e": "v5e:2x2",
  "v5p": "v5p:2x2x1",
  "v6e": "v6e:2x2",
  "a100": "a100:1",
  "h100": "h100:1",
}


def lower_attention(
  chip: str,
  shape: AttentionShape,
  length: int,
  *,
  rows: int,
  attend: Any = attention,
  check_vma: bool = True,
  **options: Any,
) -> jax.stages.Lowered:
  """The lowered program of `attend`'s output and gradients, in bfloat16 on one device.

  Args:
    chip: one of TARGETS.
    shape: heads and widths.
    length: of queries and keys, in positions.
    rows: of the batch.
    attend: a function with the contract of `api.attention`, called with `options`.
    check_vma: whether its types say over which mesh axes arrays vary, as in our kernels.
  """
  mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(TARGETS[chip])[:1])
  local = functools.partial(attend, scale=shape.width**-0.5, **options)

  def forward_backward(q: Any, k: Any, v: Any, segments: Any, do: Any) -> Any:
    o, vjp = jax.vjp(lambda q, k, v: local(q, k, v, segments, segments, 0), q, k, v)
    return o, *vjp(do)

  whole = jax.NamedSharding(mesh, jax.P())

  def array(dtype: Any, *dims: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, length, *dims), dtype, sharding=whole)

  q, do = (array(jnp.bfloat16, shape.heads, x) for x in (shape.width, shape.value_width))
  k, v = (array(jnp.bfloat16, shape.kv_heads, x) for x in (shape.width, shape.value_width))
  segments = array(jnp.int32)
  with jax.set_mesh(mesh):
    island = jax.shard_map(
      forward_backward, in_specs=(jax.P(),) * 5, out_specs=jax.P(), check_vma=check_vma
    )
    return jax.jit(island).lower(q, k, v, segments, do)


def lower_cross_entropy(
  chip: str, shape: TableShape, length: int, *, rows: int, **options: Any
) -> jax.stages.Lowered:
  """The lowered program of the cross entropy's outputs and gradients, on one device: activations in
  bfloat16, the table in float32. `options` are those of `api.cross_entropy`."""
  mesh = sharding.make_mesh((1, 1, 1, 1), topology.devices(TARGETS[chip])[:1])

  def forward_backward(x: Any, w: Any, targets: Any, dnll: Any, dlse: Any) -> Any:
    specs = sharding.Specs.of_mesh()
    outputs, vjp = jax.vjp(lambda x, w: cross_entropy(x, w, targets, specs=specs, **options), x, w)
    return outputs, vjp((dnll, dlse))

  with jax.set_mesh(mesh):
    specs = sharding.Specs.of_mesh()

    def array(dtype: Any, spec: jax.P, *dims: int) -> jax.ShapeDtypeStruct:
      return jax.ShapeDtypeStruct(dims, dtype, sharding=jax.NamedSharding(mesh, spec))

    x = array(jnp.bfloat16, specs.act_BSD, rows, length, shape.width)
    w = array(jnp.float32, specs.embed_VD.stored, shape.vocabulary, shape.width)
    targets = array(jnp.int32, specs.tokens_BS, rows, length)
    cotangent = array(jnp.float32, specs.tokens_BS, rows, length)
    return jax.jit(forward_backward).lower(x, w, targets, cotangent, cotangent)
