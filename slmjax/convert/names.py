"""Which of our arrays stands where in which of their tensors.

A family's table says, for each tensor of theirs, which of our arrays it holds and how:

  "self_attn.q_proj.weight": {"attention/q_DNH": "NH D"}
  "self_attn.qkv_proj.weight": {
    "attention/q_DNH": "+NH D", "attention/k_DKH": "+KH D", "attention/v_DKH": "+KH D"}
  "attention.query_key_value.weight": {
    "attention/q_DNH": "N+H D", "attention/k_DKH": "K+H D", "attention/v_DKH": "K+H D"}

The letters are those that end our array's name, whose sizes are its shape (d is the second of D and
D); each word is one axis of their tensor, its letters from slow to fast, 1 an axis of size one.
Where a tensor holds several arrays, they lie end to end along what follows the plus: in the second
line above all queries come first, then all keys; in the third, each head has its query, key and
value side by side. A tuple has alternatives, of which a model has the arrays of one.

Every number of ours is in exactly one tensor of theirs and the reverse, which `lay_out` proves.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from slmjax.errors import UserError
from slmjax.model_config import ModelConfig

Held = Mapping[str, str]
Table = Mapping[str, Held | tuple[Held, ...]]


@dataclasses.dataclass(frozen=True)
class Names:
  """A family's names.

  Attributes:
    prefix: what the names of the model inside the language model begin with; files saved from the
      inner model alone lack it.
    layer: where the tensors of a block are, with {} for the block's index.
    before: tensors before the blocks, in full. after: those behind them.
    block: tensors of a block, after `layer`.
    embedding: the input table. head: the output table, which may be there too if they are tied.
    buffers: regular expressions of what files may hold beside weights: constants.
    renamed: what tensors are called in files of other versions.
  """

  prefix: str
  layer: str
  before: Table
  block: Table
  after: Table
  embedding: str
  head: str
  buffers: tuple[str, ...] = ()
  renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Part:
  """A tensor's part that is one of our arrays, or one layer of a stacked one.

  Attributes:
    array: the name of ours.
    layer: index along its leading axis; None for an array without it.
    letters: their order and sizes in the tensor.
    perm: axes of ours in that order.
    start: where the part begins along the tensor's joined axis.
    size: and how much of it is the part's.
  """

  array: str
  layer: int | None
  letters: tuple[int, ...]
  perm: tuple[int, ...]
  start: int
  size: int


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of theirs. Seen with the shape `grid`, its parts are slices along `axis`."""

  name: str
  shape: tuple[int, ...]
  grid: tuple[int, ...]
  axis: int
  parts: tuple[Part, ...]

  def read(self, part: Part, theirs: np.ndarray) -> np.ndarray:
    """The part, in our order, of a tensor of theirs."""
    slices = tuple(
      slice(part.start, part.start + part.size) if i == self.axis else slice(None)
      for i in range(len(self.grid))
    )
    ordered = theirs.reshape(self.grid)[slices].reshape(part.letters)
    return ordered.transpose(np.argsort(part.perm))

  def write(self, part: Part, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Puts the part, in our order, where it belongs in a tensor of theirs."""
    grid = theirs.reshape(self.grid)
    shape = tuple(part.size if i == self.axis else n for i, n in enumerate(self.grid))
    grid[(slice(None),) * self.axis + (slice(part.start, part.start + part.size),)] = (
      ours.transpose(part.perm).reshape(shape)
    )


def lay_out(
  names: Names, model: ModelConfig, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
  """Their tensors by name, in the order of the model, for our arrays of these shapes.

  A line of the table is left out where the model has none of its arrays.

  Raises:
    UserError: some of our arrays have no place in their tensors.
  """
  lines: list[tuple[str, Held | tuple[Held, ...], str, int | None]] = []
  lines += [(theirs, holds, "", None) for theirs, holds in names.before.items()]
  blocks = [(s, i) for s, segment in enumerate(model.segments) for i in range(segment.layers)]
  for index, (s, within) in enumerate(blocks):
    at = names.layer.format(index)
    segment = f"segments/{s}/"
    lines += [(at + theirs, holds, segment, within) for theirs, holds in names.block.items()]
  lines += [(theirs, holds, "", None) for theirs, holds in names.after.items()]

  tensors: dict[str, Tensor] = {}
  for theirs, holds, prefix, layer in lines:
    for alternative in holds if isinstance(holds, tuple) else (holds,):
      held = {prefix + ours: pattern for ours, pattern in alternative.items()}
      if any(array in shapes for array in held):
        assert theirs not in tensors, theirs
        tensors[theirs] = _tensor(theirs, held, layer, shapes)
  _check_cover(tensors, shapes)
  return tensors


def _tensor(
  name: str,
  held: Mapping[str, str],
  layer: int | None,
  shapes: Mapping[str, tuple[int, ...]],
) -> Tensor:
  parts: list[Part] = []
  grid: list[int] = []
  merged: list[tuple[int, ...]] = []  # which axes of the grid are one axis of theirs
  axis, end = 0, 0
  for array, pattern in held.items():
    if array not in shapes:
      raise UserError(f"{name} also holds {array}, which this model does not have")
    letters = array.rpartition("_")[2]
    if len(set(letters)) < len(letters):  # a square matrix
      letters = letters[0] + letters[1:].lower()
    sizes = dict(zip(letters, shapes[array][layer is not None :], strict=True))
    order = [letter for letter in pattern if letter in letters]
    assert sorted(order) == sorted(letters), (array, pattern)
    grid, merged = [], []
    for word in pattern.split():
      before, plus, after = word.partition("+")
      groups = [before, after] if plus else [before]
      axis = len(grid) + 1 if plus else axis
      merged.append(tuple(range(len(grid), len(grid) + len(groups))))
      grid += [math.prod(sizes[c] for c in group if c != "1") for group in groups]
    parts.append(
      Part(
        array=array,
        layer=layer,
        letters=tuple(sizes[c] for c in order),
        perm=tuple(letters.index(c) for c in order),
        start=end,
        size=grid[axis],
      )
    )
    end += grid[axis]
  grid[axis] = end
  shape = tuple(math.prod(grid[i] for i in axes) for axes in merged)
  return Tensor(name, shape, tuple(grid), axis, tuple(parts))


def _check_cover(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
  placed: dict[tuple[str, int | None], str] = {}
  for tensor in tensors.values():
    for part in tensor.parts:
      slot = (part.array, part.layer)
      assert slot not in placed, (slot, tensor.name, placed[slot])
      placed[slot] = tensor.name
  for name, shape in shapes.items():
    layers = range(shape[0]) if name.startswith("segments/") else [None]
    for layer in layers:
      if (name, layer) not in placed:
        raise UserError(f"{name} has no tensor of this model_type to go to")
