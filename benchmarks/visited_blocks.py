"""Pairs of blocks that attention visits in rows of 8192 positions of packed documents.

  make run && python -m benchmarks.visited_blocks --store=runs/quickstart/store

Documents have the lengths of the stores under --store (all sources, each document to its last
token), and lognormal lengths with a mean of 600. `ours` is what the kernels' walk visits, `minimum`
the pairs that hold a query and a key that it sees, found position by position: no method with these
blocks can do with fewer. `splash` is what JAX's splash attention visits of a causal mask: it masks
documents by their segment ids inside the blocks, and skips none for them. All per row; exits with 1
if ours is not the minimum.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as mask_info

from slmjax.data.store import TokenStore
from slmjax.errors import UserError, run_command
from slmjax.kernels.attention import visible, walks

LENGTH, ROWS, MEAN = 8192, 64, 600
BLOCKS = ((128, 512), (256, 512), (256, 1024), (512, 512), (1024, 1024))
ROW = "{:24} {:>11} {:>8} {:>8} {:>8} {:>8}"


def document_lengths(root: Path) -> Iterator[int]:
  """Of all documents of the training stores under a folder, closing EOS included."""
  stores = sorted(path.parent for path in root.glob("*/train/index.json"))
  if not stores:
    raise UserError(f"{root} holds no token stores (SOURCE/train); `make run` makes some")
  for path in stores:
    store = TokenStore.open(path)
    yield from np.diff(store.document_starts.astype(np.int64), append=store.tokens).tolist()


def ours(rows: list[np.ndarray], queries: int, keys: int) -> int:
  @jax.jit
  def count(ids_S: jax.Array) -> jax.Array:
    blocks = (ids_S.reshape(-1, queries), ids_S.reshape(-1, keys))
    steps = visible.steps(visible.visible_blocks(*blocks, jnp.int32(0), None)[None])
    walked = jnp.arange(steps.kind_Z.size) < steps.total
    return jnp.sum(walked & (steps.kind_Z & visible.SEES > 0))

  return sum(int(count(ids)) for ids in rows)


def splash(queries: int, keys: int) -> int:
  mask = masks.MultiHeadMask([masks.CausalMask((LENGTH, LENGTH))])
  info, _ = mask_info.process_mask(mask, (queries, keys))
  return int(np.count_nonzero(np.asarray(info.block_mask)))


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.visited_blocks",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--store", type=Path, required=True)
  args = parser.parse_args()
  lengths = {
    f"lognormal, mean {MEAN}": list(walks.lognormal_lengths(MEAN, ROWS * LENGTH)),
    args.store.parent.name: list(document_lengths(args.store)),
  }
  least = True
  print(ROW.format("documents", "blocks", "ours", "minimum", "splash", "ratio"))
  for name, documents in lengths.items():
    rows = list(walks.row_segments(documents, LENGTH))[:ROWS]
    mean = np.mean(documents)
    for queries, keys in BLOCKS:
      found, fewest = ours(rows, queries, keys), walks.visits(rows, queries, keys).minimum
      causal = splash(queries, keys)
      least = least and found == fewest
      per_row = [f"{x / len(rows):.1f}" for x in (found, fewest)]
      ratio = f"{causal * len(rows) / found:.1f}"
      title = f"{name} ({mean:.0f})"
      print(ROW.format(title, f"{queries}x{keys}", *per_row, causal, ratio), flush=True)
  return 0 if least else 1


if __name__ == "__main__":
  run_command(main)
