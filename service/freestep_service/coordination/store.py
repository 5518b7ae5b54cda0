"""The connection to Redis, a single server or a cluster, and the scripts that change its data."""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.credentials import CredentialProvider
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    ClusterError,
    MovedError,
    NoPermissionError,
    NoScriptError,
    RedisClusterException,
    RedisError,
    ResponseError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from freestep.errors import CoordinatorUnavailable
from freestep_service.coordination.credentials import FilePassword, without_user
from freestep_service.coordination.pipeline import RedisPipeline
from freestep_service.domain.layout import LAYOUT, NewerLayout

__all__ = ["LAYOUT_KEY", "Evicts", "Loading", "Store", "Unusable", "scripts"]

logger = logging.getLogger("freestep")

_LUA = files("freestep_service.coordination") / "lua"
LAYOUT_KEY = "{freestep:nodes}:layout"
"""Holds the layout of the processes on this Redis, see lua/node_heartbeat.lua; it belongs to no run."""
_INCLUDES = re.compile("^-- INCLUDES (.+)$", re.MULTILINE)
"""Names scripts that a script calls: each becomes a function of its arguments before it."""
_NEWER = "NEWERLAYOUT "
"""What the refusal of a script begins with that finds a newer layout, which it ends with."""
_TIMEOUT_S = 5.0
_CONNECTIONS = 32
_PROBE, _PROBE_MS = "freestep:writable", 1000
"""A key that shows that Redis takes writes, and the ms after which it is gone; it belongs to no run."""


class Evicts(Exception):
    """Redis removes keys when its memory is full: receipts, say, so that pushes would count twice."""

    def __init__(self, policy: str) -> None:
        super().__init__(
            "removes keys when its memory is full, and pushes would then count twice: "
            f"set its maxmemory-policy to noeviction, it is {policy}"
        )
        self.policy = policy


class Unusable(Exception):
    """A server answers, and a service cannot work with it; the message says why, and what to do."""


class Loading(Unusable):
    """A server answers that it reads its data, and takes nothing before it has."""


class Store:
    """A Redis-protocol server. Its methods raise CoordinatorUnavailable when they cannot reach it."""

    def __init__(
        self,
        client: Redis | RedisCluster,
        url: str,
        pipeline: RedisPipeline | None,
        credentials: CredentialProvider | None = None,
    ) -> None:
        self.client: Any = client
        self.on_answer: Callable[[str, float], None] = lambda script, seconds: None
        """Told how long each script took to be answered ..."""
        self.on_failure: Callable[[], None] = lambda: None
        """... and of each that was not, or was refused."""
        self._url = url
        self._credentials = credentials
        self._execute = client.execute_command if pipeline is None else pipeline.execute
        self._pipeline = pipeline
        self._scripts = {
            name: (hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest(), source)
            for name, source in scripts().items()
        }

    @classmethod
    async def connect(cls, url: str, password_file: Path | None = None) -> Store:
        """Connects to a server by its URL; recognizes a server in cluster mode.

        password_file: has the password, which the URL then has not. Raises CoordinatorUnavailable, Unusable, Evicts,
        NewerLayout, and ValueError for a URL that is not one of Redis.
        """
        credentials = None
        if password_file is not None:
            url, user = without_user(url)
            credentials = FilePassword(user, password_file)
        options: dict[str, Any] = {
            "credential_provider": credentials,
            "decode_responses": True,
            "socket_timeout": _TIMEOUT_S,
            "socket_connect_timeout": _TIMEOUT_S,
            # A command whose answer was lost may have been carried out, so callers decide whether to send it again.
            "retry": Retry(NoBackoff(), 0),
        }
        pool = BlockingConnectionPool.from_url(url, max_connections=_CONNECTIONS, timeout=_TIMEOUT_S, **options)
        client = Redis.from_pool(pool)
        store = cls(client, url, RedisPipeline(pool, _TIMEOUT_S), credentials)
        try:
            with reachable():
                mode = await _mode(client)
                if mode == "sentinel":
                    raise Unusable(
                        "it is a Sentinel, which keeps nothing: name the server that it watches, by the address of a "
                        "proxy or a virtual address that follows its primary"
                    )
                if mode == "cluster":
                    await store.close()
                    cluster = RedisCluster.from_url(url, max_connections=10 * _CONNECTIONS, **options)
                    store = cls(cluster, url, None, credentials)
            await store.require_permanence()
            # Before anything is written.
            await store.require_layout()
            await store.require_writable()
        except NewerLayout:
            await store.close()
            raise
        except CoordinatorUnavailable as error:
            await store.close()
            if (advice := _advice(error.__cause__)) is None:
                raise
            kind = Loading if isinstance(error.__cause__, BusyLoadingError) else Unusable
            raise kind(f"{advice}: {error.__cause__}") from error
        except BaseException:
            await store.close()
            raise
        return store

    async def run(self, script: str, keys: Sequence[str], *arguments: str | int) -> Any:
        """Runs a script of lua/, by the name of its file, and returns its answer."""
        digest, source = self._scripts[script]
        began = monotonic()
        try:
            with reachable():
                try:
                    answer = await self._execute("EVALSHA", digest, len(keys), *keys, *arguments)
                except NoScriptError:
                    answer = await self._execute("EVAL", source, len(keys), *keys, *arguments)
        except CoordinatorUnavailable:
            self.on_failure()
            raise
        self.on_answer(script, monotonic() - began)
        return answer

    def listener(self) -> Redis:
        """A client of its own for channels: any one server of a cluster passes on what is published on the others.

        The next one is of another server, where there is one: the first may be lost while the cluster lives.
        """
        url = self._url
        if isinstance(self.client, RedisCluster) and (servers := self.client.get_primaries()):
            server = secrets.choice(servers)
            url = _url_at(url, server.host, int(server.port))
        return Redis.from_url(
            url,
            credential_provider=self._credentials,
            decode_responses=True,
            socket_connect_timeout=_TIMEOUT_S,
            # A connection that was lost may have lost messages, so its user has to notice.
            retry=Retry(NoBackoff(), 0),
            **({} if self._url.startswith("unix:") else {"socket_keepalive": True}),
        )

    async def require_layout(self) -> None:
        """Raises NewerLayout where processes of a newer version have used this Redis, and CoordinatorUnavailable."""
        with reachable():
            found = await self.client.get(LAYOUT_KEY)
        if found is not None and found.isdecimal() and int(found) > LAYOUT:
            raise NewerLayout(int(found))

    async def require_writable(self) -> None:
        """Raises CoordinatorUnavailable, also where Redis refuses writes: as a replica, say, or for want of memory."""
        with reachable():
            await self.client.set(_PROBE, "", px=_PROBE_MS)

    async def require_permanence(self) -> None:
        """Raises Evicts if a server that has keys removes some when its memory is full, and CoordinatorUnavailable.

        Logs it where a server does not say.
        """
        if None in (policies := await self.eviction_policies()):
            logger.warning("Redis does not say what it does when its memory is full: it has to be noeviction")
        if evicting := [policy for policy in policies if policy not in (None, "noeviction")]:
            raise Evicts(str(evicting[0]))

    async def eviction_policies(self) -> list[str | None]:
        """What each server that has keys does when its memory is full; None where it does not say.

        Raises CoordinatorUnavailable.
        """
        with reachable():
            try:
                if self._pipeline is not None:
                    found = [await self.client.info("memory")]
                else:
                    answers = await self.client.info("memory", target_nodes=RedisCluster.PRIMARIES)
                    # Of a single one it is the answer itself.
                    found = list(answers.values()) if isinstance(next(iter(answers.values())), dict) else [answers]
            except NoPermissionError:
                return [None]
        return [each.get("maxmemory_policy") for each in found]

    async def close(self) -> None:
        if self._pipeline is not None:
            await self._pipeline.close()
        await self.client.aclose()


def scripts() -> dict[str, str]:
    """The text of each script of lua/, by the name of its file, behind the prelude and the scripts that it includes."""
    texts = {
        entry.name.removesuffix(".lua"): entry.read_text() for entry in _LUA.iterdir() if entry.name.endswith(".lua")
    }
    prelude = f"local LAYOUT = {LAYOUT}\n" + texts.pop("_prelude")

    def whole(text: str) -> str:
        included = _INCLUDES.search(text)
        names = included[1].split(", ") if included is not None else ()
        return "".join(f"local function {name}(ARGV)\n{texts[name]}end\n" for name in names) + text

    return {name: prelude + whole(text) for name, text in texts.items()}


def _url_at(url: str, host: str, port: int) -> str:
    """A URL of another server, with the same user, password and options."""
    parts = urlsplit(url)
    who, at, _ = parts.netloc.rpartition("@")
    place = f"[{host}]" if ":" in host else host
    return parts._replace(netloc=f"{who}{at}{place}:{port}").geturl()


async def _mode(client: Any) -> str:
    """Whether a server is `standalone`, a node of a `cluster` or a `sentinel`."""
    # Not of INFO, which a user who may not administrate the server is often denied.
    answer = await client.execute_command("HELLO")
    facts = answer if isinstance(answer, dict) else dict(zip(answer[::2], answer[1::2], strict=True))
    return str(facts["mode"])


def _advice(error: BaseException | None) -> str | None:
    """What to do about an answer of a server at the start; None where there was none."""
    match error:
        case AuthenticationError() | AuthorizationError():
            return (
                "name its user and password in redis_url, as redis://USER:PASSWORD@HOST:PORT, or the password in "
                "redis_password_file"
            )
        case NoPermissionError():
            return "allow its user what is missing, with ACL SETUSER"
        case BusyLoadingError():
            return "start the service again when it has loaded its data"
        case RedisClusterException():
            return "complete the cluster"
        case RedisConnectionError() | RedisTimeoutError():
            return None
        case RedisError() if str(error).startswith("DENIED"):
            return (
                "it is in protected mode: set a password and name it in redis_url, or bind it to a private network and "
                "set protected-mode to no"
            )
        case RedisError():
            return "it refuses what a service needs"
    return None


_ANSWERS = (AuthenticationError, AuthorizationError, BusyLoadingError)
"""Errors of a connection that are answers of the server."""


class reachable:
    """Turns errors of a connection, and those that Redis answers with, into CoordinatorUnavailable.

    A class, since a generator would be a thirtieth of a call.
    """

    __slots__ = ()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, _ANSWERS):
            raise CoordinatorUnavailable(f"Redis refuses connections: {error}") from error
        if isinstance(error, RedisClusterException):
            raise CoordinatorUnavailable(f"the Redis Cluster cannot be used: {error}") from error
        if isinstance(error, ClusterError) and not isinstance(error, ResponseError):
            raise CoordinatorUnavailable(
                f"the Redis Cluster cannot be used, as while a slot is moved: {error}"
            ) from error
        if isinstance(error, MovedError):
            raise CoordinatorUnavailable(
                f"Redis has become part of a cluster, start the service again: MOVED {error}"
            ) from error
        if isinstance(error, RedisConnectionError | RedisTimeoutError | OSError):
            raise CoordinatorUnavailable(f"Redis does not answer: {type(error).__name__}") from error
        if isinstance(error, RedisError):
            if str(error).startswith(_NEWER):
                raise NewerLayout(int(str(error).removeprefix(_NEWER))) from error
            raise CoordinatorUnavailable(f"Redis refused a command: {error}") from error
