"""What scripts in docs/ write is what stands there, and no relative link of a page leads nowhere."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDERS = ("src", "csrc", "tests", "docs", "examples", "benchmarks", ".ci")
PAGES = [*ROOT.glob("*.md"), *(ROOT / "examples").glob("*.md"), *DOCS.rglob("*.md")]


def test_settings_page_is_what_the_settings_say() -> None:
    wanted = runpy.run_path(str(DOCS / "generate.py"))["settings_page"]()
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == wanted, "stale: run python docs/generate.py"


def test_figures_are_what_their_script_draws() -> None:
    figures = runpy.run_path(str(DOCS / "figures.py"))["FIGURES"]
    drawn = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "figures").glob("*.svg")}
    assert drawn == {name: draw() for name, draw in figures.items()}, "stale: run python docs/figures.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)", text)
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_paths_in_the_recipes_exist() -> None:
    text = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    quoted = re.findall(r"`([\w./]+(?:\.\w+|/))`", text)
    named = [path for path in quoted if "/" in path or path.endswith((".py", ".h"))]
    # A path may leave out the folders that its sentence has named before.
    there = {f"/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in (ROOT / folder).rglob("*")}
    there |= {f"/{folder}" for folder in FOLDERS} | {f"/{path.name}" for path in ROOT.iterdir()}
    assert len(named) > 40
    assert [name for name in named if not any(path.endswith("/" + name.rstrip("/")) for path in there)] == []


def test_readme_fits() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
