"""The GPUs that the kernels are made for, one row each: the only place for facts about them.

To support a GPU, add a row to `GPUS`. `Target` names what code is compiled for; `Target.gpu` is its row. Peak rates are
those of the makers' data sheets, for dense matrices; only their ratios decide anything. This file needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class SweepTiles:
    """Holds tile sizes (BLOCK_A, BLOCK_B) of the sweep that spill no registers; see `contrastive.tiles`."""

    plain: tuple[int, int] = (128, 128)
    masked: tuple[int, int] = (64, 64)  # entries are told apart by ids or hardness, which takes registers
    in_parts: tuple[int, int] = (64, 32)  # fp32 products, or products of fp32 in three parts
    prefixes: tuple[int, int] = (32, 32)  # a tile of weights for each of more than two prefixes
    stages: int = 3  # loads in flight, as many as shared memory holds


@dataclass(frozen=True)
class Gpu:
    """Facts about one GPU."""

    name: str
    backend: str  # "cuda" or "hip"
    arch: int | str  # 90 for compute capability 9.0, or "gfx942"
    multiprocessors: int
    shared_kib: int  # shared memory that a block may have
    shared_of_all_kib: int  # shared memory of a multiprocessor
    registers: int  # of 32 bits, of a multiprocessor
    threads: int  # that a multiprocessor holds
    half: float  # peak FLOP/s of float16 and bfloat16 products
    tf32: float
    fp32: float  # of products without tensor cores
    bandwidth: float  # bytes/s of memory
    memory_gib: int
    formats: tuple[str, ...]  # that Triton multiplies on tensor cores
    tiles: SweepTiles

    def peak(self, rate: str) -> float:
        """Returns the peak FLOP/s of products at a rate: "half", "tf32" or "fp32"."""
        return {"half": self.half, "tf32": self.tf32, "fp32": self.fp32}[rate]


_NONE = ()  # Triton multiplies nothing on Turing's tensor cores
_CUDA = ("float16", "bfloat16", "tf32")
_AMD = ("float16", "bfloat16", "float32")
_TURING = SweepTiles(in_parts=(64, 16), stages=2)
_AMPERE = SweepTiles()
_SMALL = SweepTiles(stages=2)
_HOPPER = SweepTiles(plain=(128, 256), prefixes=(64, 32))  # measured on an H200: 385 TFLOP/s, 327 with 128 columns
# Its tensor cores accumulate in a memory of their own, but bring a tile into registers as a whole.
_BLACKWELL = SweepTiles(plain=(128, 64), prefixes=(64, 32))
_GEFORCE = SweepTiles(plain=(128, 64), masked=(64, 32), stages=2)
_CDNA3 = SweepTiles(prefixes=(64, 32), stages=2)

# Of several GPUs of one arch, the first stands for all of them.
# fmt: off
GPUS = (
    # name, backend, arch, SMs, KiB, all, registers, threads, half, tf32, fp32, bandwidth, GiB, formats, tiles
    Gpu("T4",       "cuda",  75,  40,  64,  64, 65536, 1024,   65e12,    8e12,   8e12,  32e10,  16, _NONE, _TURING),
    Gpu("A100",     "cuda",  80, 108, 163, 164, 65536, 2048,  312e12,  156e12, 195e11, 2.0e12,  40, _CUDA, _AMPERE),
    Gpu("A10",      "cuda",  86,  72,  99, 100, 65536, 1536,  125e12,   62e12,  31e12, 0.6e12,  24, _CUDA, _SMALL),
    Gpu("L4",       "cuda",  89,  58,  99, 100, 65536, 1536,  121e12,   60e12,  30e12, 0.3e12,  24, _CUDA, _SMALL),
    Gpu("RTX 4090", "cuda",  89, 128,  99, 100, 65536, 1536,  165e12,   82e12,  82e12, 1.0e12,  24, _CUDA, _SMALL),
    Gpu("H100",     "cuda",  90, 132, 227, 228, 65536, 2048,  989e12,  495e12,  67e12, 335e10,  80, _CUDA, _HOPPER),
    Gpu("H200",     "cuda",  90, 132, 227, 228, 65536, 2048,  989e12,  495e12,  67e12, 4.8e12, 141, _CUDA, _HOPPER),
    Gpu("B200",     "cuda", 100, 148, 227, 228, 65536, 2048, 2250e12, 1100e12,  80e12,   8e12, 180, _CUDA, _BLACKWELL),
    Gpu("RTX 5090", "cuda", 120, 170,  99, 100, 65536, 1536,  209e12,  105e12, 105e12, 1.8e12,  32, _CUDA, _GEFORCE),
    Gpu("MI300X", "hip", "gfx942", 304, 64, 64, 131072, 2048, 1307e12, 653e12, 163e12, 5.3e12, 192, _AMD, _CDNA3),
)
# fmt: on
BY_NAME = {gpu.name: gpu for gpu in GPUS}
BY_ARCH = {gpu.arch: gpu for gpu in reversed(GPUS)}
NVIDIA_ARCHS = sorted(gpu.arch for gpu in GPUS if isinstance(gpu.arch, int))
OLDEST_CAPABILITY = divmod(NVIDIA_ARCHS[0], 10)
AMD_ARCHS = tuple(gpu.arch for gpu in GPUS if isinstance(gpu.arch, str))


@dataclass(frozen=True)
class Target:
    """Names what code is compiled for. It decides tile sizes and number formats, and no result beyond rounding."""

    backend: str  # "cuda", "hip" or "interpreter"
    arch: int | str
    multiprocessors: int | None = None  # None: as many as its row says, where nobody runs the code
    memory: int | None = None  # bytes; None: as much as its row says

    @property
    def processors(self) -> int:
        """The number of multiprocessors."""
        return self.gpu.multiprocessors if self.multiprocessors is None else self.multiprocessors

    @property
    def memory_bytes(self) -> int:
        """The memory of the GPU."""
        return self.gpu.memory_gib << 30 if self.memory is None else self.memory

    @cached_property
    def gpu(self) -> Gpu:
        """The row of this GPU, or of one that is most like it: of the same maker, no newer, of about as much memory."""
        arch = self.arch
        if self.backend == "hip":
            arch = arch if arch in BY_ARCH else "gfx942"
        elif isinstance(arch, str) or self.backend == "interpreter":
            arch = 90
        else:
            arch = max((known for known in NVIDIA_ARCHS if known <= arch), default=NVIDIA_ARCHS[0])
        if self.memory is None:
            return BY_ARCH[arch]
        gib = self.memory / 2**30
        return min((gpu for gpu in GPUS if gpu.arch == arch), key=lambda gpu: abs(gpu.memory_gib - gib))
