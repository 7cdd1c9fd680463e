"""Keeps what a self-check found in the cache folder, in small files.

    <library>-<kind of problem>-<key>.json      it is right: counts for every card of the same name, on every host
    <library>-wrong-<key>-<card>.json           it is wrong: counts for one card of one host, as the card may be broken

The key is made of the name of the device, its driver, torch, Triton, the package, the kernels and the check. A file is
read only where nobody else can have written it (:mod:`sbert_kernels.native.trust`), and only for the same. It appears
at once and whole, so that several ranks may write it at a time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
import tempfile
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import torch

from ...logs import log_once
from ...machine import version
from ...native import trust
from ...native.library import cache_directory
from .._backend import Backend
from ..triton import installed_version

logger = logging.getLogger(__name__)

_DRIVER = Path("/proc/driver/nvidia/version")
_KIND = re.compile(r"(?P<operation>[a-z]+)-(?P<dtype>bfloat16|float(16|32|64))-(?P<size>\d+)")  # in the name of a file


@dataclass(frozen=True)
class Kind:
    """A kind of problem, which is checked by itself.

    Attributes:
        operation: The operation.
        dtype: The type of the products or of the inputs.
        size: What kernels are compiled for: see `cases.size_of`.
    """

    operation: str
    dtype: torch.dtype
    size: int

    def __str__(self) -> str:
        size = f"of {self.size} pairs" if self.operation == "ranking" else f"of width {self.size}"
        return f"{self.operation} in {self.name} {size}"

    @property
    def name(self) -> str:
        """The type's name."""
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Outcome:
    """What a check found, and when.

    Attributes:
        wrong: What the kernels compute wrongly, and by how much; None if they are right.
        since: Date and time of the check, ISO 8601 in UTC.
    """

    wrong: str | None
    since: str

    @classmethod
    def now(cls, wrong: str | None) -> Outcome:
        """Returns an outcome of this moment."""
        return cls(wrong, datetime.now(timezone.utc).isoformat(timespec="seconds"))


class Records:
    """The outcomes that are kept of one library on devices like this one."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend, self.facts, self.card = backend, facts(backend, device), card(device)
        self.key = _short_hash(self.facts)
        self.folder: Path | None = None
        try:
            # Links are followed once, here: what is checked is then what is opened.
            folder = Path(os.path.realpath(cache_directory())) / "self-check"
            reason = trust.distrust(folder)
            if reason is None:
                self.folder = folder
            else:
                self._not_kept(f"the cache cannot be trusted: {reason}")
        except (OSError, RuntimeError) as error:  # no home
            self._not_kept(str(error))

    def path(self, kind: Kind) -> Path | None:
        """Returns the file that says that a kind of problem is right; None if nothing can be kept."""
        name = f"{self.backend.name}-{kind.operation}-{kind.name}-{kind.size}-{self.key}.json"
        return None if self.folder is None else self.folder / name

    @property
    def fault_path(self) -> Path | None:
        """The file that says that the library is wrong on this card; None if nothing can be kept."""
        name = f"{self.backend.name}-wrong-{self.key}-{_short_hash(self.card)}.json"
        return None if self.folder is None else self.folder / name

    def right(self, kind: Kind) -> Outcome | None:
        """Returns what is kept of a kind of problem that is right, or None: nothing that can be read and trusted."""
        outcome = self._read(self.path(kind), {"facts": self.facts})
        return outcome if outcome is not None and outcome.wrong is None else None

    def fault(self) -> Outcome | None:
        """Returns what is kept of a fault on this card, or None: nothing that can be read and trusted."""
        outcome = self._read(self.fault_path, {"facts": self.facts, "card": self.card})
        return outcome if outcome is not None and outcome.wrong is not None else None

    def kinds(self) -> list[Kind]:
        """Returns the kinds of problems for which there are files that say that they are right."""
        begin, end, found = f"{self.backend.name}-", f"-{self.key}.json", []
        for path in [] if self.folder is None else self.folder.glob(f"{begin}*{end}"):
            name = _KIND.fullmatch(path.name.removeprefix(begin).removesuffix(end))
            if name is not None:
                found.append(Kind(name["operation"], getattr(torch, name["dtype"]), int(name["size"])))
        return sorted(found, key=lambda kind: (kind.operation, kind.name, kind.size))

    def write(self, kind: Kind, outcome: Outcome) -> None:
        """Keeps an outcome, if it can be kept; one line in the log says why not."""
        path = self.path(kind) if outcome.wrong is None else self.fault_path
        if path is None:
            return
        of_card = {} if outcome.wrong is None else {"card": self.card}
        text = json.dumps({"facts": self.facts, **of_card, **asdict(outcome)}, indent=1)
        try:
            trust.make_folder(path.parent)
            reason = trust.distrust(path.parent)  # somebody else may have been faster
            if reason is not None:
                self._not_kept(f"the cache cannot be trusted: {reason}")
                return
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                file.write(text)
            try:
                os.replace(file.name, path)
            except OSError:
                os.unlink(file.name)
                raise
        except OSError as error:
            self._not_kept(str(error))

    def _read(self, path: Path | None, of: dict[str, dict[str, str]]) -> Outcome | None:
        """Returns what a file says, or None: there is none, it is not trusted, or it is about something else."""
        if path is None or not path.exists():
            return None
        reason = trust.distrust(path)
        if reason is not None:
            self._not_kept(f"the cache cannot be trusted: {reason}")
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if any(found[name] != wanted for name, wanted in of.items()):
                return None
            wrong, since = found["wrong"], found["since"]
            datetime.fromisoformat(since)
            return Outcome(wrong, since) if wrong is None or isinstance(wrong, str) else None
        except (OSError, ValueError, KeyError, TypeError):  # cut off, or written by something else: checked again
            return None

    def _not_kept(self, reason: str) -> None:
        log_once(
            logger,
            f"What the self-check of the {self.backend.name} kernels finds is not kept, so that each process checks "
            f"again: {reason}; SBERT_KERNELS_CACHE names another folder.",
        )


def facts(backend: Backend, device: torch.device) -> dict[str, str]:
    """Returns all that a right outcome depends on; another device of the same name shares it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = torch.cuda.get_device_name(device)
        architecture = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
        architecture = architecture or ".".join(map(str, torch.cuda.get_device_capability(device)))
    else:  # in Triton's interpreter
        name, architecture = device.type, platform.machine()
    return {
        "device": name,
        "architecture": architecture,
        "driver": _driver() if device.type == "cuda" else "none",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}",
        "triton": str(installed_version()),
        "sbert-kernels": str(version("sbert-kernels")),
        "kernels": _hash(backend.kernel_files()),
        "check": _hash(tuple(sorted(Path(__file__).parent.glob("*.py")))),
    }


def card(device: torch.device) -> dict[str, str]:
    """Returns what tells a device from all others: its host, and its UUID, or its number where it has none."""
    properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {"host": platform.node(), "device": str(getattr(properties, "uuid", device))}


def _short_hash(facts: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _driver() -> str:
    """Returns the version of NVIDIA's driver, or of the CUDA that it supports; "unknown" where neither is told."""
    try:
        found = re.search(r"\b\d+\.\d+(\.\d+)?\b", _DRIVER.read_text())
        if found:
            return found.group()
    except OSError:
        pass
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return f"CUDA {ask()}" if ask else "unknown"


def _hash(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        digest.update(f"{file.name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:16]
