"""Benchmark without a GPU: what the compiler makes of every Triton kernel that dispatch can pick, and roofline times.

The host code runs on tensors without memory and lists its launches; each is compiled for each target as Triton's own
launcher would, and read back: registers, spills, shared memory, occupancy, tensor-core instructions and loads of the
hottest loop (the shortest stretch between a backward branch and its target that holds them). Then the roofline times
that follow from the counts of operations and bytes (`backends/triton/contrastive/cost_model.py`).

    python -m benchmarks.aot [--quick]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sbert_kernels import machine, settings
from sbert_kernels.backends.triton.targets import BY_ARCH, BY_NAME, GPUS
from sbert_kernels.bench import arguments, harness
from sbert_kernels.bench.report import Report

TARGETS: dict[str, tuple[str, int | str]] = {
    f"sm_{gpu.arch}" if gpu.backend == "cuda" else str(gpu.arch): (gpu.backend, gpu.arch) for gpu in GPUS
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# The type of the embeddings, and how float32 is multiplied where not by float32 products (bfloat16 is as above).
KINDS = {
    **{name: (dtype, None) for name, dtype in DTYPES.items()},
    **{name: (torch.float32, name) for name in ("tf32", "tf32x3", "bfloat16x3")},
}
TENSOR_CORES = re.compile(r"\b(HMMA|IMMA|HGMMA|GMMA|UTC\w*MMA|OMMA|QMMA|v_mfma)[\w.]*", re.IGNORECASE)
LOADS = re.compile(r"\b(LDGSTS|LDG|UTMALDG|UBLKCP|global_load|buffer_load)[\w.]*", re.IGNORECASE)
FMA = re.compile(r"\b(FFMA2?|v_(?:pk_)?fmac?_f32|v_dot\w*)[\w.]*")


@dataclass(frozen=True)
class Compiled:
    """Holds what is known of a kernel once it is compiled for a target."""

    target: str
    kernel: str
    serves: str
    products: str
    tiles: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    occupancy: float  # theoretical: of a multiprocessor's threads
    dots: int  # tensor-core instructions in the whole kernel
    dot_kind: str
    loop_dots: int  # ... in the hottest loop
    loop_loads: int
    loop_fma: int
    widest_load: str
    has_dot: bool
    tile_flops: float  # of one tile of similarities and what is done with it; 0 without products
    tile_bytes: float  # of vectors read for it

    @property
    def faults(self) -> list[str]:
        """Returns the faults: spills, more shared memory than there is, products off the tensor cores."""
        arch = TARGETS[self.target][1]
        faults = []
        if self.spills:
            faults.append(f"{self.spills} spills")
        if self.shared > BY_ARCH[arch].shared_kib * 1024:
            faults.append(f"{self.shared} bytes of shared memory")
        # Products of float32 have none, and Triton uses none of sm_75.
        if self.has_dot and not self.dots and self.products != "float32" and arch != 75:
            faults.append("no tensor-core instruction")
        return faults


@dataclass(frozen=True)
class Case:
    """Describes a problem that dispatch may meet."""

    name: str
    negatives: int = 0
    gradients: bool = True
    options: dict[str, Any] = field(default_factory=dict)


FOUR = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
CASES = (
    Case("plain"),
    Case("no gradient", gradients=False),
    Case("done again", options={"scale": 100.0}),
    Case("online", options={"scale": 200.0}),
    Case("negatives", negatives=3),
    Case("four directions", negatives=1, options={"directions": FOUR}),
    Case("hardness", negatives=2, options={"hardness_mode": "in_batch_negatives", "hardness_strength": 3.0}),
    Case("mask", options={"duplicates": "mask"}),
    Case("positive", options={"duplicates": "positive"}),
    Case("guide", options={"guide": 384}),
    Case("learnable scale", options={"scale": None}),
    Case("matryoshka", options={"matryoshka": True}),
)
QUICK = ("plain", "done again", "online", "no gradient")
# Of the other products of float32, those with the largest kernels.
OPTIONS = ("positive", "guide", "matryoshka")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds this benchmark's options to a parser."""
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all of them")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: %(default)s)")
    arguments.add_arguments(parser, quick="plain problems of bfloat16 at one dimension only", repeats=1)


def run(args: argparse.Namespace) -> None:
    """Compiles, prints the tables, writes the report; exits non-zero after it if a kernel has a fault."""
    kernels = compile_all(args.targets, args.quick, args.workers)
    report = Report("Triton kernels, compiled ahead of time", "aot", machine.facts(), machine.line())
    for found in kernels:
        report.add(
            **{
                "target": found.target,
                "kernel": found.kernel,
                "serves": found.serves,
                "products": found.products,
                "tiles": found.tiles,
                "warps": found.warps,
                "stages": found.stages,
                "registers": found.registers,
                "spills": found.spills,
                "shared KiB": found.shared / 1024,
                "occupancy": found.occupancy,
                "tensor cores": found.dot_kind if found.dots else None,
                "in the loop": found.loop_dots or None,
                "loads in the loop": found.loop_loads or None,
                "loads per product": found.loop_loads / found.loop_dots if found.loop_dots else None,
                "MFLOP a tile": found.tile_flops / 1e6 or None,
                "KiB a tile": found.tile_bytes / 1024 or None,
                "FMA in the loop": found.loop_fma or None,
                "widest load": found.widest_load or None,
                "fault": "; ".join(found.faults) or None,
            }
        )
    harness.finish(report, args.output, [])
    roofline = Report("Roofline times of the contrastive loss, forward and backward", "aot-roofline")
    roofline.rows.extend(roofline_rows())
    harness.finish(roofline, args.output, [])
    summary = Report(report.title, "aot-summary", report.machine, report.machine_line)
    summary.rows.extend(summary_rows(kernels))
    faulty = [f"{k.target} {k.kernel} ({k.serves})" for k in kernels if k.faults]
    harness.finish(summary, args.output, faulty, "spills, too much shared memory, or products off the tensor cores")


def summary_rows(kernels: list[Compiled]) -> Iterator[dict[str, Any]]:
    """Yields a row for each target, kernel and kind of products: the extremes over its variants."""
    groups: dict[tuple[str, ...], list[Compiled]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.target, kernel.kernel, kernel.products), []).append(kernel)
    for (target, name, products), found in groups.items():
        yield {
            "target": target,
            "kernel": name,
            "products": products or None,
            "variants": len(found),
            "registers, most": max(k.registers for k in found),
            "spills": sum(k.spills for k in found),
            "shared KiB, most": max(k.shared for k in found) / 1024,
            "occupancy": f"{min(k.occupancy for k in found):.2f} .. {max(k.occupancy for k in found):.2f}",
            "tensor cores": ", ".join(sorted({k.dot_kind for k in found if k.dots})) or None,
            "widest load": ", ".join(sorted({k.widest_load for k in found if k.widest_load})) or None,
            "faults": sum(bool(k.faults) for k in found),
        }


# -- what is compiled -------------------------------------------------------------------------------------------------


def problem_of(case: Case, dtype: torch.dtype, dim: int, rows: int = 8192) -> Any:
    """Returns a contrastive problem whose tensors have no memory."""
    from sbert_kernels.problems.contrastive import ContrastiveProblem, ContrastiveSpec
    from sbert_kernels.problems.scale import Scale

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    options = dict(case.options)
    guide, matryoshka = options.pop("guide", None), options.pop("matryoshka", False)
    scale = options.pop("scale", 20.0)
    ids = "duplicates" in options
    columns = 1 + case.negatives
    dims = tuple(sorted({max(16, dim // 2**k) for k in range(5)})) if matryoshka else (dim,)
    return ContrastiveProblem(
        queries=meta(rows, dim),
        documents=tuple(meta(rows, dim) for _ in range(columns)),
        scale=Scale(meta(dtype=torch.float32) if scale is None else scale),
        query_ids=meta(rows, dtype=torch.int64) if ids else None,
        document_ids=meta(rows * columns, dtype=torch.int64) if ids else None,
        guide_queries=None if guide is None else meta(rows, guide),
        guide_documents=() if guide is None else tuple(meta(rows, guide) for _ in range(columns)),
        spec=ContrastiveSpec(**options, dims=dims, dim_weights=(1.0,) * len(dims)),
    )


def launches_of(target: str, quick: bool) -> Iterator[tuple[str, Any]]:
    """Yields (what it serves, launch) of all that dispatch would start for the cases on a target, each once."""
    from sbert_kernels.backends.triton import contrastive, launching
    from sbert_kernels.problems.contrastive import Needs

    seen: set[Any] = set()
    for kind, (dtype, products) in KINDS.items():
        if quick and kind != "bfloat16":
            continue
        for dim in (384,) if quick or products else (64, 123, 384, 768):
            for case in CASES:
                if case.name not in QUICK and (quick or dim != 384 or (products and case.name not in OPTIONS)):
                    continue
                for way in settings.WEIGHTS:
                    problem = problem_of(case, dtype, dim)
                    learns = problem.scale.tensor is not None
                    needs = Needs(True, True, False, learns) if case.gradients else Needs()
                    with (
                        settings.override(weights=way, matmul=products),
                        launching.recording(launching.Target(*TARGETS[target])) as launches,
                    ):
                        contrastive.contrastive(problem, needs)
                    for launch in launches:
                        yield from _once(seen, f"{case.name}, {kind}, D={dim}, {way}", launch)
    yield from _others(seen, target, quick)


def _others(seen: set[Any], target: str, quick: bool) -> Iterator[tuple[str, Any]]:
    """Yields the launches of the operations on pairs."""
    from sbert_kernels.backends.triton import launching, pairwise, ranking
    from sbert_kernels.problems.pairwise import SIMILARITIES, PairwiseProblem
    from sbert_kernels.problems.ranking import Needs, RankingProblem
    from sbert_kernels.problems.scale import Scale

    where = launching.Target(*TARGETS[target])
    for dtype_name, dtype in DTYPES.items():
        if quick and dtype_name != "bfloat16":
            continue
        x, y = (torch.empty(8192, 384, dtype=dtype, device="meta") for _ in range(2))
        for names in (("cos",), SIMILARITIES):
            problem = PairwiseProblem(x, (y,), names)
            flowing = [torch.empty(8192, device="meta") for _ in names]
            with launching.recording(where) as launches:
                pairwise.pairwise(problem)
                pairwise.pairwise_gradients(problem, flowing, (True, True))
            for launch in launches:
                yield from _once(seen, f"{'+'.join(names)}, {dtype_name}", launch)
    for rows in (1000, 65536) if quick else (1000, 8192, 65536):
        for label_type in (torch.float32,) if quick else (torch.float32, torch.int64):
            labels = torch.empty(rows, dtype=label_type, device="meta")
            problem = RankingProblem(torch.empty(rows, device="meta"), labels, Scale(20.0))
            with launching.recording(where) as launches:
                ranking.ranking(problem, Needs(True, True, False))
            for launch in launches:
                yield from _once(seen, f"n={rows}, {str(label_type).removeprefix('torch.')} labels", launch)


def _once(seen: set[Any], serves: str, launch: Any) -> Iterator[tuple[str, Any]]:
    def kind(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.dtype
        return (type(argument), argument == 1, argument % 16 == 0) if isinstance(argument, int) else type(argument)

    key = (launch.kernel.__name__, tuple(map(kind, launch.arguments.values())), str(launch.constants), launch.config)
    if key not in seen:
        seen.add(key)
        yield serves, launch


def compile_all(targets: list[str], quick: bool, workers: int) -> list[Compiled]:
    """Compiles every kernel for every target, in processes of their own, in which Triton's interpreter is off."""
    shares = [(target, quick, part, workers) for target in targets for part in range(workers)]
    environment = os.environ.pop("TRITON_INTERPRET", None)
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            parts = list(pool.map(_compile_share, shares))
    finally:
        if environment is not None:
            os.environ["TRITON_INTERPRET"] = environment
    order = {target: index for index, target in enumerate(targets)}
    return sorted((k for part in parts for k in part), key=lambda k: (order[k.target], k.kernel, k.serves))


def _compile_share(share: tuple[str, bool, int, int]) -> list[Compiled]:
    target, quick, part, parts = share
    torch.set_num_threads(1)
    launches = list(launches_of(target, quick))
    return [compiled(target, serves, launch) for serves, launch in launches[part::parts]]


def compiled(target: str, serves: str, launch: Any) -> Compiled:
    """Compiles a launch as Triton's launcher does on that target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend_name, arch = TARGETS[target]
    gpu = GPUTarget(backend_name, arch, 64 if backend_name == "hip" else 32)
    backend, kernel = make_backend(gpu), launch.kernel
    options = launch.config.options(backend_name)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialization, None)
    binary = triton.compile(ASTSource(kernel, signature, constants, attributes), target=gpu, options=options)
    text = _assembly(binary, backend_name)
    registers, spills = _resources(binary, text, backend_name)
    shared = binary.metadata.shared
    threads = launch.config.num_warps * gpu.warp_size
    dots = Counter(match.group(0) for match in TENSOR_CORES.finditer(text))
    loop = _hottest_loop(text)
    loads = Counter(match.group(0) for match in LOADS.finditer(loop or text))
    constexprs = launch.constants
    return Compiled(
        target=target,
        kernel=kernel.__name__,
        serves=serves,
        products=_products(constexprs),
        tiles="x".join(str(size) for _, size in launch.config.tiles),
        warps=launch.config.num_warps,
        stages=launch.config.num_stages,
        registers=registers,
        spills=spills,
        shared=shared,
        occupancy=_occupancy(arch, registers, shared, threads),
        dots=sum(dots.values()),
        dot_kind=dots.most_common(1)[0][0] if dots else "",
        loop_dots=len(TENSOR_CORES.findall(loop)),
        loop_loads=len(LOADS.findall(loop)),
        loop_fma=len(FMA.findall(loop)),
        widest_load=max(loads, key=_width, default=""),
        has_dot="PRECISION" in constexprs,
        **_work_of_a_tile(launch),
    )


def _work_of_a_tile(launch: Any) -> dict[str, float]:
    if "PRECISION" not in launch.constants:
        return {"tile_flops": 0.0, "tile_bytes": 0.0}
    a, b = launch.config["BLOCK_A"], launch.config["BLOCK_B"]
    # A plain product walks through all of its inner dimension.
    d = launch.constants["DIMS"][-1] if "DIMS" in launch.constants else launch.arguments["k"]
    size = launch.constants["OPERAND"].primitive_bitwidth // 8
    return {"tile_flops": 2.0 * a * b * d, "tile_bytes": float((a + b) * d * size)}


def _products(constants: dict[str, Any]) -> str:
    if "PRECISION" not in constants:
        return ""
    precision, operand = constants["PRECISION"], str(constants["OPERAND"])
    names = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32" if precision == "ieee" else precision}
    return names[operand]


# -- what is read back ------------------------------------------------------------------------------------------------


def _assembly(binary: Any, backend: str) -> str:
    if backend == "hip":
        return binary.asm["amdgcn"]
    return _tool("nvdisasm", binary, "-c")


def _tool(name: str, binary: Any, *options: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def _resources(binary: Any, text: str, backend: str) -> tuple[int, int]:
    """Registers of a thread, and how many of them are spilled."""
    if backend == "hip":

        def number(name: str) -> int:
            return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

        # Scalars that find no register go to lanes of vector registers, not to memory.
        return number("vgpr_count"), number("vgpr_spill_count") + number("private_segment_fixed_size") // 4
    usage = _tool("cuobjdump", binary, "--dump-resource-usage")
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    # Stores to local memory and loads from it; kernels without arrays have no other use of it.
    return registers, len(re.findall(r"\b(?:STL|LDL)\b", text))


def _occupancy(arch: int | str, registers: int, shared: int, threads: int) -> float:
    """Blocks that fit at once, in threads, over those that a multiprocessor holds."""
    gpu = BY_ARCH[arch]
    granted = -(-max(registers, 1) // 8) * 8
    by_registers = gpu.registers // (granted * threads)
    by_shared = gpu.shared_of_all_kib * 1024 // (shared + (0 if gpu.backend == "hip" else 1024)) if shared else 32
    return min(by_registers, by_shared, gpu.threads // threads) * threads / gpu.threads


def _hottest_loop(text: str) -> str:
    """Returns the lines from a label to a branch back to it that hold the most tensor-core instructions, or FMA."""
    lines = text.splitlines()
    labels = {}
    best, best_score = "", 0.0
    for number, line in enumerate(lines):
        label = re.match(r"\s*(\.L_x_\d+|\.LBB\d+_\d+):", line)
        if label:
            labels[label.group(1)] = number
            continue
        branch = re.search(r"(?:BRA|s_cbranch\w*|s_branch).*?(\.L_x_\d+|\.LBB\d+_\d+)", line)
        if branch and branch.group(1) in labels:
            body = "\n".join(lines[labels[branch.group(1)] : number + 1])
            score = len(TENSOR_CORES.findall(body)) * 100 + len(FMA.findall(body))
            score /= number + 1 - labels[branch.group(1)]
            if score > best_score:
                best, best_score = body, score
    return best


def _width(instruction: str) -> int:
    found = re.findall(r"128|64|dwordx4|dwordx2", instruction)
    return max((4 if width in ("128", "dwordx4") else 2 for width in found), default=1)


# -- what it should take ----------------------------------------------------------------------------------------------


def roofline_rows() -> Iterator[dict[str, Any]]:
    """Milliseconds of a forward and backward pass at the full rates of a card, and as the cost model expects them."""
    from sbert_kernels.backends.triton.contrastive import cost_model

    for card_name in ("A100", "H100", "H200", "B200", "L4", "RTX 4090"):
        gpu = BY_NAME[card_name]
        for kind, size in (("half", 2), ("fp32", 4)):
            for rows in (8192, 65536):
                for dim in (384, 768, 1024):
                    row: dict[str, Any] = {"card": card_name, "products": kind, "N": rows, "D": dim}
                    floor = 6.0 * rows * rows * dim / gpu.peak(kind)
                    row["three products ms"] = floor * 1e3
                    for way in settings.WEIGHTS:
                        work = cost_model.accounting(rows, rows, (dim,), size, way)
                        flops = work.sweep_flops + work.vendor_flops
                        row[f"{way} roofline ms"] = 1e3 * max(flops / gpu.peak(kind), work.bytes / gpu.bandwidth)
                        row[f"{way} expected ms"] = 1e3 * work.seconds(gpu, kind)
                    yield row


if __name__ == "__main__":
    harness.command_line(__doc__, add_arguments, run)
