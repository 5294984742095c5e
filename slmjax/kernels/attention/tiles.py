"""Which blocks the TPU attention kernels use: the table that `slmjax.kernels.tune` writes."""

import functools
import json
from pathlib import Path
from typing import Any

from slmjax.durable import write_atomically
from slmjax.errors import UserError
from slmjax.kernels.attention.blocks import Blocks

TABLE = Path(__file__).with_name("tiles.json")

# What libtpu calls the devices of the chips in the table.
CHIPS = {
  "TPU v5 lite": "v5e",
  "TPU v5e": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU v6e": "v6e",
}

# Rows of a product (heads of a group times positions) from which it keeps the matrix units busy.
_ROWS = 1024


@functools.cache
def table() -> dict[str, dict[str, list[int]]]:
  loaded: dict[str, dict[str, list[int]]] = json.loads(TABLE.read_text())
  return loaded


def key(group: int, width: int, value_width: int) -> str:
  """The table's name for a shape: query heads per key/value head, widths of keys and of values."""
  return f"{group}x{width}x{value_width}"


# Chips whose cores have 16 MiB of vector memory, where the kernels want 56.
_TOO_SMALL = ("TPU v2", "TPU v3", "TPU v4")


def blocks_for(device_kind: str, group: int, width: int, value_width: int) -> tuple[Blocks, str]:
  """Blocks for a chip and a shape, and where they come from.

  Raises:
    UserError: no blocks fit such a chip.
  """
  if device_kind.startswith(_TOO_SMALL):
    raise UserError(
      f"attention implementation 'pallas_tpu': {device_kind} has too little vector memory, not as "
      "v5e and newer have; use 'chunked'"
    )
  chip = CHIPS.get(device_kind)
  tuned = None if chip is None else table().get(chip)
  if tuned and (found := tuned.get(key(group, width, value_width))):
    return Blocks(*found), f"tuned for {chip}"
  queries = 128
  while queries < 512 and 2 * queries * group <= _ROWS:
    queries *= 2
  return Blocks(queries, 512 if max(width, value_width) <= 256 else 256), "by rule"


def write(chip: str, tuned: dict[str, Any]) -> None:
  """Replaces a chip's part of the table, which keeps the others'."""
  merged = {**(json.loads(TABLE.read_text()) if TABLE.exists() else {}), chip: tuned}
  lines = [f'  "{name}": {json.dumps(merged[name], sort_keys=True)}' for name in sorted(merged)]
  write_atomically(TABLE, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
