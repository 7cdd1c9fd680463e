"""Benchmark without a GPU: what the compiler made of the CUDA kernels, and a model of the time that a tile takes.

The library is disassembled. Of each kernel: registers, spills, tensor-core instructions, loads and stores by the TMA
unit, and the instructions for each entry of the weights on the usual path of the epilogue, that of a tile which meets
no diagonal, no edge and no equal ids. Rare code is a rolled loop by design, so the usual path skips what holds a loop,
and takes the shorter of two ways.

Then clocks of a multiprocessor for a tile, at full rates: the product on the tensor cores, its traffic with shared
memory, the epilogue's instructions. While one warp group multiplies, the other weighs, so that the longest of them
bounds the kernel; what barriers and stores add to the epilogue is not in the model.

    python -m benchmarks.sass [--library FILE]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sbert_kernels import machine
from sbert_kernels.bench import harness
from sbert_kernels.bench.report import Report
from sbert_kernels.native import cuda
from sbert_kernels.native.building import BuildError

TILE = 128  # rows and columns
PRODUCTS_PER_CLOCK = 2048  # multiply-adds of a multiprocessor
SHARED_BYTES_PER_CLOCK = 128
SCHEDULERS = 4  # one instruction of a warp each, a clock
WARPS_OF_AN_EPILOGUE = 4
DIMENSIONS = (768, 384, 128)
POLICIES = ("rows", "sums", "known")
TYPES = {"BF16": "bfloat16", "F16": "float16"}

Instruction = tuple[int, str]  # address, text


@dataclass(frozen=True)
class Kernel:
    """Holds what is known of a compiled kernel."""

    name: str
    registers: int
    spills: int  # loads and stores of local memory
    stages: int  # of tiles in shared memory
    counts: Counter[str]  # of instructions, by name
    usual_path: int  # instructions of a lane for a tile

    @property
    def per_entry(self) -> float:
        """Instructions for each entry of the tile on the usual path."""
        return self.usual_path / (TILE * TILE / (32 * WARPS_OF_AN_EPILOGUE))

    @property
    def faults(self) -> list[str]:
        """What a kernel of this design must not have, or must have."""
        faults = [f"{self.spills} spills"] if self.spills else []
        wanted = {"HGMMA": "tensor-core instruction", "UTMALDG": "load by the TMA unit"}
        if "sums" not in self.name:
            wanted["UTMASTG"] = "store by the TMA unit"
        faults += [f"no {what}" for name, what in wanted.items() if not self.counts[name]]
        # One before each of the two places where products are begun; more wait for each product on its own.
        if self.counts["WARPGROUP"] > 4:
            faults.append("products wait for each other")
        return faults


def clocks(kernel: Kernel, dimension: int) -> dict[str, float]:
    """Returns the clocks of a tile by what takes them, at full rates."""
    return {
        "tensor cores": TILE * TILE * dimension / PRODUCTS_PER_CLOCK,
        # Twice 64 rows with all columns are read for a product, and both sides are written before.
        "shared memory": (2 * (64 + TILE) + 2 * TILE) * 2 * dimension / SHARED_BYTES_PER_CLOCK,
        "epilogue": kernel.usual_path * WARPS_OF_AN_EPILOGUE / SCHEDULERS,
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--library", type=Path, help="the library to read; default: the one in use, or a new build")
    parser.add_argument(
        "--output", type=Path, default=Path("sbert-kernels-bench"), help="folder (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Reads the library, prints the table, writes the report; exits non-zero after it if a kernel has a fault."""
    with tempfile.TemporaryDirectory() as folder:
        library = args.library
        if library is None:
            cuda.load()
            library = cuda.library()
        if library is None:
            try:
                library = Path(folder, cuda.prebuilt_name())
                cuda.build(library, Path(folder, "build.log"))
            except BuildError as error:
                raise SystemExit(f"the CUDA kernels cannot be compiled: {error}") from None
        kernels = sorted(read(library), key=lambda kernel: kernel.name)
    report = Report("CUDA kernels as compiled, and clocks of a tile", "sass", machine.facts(), machine.line())
    for kernel in kernels:
        times = {dimension: clocks(kernel, dimension) for dimension in DIMENSIONS}
        report.add(
            **{
                "kernel": kernel.name,
                "registers": kernel.registers,
                "spills": kernel.spills,
                "stages": kernel.stages,
                "HGMMA": kernel.counts["HGMMA"],
                "TMA loads": kernel.counts["UTMALDG"],
                "TMA stores": kernel.counts["UTMASTG"],
                "instructions an entry": kernel.per_entry,
                "epilogue clocks": times[DIMENSIONS[0]]["epilogue"],
                **{f"product clocks, D={dimension}": _product(found) for dimension, found in times.items()},
                **{f"bound, D={dimension}": max(found, key=found.__getitem__) for dimension, found in times.items()},
                "fault": "; ".join(kernel.faults) or None,
            }
        )
    faulty = [kernel.name for kernel in kernels if kernel.faults]
    harness.finish(report, args.output, faulty, "spills, or not the instructions that this design is made of")


def _product(found: dict[str, float]) -> float:
    return max(found["tensor cores"], found["shared memory"])


def read(library: Path) -> Iterator[Kernel]:
    """Yields the kernels of a library."""
    usage = _cuobjdump("--dump-resource-usage", library)
    registers = {name: int(count) for name, count in re.findall(r"Function (\S+):\s+REG:(\d+)", usage)}
    for part in _cuobjdump("--dump-sass", library).split("Function : ")[1:]:
        symbol, _, text = part.partition("\n")
        instructions = [(int(at, 16), found) for at, found in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?)\s*;", text)]
        counts = Counter(_name(instruction) for _, instruction in instructions)
        yield Kernel(
            name=kernel_name(symbol),
            registers=registers[symbol.strip()],
            spills=counts["STL"] + counts["LDL"],
            stages=int(_found(r"MainloopSm90TmaGmmaWarpSpecializedILi(\d+)E", symbol)),
            counts=counts,
            usual_path=len(usual_path(instructions)),
        )


def kernel_name(symbol: str) -> str:
    """Returns the type, the policy and whether there are ids, from the mangled name of a kernel."""
    kind = re.search(r"MMA_\d+x\d+x\d+_F32(BF16|F16)", symbol)
    visitor = re.search(r"7VisitorI.*?6PolicyE(\d)ELb(\d)E", symbol)
    if kind is None or visitor is None:
        raise ValueError(f"a kernel has a name that was not expected: {symbol}")
    return f"{TYPES[kind[1]]} {POLICIES[int(visitor[1])]}{' ids' if visitor[2] == '1' else ''}"


def usual_path(instructions: list[Instruction]) -> list[str]:
    """Returns the instructions of the epilogue that a lane executes for a tile without anything rare in it."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    names = [_name(text) for _, text in instructions]
    first = next(i for i, (_, text) in enumerate(instructions) if "MUFU.EX2" in text)
    # It begins where the tile's last product is waited for.
    i = max(i for i in range(first) if "DEPBAR.LE gsb0, 0x0" in instructions[i][1])
    path, been_at = [], set()
    while i < len(instructions) and i not in been_at:
        been_at.add(i)
        address, text = instructions[i]
        path.append(text)
        branch = re.match(r"(@!?U?P\w+ +)?(?:BRA|EXIT)(?:\.\w+)*(.*)", text)
        to = _target(text)
        if branch and branch[1] is None and "P" not in branch[2] and (to is None or to < address):
            break  # the next tile, or the end
        if branch is None or to is None or to < address or to not in index:
            i += 1
        elif branch[1] is None and "P" not in branch[2]:
            i = index[to]
        else:
            i = index[to] if _skipped(instructions, names, i, index[to], index) else i + 1
    return path


def _skipped(instructions: list[Instruction], names: list[str], at: int, to: int, index: dict[int, int]) -> bool:
    """Returns True if the usual path takes the branch at ``at``, and so leaves out what lies before ``to``."""
    between = range(at + 1, to)
    if not between:
        return True
    if any(names[i] in ("STSM", "BAR", "UTMASTG", "SYNCS", "HGMMA") for i in between):
        return False
    # "if ... else ...": the first part ends with a branch behind the second one.
    behind = _target(instructions[to - 1][1])
    if names[to - 1] == "BRA" and behind is not None and behind > instructions[to][0] and behind in index:
        return index[behind] - to < len(between)
    targets = ((instructions[i][0], _target(instructions[i][1])) for i in between)
    return any(target is not None and target < address for address, target in targets)


def _target(text: str) -> int | None:
    found = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)$", text)
    return int(found[1], 16) if found else None


def _name(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ +", "", text).split()[0].partition(".")[0]


def _found(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"{pattern!r} is not in {text[:200]!r}")
    return found[1]


def _cuobjdump(option: str, library: Path) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, library], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    harness.command_line(__doc__, add_arguments, run)
