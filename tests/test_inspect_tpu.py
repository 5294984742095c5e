"""Reading libtpu's account of a kernel: a made-up one, and (slow) a real one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from slmjax import topology
from slmjax.errors import UserError
from slmjax.kernels.inspect import tpu

BUNDLES = """= control target key start
LH: loop header
= control target key end

     0   :  { %s1 = smov 0  ;;  %s2 = smov 1 }
   0x1 LB: > { %s3 = sadd.s32 %s1, %s2 }
   0x2   : > { %p1 = scmp.ne.s32 %s3, 0 }
   0x3   : > { %10 = sbr.rel (%p1) target = $region4 }
   0x4   : > { %v1 = vmatmul.f32.mxu0 %v2 } /* Start region 3 */
   0x5   : > { %v3 = vadd.f32 %v1, %v2  ;;  %v4 = vmatmul.f32.mxu1 %v2 }
   0x6   : > { %20 = vst [vmem:[#allocation2_spill]] %v3 }
   0x7 PF: > { %v5 = vmatmul.f32.mxu0 %v3 }
   0x8   :  { %s4 = smov 9 }
"""
# MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
UTILIZATION = """== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 2
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
0 0 0 0 0 0 0 0 0 1
2 0 0 0 0 0 0 0 0 0
4 0 2 0 0 1 1 0 0 0
0 0 1 0 0 0 0 1 1 0
1 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 1
"""
ALLOCATIONS = """
  #allocation1 [shape = 'u32[72,128]{1,0:T(1,128)}', space=vmem, size = 0x9000, scoped]
    #allocation5 [shape = 'u8[262144]{0}', space=vmem, size = 0x40000, scoped]
    #allocation5 [shape = 'u8[262144]{0}', space=vmem, size = 0x40000, scoped]
    #allocation6 [shape = 's32[1]', space=sflag, size = 0x4, scoped]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  for name, text in (
    ("03-final_bundles", BUNDLES),
    ("02-schedule-analysis_final_bundles", "total scheduled bundles: 9"),
    ("01-final_hlo-static-per-bundle-utilization", UTILIZATION),
    ("00-pre-finalize-registers-and-allocations", ALLOCATIONS),
  ):
    (tmp_path / f"17-attention_x.1-{name}.txt").write_text(text)
  return tmp_path


def test_the_hot_block_is_the_one_with_most_products(folder: Path) -> None:
  kernel = tpu.read_kernel(folder, "17-attention_x.1")
  assert kernel == tpu.TpuKernel(
    name="attention_x.1",
    bundles=9,
    vmem=0x49000,
    hot=tpu.HotBlock(bundles=3, fed=2 / 3, occupied=6 / 12, vector=3 / 12, spills=1, fills=1),
  )
  lines = tpu.table([kernel]).splitlines()
  assert lines[1].split() == ["attention_x.1", "9", "0.3", "3", "0.667", "0.500", "0.250", "1", "1"]


def test_blocks_end_at_branches_and_begin_at_their_targets() -> None:
  assert tpu.cut(tpu.read_bundles(BUNDLES)) == [(0, 1), (1, 4), (4, 7), (7, 9)]


def test_an_unknown_form_is_one_clear_line(folder: Path) -> None:
  file = next(folder.glob("*utilization.txt"))
  file.write_text("== UTILIZATION:\n1 2 3\n")
  with pytest.raises(UserError, match="has a form that this tool does not know"):
    tpu.read_kernel(folder, "17-attention_x.1")
  file.unlink()
  with pytest.raises(UserError, match=r"expected one file .*utilization\.txt of libtpu's, found 0"):
    tpu.read_kernel(folder, "17-attention_x.1")


def test_a_bundle_more_than_figures_is_not_counted_away(folder: Path) -> None:
  file = next(folder.glob("*utilization.txt"))
  file.write_text(UTILIZATION.removesuffix("0 0 0 0 0 0 0 0 0 1\n"))
  with pytest.raises(UserError, match="9 bundles but figures for 8"):
    tpu.read_kernel(folder, "17-attention_x.1")


def test_flags_of_others_are_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_something=1")
  with pytest.raises(UserError, match="LIBTPU_INIT_ARGS is set; unset it"), tpu.dump():
    pass


def inspect(*flags: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "slmjax.kernels.inspect", *flags]
  return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.medium
@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (("--op=cross_entropy", "--chip=v5e", "--shape=splash"), "--shape=splash is not one of cross"),
    (("--op=cross_entropy", "--chip=h100", "--shape=fox1"), "has no kernel for GPUs"),
  ],
)
def test_what_is_not_there_is_one_clear_line(flags: tuple[str, ...], message: str) -> None:
  done = inspect(*flags)
  assert done.returncode == 2
  assert message in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
  ("op", "names"),
  [
    ("attention", ["attention_o_lse", "attention_dq_dk_dv"]),
    ("cross_entropy", ["cross_entropy_fold", "cross_entropy_unfold"]),
  ],
)
def test_a_real_kernel(op: str, names: list[str]) -> None:
  if missing := topology.missing_compiler("v5e:2x2"):
    pytest.skip(missing)
  done = inspect(f"--op={op}", "--chip=v5e", "--shape=fox1", "--json")
  assert done.returncode == 0, done.stderr[-2000:]
  kernels = json.loads(done.stdout)["kernels"]
  for kernel, name in zip(kernels, names, strict=True):
    assert name in kernel["name"]
    assert 0 < kernel["vmem"] < 56 * 2**20
    # The computation is most of the kernel, and most of it feeds the matrix units.
    assert kernel["hot"]["bundles"] > kernel["bundles"] / 3
    assert 0.8 < kernel["hot"]["occupied"] <= kernel["hot"]["fed"] <= 1
