from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from cluster.control.last_known import NAME, Known, open_last_known
from cluster.errors import ConfigError
from cluster.protocol import Lead
from tests.support.full_disk import full_disk
from tests.support.worker_records import RECORD

KNOWN = Known(Lead(epoch=3, controller_id="x"), {"expert-0": RECORD}, msgspec.Raw(b'{"nodes":[]}'))


def test_the_next_one_reads_what_was_written_last_until_it_is_forgotten(tmp_path: Path) -> None:
    with open_last_known(tmp_path) as first:
        assert first.read() is None
        first.write(msgspec.structs.replace(KNOWN, workers={}))
        first.write(KNOWN)
    with open_last_known(tmp_path) as second:
        found = second.read()
        assert found is not None
        assert (found.lead, found.workers, bytes(found.placement)) == (KNOWN.lead, KNOWN.workers, b'{"nodes":[]}')
        second.forget()
        assert second.read() is None
        second.write(KNOWN)
        assert second.read() is not None


def test_two_never_have_one_folder(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="another controller runs with the folder")
    with open_last_known(tmp_path), refused, open_last_known(tmp_path, timeout_s=0.1):
        pytest.fail("its lock is held")
    with open_last_known(tmp_path, timeout_s=0.0):
        pass


@pytest.mark.parametrize("value", [b"", b"{", b"\xff", b'{"lead": 3}'])
def test_a_file_that_cannot_be_read_is_nothing(tmp_path: Path, value: bytes) -> None:
    (tmp_path / NAME).write_bytes(value)
    with open_last_known(tmp_path) as known:
        assert known.read() is None


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write to the folder") as caught, open_last_known(tmp_path / "none"):
        pass
    assert caught.value.param == "folder"


def test_a_disk_that_takes_nothing_is_no_fault(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open_last_known(tmp_path) as known:
        with full_disk():
            known.write(KNOWN)
        assert known.read() is None
    assert "cannot be written" in caplog.text
