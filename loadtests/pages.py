"""`python -m loadtests.pages FOLDER`: makes FOLDER/README.md from the benches' JSON files that lie there."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests.report import show

HEAD = """# Measurements

Made from the JSON files beside it by `make measurements`; each file is what a bench wrote with `--json`. A ratio is
value / baseline, both from the same run. A dash was not measured, and the last column says why.
"""


def page(files: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page of all files, by name, as Markdown."""
    parts = [HEAD]
    for name, rows in sorted(files.items()):
        parts.append(f"\n## {name}\n\n{rows[0]['machine']}; commit {rows[0]['commit']}.\n\n")
        parts.append(
            "| case | metric | value | unit | baseline | ratio | beside, or why not |\n|---|---|--:|---|--:|--:|---|\n"
        )
        for row in rows:
            figures = (show(row["value"]), row["unit"], show(row["baseline"]), show(row["ratio"]))
            samples = f"n = {row['num_samples']}" if "num_samples" in row else ""
            words = "; ".join(filter(None, (samples, row.get("reason") or row.get("note"))))
            parts.append(f"| {row['case']} | {row['metric']} | {' | '.join(figures)} | {words} |\n")
    return "".join(parts)


def read(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The rows of each JSON file in `folder`."""
    return {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}


def main() -> None:
    folder = Path(sys.argv[1])
    (folder / "README.md").write_text(page(read(folder)))


if __name__ == "__main__":
    main()
