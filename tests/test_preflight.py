"""Preflight: names and refusals (fast), and full-size Fox-1 compiled for its targets (slow).

The slow tests skip without the compilers of requirements-compile.txt.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from slmjax import flops, preflight, topology
from slmjax.errors import UserError
from slmjax.preflight import StageReport
from slmjax.recipe import load_recipe

_FOX1 = str(Path(__file__).parent.parent / "configs" / "fox1.py")
_GIB = 2**30


def _report(need: int, limit: int) -> StageReport:
  return StageReport(
    stage="general",
    mesh=(1, 8, 1, 1),
    microbatches=32,
    compile_seconds=1.0,
    arguments=2 * _GIB,
    outputs=2 * _GIB,
    aliased=2 * _GIB,
    temporaries=need - 2 * _GIB,
    code=0,
    need=need,
    limit=limit,
    limit_source="a test",
    kernels=("attention_forward",),
  )


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("b100:8", "is unknown; use a name such as v5e:16x16"),
    ("v5e", "takes its sides, as in v5e:4x4"),
    ("v5e:16", "takes its sides, as in v5e:4x4"),
    ("v5p:4x4", "takes its sides, as in v5p:4x4x4"),
    ("v5e:0x4", "takes its sides"),
    ("h100:4x4", "takes a number of GPUs, as in h100:8"),
    ("h100:0", "takes a number of GPUs"),
  ],
)
def test_a_bad_topology_is_one_clear_line(name: str, message: str) -> None:
  with pytest.raises(UserError) as caught:
    topology.devices(name)
  assert message in str(caught.value)
  assert name in str(caught.value)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "module", "what"),
  [
    ("v5e:2x2", "libtpu", "libtpu is not installed"),
    ("h100:8", "jax_plugins.xla_cuda13", "CUDA plugin is not installed"),
  ],
)
def test_a_missing_compiler_says_what_to_install(
  name: str, module: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
  installed = topology._installed
  monkeypatch.setattr(topology, "_installed", lambda m: m != module and installed(m))
  with pytest.raises(UserError, match=what) as caught:
    topology.devices(name)
  assert "pip install -r requirements-compile.txt" in str(caught.value)


def test_a_missing_ptxas_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
  monkeypatch.setattr(topology, "_installed", lambda _: True)
  monkeypatch.setattr(topology, "_has_ptxas", lambda: False)
  with pytest.raises(UserError, match=r"ptxas.*requirements-compile\.txt"):
    topology.devices("a100:8")


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("configs/nothing.py", "is not a recipe file"),
    (f"{_FOX1}:huge", "no variant 'huge'; there are '', 'tiny'"),
    (__file__, "has no get_config"),
  ],
)
def test_a_bad_recipe_is_one_clear_line(name: str, message: str) -> None:
  with pytest.raises(UserError) as caught:
    load_recipe(name)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_every_target_has_a_known_limit() -> None:
  kinds = ["TPU v5 lite", "TPU v5", "TPU v6 lite"]  # as libtpu names the devices of its slices
  kinds += [gpu["kind"] for gpu in topology._GPUS.values()]
  for kind in kinds:
    assert flops.chip(kind) is not None, kind


def test_the_longest_device_kind_counts() -> None:
  v5e, v5p = flops.chip("TPU v5 lite"), flops.chip("TPU v5p")
  assert v5e is not None
  assert v5p is not None
  assert (v5e.peak_flops, v5p.peak_flops) == (197e12, 459e12)
  small, large = flops.chip("NVIDIA A100-SXM4-40GB"), flops.chip("NVIDIA A100-SXM4-80GB")
  assert small is not None
  assert large is not None
  assert small.memory < 32 * _GIB < 59 * _GIB < large.memory
  assert flops.chip("Radeon") is None


def test_refusals_of_libtpu_are_read() -> None:
  error = RuntimeError()
  used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
  temporaries = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(128.00G) exceeds available HBM (15.75G)."
  )
  assert preflight.refused_bytes(used, error) == int(20.5 * _GIB)
  assert preflight.refused_bytes(temporaries, error) == 128 * _GIB
  with pytest.raises(RuntimeError):
    preflight.refused_bytes("INTERNAL: (128.00G) exceeds", error)


def test_the_table_says_what_does_not_fit() -> None:
  fits, too_big = _report(3 * _GIB, 4 * _GIB), _report(5 * _GIB, 4 * _GIB)
  refused = dataclasses.replace(
    too_big, arguments=None, outputs=None, aliased=None, temporaries=None, code=None
  )
  text = preflight.table("h100:8", [fits, too_big, refused]).splitlines()
  assert text[2].split()[-3:] == ["4.00", "1.00", "yes"]
  assert text[3].split()[-3:] == ["4.00", "-1.00", "NO"]
  assert text[4].split()[-8:] == ["-", "-", "-", "-", "5.00", "4.00", "-1.00", "NO"]
  assert text[6] == "kernels of general: attention_forward"
  xla = preflight.table("h100:8", [dataclasses.replace(fits, kernels=())])
  assert "none but those of XLA" in xla
  assert preflight.as_json("h100:8", [fits])["fits"] is True
  assert preflight.as_json("h100:8", [fits, too_big])["fits"] is False


def _compilers(target: str) -> None:
  missing = topology.missing_compiler(target)
  if missing:
    pytest.skip(f"{target}: {missing}")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("target", "replica", "kernels"),
  [
    (
      "v5e:16x16",
      16,
      ["attention_dq_dk_dv", "attention_o_lse", "cross_entropy_fold", "cross_entropy_unfold"],
    ),
    (
      "h100:8",
      1,
      ["attention_backward_keys", "attention_backward_queries", "attention_forward"],
    ),
  ],
)
def test_full_fox1_fits(target: str, replica: int, kernels: list[str]) -> None:
  """All three stages with our kernels in them, by the compilers' own account. In a process of its
  own, as the command: the GPU compiler's threads and libtpu's logs stay out of the other tests."""
  _compilers(target)
  flags = [f"--config={_FOX1}", f"--config.mesh.replica={replica}", f"--topology={target}"]
  run = subprocess.run(
    [sys.executable, "-m", "slmjax.preflight", *flags, "--json"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]
  result = json.loads(run.stdout)
  assert [stage["stage"] for stage in result["stages"]] == ["general", "curated", "instruct"]
  for stage in result["stages"]:
    assert 0 < stage["need"] <= stage["limit"]
    assert stage["kernels"] == kernels
    # The state goes in and comes out in the same place: 12 bytes per parameter, spread over fsdp.
    state = 12 * 1_665_271_808 / stage["mesh"][1]
    assert stage["aliased"] == pytest.approx(state, rel=0.05)


@pytest.mark.slow
def test_a_stage_that_does_not_fit_is_reported() -> None:
  """Batches of 64 rows of 2048 per chip need more than the 15.75 GiB of a v5e."""
  _compilers("v5e:2x2")
  config = load_recipe(_FOX1)
  stage = dataclasses.replace(config.stages[0], microbatch_rows=64)
  config = dataclasses.replace(config, stages=(stage,))
  (report,) = preflight.preflight(config, "v5e:2x2")
  assert not report.fits
  assert report.temporaries is None
  assert jax.default_backend() == "cpu"
