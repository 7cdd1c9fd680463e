"""``python -m sbert_kernels info | demo | bench``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m sbert_kernels", description=__doc__)
    parser.add_argument("--version", action="version", version=f"sbert-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="info | demo | bench")

    info = commands.add_parser("info", help="versions, device, and which backend serves which operation, and why")
    info.set_defaults(run=_info)

    from . import demo

    trainer = commands.add_parser("demo", help="train a real model on real text, stock losses beside the fused ones")
    demo.add_arguments(trainer)
    trainer.set_defaults(run=demo.run)

    bench = commands.add_parser("bench", help="parity, time and memory of an operation against its peers")
    metavar = "contrastive | ranking | objective | accuracy | training | gradcache | aot | gpu"
    subjects = bench.add_subparsers(dest="subject", required=True, metavar=metavar)
    from .benchmarks import accuracy, aot_report, contrastive, gpu, gradcache, objective, ranking, training

    for module, text in (
        (contrastive, "the in-batch-negatives losses, from embeddings to gradients"),
        (ranking, "the ranking losses CoSENT and AnglE, from embeddings to gradients"),
        (objective, "AnglE's whole objective on a model, against the sum of three stock losses"),
        (accuracy, "errors of the contrastive loss and its gradients in every number format"),
        (training, "whole training steps of a static-embedding model, and what they are made of"),
        (gradcache, "a step of a transformer through the gradient cache, stock's engine and ours"),
        (aot_report, "what the compiler makes of the Triton kernels for each kind of GPU, without one"),
        (gpu, "the Triton kernels on one GPU: parity, time, memory, peers and targets"),
    ):
        subject = subjects.add_parser(module.__name__.rpartition(".")[2].removesuffix("_report"), help=text)
        module.add_arguments(subject)
        subject.set_defaults(run=module.run)

    arguments = parser.parse_args(argv)
    return arguments.run(arguments) or 0


def _info(_: argparse.Namespace) -> int:
    import torch

    from . import backends, extension, settings
    from .benchmarks.harness import machine

    print(f"sbert-kernels {__version__}")
    for key, value in machine().items():
        print(f"  {key}: {value}")
    print(f"  compiled CPU kernels: {extension.describe()}")
    if extension.load() is None:
        print(f"  their instruction set: {torch.ops.sbert_kernels.cpu_instruction_set()}")
        print(f"  their matmul precisions: {_cpu_precisions()}")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"  the GPU's compute capability: {'.'.join(map(str, torch.cuda.get_device_capability()))}")
    print("\noperations")
    for device in devices:
        for operation in backends.OPERATIONS:
            _print_choice(operation, device, "" if len(devices) == 1 else f" on {device}")
    print("\nsettings")
    for name, variable in settings.VARIABLES.items():
        print(f"  {variable.environment} = {settings.get(name)}: {variable.meaning}")
    return 0


def _cpu_precisions() -> str:
    """The ways in which the compiled kernels can multiply here, and why no others."""
    from .backends.cpu.contrastive import MatmulPrecision, bfloat16_instructions, why_not_precision

    there = ", ".join(precision.name.lower() for precision in MatmulPrecision if why_not_precision(precision) is None)
    instructions = bfloat16_instructions()
    return f"{there} (by {instructions})" if instructions else f"{there}; {why_not_precision(MatmulPrecision.BFLOAT16)}"


def _print_choice(operation: str, device: str, where: str) -> None:
    """Which backend serves an operation on a device, and of each other one, what keeps it from doing so."""
    from . import backends

    try:
        choice = backends.choose(operation, device=device)
    except ValueError as error:  # the environment asks for one that can't
        print(f"  {operation}{where}: none ({error})")
        return
    print(f"  {operation}{where}: {choice.backend.name} ({choice.reason})")
    for other in backends.BACKENDS:
        if other is choice.backend:
            continue
        only = "" if other.automatic else "; only when asked for"
        reason = backends.why_not(other, operation, None, device=device)
        obstacle = "" if reason is None else f"; not here: {reason}"
        print(f"    else {other.name}: {other.summary}{only}{obstacle}")


if __name__ == "__main__":
    sys.exit(main())
