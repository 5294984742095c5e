"""The mesh and the table of specs: the only file that names mesh axes.

Axes: `replica` (data parallel across slices), `fsdp` (data parallel, weights spread), `context`
(sequence), `tensor` (heads, feed-forward width, vocabulary).

Letters: V vocabulary, D model width, N query heads, K key/value heads, H head width,
F feed-forward width, A microbatches, B rows, S query positions, T key positions.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("replica", "fsdp", "context", "tensor")
ROWS = ("replica", "fsdp")
_EXPLICIT = (AxisType.Explicit,) * len(AXES)


@dataclasses.dataclass(frozen=True)
class WeightSpec:
  """How a weight is kept (`stored`, spread over fsdp) and how a layer needs it (`used`)."""

  stored: P
  used: P


@dataclasses.dataclass(frozen=True)
class Specs:
  """Partition specs by shape, for a mesh with `tensor` devices on its tensor axis.

  Layers read these fields and name no axis. `row_axes` are the axes over which tokens are spread,
  `fsdp_axis` the one over which the width of a stored table is, `vocab_axis` the one over which
  its rows are: for kernels that communicate themselves.
  """

  tensor: int
  embed_VD: WeightSpec = WeightSpec(P("tensor", "fsdp"), P("tensor", None))
  q_DNH: WeightSpec = WeightSpec(P("fsdp", "tensor", None), P(None, "tensor", None))
  out_NHD: WeightSpec = WeightSpec(P("tensor", None, "fsdp"), P("tensor", None, None))
  mlp_in_DF: WeightSpec = WeightSpec(P("fsdp", "tensor"), P(None, "tensor"))
  mlp_out_FD: WeightSpec = WeightSpec(P("tensor", "fsdp"), P("tensor", None))
  down_DR: WeightSpec = WeightSpec(P("fsdp", None), P(None, None))
  up_RD: WeightSpec = WeightSpec(P(None, "fsdp"), P(None, None))
  norm_D: P = P(None)
  bias_F: P = P("tensor")
  bias_NH: P = P("tensor", None)
  series_PF: P = P(None, "tensor")
  act_BSD: P = P(ROWS, "context", None)
  act_BSNH: P = P(ROWS, "context", "tensor", None)
  tokens_BS: P = P(ROWS, "context")
  tokens_ABS: P = P(None, ROWS, "context")
  row_axes: tuple[str, ...] = (*ROWS, "context")
  fsdp_axis: str = "fsdp"
  vocab_axis: str = "tensor"

  @classmethod
  def of_mesh(cls) -> "Specs":
    """The specs for the mesh that `jax.set_mesh` (or `use_abstract_mesh`) entered."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.axis_names != AXES:
      raise ValueError(f"enter a mesh with axes {AXES} first (found {mesh.axis_names})")
    return cls(tensor=mesh.shape["tensor"])

  def kv_split(self, kv_heads: int) -> bool:
    """Whether key/value heads are spread over the tensor axis, or whole on each device (fewer
    heads than devices: each device then reads the one head that its query heads share)."""
    return kv_heads % self.tensor == 0

  def kv_DKH(self, kv_heads: int) -> WeightSpec:
    return self.q_DNH if self.kv_split(kv_heads) else WeightSpec(P("fsdp"), P())

  def bias_KH(self, kv_heads: int) -> P:
    return self.bias_NH if self.kv_split(kv_heads) else P(None, None)

  def act_BTKH(self, kv_heads: int) -> P:
    return self.act_BSNH if self.kv_split(kv_heads) else P(ROWS, "context", None, None)


def make_mesh(shape: tuple[int, ...], devices: Sequence[Any] | None = None) -> Mesh:
  """An Explicit mesh over all devices, or over the given ones (a compile-only topology's too)."""
  if devices is None:
    return jax.make_mesh(shape, AXES, axis_types=_EXPLICIT)
  grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
  return Mesh(grid, AXES, axis_types=_EXPLICIT)


def abstract_mesh(shape: tuple[int, ...]) -> AbstractMesh:
  """A mesh of devices that nobody has: enough to trace and type-check a pod-size program."""
  return AbstractMesh(shape, AXES, axis_types=_EXPLICIT)


def with_mesh(tree: Any, mesh: Mesh) -> Any:
  """Abstract arrays placed on a concrete mesh, with the specs that their types carry."""

  def place(x: Any) -> jax.ShapeDtypeStruct:
    spec = P() if x.sharding is None else x.sharding.spec  # scalars come without
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(place, tree)


def gather(weight: jax.Array, spec: WeightSpec, dtype: jnp.dtype) -> jax.Array:
  """A stored weight as a layer needs it. Cast first, so that fsdp moves the narrow type.

  The result's type says `reduced` over the axes that spread tokens. That changes nothing in the
  forward; its gradient then stays a partial sum on each device until it comes back here, to be
  scattered over fsdp and only then, as a shard, summed over the other axes. Without it the whole
  gradient would be summed on every device, and all but the shard thrown away.
  """
  if "fsdp" not in jax.typeof(weight).sharding.spec:  # gathered before, by `gathered`
    return weight.astype(dtype)
  axis = spec.stored.index("fsdp")
  tokens = Specs.row_axes

  def local(shard: jax.Array) -> jax.Array:
    others = tuple(name for name in tokens if name != "fsdp")
    shard = jax.lax.pcast(shard.astype(dtype), others, to="reduced")
    return jax.lax.all_gather(shard, "fsdp", axis=axis, tiled=True, to="reduced")

  used = P(*spec.used, reduced=frozenset(tokens))
  return jax.shard_map(local, in_specs=spec.stored, out_specs=used)(weight)


def gathered(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
  """A stored weight as `gather` gives it, for a program that uses it many times and needs no
  gradient. What is not spread over fsdp stays as it is."""
  spec = jax.typeof(weight).sharding.spec
  if "fsdp" not in spec:
    return weight
  return jax.reshard(weight.astype(dtype), P(*(None if a == "fsdp" else a for a in spec)))


def shard_attention(
  attend: Callable[..., jax.Array], specs: Specs, kv_heads: int
) -> Callable[..., jax.Array]:
  """Runs `attend(q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT, q_start, window=,
  slopes_N=)` on each device's rows and heads; `q_start` and `window` are scalars that all devices
  share."""
  kv = specs.act_BTKH(kv_heads)
  in_specs = (specs.act_BSNH, kv, kv, specs.tokens_BS, specs.tokens_BS, P())

  def call(
    *arrays: jax.Array,
    window: jax.Array | int | None = None,
    slopes_N: jax.Array | None = None,
  ) -> jax.Array:
    # What is absent or known beforehand is no argument of the island.
    scalar, heads = P(), P(specs.vocab_axis)
    traced = {"window": (window, scalar)} if isinstance(window, jax.Array) else {}
    if slopes_N is not None:
      traced["slopes_N"] = (jax.reshard(slopes_N, heads), heads)
    fixed = {} if window is None or traced.get("window") else {"window": window}

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *rest: jax.Array) -> jax.Array:
      if not specs.kv_split(kv_heads):
        # The query heads of this device all read one key/value head: keep that one.
        head = jax.lax.axis_index(specs.vocab_axis) * kv_heads // specs.tensor
        k, v = (jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2) for x in (k, v))
      positional = len(in_specs) - 3
      extra = dict(zip(traced, rest[positional:], strict=True))
      return attend(q, k, v, *rest[:positional], **extra, **fixed)

    values, extra_specs = zip(*traced.values(), strict=True) if traced else ((), ())
    island = jax.shard_map(local, in_specs=(*in_specs, *extra_specs), out_specs=specs.act_BSNH)
    return island(*arrays, *values)

  return call


def data_shards(mesh: Mesh | AbstractMesh) -> int:
  """Over how many coordinates of the mesh the rows of a batch are spread."""
  return math.prod(mesh.shape[axis] for axis in ROWS)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
  """Where the arrays of a batch [A, B, S] live."""
  return NamedSharding(mesh, Specs(tensor=mesh.shape["tensor"]).tokens_ABS)


def local_rows(sharding: NamedSharding, rows: int) -> np.ndarray:
  """The rows of a microbatch of `rows` that this process's devices hold, ascending."""
  index_map = sharding.addressable_devices_indices_map((1, rows, 1))
  spans = {index[1].indices(rows) for index in index_map.values() if index is not None}
  return np.unique(np.concatenate([np.arange(*span) for span in spans]))


def place_rows(rows_BS: np.ndarray) -> jax.Array:
  """An array of rows that every process holds whole, spread over the current mesh."""
  mesh = jax.sharding.get_mesh()
  sharding = NamedSharding(mesh, Specs.of_mesh().tokens_BS)
  return jax.make_array_from_callback(rows_BS.shape, sharding, lambda index: rows_BS[index])


def as_rows(x_BS: jax.Array) -> jax.Array:
  """An array of rows that every device holds whole, spread over the current mesh."""
  return jax.reshard(x_BS, Specs.of_mesh().tokens_BS)


def whole(x: jax.Array) -> jax.Array:
  """The array, gathered onto every device."""
  return jax.reshard(x, P())
