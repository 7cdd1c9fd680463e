"""What importing the package costs and gives."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import sbert_kernels


def test_import_loads_neither_torch_nor_triton_nor_sentence_transformers() -> None:
    code = (
        "import sys, sbert_kernels\n"
        "print([m for m in ('torch', 'triton', 'sentence_transformers', 'transformers') if m in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"


def test_the_operation_needs_no_sentence_transformers() -> None:
    code = "import sys, sbert_kernels; sbert_kernels.contrastive_loss; print('sentence_transformers' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "False"


def test_public_names_resolve() -> None:
    for name in sbert_kernels.__all__:
        assert getattr(sbert_kernels, name) is not None
    assert set(sbert_kernels.__all__) <= set(dir(sbert_kernels))


def test_the_name_of_patch_is_the_function_whatever_was_imported_first() -> None:
    code = "import sbert_kernels.patching, sbert_kernels; print(callable(sbert_kernels.patch))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "True"


# -- which module imports which ---------------------------------------------------------------------------------------

SOURCES = Path(sbert_kernels.__file__).parent
# What each floor of the library may import of the others. Data flows losses -> ops -> problems -> backends.
FLOORS = {
    "problems": set(),
    "backends": {"problems"},
    "ops": {"problems", "backends"},
    "gradcache": {"problems", "backends", "ops"},
    "losses": {"problems", "backends", "ops", "gradcache"},
}
COMMANDS = {"demo", "bench", "workloads"}  # nothing of the library imports them


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCES.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports() -> dict[str, set[str]]:
    """The modules of the package that each of them imports: anywhere in the file, for type checkers too."""
    files = {module_name(path): path for path in SOURCES.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        targets = found[name] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
                base = ".".join([*parents, *([node.module] if node.module else [])])
                targets |= {full if (full := f"{base}.{alias.name}") in files else base for alias in node.names}
        targets &= set(files)
        targets.discard(name)
    return found


def part_of(module: str) -> str:
    """The folder or file right below the package that a module belongs to."""
    return module.split(".")[1] if "." in module else ""


def test_imports_are_seen_whatever_they_look_like() -> None:
    found = imports()
    assert "sbert_kernels.losses" in found["sbert_kernels"]  # for type checkers only
    assert "sbert_kernels.machine" in found["sbert_kernels.__main__"]  # relative, in a function
    assert "sbert_kernels.workloads.models" in found["sbert_kernels.demo.comparison"]


def test_lower_floors_import_no_higher_ones() -> None:
    wrong = [
        (name, target)
        for name, targets in imports().items()
        for target in targets
        if part_of(name) in FLOORS
        and part_of(target) in FLOORS
        and part_of(target) not in FLOORS[part_of(name)] | {part_of(name)}
    ]
    assert wrong == []


def test_nothing_imports_demo_and_bench_and_they_do_not_import_each_other() -> None:
    allowed = {"demo": {"demo", "workloads"}, "bench": {"bench", "workloads"}, "workloads": {"workloads"}}
    wrong = [
        (name, target)
        for name, targets in imports().items()
        for target in targets
        if name != "sbert_kernels.__main__" and part_of(target) in COMMANDS - allowed.get(part_of(name), set())
    ]
    assert wrong == []


def test_no_module_imports_itself_through_others() -> None:
    graph = imports()
    finished: set[str] = set()

    def circle_from(name: str, path: tuple[str, ...]) -> tuple[str, ...] | None:
        if name in path:
            return (*path[path.index(name) :], name)
        if name in finished:
            return None
        for target in sorted(graph[name]):
            if (circle := circle_from(target, (*path, name))) is not None:
                return circle
        finished.add(name)
        return None

    circles = {circle for name in sorted(graph) if (circle := circle_from(name, ())) is not None}
    assert not circles


def test_help_imports_no_torch() -> None:
    code = """
import contextlib, io, sys
from sbert_kernels.__main__ import main
commands = (["--help"], ["bench", "--help"], ["demo", "--help"], ["bench", "contrastive", "--cases", "unknown"])
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main(command)
print([name for name in ("torch", "numpy", "matplotlib", "sentence_transformers") if name in sys.modules])
"""
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
