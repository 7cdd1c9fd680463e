"""What the page of results shows of each study: the columns of its table, and how it is repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

BENCH = "python -m sbert_kernels bench"


@dataclass(frozen=True)
class Study:
    """Describes one study, whose results are files that begin with its name.

    `columns` maps a column of the page to the column of the results that it shows; others are not shown. `text` says
    what was measured and what the limit is, `repeat` is the command.
    """

    text: str
    repeat: str
    columns: Mapping[str, str]


def _times(**limit: str) -> dict[str, str]:
    return {
        "case": "case",
        "dtype": "dtype",
        "precision": "precision",
        "stock ms": "stock ms",
        "stock in float32 ms": "stock float32 ms",
        "torch.compile ms": "compiled ms",
        "ours ms": "ours ms",
        "stock / ours": "stock/ours",
        **limit,
        "stock MiB": "stock MiB",
        "ours MiB": "ours MiB",
        "note": "note",
    }


_STEP_PARTS = ("tokenize", "encode", "loss", "loss backward", "encoder backward", "optimizer")
_GPU_PEERS = ("liger-kernel", "cut-cross-entropy", "torch", "memeff", "quack", "inf-cl")
STUDIES = {
    "training": Study(
        "Whole steps of `SentenceTransformerTrainer` with a static-embedding model, tokenizing included, from the "
        "real texts to the optimizer. Ours computes its gradients with the loss, so that the loss's backward is "
        "empty. In the overlapped cases a worker tokenizes beside the step. A step has no single limit: its parts "
        "are the columns.",
        f"{BENCH} training",
        {
            "case": "case",
            "losses of": "side",
            "step ms": "step ms",
            "stock / this": "stock/this",
            **{f"{part} ms": f"{part} ms" for part in _STEP_PARTS},
            "peak MiB": "peak extra MiB",
            "note": "note",
        },
    ),
    "contrastive": Study(
        "Forward and backward of in-batch losses, from embeddings to gradients. The limit is the time of the "
        "matrix products that a case cannot do without, by `torch.mm` in the same type; a ratio below 1 means that"
        " the kernels outrun that library.",
        f"{BENCH} contrastive --large",
        _times(**{"limit ms": "products ms", "ours / limit": "ours/products"}),
    ),
    "ranking": Study(
        "Forward and backward of CoSENT and AnglE, from embeddings to gradients. The limit is the time of reading "
        "both embeddings twice and writing both gradients once, at the bandwidth of a large copy.",
        f"{BENCH} ranking --large",
        _times(**{"limit ms": "floor ms", "ours / limit": "ours/floor"}),
    ),
    "objective": Study(
        "Forward and backward of a whole model with AnglE's objective: `AnglEObjective` against stock's three "
        "losses one after the other, which encode the batch three times. The encoder takes most of the time; no "
        "limit was measured.",
        f"{BENCH} objective",
        _times(),
    ),
    "gradcache": Study(
        "Forward and backward of MiniLM through the gradient cache, with its dropout, on docstring pairs, each run"
        " in a process of its own. The limit is the time of the real tokens' matrix products alone, at the rate of"
        " a plain one.",
        f"{BENCH} gradcache",
        {
            "case": "case",
            "contender": "contender",
            "options": "options",
            "s": "s",
            "stock / this": "stock/this",
            "limit s": "floor s",
            "this / limit": "this/floor",
            "peak MiB": "peak extra MiB",
            "loss curves differ by": "loss curves differ",
            "note": "note",
        },
    ),
    "host": Study(
        "What a step of a loss costs the host of a GPU, measured without one: launches and products compute nothing. "
        "Ours is the step without torch's own operations; a product and a mean take longer there than on a GPU.",
        f"{BENCH} host",
        {
            "case": "case",
            "ours us": "ours us",
            "step us": "step us",
            "launches, forward": "forward: launches",
            "products": "forward: products",
            "other kernels": "forward: other kernels",
            "calls of Python": "forward: calls",
            "other kernels, backward": "backward: other kernels",
        },
    ),
    "kernels": Study(
        "Each kernel alone, beside the vendor's product of the same shape, or a copy that reads and writes as many "
        "bytes. The peak of a GPU is its maker's, that of a CPU a large product and a large copy, measured. A kernel "
        "that multiplies and does more is read against the product alone.",
        f"{BENCH} kernels",
        {
            "kernel": "kernel",
            "shape": "shape",
            "dtype": "dtype",
            "starts": "starts",
            "ms": "ms",
            "TFLOP/s": "TFLOP/s",
            "GB/s": "GB/s",
            "vendor ms": "vendor ms",
            "copy ms": "copy ms",
            "this / other": "this / other",
            "% of peak": "% of peak",
            "note": "note",
        },
    ),
    "accuracy": Study(
        "Errors against float64, relative: of the loss, of the queries' and of the documents' gradients. Eager "
        "computes in the type of the embeddings. In p = 0.999, a well-trained batch, the gradient is of the size "
        "of a bfloat16 rounding.",
        "python -m benchmarks.accuracy",
        {
            "case": "case",
            **{f"{side} {what}": f"{side} {what}" for what in ("loss", "dQ", "dD") for side in ("ours", "eager")},
        },
    ),
    "accuracy-autocast": Study(
        "The same errors of float32 embeddings under `torch.autocast`, beside stock's loss under it. In a batch that "
        "is alike, any two embeddings have a cosine of about 0.8. The CPU has no float16 products of ours: they are "
        "float32. The Triton kernels ran in Triton's interpreter.",
        "python -m benchmarks.autocast [--quick --backend triton]",
        {
            "case": "case",
            **{f"{side} {what}": f"{side} {what}" for what in ("loss", "dQ", "dD") for side in ("ours", "stock")},
        },
    ),
    "gpu-contrastive": Study(
        "Forward and backward of the in-batch loss, from embeddings to gradients, beside other libraries' fused "
        "losses. The limit is the time of the three matrix products by the vendor's library. A ratio below 1 means"
        " that the other library is faster.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "stock ms": "eager ms",
            "torch.compile ms": "compiled ms",
            **{f"{peer} ms": f"{peer} ms" for peer in _GPU_PEERS},
            "ours ms": "ours ms",
            "stock / ours": "eager/ours",
            **{f"{peer} / ours": f"{peer}/ours" for peer in _GPU_PEERS},
            "limit ms": "limit ms",
            "% of the limit": "% of GEMM",
            "strategy": "chosen",
            "tiled ms": "tiled ms",
            "chunked ms": "chunked ms",
            "note": "note",
        },
    ),
    "gpu-memory": Study(
        "Peak extra memory of forward and backward of the in-batch loss. The limit is what the gradients take.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "stock MiB": "eager MiB",
            **{f"{peer} MiB": f"{peer} MiB" for peer in _GPU_PEERS},
            "ours MiB": "ours MiB",
            "limit MiB": "gradients MiB",
            "note": "note",
        },
    ),
    "gpu-losses": Study(
        "Forward and backward of the symmetric loss, GIST, Matryoshka, CoSENT and AnglE, from embeddings to gradients.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "stock ms": "eager ms",
            "memeff ms": "memeff ms",
            "ours ms": "ours ms",
            "stock / ours": "eager/ours",
            "memeff / ours": "memeff/ours",
            "note": "note",
        },
    ),
    "gpu-backends": Study(
        "Forward and backward of the in-batch loss by each of our backends, at the sizes of the project's goals. Ours "
        "is the backend that serves where none is asked for.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "ours ms": "ours ms",
            "by": "backend",
            "CUDA library ms": "cuda ms",
            "Triton kernels ms": "triton ms",
            "Triton / ours": "triton/ours",
            "note": "note",
        },
    ),
    "gpu-host": Study(
        "What the host takes for forward and backward of the in-batch loss if it waits for nothing, and whole steps "
        "that wait for the card. At small sizes the host's work is the step.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "stock, host us": "eager host us",
            "ours, host us": "ours host us",
            "stock ms": "eager ms",
            "ours ms": "ours ms",
            "stock / ours": "eager/ours",
        },
    ),
    "gpu-weights": Study(
        "Forward and backward of the in-batch loss with the weights made in both ways: in the kernel that multiplies "
        "(sweep), or in a pass over the vendor's product (weigh). Ours is the way that the library chooses.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "sweep ms": "sweep ms",
            "weigh ms": "weigh ms",
            "ours ms": "ours ms",
            "ours / the faster": "ours/faster",
            "note": "note",
        },
    ),
    "gpu-training": Study(
        "Whole training steps, without the optimizer, of transformers with random weights through the gradient cache: "
        "in-batch negatives over docstring pairs, autocast to bfloat16.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "tokens": "tokens",
            "stock ms": "eager ms",
            "ours ms": "ours ms",
            "stock / ours": "eager/ours",
            "stock MiB": "eager peak MiB",
            "ours MiB": "ours peak MiB",
            "note": "note",
        },
    ),
    "gpu-sigmoid": Study(
        "Forward and backward of siglip-kernel's sigmoid loss beside our softmax of the same shape. They are different "
        "losses that need the same three products.",
        f"{BENCH} gpu",
        {"case": "case", "siglip-kernel (sigmoid) ms": "siglip-kernel ms", "ours (softmax) ms": "ours ms"},
    ),
    "gpu-steps": Study(
        "Whole steps of ours on the clock of the host, and their kernels alone. At small sizes the host's work "
        "takes most of a step. The kernels' time was read with torch's profiler; the command measures the steps.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "strategy": "strategy",
            "step ms": "step ms",
            "kernels ms": "kernels ms",
            "launches": "launches",
        },
    ),
    "gpu-parity": Study(
        "Errors against float64, relative, the largest of the loss and of each gradient. Ours may have twice the "
        "error of eager torch and a few roundings.",
        f"{BENCH} gpu",
        {
            "case": "case",
            "tiled": "tiled error",
            "chunked": "chunked error",
            "ours": "ours error",
            "other library": "peer error",
            "eager": "eager error",
            "limit": "limit",
            "verdict": "verdict",
        },
    ),
    "gpu-goals": Study(
        "The project's own goals for a GPU.",
        "python -m benchmarks.goals FOLDER",
        {"goal": "goal", "verdict": "verdict", "found": "found"},
    ),
    "aot-summary": Study(
        "What compilers made of the Triton kernels for GPUs, without one: registers, spills and tensor-core "
        "instructions. Nothing was run.",
        "python -m benchmarks.aot",
        {
            name: name
            for name in (
                "target",
                "kernel",
                "products",
                "variants",
                "registers, most",
                "spills",
                "shared KiB, most",
                "occupancy",
                "tensor cores",
                "widest load",
                "faults",
            )
        },
    ),
    "sass": Study(
        "What the compiler made of the CUDA kernels for Hopper (sm_90a), without a GPU; nothing was run. Instructions "
        "are those for each entry of the weights on the usual path of the epilogue. Clocks are a model, at full rates: "
        "of a multiprocessor for a tile of 128 x 128. While one warp group multiplies, another one weighs, so that the "
        "longer of the two counts.",
        "python -m benchmarks.sass",
        {
            name: name
            for name in (
                "kernel",
                "registers",
                "spills",
                "stages",
                "HGMMA",
                "TMA loads",
                "TMA stores",
                "instructions an entry",
                "epilogue clocks",
                "product clocks, D=768",
                "product clocks, D=384",
                "product clocks, D=128",
                "bound, D=768",
                "bound, D=384",
                "bound, D=128",
            )
        },
    ),
}
# Computed times, which nothing has measured.
LEFT_OUT = ("aot-roofline",)


def study_of(name: str) -> Study:
    """Returns the study of a file of results by its name without ending; raises ValueError for an unknown one."""
    known = [study for study in STUDIES if name == study or name.startswith(f"{study}-")]
    if not known:
        raise ValueError(f"{name}.json: no study has this name, wanted one that begins with {', '.join(STUDIES)}")
    return STUDIES[max(known, key=len)]


def shown(study: Study, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of a row that the page shows, by their names there."""
    if "GEMM TFLOP/s" in row:  # three products of [N, D] and [D, N]
        row = {**row, "limit ms": 6.0 * row["N"] ** 2 * row["D"] / (1e9 * row["GEMM TFLOP/s"])}
    return {name: row[column] for name, column in study.columns.items() if column in row}
