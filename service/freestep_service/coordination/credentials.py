"""The password of a Redis, of a file that is read for each connection: so it can be replaced while a service runs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from redis.credentials import CredentialProvider
from redis.exceptions import ConnectionError as RedisConnectionError

__all__ = ["FilePassword", "password_in", "without_user"]


class FilePassword(CredentialProvider):
    """Says a user and the password that a file has just then."""

    def __init__(self, user: str, file: Path) -> None:
        self._user = user
        self._file = file

    def get_credentials(self) -> tuple[str] | tuple[str, str]:
        """Raises ConnectionError of redis where the file cannot be read: others would leave a connection half open."""
        try:
            password = password_in(self._file)
        except (OSError, UnicodeDecodeError) as error:
            raise RedisConnectionError(f"the password of Redis cannot be read: {error}") from error
        return (self._user, password) if self._user else (password,)

    async def get_credentials_async(self) -> tuple[str] | tuple[str, str]:
        return self.get_credentials()


def password_in(file: Path) -> str:
    """The password in a file, without the line end behind it. Raises OSError, UnicodeDecodeError."""
    return file.read_text().rstrip("\r\n")


def without_user(url: str) -> tuple[str, str]:
    """A URL of Redis without the user that it names, and that user, or an empty one."""
    parts = urlsplit(url)
    options = parse_qsl(parts.query, keep_blank_values=True)
    user = unquote(parts.username or "") or dict(options).get("username", "")
    rest = urlencode([(name, value) for name, value in options if name != "username"])
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query=rest)
    return bare.geturl(), user
