"""Points so large that their front is sent while the rest is still being copied: of one step, whoever else reads."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

import httpx
import pytest
import safetensors.torch
import torch

from freestep.wire.receiver import MEDIA_TYPE
from freestep_service.optimizers.kernels.points import STRETCH
from freestep_service.state.views import Copying
from harness import OWN_HEAD
from meanwhile import at_once
from plain_calls import SGD, Api
from raw_pushes import connected

NUMEL = 2 * STRETCH + 7
ONES = safetensors.torch.save({"w": torch.ones(NUMEL)})


@pytest.fixture
def large(api: Api) -> Iterator[Api]:
    """A run that starts from 0 and counts its pushes down."""
    spec = {"optimizer": SGD, "parameters": [{"name": "w", "shape": [NUMEL]}], "durability": "none"}
    assert api.http.put(api.path(), json={"aggregation": {"policy": "async"}, **spec}).status_code == 201
    zeros = safetensors.torch.save({"w": torch.zeros(NUMEL)})
    answer = api.http.put(api.path("/parameters"), content=zeros, headers={"Content-Type": MEDIA_TYPE})
    assert answer.status_code == 201
    yield api
    api.http.delete(api.path())


def assert_of_its_step(answer: httpx.Response) -> int:
    assert answer.status_code == 200
    step = int(answer.headers["Freestep-Step"])
    (tensor,) = safetensors.torch.load(answer.content).values()
    assert torch.equal(tensor, torch.full_like(tensor, -step))
    return step


def test_they_are_of_the_steps_that_they_name_while_others_push_and_leave(large: Api) -> None:
    def push(worker: str, dtype: str) -> int:
        lease, step = large.lease(worker), 0
        for turn in range(8):
            headers = large.headers(lease, 0, f"{worker}-{turn}", Prefer="return=representation")
            step = assert_of_its_step(
                large.http.post(large.path("/gradients"), params={"dtype": dtype}, content=ONES, headers=headers)
            )
        return step

    def pull() -> int:
        for dtype in ("F32", "BF16", "F16") * 4:
            for point in "xyz":
                params = {"point": point, "dtype": dtype}
                assert_of_its_step(large.http.get(large.path("/parameters"), params=params))
        return 0

    def leave() -> int:
        """Asks for points, and goes when their first bytes have come."""
        for _ in range(20):
            with connected(str(large.http.base_url)) as connection:
                target = f"{large.path('/parameters')}?point=x&dtype=BF16"
                connection.sendall(f"GET {target} HTTP/1.1\r\n{OWN_HEAD}\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        return 0

    pushing = [partial(push, f"worker-{dtype}", dtype) for dtype in ("F32", "BF16", "F16")]
    assert max(at_once(*pushing, pull, leave)) == 24


@pytest.mark.parametrize("dtype", ["F32", "BF16", "I8"])
def test_any_range_of_them_is_theirs(large: Api, dtype: str) -> None:
    url, params = large.path("/parameters"), {"point": "x", "dtype": dtype}
    large.push(large.lease(), 0, body=ONES)
    whole = large.http.get(url, params=params).content
    size = len(whole)
    for begin, end in ((0, 10), (5, size), (300, size - 1), (size // 2, size), (size - 1_000_000, size - 10), (1, 2)):
        answer = large.http.get(url, params=params, headers={"Range": f"bytes={begin}-{end - 1}"})
        assert (answer.status_code, answer.content) == (206, whole[begin:end])


def test_a_copy_is_waited_for_as_far_as_it_is_wanted() -> None:
    async def work() -> None:
        copying = Copying()
        front, rest = (asyncio.create_task(copying.reach(size)) for size in (10, 20))
        await asyncio.to_thread(copying.note, 10)
        await front
        assert not rest.done()
        await asyncio.to_thread(copying.note, 20)
        await rest
        copying.end(None)
        await copying.reach(20)
        failed = Copying()
        waiting = asyncio.create_task(failed.reach(1))
        await asyncio.sleep(0)
        failed.end(MemoryError("no more"))
        with pytest.raises(MemoryError):
            await waiting
        with pytest.raises(MemoryError):
            await failed.reach(1)

    asyncio.run(asyncio.wait_for(work(), 30))
