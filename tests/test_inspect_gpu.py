"""Reading machine code of GPUs: loops and what they count, from a listing written by hand."""

import jax
import jax.numpy as jnp
import pytest

from slmjax.errors import UserError
from slmjax.kernels.inspect import gpu

_LISTING = """
\t.section\t.text.other,"ax",@progbits
.L_x_9:
        /*0000*/                   FADD R1, R1, R2 ;
        /*0010*/               @P0 BRA `(.L_x_9) ;
\t.section\t.text.kernel,"ax",@progbits
        /*0000*/                   MOV R1, R2 ;
.L_x_0:
        /*0010*/                   IADD3 R1, R2, R3, RZ ;
.L_x_1:
        /*0020*/                   WARPGROUP.ARRIVE ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/              @!P1 MUFU.EX2 R1, R2 ;
        /*0050*/               @P2 BRA `(.L_x_3) ;
        /*0060*/                   LDL R4, [R1] ;
.L_x_3:
        /*0070*/              @!P0 BRA `(.L_x_1) ;
        /*0080*/               @P3 BRA `(.L_x_0) ;
.L_x_4:
        /*0090*/                   SYNCS.PHASECHK P0, [R1] ;
        /*00a0*/               @P0 BRA `(.L_x_4) ;
.L_x_5:
        /*00b0*/                   BRA `(.L_x_5);
"""


def test_innermost_loops_with_products_are_found_and_counted() -> None:
  (loop,) = gpu.loops(gpu.machine_code(_LISTING, "kernel"), "sm_90a")
  assert (loop.instructions, loop.tensor, loop.special, loop.spilled) == (6, 1, 1, 1)
  # A warp's quarter of 64 x 128 x 16 products, 512 of them in a cycle.
  assert loop.tensor_cycles == 64
  assert loop.tensor_share == pytest.approx(64 / (64 + 5))


def test_without_products_every_innermost_loop_counts() -> None:
  (loop,) = gpu.loops(gpu.machine_code(_LISTING, "other"), "sm_80")
  assert (loop.instructions, loop.tensor, loop.tensor_share) == (2, 0, 0.0)


@pytest.mark.parametrize(
  ("name", "products"),
  [
    ("HMMA.16816.F32.BF16", 16 * 8 * 16),
    ("HMMA.1688.F32.TF32", 2 * 16 * 8 * 8),
    ("HGMMA.64x64x8.F32.TF32", 2 * 64 * 64 * 8 / 4),
    ("FFMA", 0),
  ],
)
def test_products_of_an_instruction(name: str, products: float) -> None:
  assert gpu._products(name) == products


def test_a_program_without_kernels_and_missing_tools_raise(monkeypatch: pytest.MonkeyPatch) -> None:
  lowered = jax.jit(lambda x: x + 1).lower(jnp.ones(3))
  monkeypatch.setattr(gpu, "_tool", lambda name: f"/bin/{name}")
  with pytest.raises(UserError, match="no Triton kernel in this program"):
    gpu.report(lowered)
  monkeypatch.setattr(gpu, "_tool", lambda name: None if name == "nvdisasm" else name)
  with pytest.raises(UserError, match=r"nvdisasm is not installed: .*requirements-compile\.txt"):
    gpu.report(lowered)


def test_the_table_and_the_json_say_what_was_found() -> None:
  loop = gpu.Loop(instructions=341, tensor=12, special=34, spilled=0, tensor_cycles=512.0)
  kernel = gpu.Kernel(
    name="attention_forward",
    target="sm_90a",
    grid=(16, 2, 16),
    threads=256,
    shared_memory=98304,
    registers=187,
    spilled=0,
    serialized=True,
    loops=(loop, loop),
  )
  lines = gpu.table([kernel]).splitlines()
  assert len(lines) == 3
  row = "attention_forward 187 0 98304 341 12 34 0.61 products serialized"
  assert lines[1].split() == row.split()
  (found,) = gpu.as_json([kernel])
  assert found["loops"][0]["tensor_share"] == 0.609
