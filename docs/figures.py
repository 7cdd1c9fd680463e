"""Draws the figures of how-it-works.md: run ``python docs/figures.py`` after a change here.

A test fails while a figure differs from what this script would draw.
"""

from pathlib import Path

FOLDER = Path(__file__).parent / "figures"

LINE, PLAIN, HELD, MARK = "#555555", "#e3e7ee", "#7fa8d9", "#e0903a"


class Drawing:
    """Collects shapes and texts, and gives the SVG of them."""

    def __init__(self, width: int, height: int) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="13">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]

    def box(self, x: float, y: float, width: float, height: float, fill: str = PLAIN) -> None:
        """Draws a rectangle whose upper left corner is (x, y)."""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{LINE}"/>'
        )

    def text(self, x: float, y: float, words: str, anchor: str = "middle") -> None:
        """Writes a line of text at (x, y)."""
        self.parts.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#222222">{words}</text>')

    def line(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Draws a dashed line from (x1, y1) to (x2, y2)."""
        self.parts.append(
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{LINE}" stroke-dasharray="4 3"/>'
        )

    def svg(self) -> str:
        """Returns the whole drawing."""
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def chunk() -> str:
    """Returns the figure of the similarity matrix, of which one chunk of rows exists at a time."""
    drawing = Drawing(620, 270)
    drawing.text(150, 22, "all similarities: N x N")
    drawing.box(50, 32, 200, 200)
    drawing.box(50, 92, 200, 40, HELD)
    for position in range(10):
        drawing.box(50 + 20 * position, 32 + 20 * position, 20, 20, MARK)
    drawing.text(40, 117, "chunk", "end")
    drawing.text(150, 252, "orange: the positives, kept out of the weights")
    drawing.line(250, 92, 330, 62)
    drawing.line(250, 132, 330, 102)
    drawing.box(330, 62, 250, 40, HELD)
    drawing.text(455, 87, "e = exp(logit - shift)")
    for line, words in enumerate(
        (
            "1.  logits of the chunk and the sums of its rows",
            "2.  gradient of the rows:  e times the columns",
            "3.  gradient of the columns:  e transposed, times the rows",
            "then the chunk is forgotten, and the next one begins",
        )
    ):
        drawing.text(330, 135 + 24 * line, words, "start")
    return drawing.svg()


def prefixes() -> str:
    """Returns the figure of a Matryoshka similarity, which is a partial sum of the widest one."""
    drawing = Drawing(620, 170)
    widths = (40, 80, 160, 320)
    left = 0
    for position, width in enumerate(widths):
        drawing.box(40 + left, 40, width - left, 36, HELD if position % 2 else PLAIN)
        left = width
    drawing.text(200, 28, "one row times one column: a sum over D numbers")
    for position, width in enumerate(widths):
        bottom = 144 - 16 * position
        drawing.line(40 + width, 76, 40 + width, bottom)
        drawing.text(46 + width, bottom + 4, f"similarity of prefix {position + 1}", "start")
    return drawing.svg()


def packing() -> str:
    """Returns the figure of mini-batches in the order of the rows, and packed by length."""
    lengths = (3, 12, 2, 5, 11, 3, 2, 9, 4, 12, 3, 2)
    drawing = Drawing(620, 260)
    unit, height = 14, 14
    for title, left, groups in (
        ("as the rows come", 30, [lengths[i : i + 3] for i in range(0, 12, 3)]),
        ("sorted by length and packed", 330, [(12, 12, 11), (9, 5, 4, 3), (3, 3, 2, 2, 2)]),
    ):
        drawing.text(left, 24, title, "start")
        top = 36.0
        for group in groups:
            for length in group:
                drawing.box(left, top, unit * max(group), height, "white")
                drawing.box(left, top, unit * length, height, HELD)
                top += height
            top += 10
    drawing.text(30, 250, "blue: tokens; white: padding, which the encoder computes as well", "start")
    return drawing.svg()


FIGURES = {"chunk.svg": chunk, "prefixes.svg": prefixes, "packing.svg": packing}

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / name).write_text(draw(), encoding="utf-8")
