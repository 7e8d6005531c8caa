"""Every kernel compiles for every GPU generation, without spills, within the shared memory."""

import os
import subprocess
import sys


def run(*arguments, **environment):
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "dynamic_dino_kernels.aot", *arguments],
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_kernels_fit_every_target():
    result = run("--dtypes", "float16", "float32", "--tokens", "900", "--workers", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("fused_ffn") >= 8 and result.stdout.endswith(" 0 don't fit\n")


def test_the_interpreter_has_nothing_to_compile():
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 2 and "unset it" in result.stderr
