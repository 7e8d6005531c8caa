"""What a compiled kernel does: read from its machine code, as the tools print it that Triton has.

Nothing is run: instructions are counted as they stand in the program, in all of it and in its main
loop, the innermost one with the most arithmetic.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# Multiply-add on the matrix units: Ampere's, Hopper's, Blackwell's, and float64's.
TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "DMMA")
ORDINARY = ("FFMA", "FFMA2", "DFMA")
ASYNC_COPY = ("LDGSTS", "UTMALDG")  # cp.async, and the tensor memory accelerator
_SHOWN = (*TENSOR_CORE, *ORDINARY, *ASYNC_COPY, "LDSM", "LDS")

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;\n]*)")
_DOT = re.compile(
    r"(?:tt\.dot|ttng\.warp_group_dot) .* : !?(?:ttg\.memdesc|tensor)<(\d+)x(\d+)x"
    r".* -> tensor<\d+x(\d+)x"
)
_MMA = re.compile(r"(wgmma\.mma_async|mma)\.sync\.aligned\.m(\d+)n(\d+)k(\d+)")


@dataclass(frozen=True)
class Code:
    """Counts of the instructions of one program, by name without suffixes.

    whole        of all of it
    loop         of its main loop; empty if it has none
    duplication  multiply-adds of its matrix products over those that the products need: 2 where
                 two groups of warps compute the same. None: no products, or not to be seen
    """

    whole: Counter
    loop: Counter
    duplication: float | None

    @property
    def pipelined(self) -> bool:
        """Whether the main loop copies to shared memory while it computes."""
        return any(self.loop[name] for name in ASYNC_COPY)

    def __str__(self) -> str:
        def shown(counts: Counter) -> str:
            return " ".join(f"{counts[name]} {name}" for name in _SHOWN if counts[name]) or "-"

        text = f"loop: {shown(self.loop)}" if self.loop else f"no loop: {shown(self.whole)}"
        if self.duplication is not None:
            text += f"; arithmetic x {self.duplication:.2f}"
        if self.loop:
            text += "; pipelined" if self.pipelined else "; not pipelined"
        return text


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and the bytes of stack that what doesn't fit there lives on.

    Raises:
        RuntimeError: cuobjdump printed neither.
    """
    text = _cuobjdump(cubin, "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {text!r}")
    return int(found[1]), int(found[2])


def read(cubin: bytes, ptx: str, ttgir: str, warps: int) -> Code:
    """Reads a program of `warps` warps. ttgir: Triton's last form of it, which still knows the
    shapes of the products; ptx: the virtual code, in which each is an instruction a warp."""
    instructions = [
        (int(at, 16), name, rest) for at, name, rest in _INSTRUCTION.findall(_cuobjdump(cubin))
    ]
    return Code(
        Counter(name for _, name, _ in instructions),
        _main_loop(instructions),
        _duplication(ptx, ttgir, warps),
    )


def _main_loop(instructions: list[tuple[int, str, str]]) -> Counter:
    """Of the loops without a loop inside, the one with the most arithmetic, else the longest."""
    loops = []
    for at, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:  # a branch to itself ends the program
            loops.append((int(target[1], 16), at))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counts = [
        Counter(name for at, name, _ in instructions if start <= at <= end) for start, end in inner
    ]
    arithmetic = (*TENSOR_CORE, *ORDINARY)
    return max(
        counts, key=lambda c: (sum(c[name] for name in arithmetic), c.total()), default=Counter()
    )


def _duplication(ptx: str, ttgir: str, warps: int) -> float | None:
    needed = sum(int(m) * int(k) * int(n) for m, k, n in _DOT.findall(ttgir))
    done = sum(
        int(m) * int(n) * int(k) * (warps // 4 if kind.startswith("wgmma") else warps)
        for kind, m, n, k in _MMA.findall(ptx)
    )
    # On the ordinary units: one a thread, or two at once on Blackwell.
    done = done or warps * 32 * (
        len(re.findall(r"fma\.rn\.f(?:32|64)\b", ptx))
        + 2 * len(re.findall(r"fma\.rn\.f32x2\b", ptx))
    )
    return done / needed if needed else None


def _cuobjdump(cubin: bytes, what: str = "-sass") -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, what, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
