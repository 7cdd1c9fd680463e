"""The benchmark of errors under autocast from its command line: a row for each case, with ours below stock's."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import autocast


def test_a_row_for_each_case(tmp_path: Path, compiled: None) -> None:
    parser = argparse.ArgumentParser()
    autocast.add_arguments(parser)
    arguments = ["--quick", "--repeats", "2", "--device", "cpu", "--backend", "cpu", "--output", str(tmp_path)]
    autocast.run(parser.parse_args(arguments))
    rows = json.loads((tmp_path / "accuracy-autocast-cpu.json").read_text())["rows"]
    assert len({row["case"] for row in rows}) == len(autocast.TYPES) * len(autocast.SHARED) * len(autocast.SCALES)
    for row in rows:
        # A rounding of bfloat16 is 2^-9 at most, and one of float16 2^-12.
        unit = 2**-9 if row["case"].startswith("bfloat16") else 2**-12
        assert 0 < row["ours dQ"] < row["stock dQ"] < 100 * unit, row
