"""What the compiler makes of a Triton kernel: the code of its main loop, registers and spills."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as _nvidia
from triton.compiler import ASTSource

TOOLS = Path(_nvidia.__file__).parent / "bin"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_\S+):")
_TARGET = re.compile(r"`\((\.L_[^)]+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction: its opcode with modifiers, and the label it branches to."""

    opcode: str
    target: str | None


@dataclass(frozen=True)
class Compiled:
    """A compiled kernel.

    Args:
        loop: instructions of the main loop, the one that loads most at once.
        registers: of each thread.
        spills: bytes of local memory and stack.
        shared: bytes of shared memory.
    """

    loop: list[Instruction]
    registers: int
    spills: int
    shared: int

    def count(self, pattern: str) -> int:
        """Instructions of the loop whose opcode begins with the pattern."""
        return sum(bool(re.match(pattern, each.opcode)) for each in self.loop)

    def pipes(self) -> Counter[str]:
        """Instructions of the loop by the pipe that executes them."""
        return Counter(pipe(each.opcode) for each in self.loop)


def compile_kernel(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[str, Any],
    target: GPUTarget,
    num_warps: int = 4,
    **options: Any,
) -> Any:
    """Compile a kernel for a GPU that need not be there.

    Args:
        kernel: a ``triton.jit`` function.
        signature: type of each argument that is not constant.
        constants: value of each constant.
        target: backend, architecture and warp size.
        num_warps: warps of a program.
        options: further options of the compiler.

    Returns:
        Triton's compiled kernel.
    """
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name, kind in signature.items()
            if kind.startswith("*")
        },
    )
    return triton.compile(source, target=target, options={"num_warps": num_warps, **options})


def usage(compiled: Any) -> dict[str, int]:
    """Registers of each thread, and bytes of memory, by `cuobjdump`'s names."""
    listed = _of_cubin(compiled, "cuobjdump", "-res-usage")
    return {name: int(number) for name, number in re.findall(r"(\w+):(\d+)", listed)}


def inspect(compiled: Any) -> Compiled:
    """Disassemble a kernel compiled for an NVIDIA GPU."""
    code, use = _of_cubin(compiled, "nvdisasm", "-c"), usage(compiled)
    return Compiled(_main_loop(code), use["REG"], use["STACK"] + use["LOCAL"], use["SHARED"])


def fused_with_exchanged(ptx: str) -> list[str]:
    """Fused multiply-adds that take what another lane sent, in PTX.

    A sum over a warp adds to each lane's term the one that another lane sent. Where the term is a
    product, and the addition is fused with it, a lane rounds only the other's product: the lanes'
    sums differ in the last bit.
    """
    sent: set[str] = set()
    found = []
    for line in ptx.splitlines():
        registers = re.findall(r"%\w+", line)
        takes = not sent.isdisjoint(registers[1:])
        if re.match(r"\s*shfl\.", line) or (takes and re.match(r"\s*mov\.", line)):
            sent.add(registers[0])
        elif takes and re.match(r"\s*fma\.", line):
            found.append(line.strip())
    return found


def _of_cubin(compiled: Any, tool: str, option: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        return _run(tool, option, str(cubin))


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run(
        [TOOLS / tool, *arguments], capture_output=True, text=True, check=True
    ).stdout


def _main_loop(code: str) -> list[Instruction]:
    """The innermost loop with the widest loads from global memory, and of those with the most."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := _INSTRUCTION.match(line):
            text = re.sub(r"^@!?U?P\w+\s+", "", found[2])
            target = _TARGET.search(text)
            instructions.append(Instruction(text.split()[0], target and target[1]))
    loops = [
        (labels[each.target], at + 1)
        for at, each in enumerate(instructions)
        if each.opcode.startswith("BRA") and each.target and labels.get(each.target, at + 1) <= at
    ]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]

    def loaded(loop: tuple[int, int]) -> tuple[int, int]:
        loads = [load_bytes(each.opcode) for each in instructions[slice(*loop)]]
        return max(loads), sum(loads)

    return instructions[slice(*max(inner, key=loaded))]


def load_bytes(opcode: str) -> int:
    """Bytes that a thread loads from global memory with an instruction; 0 for others."""
    if not opcode.startswith("LDG"):
        return 0
    width = re.search(r"\.(64|128|256)\b", opcode)
    if width:
        return int(width[1]) // 8
    return 2 if ".U16" in opcode else 1 if ".U8" in opcode else 4


def pipe(opcode: str) -> str:
    """Execution pipe of an instruction on Ampere and later, by opcode."""
    stem = opcode.partition(".")[0]
    if stem in (*(f"{x}{y}" for x in ("FADD", "FMUL", "FFMA") for y in ("", "2")), "IMAD") or (
        stem in ("HADD2", "HMUL2", "HFMA2")
    ):
        return "fma"
    if stem in ("LDG", "LDS", "STS", "STG", "ATOMS", "ATOMG", "RED", "LDGSTS", "SHFL"):
        return "memory"
    if stem in ("I2F", "F2I", "MUFU", "I2FP", "F2IP", "POPC", "FLO", "F2F"):
        return "conversion"
    if stem in ("BRA", "BAR", "BSSY", "BSYNC", "EXIT", "NOP", "WARPSYNC", "DEPBAR"):
        return "control"
    if stem.startswith("U") or stem in ("R2UR", "S2UR"):
        return "uniform"
    return "alu"
