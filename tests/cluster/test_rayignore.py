"""What `ray job submit --working-dir .` would send, by Ray's own packaging code."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_BYTES = 50 * 2**20


@pytest.fixture(scope="module")
def sent() -> set[Path]:
    packaging = pytest.importorskip("ray._private.runtime_env.packaging")
    found: set[Path] = set()
    excludes = packaging.get_excludes_from_ignore_files(ROOT, include_gitignore=True, logger=logging.getLogger())
    packaging._dir_travel(
        ROOT,
        excludes,
        lambda path: found.add(path.relative_to(ROOT)),
        include_gitignore=True,
        logger=logging.getLogger(),
    )
    return {path for path in found if (ROOT / path).is_file()}


@pytest.mark.needs("ray")
def test_the_upload_is_small(sent: set[Path]) -> None:
    assert sum((ROOT / path).stat().st_size for path in sent) < MAX_BYTES


@pytest.mark.needs("ray", "demo")
def test_the_upload_has_what_a_job_runs(sent: set[Path]) -> None:
    needed = [
        "cluster/cli.py",
        "workers/server.py",
        "workers/demo/model/model.safetensors",
        "cuda/host/abi.h",
        "configs/cluster/local.yaml",
    ]
    assert {Path(name) for name in needed} <= sent


@pytest.mark.needs("ray")
def test_the_upload_has_nothing_else(sent: set[Path]) -> None:
    assert not {path.parts[0] for path in sent} & {".git", ".venv", "docs", "helm", "tests", "build", "dist"}
    assert not [path for path in sent if "__pycache__" in path.parts or path.suffix == ".pyc"]
