from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from cluster.control.worker_folders import socket_folder


def test_the_sockets_folder_is_private_short_and_removed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with socket_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert len(str(folder)) < 90
        (folder / "worker.sock").touch()
    assert not folder.exists()
