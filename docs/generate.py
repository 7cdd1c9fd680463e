"""Writes docs/settings.md from sbert_kernels.settings: run ``python docs/generate.py`` after a change there.

A test fails while the page differs from what this script would write.
"""

from pathlib import Path

from sbert_kernels.settings import VARIABLES, Variable

PAGE = Path(__file__).with_name("settings.md")

BEFORE = """<!-- Written by docs/generate.py from src/sbert_kernels/settings.py: change it there. -->

# Settings

All settings are environment variables. They are read at each call, so a script can change its mind between two steps.
A value that cannot be read raises an error that names the variable, where the setting is needed; one line in the log
names a variable that is misspelt.

| variable | default | meaning |
|---|---|---|
"""

AFTER = """
One more is read when the package is built: `SBERT_KERNELS_BUILD=1` makes `pip install` fail where it cannot compile the
CPU kernels, `0` never compiles them then; see [On a CPU](cpu.md#where-the-compiled-kernels-come-from), and
[Packaging](packaging.md) for the CUDA kernels.

## For a block of code

`sbert_kernels.use_backend("name")` overrides the backend within a `with` block, in the current thread or task:

```python
import sbert_kernels

with sbert_kernels.use_backend("reference"):  # eager torch, the definition that everything else is tested against
    loss = loss_fn(features, labels)
```

`python -m sbert_kernels info` prints the settings that are in force, and which backend serves which operation, and why.
"""


def row(variable: Variable) -> str:
    """Returns the table's row of one variable."""
    default = {None: "unset", True: "`1`", False: "`0`"}.get(variable.default, f"`{variable.default}`")
    meaning = variable.meaning.replace("|", "\\|")
    former = getattr(variable, "former", None)
    if former:
        meaning += f" Its former name `{former}` is read for one more version."
    return f"| `{variable.environment}` | {default} | {meaning} |\n"


def settings_page() -> str:
    """Returns the text of settings.md."""
    return BEFORE + "".join(map(row, VARIABLES.values())) + AFTER


if __name__ == "__main__":
    PAGE.write_text(settings_page(), encoding="utf-8")
