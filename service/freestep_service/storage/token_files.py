"""Tokens in storage, beside the checkpoints, so that none is lost with Redis and no revoked one comes back.

tokens/ID.json       a token: what it allows, and the SHA-256 of its text
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict

from freestep_service.domain.tokens import Token
from freestep_service.storage.checksummed import Damaged, read_document, write_document
from freestep_service.storage.medium import Storage

__all__ = ["TokenFiles"]

logger = logging.getLogger("freestep")

_FOLDER = "tokens"


class TokenFiles:
    """The tokens in a storage. Its methods block, and raise StorageUnavailable."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def read(self) -> list[Token]:
        """All tokens, revoked ones among them; a damaged file is logged, and lets nobody in.

        Raises NewerFormat where a newer version has written one, which may be revoked.
        """
        ids = [name.removesuffix(".json") for name in self._storage.names(_FOLDER) if name.endswith(".json")]
        return [token for token_id in ids if (token := self._read(token_id)) is not None]

    def _read(self, token_id: str) -> Token | None:
        path = f"{_FOLDER}/{token_id}.json"
        try:
            token = Token.from_json(json.dumps(read_document(self._storage, path)))
            if token.id == token_id:
                return token
            logger.error("%s holds another token", path)
        except FileNotFoundError:
            # It has expired, and another process was faster.
            pass
        except (Damaged, ValueError) as error:
            logger.error("%s holds no token: %s", path, error)
        return None

    def write(self, token: Token) -> None:
        """Writes a token, in place of an older state of it."""
        write_document(self._storage, f"{_FOLDER}/{token.id}.json", asdict(token))

    def remove(self, token_id: str) -> None:
        """Removes a token that has expired."""
        self._storage.remove(f"{_FOLDER}/{token_id}.json")
