"""What the commands show, as tables: rich on a terminal, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from cluster.config import Setting
    from cluster.doctor import Finding

MARKS = {"ok": ("ok", "green"), "note": ("note", "yellow"), "missing": ("MISSING", "bold red")}


def print_rows(rows: Sequence[Sequence[str | Text]], *, console: Console | None = None) -> None:
    """Columns with two spaces between; the last one wraps on a terminal and is never cut."""
    console = Console(soft_wrap=True) if console is None else console
    if console.is_terminal:
        table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
        for _ in rows[0]:
            table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        return
    cells = [[cell.plain if isinstance(cell, Text) else cell for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), markup=False, highlight=False)


def print_findings(findings: Sequence[Finding]) -> None:
    """The doctor's report: a mark, what, what was found, and what to do."""
    rows = []
    for finding in findings:
        mark, style = MARKS[finding.state]
        advice = f" -> {finding.advice}" if finding.advice else ""
        rows.append((Text(mark, style), finding.what, f"{finding.found}{advice}"))
    print_rows(rows)
    num_missing = sum(finding.state == "missing" for finding in findings)
    print(f"\n{num_missing} missing: see above." if num_missing else "\nNothing is missing.")


def print_settings(settings: Sequence[Setting]) -> None:
    """Each setting, its value and where that came from."""
    print_rows([(setting.name, setting.value, setting.origin) for setting in settings])
