"""A stand-in for the CUDA toolkit and CUTLASS: a script that compiles kernels as C++ and says what ptxas would say."""

from __future__ import annotations

from pathlib import Path

PTXAS = """ptxas info    : Compiling entry function '_Z4tinyv' for 'sm_90a'
ptxas info    : Function properties for _Z4tinyv
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
"""

# Keeps of nvcc's arguments those that a C++ compiler knows. Each compile leaves a line in the file `compiled`.
_NVCC = """#!/bin/sh
here=$(dirname "$0")
case "$*" in
  *--version*) echo "Cuda compilation tools, release 13.0, V$(cat "$here/version")"; exit ;;
  *--dryrun*) echo "#\\$ TOP=$(dirname "$here")/bin/.." >&2; exit ;;
esac
known=
while [ $# -gt 0 ]; do
  case "$1" in
    -MF|-c|-o) [ "$1" != -c ] || echo "$2" >> "$here/compiled"; known="$known $1 $2"; shift ;;
    -MD) known="$known $1" ;;
  esac
  shift
done
cat "$here/says"
c++ -fPIC -x c++ $known
"""


def make_toolkit(home: Path) -> Path:
    """Makes the folder of a toolkit, and returns it."""
    for part in (
        "nvvm/bin/cicc",
        "include/crt/host_config.h",
        "include/cuda_runtime.h",
        "include/cccl/cuda/std/version",
    ):
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).write_text("")
    for part, content in {
        "bin/nvcc": _NVCC,
        "bin/version": "13.0.88",
        "bin/says": PTXAS,
        "bin/compiled": "",
        "lib/libcudart_static.a": "!<arch>\n",  # an archive of nothing
    }.items():
        (home / part).parent.mkdir(parents=True, exist_ok=True)
        (home / part).write_text(content)
    (home / "bin" / "nvcc").chmod(0o755)
    return home


def make_cutlass(path: Path) -> Path:
    """Makes the folder of CUTLASS, and returns it."""
    header = path / "include" / "cutlass" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text("#define CUTLASS_MAJOR 4\n#define CUTLASS_MINOR 2\n#define CUTLASS_PATCH 0\n")
    return path
