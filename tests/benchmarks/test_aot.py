"""The kernels as compilers for GPUs see them, and the reading of what they write."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import aot

ROOT = Path(__file__).parents[2]
needs_compilers = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
# What multiplies matrices in half precision.
TENSOR_CORES = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}


@pytest.fixture(scope="module")
def kernels() -> list[aot.Compiled]:
    """Those of the most usual problems, for four targets."""
    return aot.compile_all(list(TENSOR_CORES), quick=True, workers=2)


@needs_compilers
@pytest.mark.parametrize("target", TENSOR_CORES)
def test_nothing_spills_and_products_are_the_tensor_cores(target: str, kernels: list[aot.Compiled]) -> None:
    found = [kernel for kernel in kernels if kernel.target == target]
    assert {kernel.kernel for kernel in found} == {
        "norms_forward", "sweep", "weigh", "redo", "softmax_statistics", "scale_rows", "norms_backward",
        "rank", "pair_scores", "pair_gradients", *(["matrix_product"] if target == "gfx942" else []),
    }  # fmt: skip
    assert not [(kernel.serves, kernel.faults) for kernel in found if kernel.faults]
    for kernel in found:
        if kernel.kernel == "sweep":
            assert kernel.dot_kind.startswith(TENSOR_CORES[target])
            assert kernel.loop_dots > 0
            assert kernel.loop_fma == 0
            assert "128" in kernel.widest_load or "dwordx4" in kernel.widest_load


@needs_compilers
def test_a_kernel_that_spills_is_seen(tmp_path: Path) -> None:
    """Four times the accumulators that registers hold."""
    code = """
import dataclasses
from benchmarks import aot
from sbert_kernels.backends.triton import launching
serves, launch = next(x for x in aot.launches_of("sm_80", True) if x[1].kernel.__name__ == "sweep")
tiles = tuple({**dict(launch.config.tiles), "BLOCK_A": 256, "BLOCK_B": 256}.items())
launch = dataclasses.replace(
    launch, config=launching.Config(tiles, 8, 3), constants=launch.constants | dict(tiles)
)
kernel = aot.compiled("sm_80", serves, launch)
print(kernel.spills, kernel.faults)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    spills, _, faults = found.stdout.partition(" ")
    assert int(spills) > 100
    assert f"{spills} spills" in faults


PLAIN = aot.Compiled(
    target="sm_90",
    kernel="sweep",
    serves="plain",
    products="bfloat16",
    tiles="128x128",
    warps=8,
    stages=3,
    registers=128,
    spills=0,
    shared=96 * 1024,
    occupancy=0.25,
    dots=4,
    dot_kind="HGMMA",
    loop_dots=4,
    loop_loads=8,
    loop_fma=0,
    widest_load="LDGSTS.128",
    has_dot=True,
    tile_flops=1.0,
    tile_bytes=1.0,
)


def test_faults_are_told() -> None:
    assert not PLAIN.faults
    assert replace(PLAIN, spills=3).faults == ["3 spills"]
    assert replace(PLAIN, shared=228 * 1024).faults == [f"{228 * 1024} bytes of shared memory"]
    assert replace(PLAIN, dots=0).faults == ["no tensor-core instruction"]
    assert not replace(PLAIN, dots=0, products="float32").faults


def test_occupancy_is_that_of_the_scarcest() -> None:
    assert aot._occupancy(90, 128, 0, 256) == 0.25  # 65536 registers are two blocks
    assert aot._occupancy(90, 32, 100 * 1024, 256) == 0.25  # 228 KiB are two blocks
    assert aot._occupancy(90, 32, 0, 256) == 1.0
    assert aot._occupancy("gfx942", 256, 64 * 1024, 512) == 0.25


def test_the_hottest_loop_is_the_innermost() -> None:
    text = """
.L_x_1:
        /*0010*/ LDG.E.128 R0 ;
        /*0020*/ FADD R1 ;
.L_x_2:
        /*0030*/ LDGSTS.E.128 R0 ;
        /*0040*/ HMMA.16816.F32 R4 ;
        /*0050*/ HMMA.16816.F32 R8 ;
        /*0060*/ @P0 BRA `(.L_x_2) ;
        /*0070*/ MUFU.EX2 R3 ;
        /*0080*/ @P1 BRA `(.L_x_1) ;
"""
    loop = aot._hottest_loop(text)
    assert len(aot.TENSOR_CORES.findall(loop)) == 2
    assert "MUFU" not in loop
    assert "LDG.E" not in loop


def test_reports_are_written_and_faults_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [PLAIN, replace(PLAIN, spills=7, serves="another")]
    monkeypatch.setattr(aot, "compile_all", lambda *_: found)
    pytest.importorskip("triton")
    args = argparse.Namespace(targets=["sm_90"], quick=True, workers=1, output=tmp_path)
    with pytest.raises(SystemExit, match=r"spills.*sm_90 sweep \(another\)"):
        aot.run(args)
    rows = json.loads((tmp_path / "aot.json").read_text())["rows"]
    assert [row["fault"] for row in rows] == [None, "7 spills"]
    (summary,) = json.loads((tmp_path / "aot-summary.json").read_text())["rows"]
    assert (summary["variants"], summary["spills"], summary["faults"]) == (2, 7, 1)
    roofline = json.loads((tmp_path / "aot-roofline.json").read_text())["rows"]
    assert {row["card"] for row in roofline} >= {"A100", "H100", "H200", "B200", "L4", "RTX 4090"}
    # 6 N^2 D operations at 989 TFLOP/s.
    (row,) = (r for r in roofline if (r["card"], r["products"], r["N"], r["D"]) == ("H100", "half", 65536, 768))
    assert row["three products ms"] == pytest.approx(20.0, rel=0.01)
    assert row["sweep roofline ms"] >= row["three products ms"]
