"""What compiling the C++ library and compiling the CUDA library have in common: compiler, ninja, log, whole files."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Begins a script for a Python that compiles or loads a library. Python would import from the current folder (the empty
# entry), which may be anybody's.
IN_PYTHON = "import sys; sys.path[:] = filter(None, sys.path)\n"


class BuildError(Exception):
    """A library could not be compiled; the message is one line that says why."""


def compiler() -> list[str]:
    """Returns the words of the C++ compiler's command: ``CXX`` may name a launcher before it, and flags after it.

    Raises:
        ValueError: CXX is blank, or has a quote without its partner.
    """
    command = os.environ.get("CXX")
    if sys.platform == "win32":  # a path there has backslashes and spaces, and torch compiles with cl in any case
        return [command or "cl"]
    words = shlex.split(command) if command else ["c++"]
    if not words:
        raise ValueError("CXX is blank")
    return words


def why_not_compile() -> str | None:
    """Returns what is missing to compile C++ against torch with, as one clause, or None."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    try:
        program = compiler()[0]
    except ValueError:
        return f"CXX={os.environ['CXX']!r} is not a command"
    if shutil.which(program) is None:
        return f"there is no C++ compiler ({program!r} is not found; CXX names another)"
    if shutil.which("ninja", path=environment()["PATH"]) is None:
        return "there is no ninja (pip install ninja)"
    return None


def environment() -> dict[str, str]:
    """Returns the environment to compile in, with ninja on its PATH, where pip need not have put it."""
    path = [os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)]
    try:
        import ninja

        # "" where the package does not know; an empty entry would be the current folder.
        path += filter(None, [ninja.BIN_DIR])
    except ImportError:
        pass
    return {**os.environ, "PATH": os.pathsep.join(path)}


def run(commands: Sequence[Sequence[str]], log: Path, variables: Mapping[str, str], timeout_s: float) -> None:
    """Runs commands one after the other, with all that they say in the file ``log``.

    Raises:
        BuildError: one of them fails, or takes longer than ``timeout_s``.
    """
    log.unlink(missing_ok=True)  # never through a link
    with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w") as output:
        for command in commands:
            try:
                done = subprocess.run(
                    command,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=variables,
                    timeout=timeout_s,
                )
            except subprocess.TimeoutExpired:
                raise BuildError(f"the compiler took longer than {timeout_s:.0f} s") from None
            if done.returncode != 0:
                raise BuildError(reason_in(log))


def put_in_place(built: Path, library: Path) -> None:
    """Gives a library its name at once and whole, whatever happens to the machine; nobody else may write it."""
    with built.open("rb+") as file:
        os.fsync(file.fileno())
    built.chmod(0o755)  # whatever the umask
    os.replace(built, library)


def reason_in(log: Path) -> str:
    """Returns the line of a build log that says most: the compiler's first error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    error = next((line for line in lines if re.search(r"\berror( \w+)?:|\bfatal\s+:|: not found$", line)), None)
    return first_line(error or (lines[-1] if lines else "the compiler said nothing"))


def first_line(text: str) -> str:
    """Returns the first line of a message without its full stop, to be part of another one."""
    return text.strip().split("\n", 1)[0].rstrip(".")
