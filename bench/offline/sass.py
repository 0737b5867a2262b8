"""The loops of a compiled matrix kernel, read from its machine code: what a turn of each costs, and what bounds it.

A loop is a backward branch; of nested ones the innermost that holds products counts. Code that the assembler moved out
of a loop's range is not seen, and its way back, a branch from behind the loop's end into its middle, is no loop. What a
branch inside a loop passes over, as the masks of attention in one loop, counts as if it never did. The model: cycles
of one of the four sub-partitions of a multiprocessor for the warps that reside on it (CTAs per multiprocessor x
warps / 4), one turn each.

    tensor   HGMMA of 64 x N: N/2. Dense bf16 does 4,096 FLOPs a cycle and multiprocessor, 512 FMA on each of its four
             tensor cores (NVIDIA, "H100 Tensor Core GPU Architecture"; x 132 x 1.83 GHz it is the datasheet's 989.5
             TFLOP/s).
    shared   what products read (B, and A where it is no register) and what other instructions read and write there:
             128 bytes a cycle and multiprocessor, 32 banks of 4. Bank conflicts are not seen.
    xu       8 a warp for MUFU and for conversions of single numbers: 16 lanes a cycle and multiprocessor (CUDA C++
             Programming Guide, "Arithmetic Instructions"). That conversions share the pipe is from Nsight Compute's
             guide; their rate is an assumption.
    issue    1 for every instruction.

`peak` is tensor over the largest of the four: the share of the tensor cores' peak that is left where all overlaps.
`serial` is tensor over the larger of tensor and shared + the larger of xu and issue: where no product runs beside
other work. The truth lies between them, and below where copies come late: neither that nor barriers are in it. Made to
compare two versions of a kernel, not to predict milliseconds; not yet held against a GPU.
"""

import re
from collections import Counter
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
PRODUCT = re.compile(r"[HQI]GMMA\.64x(\d+)x(\d+)\.")
# Classes in the order of the columns; the first whose pattern begins the mnemonic counts.
CLASSES = {
    "spill": r"(LDL|STL)\b",
    "xu": r"(MUFU|F2F|F2I|I2F|FRND)\b",
    "fp": r"(FADD|FMUL|FFMA|FMNMX|FSEL|FSETP|FSET|FCHK|F2FP|H\w+2)\b",
    "global": r"(LDGSTS|UTMALDG|UTMASTG|UBLKCP|LDG|STG|RED|ATOMG?)\b",
    "shared": r"(LDS|LDSM|STS|STSM|ATOMS)\b",
    "wait": r"(BAR|WARPSYNC|DEPBAR|LDGDEPBAR|WARPGROUP|MEMBAR|FENCE|SYNCS|ERRBAR)\b",
    "shuffle": r"(SHFL|REDUX|VOTE)\b",
    "uniform": r"(U[A-Z0-9]+|R2UR|S2UR)\b",
    "int": r"",  # addresses, predicates, moves, branches
}


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str
    never: bool  # predicated off for good, as the loads of nothing before a fence are

    @property
    def kind(self) -> str:
        if PRODUCT.match(self.mnemonic):
            return "product"
        if self.never:
            return "wait"
        return next(kind for kind, pattern in CLASSES.items() if re.match(pattern, self.mnemonic))

    def shared_bytes(self) -> int:
        """What it moves between shared memory and the 128 threads of a warp group."""
        if product := PRODUCT.match(self.mnemonic):
            # K of a product is 32 bytes in every dtype; a descriptor in A's place says that A is in shared memory.
            return 32 * (int(product[1]) + 64 * (re.match(r"\s*R\d+, gdesc", self.operands) is not None))
        if not (self.kind == "shared" or self.mnemonic.startswith("LDGSTS")):
            return 0
        if matrices := re.search(r"\.M88\.(\d)", self.mnemonic):
            return 128 * 4 * int(matrices[1])
        bits = re.search(r"\.(64|128)\b", self.mnemonic)
        return 128 * (int(bits[1]) // 8 if bits else 4)


@dataclass(frozen=True)
class Loop:
    """Instructions from a backward branch's target to the branch itself."""

    body: list[Instruction]

    def counts(self) -> Counter:
        return Counter(instruction.kind for instruction in self.body)

    def products(self) -> list[tuple[int, int]]:
        """(N, K) of each."""
        found = (PRODUCT.match(instruction.mnemonic) for instruction in self.body)
        return [(int(product[1]), int(product[2])) for product in found if product]

    def flops(self) -> int:
        """Of one warp group's turn."""
        return sum(2 * 64 * n * k for n, k in self.products())

    def cycles(self, resident_warps: float) -> dict[str, float]:
        """Of each resource, by the model above, for that many warps on a sub-partition."""
        each = {
            "tensor": sum(n for n, _ in self.products()) / 2,
            "shared": sum(instruction.shared_bytes() for instruction in self.body) / 128,
            "xu": 8 * self.counts()["xu"],
            "issue": len(self.body),
        }
        return {resource: resident_warps * cycles for resource, cycles in each.items()}


def instructions(sass: str) -> list[Instruction]:
    """Of the text that `cuobjdump -sass` prints of one function."""
    found = LINE.finditer(sass)
    return [Instruction(int(m[1], 16), m[3], m[4], never=(m[2] or "").strip() == "@!PT") for m in found]


def loops(code: list[Instruction]) -> list[Loop]:
    """The innermost loops that hold a product, in the order of the code."""
    products = [i.address for i in code if i.kind == "product"]
    ranges = set()
    for instruction in code:
        target = re.search(r"\b0x([0-9a-f]+)\s*$", instruction.operands)
        if instruction.mnemonic.startswith("BRA") and target and int(target[1], 16) < instruction.address:
            ranges.add((int(target[1], 16), instruction.address))
    ranges = {(a, b) for a, b in ranges if not any(first < a <= last < b for first, last in ranges)}
    held = sorted((first, last) for first, last in ranges if any(first <= p <= last for p in products))
    innermost = [
        (first, last) for first, last in held
        if not any(first <= a and b <= last and (a, b) != (first, last) for a, b in held)
    ]  # fmt: skip
    return [Loop([i for i in code if first <= i.address <= last]) for first, last in innermost]


def print_loops(kernels: list[tuple[str, float, list[Loop]]]) -> None:
    """A row for each loop. Of a kernel: its name, the warps that reside on a sub-partition, its loops."""
    width = max((len(name) for name, _, held in kernels if held), default=0)
    if not width:
        print("no loop with a product of warp groups")
        return
    print(f"{'loop':<{width}}  warps  instr  HGMMA  MFLOP  " + "  ".join(f"{kind:>7}" for kind in CLASSES)
          + "  | cycles: tensor  shared     xu  issue  bound   peak  serial")  # fmt: skip
    for name, warps, held in kernels:
        for loop in held:
            counts, cycles = loop.counts(), loop.cycles(warps)
            bound = max(cycles, key=cycles.get)
            tensor = cycles["tensor"]
            serial = max(tensor, cycles["shared"]) + max(cycles["xu"], cycles["issue"])
            print(
                f"{name:<{width}}  {warps:>5g}  {len(loop.body):>5}  {counts['product']:>5}"
                f"  {warps * loop.flops() / 1e6:>5.2f}  " + "  ".join(f"{counts[kind]:>7}" for kind in CLASSES)
                + f"  |         {tensor:>6.0f}  {cycles['shared']:>6.0f}  {cycles['xu']:>5.0f}  {cycles['issue']:>5.0f}"
                f"  {bound:<6}{tensor / cycles[bound]:>5.0%}  {tensor / serial:>6.0%}"
            )
