"""A client whose answers are lost, as where the connection breaks once the service has done what it was asked."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from freestep import Client
from freestep.bulk import BulkTransport

__all__ = ["LosingClient"]


class LosingClient(Client):
    """A client of a service, which loses the next answer to each request that `loses` names by method and path's end.

    lost: what is called when an answer is lost.
    """

    def __init__(self, url: str, *, retry_for: float = 60.0, lost: Callable[[], object] = lambda: None) -> None:
        self.loses: list[tuple[str, str]] = []
        self.lost = lost
        super().__init__(http=httpx.Client(base_url=url, transport=_Losing(self)), retry_for=retry_for)


class _Losing(httpx.BaseTransport):
    def __init__(self, client: LosingClient) -> None:
        self._client = client
        self._inner = BulkTransport()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        response = self._inner.handle_request(request)
        for method, end in self._client.loses:
            if request.method == method and request.url.path.endswith(end):
                self._client.loses.remove((method, end))
                response.read()
                response.close()
                self._client.lost()
                raise httpx.ReadError("the connection was reset", request=request)
        return response

    def close(self) -> None:
        self._inner.close()
