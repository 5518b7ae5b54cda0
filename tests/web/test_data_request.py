"""What a request of the data path is about: the run of its path, the shard and the point of its query."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from asgi_calls import request_of
from freestep.api.models import RunSpec
from freestep.errors import MalformedRequest, MalformedTensors, RunNotFound, ShardUnavailable
from freestep.wire.manifest import Manifest
from freestep_service.settings import Settings
from freestep_service.web.routes.data_request import DataRequest


def manifest(*names: str) -> Manifest:
    parameters = [{"name": name, "shape": [2]} for name in names]
    return Manifest.of(RunSpec.model_validate({"optimizer": {"algorithm": "sgd"}, "parameters": parameters}))


def parsed(query: str, *, shards: int = 1, name: str = "run", names: tuple[str, ...] = ("w",)) -> DataRequest:
    """What a request to a run is about."""
    run = SimpleNamespace(name="run", count=shards, manifest=manifest(*names))

    async def find(name: str) -> Any:
        if name != run.name:
            raise RunNotFound
        return run

    context = SimpleNamespace(registry=SimpleNamespace(find=find), settings=Settings(), relay=None)
    app = SimpleNamespace(state=SimpleNamespace(context=context))
    request = request_of("GET", f"/v1/runs/{name}/parameters?{query}", app=app, path_params={"run": name})
    return asyncio.run(DataRequest.of(request))


def test_what_is_absent_has_its_default() -> None:
    about = parsed("")
    assert (about.shard, about.point, about.dtype, about.min_step, about.cut) == (0, "x", "F32", 0, "")
    assert about.checkpoint is None


def test_all_of_it() -> None:
    about = parsed("shard=1&of=2&point=y&dtype=BF16&min_step=12&cut=word", shards=2)
    assert (about.shard, about.point, about.dtype, about.min_step, about.cut) == (1, "y", "BF16", 12, "word")
    assert parsed("checkpoint=0").checkpoint == 0
    assert parsed(f"checkpoint={10**18 - 1}").checkpoint == 10**18 - 1


def test_a_run_of_several_shards_may_be_meant_as_a_whole() -> None:
    assert parsed("", shards=2).shard is None
    assert parsed("of=2", shards=2).shard is None


@pytest.mark.parametrize("shards", [1, 3])
def test_a_sender_that_supposes_another_number_of_shards(shards: int) -> None:
    with pytest.raises(ShardUnavailable) as refused:
        parsed("shard=0&of=2", shards=shards)
    assert refused.value.extensions["shards"] == shards


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("shard=2", "shard"),
        ("shard=-1", "shard"),
        ("shard=one", "shard"),
        ("shard=", "shard"),
        ("of=0", "of"),
        ("of=257", "of"),
        ("point=w", "point"),
        ("point=X", "point"),
        ("dtype=F64", "dtype"),
        ("dtype=I8", "dtype"),
        ("min_step=-1", "min_step"),
        ("min_step=1.5", "min_step"),
        (f"min_step={'9' * 30}", "min_step"),
        ("checkpoint=-1", "checkpoint"),
        ("checkpoint=newest", "checkpoint"),
        ("checkpoint=", "checkpoint"),
        (f"checkpoint={'9' * 19}", "checkpoint"),
        ("checkpoint=1&checkpoint=1", "checkpoint"),
        ("cut=two%20words", "cut"),
        (f"cut={'c' * 201}", "cut"),
    ],
)
def test_a_malformed_query_names_its_field(query: str, field: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        about = parsed(query, shards=2)
        getattr(about, field)
    assert refused.value.extensions["field"] == field


@pytest.mark.parametrize("name", ["", "-dash", ".hidden", "a b", "x" * 129, "run\n"])
def test_a_malformed_name_of_a_run(name: str) -> None:
    with pytest.raises(MalformedRequest) as refused:
        parsed("", name=name)
    assert refused.value.extensions["field"] == "run"


def test_an_unknown_run() -> None:
    with pytest.raises(RunNotFound):
        parsed("", name="other")


def test_int8_needs_names_for_its_scales() -> None:
    assert parsed("dtype=I8&shard=1&of=2", shards=2).dtype == "I8"
    with pytest.raises(MalformedTensors):
        assert parsed("dtype=I8", names=("w", "w::scale")).dtype
