"""What an OpenID Connect issuer publishes: its configuration (OpenID Connect Discovery, section 4), and its keys."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any
from urllib.parse import urlsplit

import httpx

from freestep.errors import IssuerUnavailable
from freestep_service.settings import Settings, is_safe, shown

__all__ = ["IssuerDocuments", "issuer_client"]

_TIMEOUT_S = 5.0
_LARGEST = 1024**2
_CONFIGURATION = "/.well-known/openid-configuration"


def issuer_client(trusted: Any) -> httpx.AsyncClient:
    """The HTTP client of IssuerDocuments."""
    return httpx.AsyncClient(timeout=_TIMEOUT_S, verify=trusted)


class IssuerDocuments:
    """Reads the documents of the issuer that the settings name."""

    def __init__(self, http: httpx.AsyncClient, settings: Settings) -> None:
        self._http = http
        self._issuer = settings.oidc_issuer or ""
        self._jwks_url = settings.oidc_jwks_url
        self._token_file = settings.oidc_token_file

    async def keys(self) -> dict[str, Any]:
        """The issuer's JSON Web Key Set. Raises IssuerUnavailable."""
        return await self._read(self._jwks_url or await self._keys_url())

    async def _keys_url(self) -> str:
        document = await self._read(self._issuer.rstrip("/") + _CONFIGURATION)
        url = document.get("jwks_uri")
        if document.get("issuer") != self._issuer:
            raise IssuerUnavailable(f"the issuer at {shown(self._issuer)} says that it is another one")
        if not isinstance(url, str) or not is_safe(url):
            raise IssuerUnavailable(f"the issuer {shown(self._issuer)} names no https URL of its keys")
        return url

    async def _read(self, url: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                document = json.loads(await self._content(url))
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RecursionError) as error:
            cause = str(error) or type(error).__name__
            raise IssuerUnavailable(f"{shown(url)} cannot be read: {cause}") from error
        if not isinstance(document, dict):
            raise IssuerUnavailable(f"{shown(url)} is no JSON object")
        return document

    async def _content(self, url: str) -> bytes:
        headers = {"Accept": "application/json, application/jwk-set+json", "Accept-Encoding": "identity"}
        if self._token_file is not None and _origin(url) == _origin(self._jwks_url or self._issuer):
            # Read for each request: Kubernetes replaces it.
            token = (await asyncio.to_thread(self._token_file.read_text)).strip()
            if not re.fullmatch("[!-~]+", token):
                raise ValueError("there is no token in oidc_token_file")
            headers["Authorization"] = f"Bearer {token}"
        async with self._http.stream("GET", url, headers=headers) as answer:
            if not answer.is_success:
                # httpx's own error quotes the URL, and what its query may hold.
                raise ValueError(f"it was answered with {answer.status_code}")
            content = b""
            async for chunk in answer.aiter_raw():
                content += chunk
                if len(content) > _LARGEST:
                    raise ValueError(f"it is longer than {_LARGEST} bytes")
            return content


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.lower()
