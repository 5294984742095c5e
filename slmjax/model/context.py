"""What all layers of a call share, and what attention keeps for later calls.

Letters: B rows, S positions of the call, T positions of the keys, R rotation angles.
"""

import dataclasses
from typing import Any

import jax

# What one pass of a block keeps: arrays of the kind of its attention, and of its feed-forward.
LayerCache = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """Where the tokens of a call stand.

  `segments_BS` are their segment ids (0 is padding), `kv_segments_BT` those of the keys; token i
  sits at index `start` + i of the keys. `angles_BSR` are cosines and sines, for rotary positions.
  `window` is the layer's, which may differ from its neighbours': None or 0 is none.
  """

  segments_BS: jax.Array
  kv_segments_BT: jax.Array
  start: jax.Array
  angles_BSR: tuple[jax.Array, jax.Array] | None
  window: jax.Array | int | None
