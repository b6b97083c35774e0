"""What the commands print with: rich, imported when the first table is made."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from weightlift.visible import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 200


def console() -> Console:
    """A console on standard output. Into a pipe or a file lines are not cut to 80 columns."""
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process itself
            raise BrokenPipeError

    made = Quiet(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def table(*columns: str) -> Table:
    """A plain table: no lines, a bold head. A column whose name begins with ``>`` is aligned to the right."""
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        right = column.startswith(">")
        made.add_column(
            Text(column.removeprefix(">")), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return made


def add(to: Table, *cells: object) -> None:
    """Add a row; brackets in a key are not markup, and nothing in it is obeyed by the terminal."""
    from rich.text import Text

    to.add_row(*(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in cells))


def shape_text(shape: tuple[int, ...]) -> str:
    """``(2, 3)`` → ``2×3``, as in a plan."""
    return "×".join(map(str, shape)) if shape else "scalar"


_STYLES = {
    "loaded": "green",
    "tied": "cyan",
    "initialised": "yellow",
    "kept": "dim",
    "missing": "red",
    "mismatched": "red",
    "unexpected": "red",
    "refused,": "bold red",
    "-": "red",
}


def print_plan(to: Console, text: str) -> None:
    """Print ``str(plan)``; on a terminal each line has the colour of what it says. Nothing is cut or wrapped."""
    from rich.text import Text

    for line in text.split("\n"):
        words = line.split(maxsplit=1)
        style = _STYLES.get(words[0], "") if words else ""
        to.print(Text(line, style=style), soft_wrap=True)
