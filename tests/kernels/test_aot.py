"""Every kernel compiles for every GPU generation, without spills, within the shared memory."""

import re

import pytest
from dynamic_dino_kernels import aot, sass
from helpers.processes import run_python


# Other targets, types and launches take minutes: `make aot`, in CI a job.
@pytest.mark.slow
@pytest.mark.parametrize("target, unit", [("sm_90", "HGMMA")])
def test_kernels_fit(target, unit):
    """And the detector's tiles compute no product twice, and copy beside the arithmetic."""
    options = f"--targets {target} --dtypes float16 --tokens 900 --once --report"
    code = "import sys; from dynamic_dino_kernels import aot; sys.exit(aot.main(sys.argv[1:]))"
    result = run_python("-c", code, *options.split())
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    assert lines[-1].endswith(" 0 don't fit")
    compiled = {line.split()[3] for line in lines if line.startswith(f"{target} ")}
    assert {"fused_ffn", "grouped_linear", "sample_forward"} <= compiled
    of_ffn = [
        lines[i + 1] for i, line in enumerate(lines) if "fused_ffn" in line and "GLU=False" in line
    ]
    assert of_ffn
    for line in of_ffn:
        assert re.search(rf"\d at a time; loop: \d+ {unit} ", line), line
        assert "arithmetic x 1.00; pipelined" in line, line


CODE = """
        /*0000*/                   LDG.E R0, [R2] ;   /* 0x0 */
        /*0010*/                   LDGSTS.E [R0], [R2] ;   /* 0x0 */
        /*0020*/                   HMMA.16816.F32 R0, R0, R0, R0 ;   /* 0x0 */
        /*0030*/              @!P0 BRA 0x20 ;   /* 0x0 */
        /*0040*/                   HMMA.16816.F32 R0, R0, R0, R0 ;   /* 0x0 */
        /*0050*/                   HMMA.16816.F32 R0, R0, R0, R0 ;   /* 0x0 */
        /*0060*/                   LDSM.16.M88.4 R0, [R2] ;   /* 0x0 */
        /*0070*/               @P1 BRA 0x40 ;   /* 0x0 */
        /*0080*/               @P1 BRA 0x10 ;   /* 0x0 */
        /*0090*/                   EXIT ;   /* 0x0 */
        /*00a0*/                   BRA 0xa0;   /* 0x0 */
"""
TTGIR = (
    "%z = tt.dot %x, %w, %c : tensor<32x16xf16, #dot> * tensor<16x16xf16, #dot> -> "
    "tensor<32x16xf32, #mma>"
)


def test_main_loop_and_duplication(monkeypatch):
    """Of nested loops an inner one, with the most arithmetic; two warps do a product of 32 x 16 x
    16 in two instructions each, so that four instructions are twice as many."""
    monkeypatch.setattr(sass, "_cuobjdump", lambda cubin, what="-sass": CODE)
    one = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {...};\n"
    code = sass.read(b"", one * 4, TTGIR, warps=2)
    assert code.loop == {"HMMA": 2, "LDSM": 1, "BRA": 1} and not code.pipelined
    assert code.whole["HMMA"] == 3 and code.whole["LDGSTS"] == 1
    assert code.duplication == 2
    assert sass.read(b"", one * 2, TTGIR, warps=2).duplication == 1
    assert sass.read(b"", "", "", warps=2).duplication is None


def test_the_interpreter_has_nothing_to_compile(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit) as stop:
        aot.main([])
    assert stop.value.code == 2 and "unset it" in capsys.readouterr().err
