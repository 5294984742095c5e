"""Our TPU attention beside JAX's splash attention, as libtpu compiles them: no TPU is needed.

  python -m benchmarks.attention_splash --chip=v5e --length=2048

Fox-1's heads (16 queries, 4 keys/values, width 128), bfloat16, one causal document. Per kernel and
size of blocks: bundles of the hot block (the computation of one step) per 512 x 512 pairs of
positions and head, the share of them in which a matrix unit is at work (fed), the share of the
matrix units' time that is used (occupied), and the millions of bundles that the steps of one row
take with all heads, each with the 500 that a step of the grid costs beside its computation. A
bundle is a cycle if nothing stalls. Both are compiled with several sizes of blocks, and splash
attention with its two backward kernels (seven products per pair) and with its fused one (five, as
ours). Splash attention gets no segment ids here, ours always compares them.

Exits with 1 if the best matrix-unit share (occupied) of ours is below the best of splash
attention's forward or fused backward. About ten minutes on two cores. Needs
requirements-compile.txt.
"""

import argparse
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from slmjax.errors import run_command
from slmjax.kernels import programs, tune
from slmjax.kernels.attention import tiles, walks
from slmjax.kernels.attention.blocks import Blocks
from slmjax.kernels.inspect import tpu
from slmjax.kernels.shapes import ATTENTION

SHAPE = ATTENTION["fox1"]
# Blocks of queries and of keys, and of how many keys the inner loop computes at a time: those that
# were best in some pass, by shares or by bundles, of twenty that were tried on v5e and v5p.
SPLASH = (
  (512, 2048, 512),
  (1024, 1024, 512),
  (2048, 512, 512),
  (2048, 1024, 256),
  (2048, 2048, 512),
)
# Of ours, beside those of its table.
OURS = ((512, 1024), (512, 2048), (1024, 512), (1024, 1024))
ROW = "{:12} {:24} {:14} {:>9} {:>7} {:>9} {:>10}"


class Result(NamedTuple):
  """A pass of one implementation: its kernels' figures, added up where there are two."""

  implementation: str
  passed: str
  blocks: str
  bundles: float  # per 512 x 512 pairs and head
  fed: float
  occupied: float
  millions: float


def result(
  implementation: str,
  passed: str,
  blocks: tuple[int, ...],
  kernels: list[tpu.TpuKernel],
  heads: int,
  length: int,
) -> Result:
  """Figures of kernels whose step computes a pair of blocks for so many heads."""
  queries, keys = blocks[:2]
  bundles = sum(kernel.hot.bundles for kernel in kernels)
  (row,) = walks.row_segments([length], length)
  steps = walks.visits([row], queries, keys).causal * SHAPE.heads // heads

  def mean(share: Any) -> float:
    return sum(share(kernel.hot) * kernel.hot.bundles for kernel in kernels) / bundles

  return Result(
    implementation,
    passed,
    "x".join(map(str, blocks)),
    bundles * 512**2 / (queries * keys * heads),
    mean(lambda hot: hot.fed),
    mean(lambda hot: hot.occupied),
    steps * (bundles + tune.STEP_BUNDLES * len(kernels)) / 1e6,
  )


def ours(dump: tpu.Dump, chip: str, length: int) -> Iterator[Result]:
  tuned = tiles.table()[chip][tiles.key(SHAPE.group, SHAPE.width, SHAPE.value_width)]
  for blocks in dict.fromkeys([Blocks(*tuned), *(Blocks(*x) for x in OURS)]):
    if kernels := tune.compiled(dump, chip, SHAPE, blocks, length):
      for passed, kernel in zip(("forward", "backward, fused"), kernels, strict=True):
        yield result("ours", passed, blocks, [kernel], SHAPE.group, length)


def theirs(dump: tpu.Dump, chip: str, length: int, blocks: tuple[int, int, int]) -> Iterator[Any]:
  queries, keys, compute = blocks
  for fused in (False, True):
    sizes = splash.BlockSizes(
      block_q=queries,
      block_kv=keys,
      block_kv_compute=compute,
      block_q_dkv=queries,
      block_kv_dkv=keys,
      block_kv_dkv_compute=compute,
      block_q_dq=None if fused else queries,
      block_kv_dq=None if fused else keys,
      use_fused_bwd_kernel=fused,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * SHAPE.group)
    kernel = splash.make_splash_mqa_single_device(mask, block_sizes=sizes)

    def attend(q: Any, k: Any, v: Any, *_: Any, scale: float, kernel: Any = kernel) -> Any:
      q_BKGSH = jnp.moveaxis(q * scale, 2, 1).reshape(
        q.shape[0], SHAPE.kv_heads, SHAPE.group, length, SHAPE.width
      )
      k_BKTH, v_BKTH = (jnp.moveaxis(x, 2, 1) for x in (k, v))
      o_BKGSH = jax.vmap(jax.vmap(kernel))(q_BKGSH.astype(q.dtype), k_BKTH, v_BKTH)
      return jnp.moveaxis(o_BKGSH.reshape(q.shape[0], -1, length, SHAPE.width), 1, 2)

    program = programs.lower_attention(chip, SHAPE, length, rows=1, attend=attend, check_vma=False)
    try:
      kernels = dump.kernels("splash_", program.compile)
    except jax.errors.JaxRuntimeError as error:
      if "RESOURCE_EXHAUSTED" not in str(error):
        raise
      continue
    forward = [kernel for kernel in kernels if "_fwd" in kernel.name]
    backward = [kernel for kernel in kernels if "_fwd" not in kernel.name]
    if not fused:
      yield result("splash", "forward", blocks, forward, 1, length)
    name = "backward, fused" if fused else "backward, two kernels"
    yield result("splash", name, blocks, backward, 1, length)


def main() -> int:
  parser = argparse.ArgumentParser(
    prog="python -m benchmarks.attention_splash",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--chip", required=True, choices=("v5e", "v5p", "v6e"))
  parser.add_argument("--length", type=int, required=True, help="2048 or 8192")
  args = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  results: list[Result] = []
  print(f"{args.chip}, length {args.length}, jax {jax.__version__}")
  print(ROW.format("", "pass", "blocks", "bundles", "fed", "occupied", "M per row"))

  def show(found: Iterator[Result]) -> None:
    for x in found:
      results.append(x)
      figures = (f"{x.bundles:.0f}", f"{x.fed:.3f}", f"{x.occupied:.3f}", f"{x.millions:.2f}")
      print(ROW.format(x.implementation, x.passed, x.blocks, *figures), flush=True)

  with tpu.dump() as dump:
    show(ours(dump, args.chip, args.length))
    for blocks in SPLASH:
      if max(blocks) <= args.length:
        show(theirs(dump, args.chip, args.length, blocks))
  return 0 if report(results) else 1


def report(results: list[Result]) -> bool:
  """Prints our best beside splash attention's; whether our shares are at least equal."""
  equal = True
  for ours_passed, passed in (
    ("forward", "forward"),
    ("backward, fused", "backward, fused"),
    ("backward, fused", "backward, two kernels"),
  ):
    mine = [x for x in results if x.implementation == "ours" and x.passed == ours_passed]
    others = [x for x in results if x.implementation == "splash" and x.passed == passed]
    share, their_share = (max(some, key=lambda x: x.occupied) for some in (mine, others))
    fewest, their_fewest = (min(some, key=lambda x: x.millions) for some in (mine, others))
    print(
      f"{passed}: occupied {share.occupied:.3f} ({share.blocks}) beside splash attention's "
      f"{their_share.occupied:.3f} ({their_share.blocks}); {fewest.millions:.2f} million bundles "
      f"a row ({fewest.blocks}) beside {their_fewest.millions:.2f} ({their_fewest.blocks})"
    )
    equal = equal and (passed != ours_passed or share.occupied >= their_share.occupied)
  return equal


if __name__ == "__main__":
  run_command(main)
