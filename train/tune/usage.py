"""What a compiled kernel takes of a multiprocessor, as the assembler says it."""

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# (kernel, arch): (bytes of stack a thread, why it is accepted).
ALLOWED_SPILLS: dict[tuple[str, int], tuple[int, str]] = {}


@dataclass(frozen=True)
class Arch:
    """Limits of a multiprocessor, from the CUDA programming guide's table of compute capabilities."""

    shared_per_sm: int
    shared_per_cta: int
    warps: int = 64
    ctas: int = 32
    registers: int = 65536


ARCHS = {
    80: Arch(164 * 1024, 163 * 1024),
    86: Arch(100 * 1024, 99 * 1024, warps=48, ctas=16),
    89: Arch(100 * 1024, 99 * 1024, warps=48, ctas=24),
    90: Arch(228 * 1024, 227 * 1024),
    100: Arch(228 * 1024, 227 * 1024),
    103: Arch(228 * 1024, 227 * 1024),
    120: Arch(100 * 1024, 99 * 1024, warps=48, ctas=24),
}
RESERVED_SHARED = 1024  # the driver's own, in every CTA
REGISTER_UNIT = 256  # registers are given to a warp in units of this many


@dataclass(frozen=True)
class Usage:
    """One compiled variant of a kernel."""

    name: str
    launches: int
    warps: int
    registers: int
    stack: int  # bytes a thread: registers that did not fit
    shared: int
    is_matrix: bool
    wgmma: int
    serial: bool = False  # its wgmma wait for each other

    def ctas_per_sm(self, arch: int) -> int:
        """CTAs that fit on a multiprocessor at once; 0 where not even one does."""
        limits = ARCHS[arch]
        registers = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT * self.warps
        by_registers = limits.registers // max(registers, 1)
        by_shared = limits.shared_per_sm // (self.shared + RESERVED_SHARED)
        return min(limits.ctas, limits.warps // self.warps, by_registers, by_shared)

    def misfits(self, arch: int) -> list[str]:
        """Why it cannot be launched at all."""
        if self.shared > ARCHS[arch].shared_per_cta:
            return [f"{self.name}: {self.shared} bytes of shared memory, {ARCHS[arch].shared_per_cta} there"]
        return []

    def faults(self, arch: int) -> list[str]:
        """What is wrong with it as a default, a line each."""
        found = []
        allowed, _ = ALLOWED_SPILLS.get((self.name, arch), (0, ""))
        if self.stack > allowed:
            found.append(f"{self.name}: {self.stack} bytes of spills, {allowed} allowed")
        found += self.misfits(arch)
        if arch == 90 and self.is_matrix and not self.wgmma:
            found.append(f"{self.name}: a matrix product without wgmma")
        if self.serial:
            found.append(f"{self.name}: its products run one after the other, as ptxas warns")
        return found


def usage(kernel, launches: int, warnings: bool = False) -> Usage:
    """What the assembler made of a compiled kernel; with `warnings` also what it warns of, which takes another run."""
    report = cuobjdump(kernel.asm["cubin"], "-res-usage")
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}
    ir = kernel.asm.get("ttir", "") + kernel.asm.get("ttgir", "")
    wgmma = kernel.asm["ptx"].count("wgmma.mma_async")
    return Usage(
        name=kernel.metadata.name,
        launches=launches,
        warps=kernel.metadata.num_warps,
        registers=numbers["REG"],
        stack=numbers["STACK"] + numbers["LOCAL"],
        shared=kernel.metadata.shared,
        is_matrix=re.search(r"\btt\.dot\b|warp_group_dot|tc_gen5_mma", ir) is not None,
        wgmma=wgmma,
        serial=warnings and wgmma > 0 and _serial(kernel.asm["ptx"]),
    )


def _serial(ptx: str) -> bool:
    """Whether the assembler lets no wgmma begin before the last has ended. It says so in a warning alone, which Triton
    throws away."""
    from triton.backends.nvidia.compiler import get_ptxas

    command = [get_ptxas(90).path, "--gpu-name=sm_90a", "-", "-o", os.devnull]
    log = subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in log


def cuobjdump(cubin: bytes, option: str) -> str:
    """What the program of that name in Triton's wheel prints with `-sass` or `-res-usage`."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, option, file.name], capture_output=True, text=True, check=True).stdout
