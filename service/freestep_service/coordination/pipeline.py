"""Pipelined commands over a few connections to Redis.

Commands that are issued at the same time, or while all connections wait for answers, are sent together, so that each
costs less the more there are. The bookkeeping of a connection pool would cost more than the call of a script.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import hiredis
from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

__all__ = ["RedisPipeline"]

_CONNECTIONS = 4
"""Several, so that a slow answer delays only the commands that were sent with it."""


class RedisPipeline:
    """Sends commands over connections of a pool's kind, and connects again when one is lost."""

    def __init__(self, pool: ConnectionPool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._waiting: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._idle: list[AbstractConnection] = []
        self._exchanges: set[asyncio.Task[None]] = set()
        self._busy = 0
        """Exchanges that will look for more commands. A task that will not may still be in `_exchanges`."""

    async def execute(self, *command: str | int) -> Any:
        """Returns the answer to a command.

        Raises the error that Redis answers with, and ConnectionError, TimeoutError or OSError if it is not known
        whether the command was carried out. A command whose caller is cancelled may still be carried out.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # The stub declares a tuple of one member.
        self._waiting.append((hiredis.pack_command(command), answer))  # type: ignore[arg-type]
        if len(self._waiting) == 1 and self._busy < _CONNECTIONS:
            self._busy += 1
            exchange = asyncio.create_task(self._exchange())
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._exchanges.discard)
        return await answer

    async def _exchange(self) -> None:
        """Sends the commands that wait, and reads their answers, until none waits."""
        while self._waiting:
            sent, self._waiting = self._waiting, []
            answers = [answer for _, answer in sent]
            connection = self._idle.pop() if self._idle else self._connection()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._ensure_connected(connection)
                    await connection.send_packed_command([packed for packed, _ in sent], check_health=False)
                    for answer in answers:
                        await _take(connection, answer)
            except Exception as error:
                # Of any kind: every caller has to get an answer.
                await _disconnect(connection)
                _fail(answers, error)
            except asyncio.CancelledError:
                await _disconnect(connection)
                _fail(answers, RedisConnectionError("the connection is being closed"))
                raise
            else:
                self._idle.append(connection)
        self._busy -= 1

    def _connection(self) -> AbstractConnection:
        # The timeout is that of the whole exchange.
        return self._pool.connection_class(**{**self._pool.connection_kwargs, "socket_timeout": None})

    @staticmethod
    async def _ensure_connected(connection: AbstractConnection) -> None:
        """Connects if the connection is new, or if the other end has closed it since it was last used."""
        if connection.is_connected:
            with suppress(RedisError, OSError):
                if not await connection.can_read():
                    return
            await connection.disconnect()
        await connection.connect()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Closes the connections. No command may be issued any more."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        while self._idle:
            await _disconnect(self._idle.pop())


async def _take(connection: AbstractConnection, answer: asyncio.Future[Any]) -> None:
    try:
        response = await connection.read_response()
    except ResponseError as refusal:
        _fail([answer], refusal)
    else:
        if not answer.done():
            answer.set_result(response)


def _fail(answers: list[asyncio.Future[Any]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(error)
            # Its caller may have been cancelled.
            answer.exception()


async def _disconnect(connection: AbstractConnection) -> None:
    with suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
