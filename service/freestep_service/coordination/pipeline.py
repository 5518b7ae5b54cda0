"""A few connections to Redis for commands that many give at the same time.

What is asked at the same moment, or while all connections wait for answers, goes out together in one piece: the more
is asked at once the less each costs. A pool's bookkeeping, which costs more than a script's call, is not needed.
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
"""So that an answer that is long in coming holds up only those that were asked for with it."""


class RedisPipeline:
    """Commands over connections of the kind that a pool has; they are made anew when they are lost."""

    def __init__(self, pool: ConnectionPool, timeout_s: float) -> None:
        self._pool = pool
        self._timeout_s = timeout_s
        self._asked: list[tuple[bytes, asyncio.Future[Any]]] = []
        self._idle: list[AbstractConnection] = []
        self._exchanges: set[asyncio.Task[None]] = set()
        self._busy = 0
        """Exchanges that will look once more for what is asked: a task may be done and still among them."""

    async def execute(self, *command: str | int) -> Any:
        """What Redis answers to a command.

        Raises what it refuses with, and ConnectionError, TimeoutError or OSError where it is not known whether the
        command was carried out. Who asks may leave; the command may then still be carried out.
        """
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Its stub takes a tuple of one.
        self._asked.append((hiredis.pack_command(command), answer))  # type: ignore[arg-type]
        if len(self._asked) == 1 and self._busy < _CONNECTIONS:
            self._busy += 1
            exchange = asyncio.create_task(self._exchange())
            self._exchanges.add(exchange)
            exchange.add_done_callback(self._exchanges.discard)
        return await answer

    async def _exchange(self) -> None:
        """Sends what is asked, and goes on while more is."""
        while self._asked:
            asked, self._asked = self._asked, []
            answers = [answer for _, answer in asked]
            connection = self._idle.pop() if self._idle else self._connection()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._see_to(connection)
                    await connection.send_packed_command([packed for packed, _ in asked], check_health=False)
                    for answer in answers:
                        await _take(connection, answer)
            except Exception as error:
                # Whatever it is: nobody may be left waiting.
                await _hang_up(connection)
                _fail(answers, error)
            except asyncio.CancelledError:
                await _hang_up(connection)
                _fail(answers, RedisConnectionError("the connection is being closed"))
                raise
            else:
                self._idle.append(connection)
        self._busy -= 1

    def _connection(self) -> AbstractConnection:
        # It has no timeout of its own, since an exchange has one.
        return self._pool.connection_class(**{**self._pool.connection_kwargs, "socket_timeout": None})

    @staticmethod
    async def _see_to(connection: AbstractConnection) -> None:
        """Connects, again if the other end has closed the connection meanwhile: before anything is sent on it."""
        if connection.is_connected:
            with suppress(RedisError, OSError):
                if not await connection.can_read():
                    return
            await connection.disconnect()
        await connection.connect()  # type: ignore[no-untyped-call]

    async def close(self) -> None:
        """Ends the connections; nothing may be asked any more."""
        for exchange in self._exchanges:
            exchange.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)
        while self._idle:
            await _hang_up(self._idle.pop())


async def _take(connection: AbstractConnection, answer: asyncio.Future[Any]) -> None:
    try:
        told = await connection.read_response()
    except ResponseError as refusal:
        _fail([answer], refusal)
    else:
        if not answer.done():
            answer.set_result(told)


def _fail(answers: list[asyncio.Future[Any]], error: Exception) -> None:
    for answer in answers:
        if not answer.done():
            answer.set_exception(error)
            # Who asked may have left.
            answer.exception()


async def _hang_up(connection: AbstractConnection) -> None:
    with suppress(RedisError, OSError):
        await connection.disconnect(nowait=True)
