"""The accuracy benchmark from its command line: it finds the errors that each format has."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import accuracy
from sbert_kernels.backends.cpu import contrastive as cpu


def test_errors_are_those_of_the_formats(tmp_path: Path, compiled: None) -> None:
    reason = cpu.why_not_precision(cpu.MatmulPrecision.BFLOAT16)
    if reason is not None:
        pytest.skip(reason)
    parser = argparse.ArgumentParser()
    accuracy.add_arguments(parser)
    accuracy.run(parser.parse_args(["--quick", "--repeats", "3", "--output", str(tmp_path)]))
    rows = {row["case"]: row for row in json.loads((tmp_path / "accuracy.json").read_text())["rows"]}
    assert len(rows) == len(accuracy.FORMATS) * (len(accuracy.SCALES) + 1)
    for name, row in rows.items():
        # A rounding of bfloat16 is 2^-9 at most; bfloat16x3 has twice its bits, float16 three more.
        unit = 2**-24 if name.startswith("float32,") and "products" not in name else 2**-9
        unit = 2**-17 if "x3" in name else 2**-12 if name.startswith("float16") else unit
        scale = float(name.partition("scale ")[2].partition(",")[0])
        assert unit / 100 < row["ours dQ"] < unit * scale, name
