from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.numerics import KERNELS_DIR


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, with the kernels that all share."""
    KERNELS_DIR.mkdir(parents=True, exist_ok=True)
    (tmp_path / "kernels").symlink_to(KERNELS_DIR)
    monkeypatch.setenv("FORETOKEN_HOME", str(tmp_path))
    return tmp_path
