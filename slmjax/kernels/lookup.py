"""Rows of a table that is spread over devices, by their numbers.

B rows of a batch, S positions, V rows of the table, D its width. Inside an island these letters are
sizes on one device.
"""

import functools

import jax
import jax.numpy as jnp

from slmjax.kernels import manual
from slmjax.sharding import Specs


def take_rows(
  table_VD: jax.Array, ids_BS: jax.Array, specs: Specs, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
  """Rows of a stored table, [B, S, D] in `dtype`, and the table, passed on.

  The ids travel to the table and the activations back (an all-to-all of B x S x D), never the
  table: for a vocabulary of 256K that is tens of megabytes instead of one gigabyte.

  Whoever uses the table again uses the one that was passed on: the cotangent that arrives for it is
  the array that the gradients of the rows are then added to, in the table's own dtype and in the
  shard that stores it. So a table that is used twice has one gradient, not two and their sum.

  Args:
    table_VD: with spec `embed_VD.stored`.
    ids_BS: int32 in [0, V), with spec `tokens_BS`.
  """
  return _take_rows(specs, dtype, table_VD, ids_BS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_rows(
  specs: Specs, dtype: jnp.dtype, table_VD: jax.Array, ids_BS: jax.Array
) -> tuple[jax.Array, jax.Array]:
  def local(table_VD: jax.Array, ids_BS: jax.Array) -> jax.Array:
    mine_BS, own_BS = _own_rows(specs, table_VD, ids_BS)
    rows_BSD = jnp.where(mine_BS[..., None], table_VD[jnp.where(mine_BS, own_BS, 0)], 0)
    rows_BSD = jax.lax.psum(rows_BSD.astype(dtype), specs.vocab_axis)
    return jax.lax.all_to_all(rows_BSD, specs.fsdp_axis, split_axis=0, concat_axis=2, tiled=True)

  table, tokens = specs.embed_VD.stored, specs.tokens_BS
  island = jax.shard_map(local, in_specs=(table, tokens), out_specs=specs.act_BSD)
  return island(table_VD, ids_BS), table_VD


def _forward(
  specs: Specs, dtype: jnp.dtype, table_VD: jax.Array, ids_BS: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  return _take_rows(specs, dtype, table_VD, ids_BS), ids_BS


def _backward(
  specs: Specs,
  dtype: jnp.dtype,
  ids_BS: jax.Array,
  cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None]:
  others = tuple(axis for axis in specs.row_axes if axis != specs.fsdp_axis)

  def local(drows_BSD: jax.Array, dtable_VD: jax.Array, ids_BS: jax.Array) -> jax.Array:
    mine_BS, own_BS = _own_rows(specs, dtable_VD, ids_BS)
    drows_BSD = jax.lax.all_to_all(
      drows_BSD, specs.fsdp_axis, split_axis=2, concat_axis=0, tiled=True
    )
    outside = dtable_VD.shape[0]
    dtable_VD = manual.on_first(dtable_VD, others)
    dtable_VD = dtable_VD.at[jnp.where(mine_BS, own_BS, outside)].add(
      drows_BSD.astype(dtable_VD.dtype), mode="drop"
    )
    return jax.lax.psum(dtable_VD, others)

  table = specs.embed_VD.stored
  island = jax.shard_map(local, in_specs=(specs.act_BSD, table, specs.tokens_BS), out_specs=table)
  return island(*cotangents, ids_BS), None


_take_rows.defvjp(_forward, _backward)


def _own_rows(specs: Specs, table_VD: jax.Array, ids_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Of the ids of all fsdp devices: which are in this shard of the table, and where."""
  ids_BS = jax.lax.all_gather(ids_BS, specs.fsdp_axis, axis=0, tiled=True)
  own_BS = ids_BS - jax.lax.axis_index(specs.vocab_axis) * table_VD.shape[0]
  return (own_BS >= 0) & (own_BS < table_VD.shape[0]), own_BS
