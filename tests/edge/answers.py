"""Answers of the service as they stand on a connection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPResponse
from typing import Any

__all__ = ["Answer"]


@dataclass(frozen=True)
class Answer:
    """An answer: its status, its headers by lower-case name, and its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def read(cls, response: HTTPResponse) -> Answer:
        """The answer whose head was parsed."""
        headers = {name.lower(): value for name, value in response.getheaders()}
        return cls(response.status, headers, response.read())

    @property
    def document(self) -> Any:
        return json.loads(self.body)

    @property
    def slug(self) -> str:
        """The end of a problem's type."""
        assert self.headers["content-type"] == "application/problem+json", self
        return str(self.document["type"]).rpartition(":")[2]
