"""Checkpoints that are read while the run stays where it is: points and whole states of an earlier step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from checkpointed import flip_a_bit
from forms import FORMS
from harness import ThreadService
from plain_calls import Api, slug
from states import document_of, free_memory, import_, train
from states import points as points_of

ADAMW = {"algorithm": "adamw_schedule_free", "lr": 0.01, "weight_decay": 0.1}
DTYPES = ("F32", "BF16", "F16", "I8")


def pull(api: Api, *, headers: dict[str, str] | None = None, **query: Any) -> httpx.Response:
    return api.http.get(api.path("/parameters"), params=query, headers=headers)


def export(api: Api, **query: Any) -> httpx.Response:
    return api.http.get(api.path("/state"), params=query)


def checkpoint(api: Api) -> int:
    answer = api.http.post(api.path("/checkpoints"))
    assert answer.status_code == 201, answer.text
    return int(answer.json()["step"])


def told(answer: httpx.Response) -> dict[str, str]:
    """What an answer's headers say of its body, but for the place in the log, which a run's one shard does not tell."""
    assert answer.status_code == 200, answer.text
    names = ("ETag", "Freestep-Epoch", "Freestep-Step", "Freestep-Scheduled-Lr", "Content-Length", "Content-Type")
    return {name: answer.headers[name] for name in names if name in answer.headers}


@pytest.fixture
def written(api: Api) -> Api:
    """A run with a checkpoint of step 3, which has gone on to step 5."""
    api.create(optimizer=ADAMW)
    train(api, 0, 3)
    assert checkpoint(api) == 3
    train(api, 3, 5)
    return api


@pytest.mark.parametrize("form", FORMS)
def test_all_points_are_those_that_the_run_had(api: Api, form: str) -> None:
    api.create(optimizer=FORMS[form])
    train(api, 0, 3)
    queries = [{"point": point, "dtype": dtype} for point in "xyz" for dtype in DTYPES]
    before = [pull(api, **query) for query in queries]
    state = export(api)
    assert checkpoint(api) == 3
    train(api, 3, 5)
    after = points_of(api)
    for query, then in zip(queries, before, strict=True):
        answer = pull(api, **query, checkpoint=3)
        assert (told(answer), answer.content) == (told(then), then.content)
    answer = export(api, checkpoint=3)
    assert (told(answer), answer.content) == (told(state), state.content)
    assert points_of(api) == after
    assert (api.status()["epoch"], api.status()["step"]) == (1, 5)


def test_a_new_run_begins_with_a_checkpoint_of_another(written: Api, connect: Callable[..., Api]) -> None:
    there = connect(written.url)
    assert import_(there, export(written, checkpoint=3).content).json()["step"] == 3
    train(there, 3, 5)
    assert points_of(there) == points_of(written)
    there.http.delete(there.path())


def test_what_an_unfinished_update_has_gathered_is_not_in_an_exported_checkpoint(api: Api) -> None:
    api.create(aggregation={"policy": "buffered", "batch": 2})
    lease = api.lease()
    assert [api.push(lease, 0).json()["decision"] for _ in range(2)] == ["accumulated", "applied"]
    assert api.push(lease, 1).json()["decision"] == "accumulated"
    before = export(api).content
    assert checkpoint(api) == 1
    assert api.push(lease, 1).json()["step"] == 2
    assert export(api, checkpoint=1).content == before


def test_a_range_of_it_and_its_tag(written: Api) -> None:
    whole = pull(written, checkpoint=3)
    tag = whole.headers["ETag"]
    assert tag == '"e1-s3-x-F32"'
    part = pull(written, checkpoint=3, headers={"Range": "bytes=10-99", "If-Range": tag})
    assert (part.status_code, part.content) == (206, whole.content[10:100])
    assert pull(written, checkpoint=3, headers={"If-None-Match": tag}).status_code == 304
    assert pull(written, headers={"If-None-Match": tag}).status_code == 200
    assert slug(pull(written, checkpoint=3, headers={"Range": "bytes=100000-"})) == "range-not-satisfiable"
    head = written.http.head(written.path("/parameters"), params={"checkpoint": 3})
    assert (told(head), head.content) == (told(whole), b"")


def test_a_step_without_a_checkpoint(written: Api) -> None:
    for answer in (pull(written, checkpoint=4), export(written, checkpoint=4)):
        assert slug(answer) == "checkpoint-not-found"
        assert answer.json()["step"] == 4
    for wrong in ("-1", "newest", "", "1.5"):
        for answer in (pull(written, checkpoint=wrong), export(written, checkpoint=wrong)):
            assert (slug(answer), answer.json()["field"]) == ("malformed-request", "checkpoint")
    later = pull(written, checkpoint=3, min_step=4)
    assert (slug(later), later.json()["field"]) == ("malformed-request", "min_step")
    assert pull(written, checkpoint=3, min_step=3).status_code == 200


def test_a_run_without_weights_has_no_checkpoint(api: Api) -> None:
    assert slug(pull(api, checkpoint=0)) == "run-not-found"
    api.http.put(api.path(), json=api.spec())
    assert slug(pull(api, checkpoint=0)) == "checkpoint-not-found"
    assert slug(export(api, checkpoint=0)) == "checkpoint-not-found"


def test_one_that_was_dropped_is_not_read(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    api = connect(start_service(checkpoints_kept=1).url)
    api.create()
    train(api, 0, 1)
    checkpoint(api)
    assert slug(pull(api, checkpoint=0)) == "checkpoint-not-found"
    assert pull(api, checkpoint=1).status_code == 200


def test_of_a_step_the_newest_epochs_is_read_as_a_restore_has_it(written: Api) -> None:
    assert written.http.post(written.path("/checkpoints/3/restore")).json()["epoch"] == 2
    train(written, 3, 4)
    answer = pull(written, checkpoint=3)
    assert told(answer)["ETag"] == '"e2-s3-x-F32"'
    assert document_of(export(written, checkpoint=3).content)["epoch"] == 2


def test_points_follow_what_was_changed_of_the_run_before_and_not_after(written: Api) -> None:
    def change_beta(beta: float) -> None:
        changed = written.http.patch(written.path(), json={"optimizer": {"betas": [beta, 0.999]}})
        assert changed.status_code == 200, changed.text

    change_beta(0.8)
    train(written, 5, 6)
    before, state = points_of(written), export(written).content
    assert checkpoint(written) == 6
    train(written, 6, 7)
    change_beta(0.95)
    assert points_of(written, checkpoint=6) == before
    assert export(written, checkpoint=6).content == state


def test_a_damaged_one_is_refused_and_the_run_goes_on(
    start_service: Callable[..., ThreadService], connect: Callable[..., Api], tmp_path: Path
) -> None:
    service = start_service(tmp_path / "data")
    api = connect(service.url)
    api.create()
    for file in (tmp_path / "data" / "runs" / api.run / "checkpoints").glob("*/*.safetensors"):
        flip_a_bit(file)
    memory = service.registry.get(api.run)._context.resources.memory
    free = free_memory(memory)
    for answer in (pull(api, checkpoint=0), export(api, checkpoint=0)):
        assert slug(answer) == "checkpoint-not-found"
        assert "is damaged" in answer.json()["detail"]
    assert free_memory(memory) == free
    train(api, 0, 1)
