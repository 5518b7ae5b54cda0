"""What returns, lost leases, pauses and refusals on either side do to a region's rounds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freestep import (
    DtypeOverflow,
    FreestepError,
    ManifestMismatch,
    NonFiniteGradient,
    Region,
    Run,
    RunNotFound,
    ServiceUnreachable,
    StorageUnavailable,
    WorkerNameTaken,
)
from freestep.api.models import RunStatus
from harness import ThreadService
from lost_answers import LosingClient
from meanwhile import under_way, wait_until
from region_sides import NUMEL, OF_REGION, WHOLE, begin, checkpointed_in_round, count, counted, joined, push


def test_a_region_that_finishes_follows_runs_that_went_back(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here)
    works = region(every=5)
    works.finish()
    at_far = far.checkpoint().step
    push(here, 2)
    works.finish()
    far.restore(at_far)
    works.finish()
    assert counted(far) == counted(here) == 0.0
    kept = here.checkpoint().step
    push(here, 2)
    works.finish()
    assert counted(far) == counted(here) == 2.0
    here.restore(kept)
    far.restore(at_far)
    works.finish()
    push(here, 1)
    works.finish()
    assert counted(far) == counted(here) == 1.0


def test_a_parent_that_went_back_while_no_process_worked_takes_no_progress_from_what_it_has_given_up(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region())
    kept = far.checkpoint().step
    push(here, 2)
    works.run_rounds(1)
    push(here, 2)
    works.close()
    far.restore(kept)
    push(far, 1, value=10.0)
    works = region()
    works.finish()
    assert counted(far) == counted(here) == 10.0
    assert works.receipt is None


def test_a_round_that_is_dropped_is_lost_and_the_steps_since_then_are_not(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region(aggregation={"policy": "async", "max_staleness": 1}))
    push(far, 2, value=10.0)
    push(here, 2)
    works.advance()
    push(here, 1)
    works.advance()
    assert works.receipt is not None and (works.receipt.decision, works.receipt.reason) == ("dropped", "stale")
    works.advance()
    assert (counted(far), counted(here)) == (20.0, 21.0)


def test_a_parent_that_went_back_takes_no_progress_from_what_it_has_given_up(
    here: Run, far: Run, region: Callable[..., Region], caplog: pytest.LogCaptureFixture
) -> None:
    begin(here)
    works = joined(region())
    push(here, 2)
    works.run_rounds(1)
    kept = far.checkpoint().step
    push(here, 2)
    works.run_rounds(1)
    push(here, 2)
    far.restore(kept)
    with caplog.at_level(logging.WARNING, "freestep"):
        for stage in ("sending", "moving", "training"):
            assert works.advance().stage == stage
    assert "is in another epoch" in caplog.text
    assert counted(far) == counted(here) == 2.0
    push(here, 2)
    works.run_rounds(1)
    assert counted(far) == counted(here) == 4.0


def test_a_region_that_went_back_in_its_round_pushes_what_it_has(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = region()
    here.restore(checkpointed_in_round(here, works))
    push(here, 1, value=5.0)
    works.run_rounds(1)
    assert counted(far) == counted(here) == 6.0


def test_a_region_that_went_back_behind_its_move_is_moved_again_as_a_whole(
    here: Run, far: Run, region: Callable[..., Region], caplog: pytest.LogCaptureFixture
) -> None:
    begin(here)
    works = joined(region())
    kept = here.checkpoint().step
    push(here, 2)
    push(far, 1, value=10.0)
    works.run_rounds(1)
    assert counted(here) == 12.0
    here.restore(kept)
    push(here, 4, value=100.0)
    with caplog.at_level(logging.WARNING, "freestep"):
        works.advance()
        works.advance()
    assert "gone back from round 2 to round 1" in caplog.text
    assert counted(far) == counted(here) == 12.0
    push(here, 2)
    works.run_rounds(1)
    assert counted(far) == counted(here) == 14.0


@pytest.mark.parametrize("since", [0, 4])
def test_a_region_that_went_back_while_a_push_travelled_keeps_what_the_parent_has(
    here: Run, far: Run, region: Callable[..., Region], since: int
) -> None:
    begin(here)
    works = region()
    kept = checkpointed_in_round(here, works)
    works.advance()
    here.restore(kept)
    push(here, since)
    works.advance()
    works.advance()
    assert counted(far) == counted(here) == 2.0
    # A round of nothing is not pushed, however far the run has come since it went back.
    assert works.advance(at_once=True).stage == "training"
    push(here, 2)
    works.run_rounds(1)
    assert counted(far) == counted(here) == 4.0


def test_a_lease_that_has_ended_is_replaced_and_the_round_counts_once(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region(worker="north"))
    push(here, 2)
    works.advance()
    far.end_worker("north")
    works.advance()
    works.advance()
    assert counted(far) == counted(here) == 2.0
    assert [each.worker for each in far.workers()] == ["north"]


def test_a_lease_of_the_regions_own_whose_answer_was_lost_is_not_another_regions(
    service: ThreadService, here: Run, far: Run, tmp_path: Path
) -> None:
    begin(here)
    with (
        LosingClient(service.url, retry_for=0.0) as client,
        Region(here, client.run(far.name), tmp_path / "place", every=2, worker="north", optimizer=WHOLE) as works,
    ):
        joined(works)
        push(here, 2)
        works.advance()
        far.end_worker("north")
        client.loses.append(("POST", "/leases"))
        with pytest.raises(ServiceUnreachable):
            works.advance()
        works.run_rounds(1)
    assert counted(far) == counted(here) == 2.0


def test_a_region_takes_no_lease_from_a_newer_process_of_its_name_when_the_parent_went_back(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region())
    kept = far.checkpoint().step
    push(here, 2)
    works.run_rounds(1)
    (name,) = [each.worker for each in far.workers()]
    far.restore(kept)
    with far.lease(name) as newer:
        with pytest.raises(WorkerNameTaken, match="give each region a name of its own"):
            works.finish()
        own = newer.granted.lease
        assert own in [each.lease for each in far.workers(own)]


@pytest.mark.parametrize("made", [0, 3, 5])
def test_others_do_not_wait_for_a_region_without_workers(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch, made: int
) -> None:
    monkeypatch.setattr("freestep.region._WAIT_S", 0.1)
    begin(here, {**OF_REGION, "lease_ttl_ms": 100})
    works = joined(region(every=5, aggregation=None, worker="north"))
    assert [each.worker for each in far.workers()] == ["north"]
    working = under_way(lambda: works.run_rounds(1 + bool(made)))
    # Its workers leave in the middle of a round or at its end, or have never come.
    with here.lease(ttl_ms=600_000) as lease:
        count(here, lease, made)
    wait_until(lambda: counted(far) == made)
    wait_until(lambda: not far.workers())
    with here.lease(ttl_ms=600_000) as lease:
        wait_until(lambda: [each.worker for each in far.workers()] == ["north"])
        count(here, lease, 5)
        working.result()
    assert counted(far) == counted(here) == made + 5.0


def test_others_do_not_wait_for_a_region_that_is_started_again_without_workers(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.region._WAIT_S", 0.1)
    begin(here, {**OF_REGION, "lease_ttl_ms": 100})
    joined(region()).close()
    works = region()
    working = under_way(lambda: works.run_rounds(1))
    wait_until(lambda: works._parent.lease is not None)
    wait_until(lambda: not far.workers())
    with here.lease(ttl_ms=600_000) as lease:
        count(here, lease, 2)
    working.result()


def test_a_run_that_somebody_has_paused_stays_paused(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here)
    works = joined(region())
    assert not here.status().control.paused
    push(here, 2)
    here.pause()
    works.run_rounds(1)
    assert here.status().control.paused
    assert counted(far) == counted(here) == 2.0


def test_a_run_whose_move_is_refused_trains_on_until_the_next_attempt(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise StorageUnavailable("the disk is full")

    begin(here)
    works = joined(region())
    push(here, 2)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "import_state", refuse)
        works.advance()
        works.advance()
        with pytest.raises(StorageUnavailable):
            works.advance()
    assert not here.status().control.paused
    works.close()
    push(here, 1)
    joined(region())
    assert (counted(far), counted(here)) == (2.0, 3.0)
    assert not here.status().control.paused


def test_a_region_waits_while_a_service_cannot_write(
    here: Run,
    far: Run,
    region: Callable[..., Region],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    refused: list[bool] = []
    pause = Run.pause

    def pause_unwritten(run: Run) -> RunStatus:
        """It has counted, but could not be written at first."""
        status = pause(run)
        if not refused:
            refused.append(status.control.paused)
            raise StorageUnavailable("the disk is full")
        return status

    begin(here)
    works = joined(region())
    push(here, 2)
    monkeypatch.setattr(Run, "pause", pause_unwritten)
    works.run_rounds(1)
    assert refused == [True]
    assert f"the region {here.name} waits: the disk is full" in caplog.messages
    assert not here.status().control.paused
    assert counted(far) == counted(here) == 2.0


@pytest.mark.parametrize("made", [0, 2])
def test_a_region_that_waits_ends_by_a_signal_that_something_has_swallowed(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch, made: int
) -> None:
    for name in ("region._WAIT_S", "region_parent._WAIT_S", "region_parent.FIRST_WAIT_S"):
        monkeypatch.setattr(f"freestep.{name}", 0.1)
    begin(here)
    works = joined(region(aggregation={"policy": "sync"}))
    push(here, made)
    # For its workers, or for another one of the parent's.
    with far.lease("other"):
        working = under_way(lambda: works.run_rounds(1))
        wait_until(lambda: far.status().pushes["accumulated"] == made // 2)
        monkeypatch.setattr("freestep.leaving._is_leaving", True)
        with pytest.raises(SystemExit):
            working.result()
        with pytest.raises(SystemExit):
            works.advance()
        monkeypatch.setattr("freestep.leaving._is_leaving", False)


def test_weights_that_are_not_finite_are_not_pushed(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here, {**OF_REGION, "optimizer": {"algorithm": "sgd", "lr": 1e12, "weight_decay": 1e12}}, value=1e20)
    works = joined(region(every=1))
    push(here, 1)
    with pytest.raises(NonFiniteGradient, match="return the run to an earlier checkpoint"):
        works.advance()
    assert works.place is not None and works.place.stage == "training"
    assert counted(far) == pytest.approx(1e20)


def test_a_round_that_is_too_large_for_f16_is_pushed_as_another_dtype(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region(push_dtype="F16"))
    push(here, 2, value=2.0**16)
    works.advance()
    with pytest.raises(DtypeOverflow):
        works.advance()
    works.close()
    region(push_dtype="BF16").finish()
    assert counted(far) == counted(here) == 2.0**17


def test_a_round_whose_answer_is_too_large_for_f16_counts_once(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region(pull_dtype="F16"))
    push(here, 2, value=2.0**16)
    works.advance()
    with pytest.raises(DtypeOverflow):
        works.advance()
    assert works.place is not None and works.place.stage == "sending"
    works.close()
    region(pull_dtype="BF16").finish()
    assert counted(far) == counted(here) == 2.0**17
    assert far.status().pushes["applied"] == 1


def test_other_parameters_are_refused(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here)
    far.create({**OF_REGION, "optimizer": WHOLE, "parameters": [{"name": "count", "shape": [NUMEL + 1]}]})
    with pytest.raises(ManifestMismatch, match="other parameters"):
        region().advance()


def test_a_place_is_of_its_runs_and_of_one_process(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here)
    works = joined(region())
    with pytest.raises(FreestepError, match="another process"):
        region()
    works.close()
    with pytest.raises(FreestepError, match="name another file"):
        region(worker="another")
    far.delete()
    works = region()
    with pytest.raises(RunNotFound):
        works.advance()
    begin(far, {**OF_REGION, "optimizer": WHOLE})
    with pytest.raises(FreestepError, match="another has its name"):
        works.advance()


@pytest.mark.parametrize("stage", ["training", "sending", "moving"])
def test_a_run_that_was_made_anew_meanwhile_is_left_as_it_is(
    here: Run, far: Run, region: Callable[..., Region], stage: str
) -> None:
    begin(here)
    works = joined(region())
    push(here, 2)
    while works.place is not None and works.place.stage != stage:
        works.advance()
    made_anew = far if stage == "sending" else here
    made_anew.delete()
    begin(made_anew)
    push(made_anew, 2, value=100.0)
    epoch = made_anew.status().epoch
    for _ in range(2):
        with pytest.raises(FreestepError, match="another has its name"):
            works.advance()
    assert counted(made_anew) == 200.0
    assert made_anew.status().epoch == epoch
    assert works.place is not None and works.place.stage == stage


def test_a_file_that_is_no_place_is_refused(region: Callable[..., Region], tmp_path: Path) -> None:
    (tmp_path / "place").write_text("something else")
    with pytest.raises(FreestepError, match="no region's place"):
        region()


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_a_round_has_an_update_at_least(region: Callable[..., Region], every: Any) -> None:
    with pytest.raises(FreestepError, match="every must be"):
        region(every=every)
