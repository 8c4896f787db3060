"""What a bench says: one table for people, and with `--json FILE` one JSON array of rows for programs."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cluster.environment import PACKAGES
from cluster.machine import this_machine

GIT_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure. `value` None: it was not measured, and `reason` says why; a count of 0 may have one too. Shares and
    ratios are fractions.

    `baseline` is the same figure of what it is compared with; `note` names that and its settings. `num_samples` is of
    how many a percentile was taken. `goal` is for the table only.
    """

    bench: str
    case: str
    metric: str
    unit: str
    value: float | None = None
    baseline: float | None = None
    reason: str = ""
    note: str = ""
    goal: str = ""
    num_samples: int | None = None

    def __post_init__(self) -> None:
        assert bool(self.reason) == (self.value is None) or self.value == 0, "a row has a value, or a reason for none"

    @property
    def ratio(self) -> float | None:
        """value / baseline; None where either is missing, or the baseline is zero."""
        return None if self.value is None or not self.baseline else self.value / self.baseline


@cache
def machine() -> str:
    """The processor, its cores and memory, and torch's version, in one line."""
    here = this_machine()
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = "not installed"
    cores = f"{here.num_usable_cores} core" + "s" * (here.num_usable_cores != 1)
    return f"{here.processor} ({here.isa}), {cores}, {here.memory_bytes / 2**30:.0f} GiB, torch {torch}"


@cache
def commit() -> str:
    """The commit of the checkout that this runs from, `-dirty` where files changed; elsewhere the installed version."""
    if Path(_git("rev-parse", "--show-toplevel")) == PACKAGES and (
        found := _git("describe", "--always", "--dirty", "--exclude=*", "--abbrev=12")
    ):
        return found
    try:
        return importlib.metadata.version("foretoken")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(*arguments: str) -> str:
    command = ("git", "-C", os.fspath(PACKAGES), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def as_json(row: Row) -> dict[str, Any]:
    """A row as it stands in the file."""
    written: dict[str, Any] = {
        "bench": row.bench,
        "case": row.case,
        "metric": row.metric,
        "value": row.value,
        "unit": row.unit,
        "baseline": row.baseline,
        "ratio": row.ratio,
        "machine": machine(),
        "commit": commit(),
    }
    if row.num_samples is not None:
        written["num_samples"] = row.num_samples
    return written | {name: text for name, text in (("reason", row.reason), ("note", row.note)) if text}


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Write one JSON array; a reader sees the old file or the new one, never a half."""
    text = msgspec.json.format(msgspec.json.encode([as_json(row) for row in rows]), indent=1)
    part = path.with_name(path.name + ".part")
    part.write_bytes(text + b"\n")
    part.replace(path)


def show(value: float | None) -> str:
    """A number in three to four significant digits, without an exponent where people would write none."""
    if value is None:
        return "–"
    if value == 0 or not math.isfinite(value):
        return str(value)
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 9)}f}"


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """All rows as one table, then the machine, and by case what the figures stand beside or why there is none."""
    console = console or Console(soft_wrap=True)
    if not console.is_terminal:  # a file or a pipe has room
        console.width = max(console.width, 140)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    has_samples = any(row.num_samples is not None for row in rows)
    for column in ("case", "metric", "value", "unit", *["n"] * has_samples, "baseline", "ratio", "goal"):
        is_number = column in ("value", "n", "baseline", "ratio", "goal")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for row in rows:
        samples = ["" if row.num_samples is None else str(row.num_samples)] * has_samples
        cells = (show(row.value), row.unit, *samples, show(row.baseline), show(row.ratio), row.goal)
        table.add_row(row.case, row.metric, *cells, style="dim" if row.reason else None)
    console.print(table)
    for row in rows:
        if text := row.reason or row.note:
            console.print(f"{row.case} {row.metric}: {text}", style="dim", markup=False, highlight=False)
    console.print(f"machine: {machine()}; commit: {commit()}", style="dim", markup=False, highlight=False)
