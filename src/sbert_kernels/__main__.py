"""``python -m sbert_kernels info | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import __version__, demo
from .bench import command as bench

if TYPE_CHECKING:  # it imports torch
    from .backends import Backend


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status. Arguments are parsed before torch is imported."""
    parser = argparse.ArgumentParser(prog="python -m sbert_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"sbert-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | bench")

    info = commands.add_parser("info", help="versions, device, and which backend serves which operation, and why")
    info.set_defaults(run=_info)

    trainer = commands.add_parser("demo", help="train a real model on real text, stock losses beside the fused ones")
    demo.add_arguments(trainer)
    trainer.set_defaults(run=demo.run)

    measure = commands.add_parser("bench", help="parity, time and memory of an operation against its peers")
    bench.add_arguments(measure)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments) or 0


def _info(_: argparse.Namespace) -> int:
    """Prints the facts about this machine, the backends of each operation, and the settings."""
    import torch

    from . import backends, machine, native, settings

    print(f"sbert-kernels {__version__}")
    for key, value in machine.facts().items():
        print(f"  {key}: {value}")
    for backend in backends.BACKENDS:
        try:
            library = backend.library()
        except ValueError as error:  # a setting that cannot be read
            library = f"none ({error})"
        if library is not None:
            print(f"  compiled {backend.name.upper()} kernels: {library}")
        if backend.name == "cpu" and native.cpu.load() is None:
            print(f"    their instruction set: {torch.ops.sbert_kernels.cpu_instruction_set()}")
            print(f"    their matmul precisions: {_cpu_precisions()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"  the GPU's compute capability: {'.'.join(map(str, torch.cuda.get_device_capability()))}")
    print("\noperations")
    for device in devices:
        for operation in backends.OPERATIONS:
            _print_choice(operation, device, "" if len(devices) == 1 else f" on {device}")
    if torch.cuda.is_available():
        print("\nself-check of the kernels on the GPU")
        for backend in backends.BACKENDS:
            if backend.self_checked is not None:
                print(f"  {backend.name}: {_self_check(backend)}")
    print("\nsettings")
    for name, variable in settings.VARIABLES.items():
        try:
            value = settings.get(name)
        except ValueError as error:  # the reason why somebody looks here
            value = f"({error})"
        print(f"  {variable.environment} = {value}: {variable.meaning}")
    return 0


def _self_check(backend: Backend) -> str:
    """Returns what the self-check has found of a backend on the GPU, or why it does not serve there anyhow."""
    import torch

    from .backends import self_check

    return backend.why_not_on("cuda", False) or self_check.state(backend, torch.device("cuda"))


def _cpu_precisions() -> str:
    """Returns the ways in which the compiled kernels can multiply on this CPU, and why there are no others."""
    from .backends.cpu.contrastive import MatmulPrecision, bfloat16_instructions, why_not_precision

    there = ", ".join(precision.name.lower() for precision in MatmulPrecision if why_not_precision(precision) is None)
    instructions = bfloat16_instructions()
    return f"{there} (by {instructions})" if instructions else f"{there}; {why_not_precision(MatmulPrecision.BFLOAT16)}"


def _print_choice(operation: str, device: str, where: str) -> None:
    """Prints which backend serves an operation on a device, and for each other one why it does not."""
    from . import backends

    try:
        choice = backends.choose(operation, device=device)
    except ValueError as error:  # the environment asks for one that can't
        print(f"  {operation}{where}: none ({error})")
        return
    print(f"  {operation}{where}: {choice.backend.name} ({choice.reason})")
    for other in backends.BACKENDS:
        if other is choice.backend or operation not in other.has_kernels_for:
            continue
        only = "" if other.automatic else "; only when asked for"
        reason = backends.why_not(other, operation, None, device=device)
        obstacle = "" if reason is None else f"; not here: {reason}"
        print(f"    else {other.name}: {other.summary}{only}{obstacle}")


if __name__ == "__main__":
    sys.exit(main())
