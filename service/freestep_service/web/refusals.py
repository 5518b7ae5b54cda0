"""Answers that no application gives, as bytes: each is the last of its connection."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

__all__ = ["encoded"]


def encoded(answer: Response, more: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
    """An answer with `more` headers, and that the connection ends with it."""
    headers = [*more, *answer.raw_headers, (b"connection", b"close")]
    lines = [b"%b: %b\r\n" % header for header in headers]
    return b"".join([STATUS_LINE[answer.status_code], *lines, b"\r\n", answer.body])
