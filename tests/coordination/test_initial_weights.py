"""One upload of initial weights wins on all shards."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coordination.driven import HOUR, DrivenRun
from freestep.errors import ShardUnavailable
from freestep_service.domain.records import Behind, Fenced, LogPosition

Make = Callable[..., DrivenRun]


def weights(
    run: DrivenRun, shard: int, upload: str, progress: str, patience_ms: int = HOUR, digest: str = "digest"
) -> str:
    part = run.part(shard)
    digest = digest if progress == "staged" else ""
    call = run.opening.initial_weights(
        run.owner(shard), upload, progress, patience_ms, f"{part.begin}-{part.end}", digest
    )
    return run.do(call)


def test_the_first_upload_of_a_single_shard_wins(make_run: Make) -> None:
    run = make_run().open(initialized=False)
    assert weights(run, 0, "a", "coming") == "coming"
    assert weights(run, 0, "b", "coming") == "waiting"
    assert weights(run, 0, "a", "withdrawn") == "waiting"
    assert weights(run, 0, "b", "coming") == "coming"
    assert run.view().number("initialized") == 0
    assert weights(run, 0, "b", "staged") == "initialized"
    assert weights(run, 0, "b", "coming") == weights(run, 0, "b", "staged") == "initialized"
    assert weights(run, 0, "b", "staged", digest="of another") == "already-initialized"
    assert weights(run, 0, "a", "staged") == "already-initialized"
    assert run.view().number("initialized") == 1


def test_uploads_to_several_shards_take_turns(make_run: Make) -> None:
    run = make_run(2).open(initialized=False)
    assert weights(run, 0, "a", "coming") == "coming"
    assert weights(run, 1, "b", "coming") == "waiting"
    assert weights(run, 1, "b", "staged") == "waiting"
    assert weights(run, 0, "a", "staged") == "staged"
    # A turn ends when a part is withdrawn, or when nothing comes for long while others wait.
    assert weights(run, 1, "a", "withdrawn") == "waiting"
    assert weights(run, 1, "b", "coming") == "coming"
    assert weights(run, 0, "a", "coming") == "waiting"
    assert weights(run, 0, "a", "coming", patience_ms=0) == "coming"
    assert weights(run, 0, "a", "staged") == "staged"
    assert run.view().number("initialized") == 0
    assert weights(run, 1, "a", "staged") == "initialized"
    assert weights(run, 0, "a", "staged") == "initialized"
    assert weights(run, 1, "a", "staged", digest="of another") == "already-initialized"
    assert weights(run, 1, "b", "coming") == "already-initialized"
    # Older versions wrote no digests.
    run.redis.hdel(run.key("run"), "upload_parts")
    assert weights(run, 1, "a", "staged", digest="of another") == "initialized"


def test_a_part_that_was_staged_by_a_former_owner_does_not_count(make_run: Make) -> None:
    run = make_run(2).open(initialized=False)
    assert weights(run, 0, "a", "coming") == "coming"
    assert weights(run, 0, "a", "staged") == "staged"
    run.redis.hset(run.key("shards"), "0:token", "99")
    assert weights(run, 1, "a", "staged") == "staged"
    assert weights(run, 0, "a", "staged") == "initialized"


def test_weights_are_refused_by_a_run_that_is_not_open_or_is_behind(run: DrivenRun) -> None:
    owner = run.owner()
    with pytest.raises(Behind):
        run.do(run.opening.initial_weights(owner._replace(position=LogPosition(2, 0)), "a", "coming", HOUR, "0-10"))
    with pytest.raises(Fenced):
        run.do(run.opening.initial_weights(owner._replace(token="1"), "a", "coming", HOUR, "0-10"))
    run.do(run.opening.give_up([owner]))
    with pytest.raises(ShardUnavailable) as refused:
        run.do(run.opening.initial_weights(owner, "a", "coming", HOUR, "0-10"))
    assert refused.value.extensions == {"missing": [0]}
