"""The study of the compiled CUDA kernels reads what is there, and tells faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import sass

KERNEL = sass.Kernel("bfloat16 rows", 168, 0, 6, Counter(HGMMA=16, UTMALDG=2, UTMASTG=8, WARPGROUP=4), 1024)


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({}, []),
        ({"spills": 3}, ["3 spills"]),
        ({"counts": KERNEL.counts - Counter(HGMMA=16)}, ["no tensor-core instruction"]),
        ({"counts": KERNEL.counts - Counter(UTMASTG=8)}, ["no store by the TMA unit"]),
        ({"counts": KERNEL.counts - Counter(UTMASTG=8), "name": "bfloat16 sums"}, []),
        ({"counts": KERNEL.counts + Counter(WARPGROUP=28)}, ["products wait for each other"]),
    ],
)
def test_faults_are_told(changed: dict, fault: list[str]) -> None:
    assert replace(KERNEL, **changed).faults == fault


def test_clocks_of_a_tile() -> None:
    """128 x 128 x 768 products are 6144 clocks; 640 of 80 KiB for each 64 of D; 8 instructions an entry are 1024."""
    assert sass.clocks(KERNEL, 768) == {"tensor cores": 6144.0, "shared memory": 7680.0, "epilogue": 1024.0}
    assert KERNEL.per_entry == 8.0


def test_kernels_have_names() -> None:
    symbol = "_Z28MMA_64x128x16_F32F16F16_SSIN13sbert_kernels11contrastive7VisitorISJ_LNS1Q_6PolicyE2ELb1EEEvv"
    assert sass.kernel_name(symbol) == "float16 known ids"
    with pytest.raises(ValueError, match="was not expected"):
        sass.kernel_name("_Z3foov")


def test_the_usual_path_leaves_out_loops_and_the_longer_way() -> None:
    text = [
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
        "@P0 BRA 0x40",  # if edge: two loads, else one
        "LDG R0",
        "LDG R1",
        "BRA 0x50",
        "LDG.64 R0",
        "MUFU.EX2 R3, R3",
        "@!P1 BRA 0x90",  # rare: a loop
        "IADD R4, R4, 1",
        "@P2 BRA 0x80",
        "STSM R3",
        "@P3 BRA 0x0",
        "BRA 0x0",
    ]
    # Addresses as above count the instruction behind the branch of the first way as 0x40.
    addresses = [0x0, 0x10, 0x20, 0x28, 0x30, 0x40, 0x50, 0x60, 0x80, 0x88, 0x90, 0xA0, 0xB0]
    path = sass.usual_path(list(zip(addresses, text, strict=True)))
    assert path == [text[i] for i in (0, 1, 5, 6, 7, 10, 11, 12)]
