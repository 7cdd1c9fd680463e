"""`Lane` places its entries where CUTLASS's epilogue for sm_90 leaves them, for every lane of a tile."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sbert_kernels.native import toolchain
from sbert_kernels.native.building import BuildError


def test_entries_lie_where_cutlass_puts_them(tmp_path: Path) -> None:
    """CUTLASS's partition is computed when its headers are compiled, by the host's compiler."""
    try:
        found = toolchain.find()
    except BuildError as error:
        pytest.skip(f"where the lanes' entries lie is not compared, and no other test would see it: {error}")
    includes = [*found.cutlass_includes, found.home / "include", found.home / "include" / "cccl"]
    program = tmp_path / "lane_map"
    source = Path(__file__).with_name("lane_map.cpp")
    options = [text for folder in includes for text in ("-isystem", str(folder))]
    subprocess.run(["c++", "-std=c++17", *options, str(source), "-o", str(program)], check=True)
    said = subprocess.run([program], capture_output=True, text=True, check=False)
    assert said.stdout == "16384 entries, 0 wrong\n"
