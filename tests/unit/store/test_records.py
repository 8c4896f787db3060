from __future__ import annotations

import logging

import msgspec
import pytest

from cluster.protocol import Lead
from cluster.store.records import MAX_EPOCH, MAX_STORED_EPOCH, ClusterStatus, Reader, decode_epoch, decode_lead
from tests.support.worker_records import RECORD

GARBAGE = [b"", b"\xff\x00", b"{", b"[]", b"null", b'{"x":' + b"[" * 100_000, b"9" * 5000]
decode = msgspec.json.Decoder(Lead).decode


@pytest.mark.parametrize("value", GARBAGE, ids=lambda value: repr(value[:8]))
def test_any_bytes_are_read_or_passed_over(value: bytes) -> None:
    assert Reader().read("a/b", value, decode) is None
    if not value.isdigit():
        assert Reader().read("a/b", value, int) is None


def test_a_value_that_cannot_be_read_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader()
    good = msgspec.json.encode(Lead(epoch=1, controller_id="x"))
    told = []
    with caplog.at_level(logging.WARNING):
        for key, value in [("a/b", b"{"), ("a/b", b"{"), ("a/c", b"{"), ("a/b", b"["), ("a/b", good), ("a/b", b"[")]:
            before = len(caplog.records)
            reader.read(key, value, decode)
            told.append(len(caplog.records) - before)
    assert told == [1, 0, 1, 1, 0, 1]
    assert "the store's a/b cannot be read and is passed over" in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "is_read"),
    [
        ("workers/expert-0", msgspec.json.encode(RECORD), True),
        ("workers/expert-1", msgspec.json.encode(RECORD), False),
        ("workers/x", msgspec.json.encode(msgspec.structs.replace(RECORD, name="x")), False),
        ("workers/expert-0", msgspec.json.encode(msgspec.structs.replace(RECORD, role="attention")), False),
        *(("workers/expert-0", value, False) for value in GARBAGE),
    ],
)
def test_a_record_is_read_where_it_is_its_names_own(key: str, value: bytes, is_read: bool) -> None:
    assert Reader().read_worker(key, value) == (RECORD if is_read else None)


@pytest.mark.parametrize("epoch", [-1, MAX_EPOCH + 1])
def test_an_epoch_out_of_range_is_none(epoch: int) -> None:
    with pytest.raises(ValueError, match="an epoch is a number from 0 to"):
        decode_epoch(str(epoch).encode())
    with pytest.raises(ValueError, match="an epoch is a number from 0 to"):
        decode_lead(msgspec.json.encode(Lead(epoch=epoch, controller_id="x")))
    assert decode_epoch(str(MAX_STORED_EPOCH).encode()) == MAX_STORED_EPOCH


def test_whoever_leads_above_the_highest_stored_epoch_can_be_read() -> None:
    """A number that somebody put there must not leave the next one with a lead that nobody understands."""
    with pytest.raises(ValueError, match="an epoch is a number from 0 to"):
        decode_epoch(b"%d" % (MAX_STORED_EPOCH + 1))
    lead = Lead(epoch=MAX_STORED_EPOCH + 1, controller_id="x")
    assert decode_lead(msgspec.json.encode(lead)) == lead


def test_what_an_older_release_wrote_of_a_status_is_read() -> None:
    """Fields that came later have defaults."""
    old = {
        "cluster": "c",
        "model": "m",
        "epoch": 1,
        "controller_id": "x",
        "at_s": 1.0,
        "num_layers": 2,
        "num_experts": 4,
    }
    assert msgspec.json.decode(msgspec.json.encode(old), type=ClusterStatus).failures == ()
