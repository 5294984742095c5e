"""Attention as Triton kernels for NVIDIA GPUs, that go only where something is seen.

The online softmax and its recomputing backward are those of FlashAttention-2 (Dao 2023,
arXiv:2307.08691), with the keys' gradients in a kernel of their own: a program per block of keys
adds up what the queries of its whole group of heads send it, always in the same order, so that
equal inputs give equal bits. Per block, the range of blocks that it sees is known before the kernel
starts, from segment ids and window, and so is the part of it where every pair is visible: there,
no mask is computed. Heads and rows of any length are padded by masks as they are loaded.

B rows, S query positions, T key positions, N query heads, K key/value heads, G query heads per
key/value head, H width of queries and keys, U width of values; I query blocks of Q positions, J
key blocks of P positions, X own blocks and Y other ones, R the bounds of ranges.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from slmjax.errors import UserError
from slmjax.kernels import manual
from slmjax.kernels.attention import pallas_gpu_kernels, ranges, visible
from slmjax.kernels.attention.blocks import round_up
from slmjax.kernels.attention.online_softmax import delta
from slmjax.kernels.attention.pallas_gpu_kernels import NARROWEST, Sizes, Static, Tile

# Wider than any row, and far enough from the largest integer to subtract from.
_NO_WINDOW = 2**30


class Tiles(NamedTuple):
  """Of each kernel: the forward, the gradient of queries, and that of keys and values."""

  forward: Tile
  queries: Tile
  keys: Tile


_CAPABILITIES = {
  "A100": (8, 0),
  "A800": (8, 0),
  "H100": (9, 0),
  "H200": (9, 0),
  "H800": (9, 0),
}

# By capability and the widest head that they are for, narrow ones first. Of those that were tried,
# the tiles with the largest share of products in the loop without masks that keep to registers and
# to shared memory (docs/log.md, 2026-11-25); of equals the smaller, whose edges are shorter.
_TILES = {
  (8, 0): {
    96: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(32, 64, 4, 2)),
    128: Tiles(Tile(128, 64, 8, 2), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    192: Tiles(Tile(128, 64, 8, 2), Tile(32, 64, 4, 2), Tile(64, 64, 8, 2)),
    256: Tiles(Tile(64, 64, 8, 2), Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
    576: Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
  },
  (9, 0): {
    96: Tiles(Tile(128, 128, 8, 2), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    128: Tiles(Tile(128, 128, 8, 2), Tile(128, 64, 8, 2), Tile(64, 128, 8, 2)),
    192: Tiles(Tile(128, 64, 8, 2), Tile(128, 64, 8, 2), Tile(32, 128, 8, 2)),
    256: Tiles(Tile(128, 32, 8, 2), Tile(128, 32, 8, 2), Tile(128, 32, 8, 2)),
    576: Tiles(Tile(16, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
  },
}


def tiles_for(device_kind: str, width: int, dtype: Any) -> Tiles:
  """Tiles for a GPU of that name, and for the wider one of keys and values.

  Heads of float32 take the room of those of bfloat16 that are twice as wide, and get their tiles.

  Raises:
    UserError: the kernels have not been compiled for such a GPU, or for heads so wide.
  """
  capability = next((x for name, x in _CAPABILITIES.items() if name in device_kind), None)
  if capability is None:
    raise UserError(
      f"attention implementation 'pallas_gpu': has no tiles for {device_kind!r}, only for "
      f"{', '.join(_CAPABILITIES)}; use 'chunked'"
    )
  bfloat16s = jnp.dtype(dtype).itemsize // 2
  for widest, tiles in _TILES[capability].items():
    if width * bfloat16s <= widest:
      return tiles
  raise UserError(
    f"attention implementation 'pallas_gpu': heads of {width} are wider than "
    f"{widest // bfloat16s}; use 'chunked'"
  )


class _Options(NamedTuple):
  """`Static` without what differs between the kernels."""

  scale: float
  softcap: float | None
  windowed: bool
  sloped: bool
  interpret: bool
  tiles: Tiles


class _Shared(NamedTuple):
  """What all rows of the batch share."""

  q_start: jax.Array
  window: jax.Array | None
  slopes_N: jax.Array | None


class _Inputs(NamedTuple):
  """What kernels read. Segment ids are padded to whole blocks, the rest is as it came."""

  q_BSNH: jax.Array
  k_BTKH: jax.Array
  v_BTKU: jax.Array
  q_segments_BS: jax.Array
  kv_segments_BT: jax.Array
  shared: _Shared


def attention(
  q_BSNH: jax.Array,
  k_BTKH: jax.Array,
  v_BTKU: jax.Array,
  q_segments_BS: jax.Array,
  kv_segments_BT: jax.Array,
  q_start: int | jax.Array,
  *,
  scale: float,
  window: jax.Array | None,
  softcap: float | None,
  slopes_N: jax.Array | None,
  blocks: Tiles,
  interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """See `api.attention_and_logsumexp`. Temporaries are linear in S and T.

  Products of float32 arrays have the precision of `jax.default_matmul_precision`, as in XLA: TF32
  unless that says otherwise.

  Args:
    blocks: the tiles of `tiles_for`; rows may be shorter.
    interpret: runs the kernels as XLA programs on any platform, for tests.

  Raises:
    UserError: what `refusal` says.
  """
  if (why := refusal(q_BSNH, scale)) is not None:
    raise UserError(f"attention implementation 'pallas_gpu': {why}; use 'chunked'")
  options = _Options(scale, softcap, window is not None, slopes_N is not None, interpret, blocks)
  shared = _Shared(jnp.asarray(q_start, jnp.int32), window, slopes_N)
  arrays = (shared, q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT)
  axes = manual.varying_axes(*jax.tree.leaves(arrays))
  return _attention(options, *jax.tree.map(lambda x: manual.vary_over(x, axes), arrays))


def refusal(q_BSNH: jax.Array, scale: float) -> str | None:
  """What the kernels cannot do with such queries, or None."""
  if q_BSNH.dtype not in (jnp.bfloat16, jnp.float32):
    return f"{q_BSNH.dtype.name} is not built, only bfloat16 and float32"
  if not scale > 0:
    return f"scale must be positive, got {scale}"
  return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
  options: _Options, shared: _Shared, *batched: jax.Array
) -> tuple[jax.Array, jax.Array]:
  return _forward(options, shared, *batched)[0]


def _forward(
  options: _Options, shared: _Shared, *batched: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
  inputs = _prepare(options, shared, *batched)
  B, S, N, _ = inputs.q_BSNH.shape
  out = {
    "o": _like(inputs, (B, S, N, inputs.v_BTKU.shape[3]), inputs.q_BSNH.dtype),
    "lse": _like(inputs, (B, N, inputs.q_segments_BS.shape[1]), jnp.float32),
  }
  o_BSNU, lse_BNS = _call(options, inputs, "forward", {}, out)
  return (o_BSNU, jnp.swapaxes(lse_BNS, 1, 2)[:, :S]), (shared, batched, o_BSNU, lse_BNS)


def _backward(
  options: _Options, saved: Any, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array | None, ...]:
  shared, batched, o_BSNU, lse_BNS = saved
  do_BSNU, dlse_BSN = cotangents
  inputs = _prepare(options, shared, *batched)
  delta_BNS = jnp.swapaxes(delta(o_BSNU, do_BSNU, dlse_BSN), 1, 2)
  more = {
    "do": do_BSNU,
    "powers": pallas_gpu_kernels.powers_of_logsumexp(lse_BNS, options.softcap),
    "delta": _pad(delta_BNS, lse_BNS.shape[2]),
  }
  q, k, v = (_like(inputs, x.shape, x.dtype) for x in inputs[:3])
  (dq_BSNH,) = _call(options, inputs, "queries", more, {"dq": q})
  dk_BTKH, dv_BTKU = _call(options, inputs, "keys", more, {"dk": k, "dv": v})
  return None, dq_BSNH, dk_BTKH, dv_BTKU, None, None


_attention.defvjp(_forward, _backward)


def _pad(x: jax.Array, length: int, value: int = 0) -> jax.Array:
  """The last axis, up to `length`."""
  widths = [(0, 0)] * (x.ndim - 1) + [(0, length - x.shape[-1])]
  return jnp.pad(x, widths, constant_values=value)


def _prepare(options: _Options, shared: _Shared, *batched: jax.Array) -> _Inputs:
  q_BSNH, k_BTKH, v_BTKU, q_segments_BS, kv_segments_BT = batched
  # Blocks are powers of two, so that what the largest divides all do.
  S = round_up(q_BSNH.shape[1], max(tile.queries for tile in options.tiles))
  T = round_up(k_BTKH.shape[1], max(tile.keys for tile in options.tiles))
  ids = (_pad(q_segments_BS, S), _pad(kv_segments_BT, T))
  return _Inputs(q_BSNH, k_BTKH, v_BTKU, *ids, shared)


def _ranges(inputs: _Inputs, tile: Tile, own: str) -> jax.Array:
  """int32 [B, X, R]: per block of `own` the bounds of what it sees, see `ranges.bounds`."""
  B = inputs.q_segments_BS.shape[0]
  q_segments_BIQ = inputs.q_segments_BS.reshape(B, -1, tile.queries)
  kv_segments_BJP = inputs.kv_segments_BT.reshape(B, -1, tile.keys)

  def of_row(q_segments_IQ: jax.Array, kv_segments_JP: jax.Array) -> jax.Array:
    arguments = (q_segments_IQ, kv_segments_JP, inputs.shared.q_start, inputs.shared.window)
    found = (visible.visible_blocks(*arguments), ranges.whole_blocks(*arguments))
    return ranges.bounds(*(x_IJ.T if own == "keys" else x_IJ for x_IJ in found))

  return jax.vmap(of_row)(q_segments_BIQ, kv_segments_BJP)


def _specs(static: Static, inputs: _Inputs, own: str) -> dict[str, pl.BlockSpec]:
  """Where a program finds each array: its block of its own side, and all of a row of the other.

  The grid runs over heads first, so that what runs at once shares keys; then over rows and blocks.
  """
  (Q, P), (_, _, G, H, U) = static.tile[:2], static.sizes
  S, T = inputs.q_segments_BS.shape[1], inputs.kv_segments_BT.shape[1]
  H, U = round_up(H, NARROWEST), round_up(U, NARROWEST)
  spec = pl.BlockSpec
  if own == "queries":
    last = S // Q - 1  # programs start with it, see the kernels

    def key(head: Any, row: Any, _: Any) -> Any:
      return row, 0, jax.lax.div(head, G), 0

    query = {
      width: spec((None, Q, None, width), lambda head, row, i: (row, last - i, head, 0))
      for width in (H, U)
    }
    keys = {width: spec((None, T, None, width), key) for width in (H, U)}
    q_segments = spec((None, Q), lambda head, row, i: (row, last - i))
    kv_segments = spec((None, T), lambda head, row, i: (row, 0))
    of_query = spec((None, None, Q), lambda head, row, i: (row, head, last - i))
    of_block = spec((None, None, 4), lambda head, row, i: (row, last - i, 0))
    slopes = spec((1,), lambda head, row, i: (head,))
  else:
    query = {
      width: spec((None, S, G, width), lambda head, row, j: (row, 0, head, 0)) for width in (H, U)
    }
    keys = {
      width: spec((None, P, None, width), lambda head, row, j: (row, j, head, 0))
      for width in (H, U)
    }
    q_segments = spec((None, S), lambda head, row, j: (row, 0))
    kv_segments = spec((None, P), lambda head, row, j: (row, j))
    of_query = spec((None, G, S), lambda head, row, j: (row, head, 0))
    of_block = spec((None, None, 4), lambda head, row, j: (row, j, 0))
    slopes = spec((G,), lambda head, row, j: (head,))
  return {
    "ranges": of_block,
    "limits": spec((2,), lambda *_: (0,)),
    "slopes": slopes,
    **dict.fromkeys(("q", "dq"), query[H]),
    **dict.fromkeys(("do", "o"), query[U]),
    **dict.fromkeys(("k", "dk"), keys[H]),
    **dict.fromkeys(("v", "dv"), keys[U]),
    **dict.fromkeys(("lse", "powers", "delta"), of_query),
    "q_segments": q_segments,
    "kv_segments": kv_segments,
  }


_KERNELS = {
  "forward": pallas_gpu_kernels.attention_forward,
  "queries": pallas_gpu_kernels.attention_backward_queries,
  "keys": pallas_gpu_kernels.attention_backward_keys,
}


def _call(
  options: _Options,
  inputs: _Inputs,
  name: str,
  more: dict[str, jax.Array],
  out: dict[str, jax.ShapeDtypeStruct],
) -> Any:
  """Runs the kernel of that name; `more` are its inputs beside those of the forward."""
  (B, S, N, H), (T, K, U) = inputs.q_BSNH.shape, inputs.v_BTKU.shape[1:]
  tile = getattr(options.tiles, name)
  static = Static(*options[:-1], tile=tile, sizes=Sizes(S, T, N // K, H, U))
  own = "keys" if name == "keys" else "queries"
  shared = inputs.shared
  window = shared.q_start if shared.window is None else jnp.minimum(shared.window, _NO_WINDOW)
  optional: dict[str, jax.Array | None] = {
    "ranges": _ranges(inputs, tile, own),
    "limits": jnp.stack([shared.q_start, window]),
    "slopes": shared.slopes_N,
    "q": inputs.q_BSNH,
    "k": inputs.k_BTKH,
    "v": inputs.v_BTKU,
    # Padding's queries get an id that no key has, so that kernels compare ids and nothing else.
    "q_segments": jnp.where(inputs.q_segments_BS > 0, inputs.q_segments_BS, -1),
    "kv_segments": inputs.kv_segments_BT,
    **more,
  }
  arrays = {key: x for key, x in optional.items() if x is not None}
  specs = _specs(static, inputs, own)
  blocks = arrays["ranges"].shape[1]
  return pl.pallas_call(
    functools.partial(_KERNELS[name], static),
    grid=(K if own == "keys" else N, B, blocks),
    in_specs=[specs[key] for key in arrays],
    out_specs=[specs[key] for key in out],
    out_shape=list(out.values()),
    compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
    interpret=options.interpret,
    name=_KERNELS[name].__name__,
  )(*arrays.values())


def _like(inputs: _Inputs, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
  """An output that varies over the mesh axes over which the inputs do."""
  axes = jax.typeof(inputs.q_BSNH).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)
