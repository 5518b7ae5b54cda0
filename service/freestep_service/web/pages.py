"""The dashboard's files, as they are sent: read once, with headers that let them do little.

No page of the dashboard runs a script that is not a file of this service, loads anything from elsewhere, is shown in a
frame, or makes markup of a text: browsers that know trusted types refuse it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import PurePosixPath

from starlette.requests import Request
from starlette.responses import Response

from freestep_service.web.responses import not_modified

__all__ = ["INDEX", "Pages"]

INDEX = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    "": "text/plain; charset=utf-8",
}
"""Media types by the ending of a file's name."""
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    # Asked for again each time, so that a page and its modules are of one version; the answer is mostly 304.
    "Cache-Control": "no-cache",
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    headers: dict[str, str]


class Pages:
    """The files of the dashboard, by their paths below its folder."""

    def __init__(self) -> None:
        self._files = dict(_read(files("freestep_service.web").joinpath("dashboard"), ""))

    def answer(self, request: Request, path: str) -> Response | None:
        """A file as the answer to a request; None if there is no such file."""
        found = self._files.get(path)
        if found is None:
            return None
        return not_modified(request, found.headers) or Response(found.content, headers=found.headers)


def _read(folder: Traversable, prefix: str) -> list[tuple[str, _File]]:
    read: list[tuple[str, _File]] = []
    for each in folder.iterdir():
        path = prefix + each.name
        if each.is_dir():
            read += _read(each, f"{path}/")
            continue
        content = each.read_bytes()
        ending = PurePosixPath(path).suffix
        tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        read.append((path, _File(content, {**_HEADERS, "Content-Type": _TYPES[ending], "ETag": tag})))
    return read
