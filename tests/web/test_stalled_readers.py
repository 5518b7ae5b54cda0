"""Readers that stall and wake get no bytes of anything else, and cost one line of the log."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from freestep.wire.receiver import MEDIA_TYPE
from harness import OWN_HEAD, ThreadService
from meanwhile import wait_until
from plain_calls import SGD, Api
from raw_pushes import connected

NUMEL = 8 * 1024 * 1024


@pytest.fixture(params=["http", "https"])
def api(
    request: pytest.FixtureRequest, start_service: Callable[..., ThreadService], tls: dict[str, Path]
) -> Iterator[Api]:
    """A run that counts its pushes down, of a service that soon gives up readers that stall."""
    service = start_service(stall_seconds=2.0, **(tls if request.param == "https" else {}))
    made = Api(service.url, trusted=service.trusted)
    spec = {"optimizer": SGD, "parameters": [{"name": "w", "shape": [NUMEL]}], "durability": "none"}
    assert made.http.put(made.path(), json={"aggregation": {"policy": "async"}, **spec}).status_code == 201
    zeros = safetensors.torch.save({"w": torch.zeros(NUMEL)})
    headers = {"Content-Type": MEDIA_TYPE}
    assert made.http.put(made.path("/parameters"), content=zeros, headers=headers).status_code == 201
    yield made
    made.http.close()


@pytest.mark.parametrize("query", ["point=y", "point=y&dtype=BF16", "point=x"])
def test_a_reader_that_wakes_has_read_its_point_and_nothing_else(
    api: Api, query: str, caplog: pytest.LogCaptureFixture
) -> None:
    def aborted() -> list[logging.LogRecord]:
        return [each for each in caplog.records if "aborted" in each.getMessage()]

    ones, lease = safetensors.torch.save({"w": torch.ones(NUMEL)}), api.lease()
    with connected(api.url, api.trusted) as connection:  # type: ignore[arg-type]
        connection.sendall(f"GET {api.path('/parameters')}?{query} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
        received = connection.recv(1000)
        wait_until(lambda: len(aborted()) == 1)
        # What was its point is used again, for other steps.
        for step in range(3):
            assert api.push(lease, step, body=ones).json()["step"] == step + 1
            api.pull("x", dtype="BF16"), api.pull("y")
        try:
            while more := connection.recv(1024 * 1024):
                received += more
        except OSError:
            # The end of an aborted connection.
            pass
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"\r\nfreestep-step: 0\r\n" in head
    assert 0 < len(body) < (2 if "BF16" in query else 4) * NUMEL
    # All elements of step 0 are 0.
    assert not body[8 + int.from_bytes(body[:8], "little") :].strip(b"\0")
    (record,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert record.exc_info is None
