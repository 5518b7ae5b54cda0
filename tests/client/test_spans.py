"""Where bodies lie in shared memory, as text; copies of bytes."""

from __future__ import annotations

import pytest

from freestep.wire.spans import Span, copy_bytes


def test_a_span_is_read_as_it_is_written() -> None:
    span = Span.parse("8-4096")
    assert (span, span.length, str(span)) == (Span(8, 4096), 4088, "8-4096")
    assert Span.parse("0-0").length == 0


@pytest.mark.parametrize("text", ["", "-", "1", "1-", "-1", "2-1", "-1-2", "1-2-3", "1 - 2", "0x1-2", "1-9" + 18 * "0"])
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(ValueError):
        Span.parse(text)


@pytest.mark.parametrize("source", [bytes(range(200)), bytearray(range(200)), b""], ids=["read-only", "writable", "no"])
def test_bytes_are_copied(source: bytes | bytearray) -> None:
    target = bytearray(len(source))
    copy_bytes(memoryview(target), memoryview(source))
    assert target == source


@pytest.mark.parametrize("source", [bytes(3), bytearray(3), bytearray()])
def test_as_many_bytes_as_there_is_room_for(source: bytes | bytearray) -> None:
    with pytest.raises(ValueError):
        copy_bytes(memoryview(bytearray(4)), memoryview(source))
