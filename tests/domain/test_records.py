"""Claims and records: what is the same when a key comes again, and what is kept of a push."""

from __future__ import annotations

from dataclasses import replace

import pytest

from freestep_service.domain.records import (
    CheckpointId,
    Claim,
    LogPosition,
    LogTruncated,
    Receipts,
    Record,
    UrlInUse,
)

RECORD = Record("lease 1 0 None", {"0-10": "a", "10-25": "b"}, "accumulated", 4, 1, seq=9, live=2, worker="w", epoch=1)


def test_a_record_is_read_as_it_was_written() -> None:
    assert Record.from_json(RECORD.to_json()) == RECORD
    assert Record.from_json(replace(RECORD, reason="stale", norm="0.5").to_json()).reason == "stale"


def test_a_digest_is_known_of_the_parts_that_were_pushed() -> None:
    assert (RECORD.digest_of(0, 10), RECORD.digest_of(10, 25)) == ("a", "b")
    assert [RECORD.digest_of(*part) for part in [(0, 25), (0, 5), (5, 10)]] == [None] * 3
    assert replace(RECORD, digests={}).digest_of(0, 10) is None


def test_digests_of_an_older_version_are_not_comparable() -> None:
    text = (
        '{"claim": "lease 1 0 None", "digests": {"0": "a", "1": "b"}, "decision": "applied", "step": 1, '
        '"staleness": 0, "seq": 1, "live": 1, "worker": "w", "epoch": 1, "norm": "1.5"}'
    )
    record = Record.from_json(text)
    assert record.digests == {"0": "a", "1": "b"}
    assert (record.digest_of(0, 10), record.digest_of(0, 1)) == (None, None)


@pytest.mark.parametrize(
    ("decision", "reached", "settled"),
    [
        ("accumulated", 4, ("accumulated", 4)),
        ("accumulated", 5, ("applied", 5)),
        ("accumulated", 9, ("applied", 5)),
        ("applied", 9, ("applied", 4)),
        ("dropped", 9, ("dropped", 4)),
    ],
)
def test_an_accumulated_push_is_applied_with_its_update(decision: str, reached: int, settled: tuple[str, int]) -> None:
    record = replace(RECORD, decision=decision).settled(reached)
    assert (record.decision, record.step) == settled


def test_a_receipt_says_what_was_decided() -> None:
    receipt = replace(RECORD, decision="dropped", reason="stale").receipt(replayed=True)
    assert receipt.model_dump() == {
        "decision": "dropped", "reason": "stale", "step": 4, "staleness": 1, "replayed": True,
    }  # fmt: skip


def test_a_claim_is_known_by_what_may_not_change() -> None:
    claim = Claim("lease", 5, 7, "key", samples=2.0, loss=0.5, speed=3.0)
    assert claim.fingerprint() == "lease 5 7 2.0"
    assert replace(claim, loss=0.7, speed=None).fingerprint() == claim.fingerprint()
    for changed in ({"lease": "other"}, {"token": 6}, {"step": 8}, {"samples": None}):
        assert replace(claim, **changed).fingerprint() != claim.fingerprint()  # type: ignore[arg-type]


def test_receipts_are_those_that_redis_keeps() -> None:
    receipts, dropped = Receipts(), replace(RECORD, seq=0)
    receipts.remember("a", RECORD, [])
    receipts.remember("b", dropped, [])
    receipts.remember("c", replace(RECORD, seq=10), ["a", "unknown"])
    assert list(receipts) == ["b", "c"]
    assert receipts.until(9) == {"b": dropped}
    receipts.forget(["b"])
    assert list(receipts) == ["c"]


def test_positions_and_checkpoints_sort_by_age() -> None:
    assert LogPosition(1, 9) < LogPosition(2, 0) < LogPosition(2, 1)
    assert CheckpointId(1, 5, 9) < CheckpointId(2, 0, 0)
    assert str(CheckpointId(1, 5, 9)) == "1-5-9"


def test_exceptions_say_what_is_to_be_done() -> None:
    assert str(LogTruncated(LogPosition(1, 99), 300)) == "the log has entries from 300 on, and entry 100 is needed"
    assert LogTruncated(LogPosition(1, 99), 300).first_seq == 300
    assert str(UrlInUse("http://a:1", "here", "there")).startswith(
        "http://a:1 is the URL of a service on the host there already, and this one runs on here: set advertise_url"
    )
