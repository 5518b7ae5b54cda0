"""A region's run as a worker of its parent's: rounds, moves, and what each side's returns and refusals do to them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep import (
    DtypeOverflow,
    FreestepError,
    ManifestMismatch,
    NonFiniteGradient,
    Region,
    RemoteOptimizer,
    Run,
    RunNotFound,
    RunState,
    StorageUnavailable,
)
from freestep.region_move import ROUND_METRIC
from harness import ThreadService
from meanwhile import under_way, wait_until
from region_sides import NUMEL, OF_REGION, WHOLE, begin, count, counted, push, sides
from trained import TOLERANCE, held, network, pulled, step


@pytest.fixture
def here_and_far(service: ThreadService, name: str) -> Iterator[tuple[Run, Run]]:
    with sides(service.url, name) as both:
        yield both


@pytest.fixture
def here(here_and_far: tuple[Run, Run]) -> Run:
    return here_and_far[0]


@pytest.fixture
def far(here_and_far: tuple[Run, Run]) -> Run:
    return here_and_far[1]


@pytest.fixture
def region(here_and_far: tuple[Run, Run], tmp_path: Path) -> Iterator[Callable[..., Region]]:
    """Makes regions of the two runs, one after another over the same file; they are closed with the test."""
    made: list[Region] = []

    def make(**options: Any) -> Region:
        given = {"every": 2, "optimizer": WHOLE, "aggregation": {"policy": "async"}, **options}
        made.append(Region(*here_and_far, tmp_path / "place", **given))
        return made[-1]

    yield make
    for each in made:
        each.close()


def joined(region: Region) -> Region:
    """Moved to where its round begins."""
    while region.place is None or region.place.stage != "training":
        region.advance()
    return region


def checkpointed_in_round(here: Run, region: Region) -> int:
    """Has two updates made in a region's round, with a checkpoint between them; its step."""
    joined(region)
    push(here, 1)
    kept = here.checkpoint().step
    push(here, 1)
    return kept


def test_a_parent_is_created_with_the_regions_weights(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here, value=7.0)
    joined(region(optimizer={}, aggregation=None, options={"durability": "none"}))
    status = far.status()
    assert (status.spec.optimizer.algorithm, status.spec.aggregation.policy, status.spec.durability) == (
        "diloco",
        "sync",
        "none",
    )
    assert counted(far) == counted(here) == 7.0


def test_a_region_begins_where_the_parent_is(here: Run, far: Run, region: Callable[..., Region]) -> None:
    begin(here, value=1.0)
    begin(far, {**OF_REGION, "optimizer": WHOLE}, value=5.0)
    joined(region())
    assert counted(here) == 5.0


@pytest.mark.parametrize("shards", [1, 2])
def test_each_round_is_one_push_of_all_its_updates(
    here: Run, far: Run, region: Callable[..., Region], shards: int
) -> None:
    begin(here, {**OF_REGION, "shards": shards})
    works = joined(region(every=3, options={"shards": shards}))
    for number in range(1, 4):
        push(here, 3)
        works.run_rounds(1)
        assert counted(far) == counted(here) == 3.0 * number
    assert far.status().pushes["applied"] == 3
    assert works.receipt is not None and works.receipt.staleness == 0


def test_what_the_region_makes_while_a_push_travels_is_of_the_next_round(
    here: Run, far: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    works = joined(region())
    push(here, 2)
    assert works.advance().stage == "sending"
    push(here, 1)
    push(far, 1, value=10.0)
    assert works.advance().stage == "moving"
    assert counted(far) == 12.0
    place = works.advance()
    assert (place.stage, counted(here)) == ("training", 13.0)
    # The step was taken at the y before.
    assert place.oldest == 0
    push(here, 1)
    works.run_rounds(1)
    assert counted(far) == counted(here) == 14.0
    assert works.receipt is not None and works.receipt.staleness == 2


def test_a_round_that_the_parent_has_not_had_is_none_of_those_asked_for(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freestep.region._WAIT_S", 0.1)
    begin(here)
    works = joined(region())
    kept, at_far = here.checkpoint().step, far.checkpoint().step
    push(here, 2)
    works.run_rounds(1)
    # First the region's run goes back behind its move, then the parent's.
    here.restore(kept)
    working = under_way(lambda: works.run_rounds(1))
    wait_until(lambda: counted(here) == 2.0)
    wait_until(lambda: works.place is not None and works.place.stage == "training")
    with here.lease(ttl_ms=600_000) as lease:
        count(here, lease, 1)
        far.restore(at_far)
        count(here, lease, 1)
    wait_until(lambda: counted(here) == 0.0)
    wait_until(lambda: works.place is not None and works.place.stage == "training")
    push(here, 2, value=5.0)
    working.result()
    assert counted(far) == counted(here) == 10.0


def test_two_regions_go_round_by_round(service: ThreadService, name: str, far: Run, tmp_path: Path, here: Run) -> None:
    with sides(service.url, f"{name}-other") as (there, _):
        begin(here)
        begin(there)
        one, other = (Region(run, far, tmp_path / run.name, every=2, optimizer=WHOLE) for run in (here, there))
        with one, other:
            for works in (one, other):
                joined(works)
                works.advance(at_once=True)
            for number in range(1, 4):
                push(here, 2, value=1.0)
                push(there, 2, value=3.0)
                calls = [under_way(lambda works=works: works.run_rounds(1)) for works in (one, other)]  # type: ignore[misc]
                for call in calls:
                    call.result()
                # The mean of 2 and 6.
                assert counted(far) == counted(here) == counted(there) == 4.0 * number
            assert far.status().step == 3


def test_a_moved_run_trains_on_as_one_whose_gradients_are_taken_elsewhere(
    service: ThreadService, here: Run, far: Run, region: Callable[..., Region]
) -> None:
    model = network()
    with RemoteOptimizer(model, url=service.url, run=here.name, lr=0.05, aggregation="async") as optimizer:
        for number in range(4):
            step(model, optimizer, number)
        works = joined(region(every=1))
        before = here.export_state()
        step(model, optimizer, 4)
        assert optimizer.receipt is not None and optimizer.receipt.reason == "epoch-changed"
        torch.testing.assert_close(held(model), pulled(far))
        works.finish()
        # The parent goes elsewhere meanwhile.
        away = {each: torch.full_like(tensor, -0.25) for each, tensor in before.buffers["y"].items()}
        with far.lease() as lease:
            far.push(away, lease.claim(far.status().step))
        step(model, optimizer, 5)
        while works.place is None or works.place.stage != "moving":
            works.advance()
        still = here.export_state()
        works.advance()
    after = here.export_state()
    assert after.scalars == still.scalars
    for name, vector in still.buffers.items():
        moved = 0.25 if name in "xyz" else 0.0
        for parameter, tensor in vector.items():
            torch.testing.assert_close(after.buffers[name][parameter], tensor + moved, **TOLERANCE)


@pytest.mark.parametrize("encoded", [{"push_dtype": "BF16"}, {"push_encoding": "int8"}, {"push_encoding": "topk"}])
def test_what_an_encoded_push_leaves_out_comes_later(
    here: Run, far: Run, region: Callable[..., Region], encoded: dict[str, str]
) -> None:
    begin(here)
    for number in range(4):
        # A region of its own each time, as after a restart.
        works = joined(region(every=1, **encoded))
        push(here, 1, value=0.1 + number)
        works.finish()
        works.close()
    assert works.place is not None and works.place.residual is not None
    y, _ = far.pull("y")
    # What has been pushed and what was left out is all that was made: 0.1 + 1.1 + 2.1 + 3.1, as the region has it.
    own, _ = here.pull("y")
    torch.testing.assert_close(y["count"], own["count"], **TOLERANCE)
    if encoded != {"push_encoding": "topk"}:
        torch.testing.assert_close(y["count"] - works.place.residual, torch.full((NUMEL,), 6.4), **TOLERANCE)


def test_a_region_that_finishes_has_the_parents_newest_y(
    here: Run, far: Run, region: Callable[..., Region], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(here)
    works = region(every=5)
    works.finish()
    push(here, 3)
    works.finish()
    assert counted(far) == counted(here) == 3.0
    epoch = here.status().epoch
    works.finish()
    assert here.status().epoch == epoch
    push(far, 1, value=10.0)
    works.finish()
    assert counted(here) == 13.0
    assert far.status().pushes["applied"] == 2
    # A step of the region's that comes while it is moved is of its next round.
    push(far, 1, value=10.0)
    export = Run.export_state

    def exported_late(run: Run) -> RunState:
        monkeypatch.undo()
        run.resume()
        push(run, 1)
        run.pause()
        return export(run)

    monkeypatch.setattr(Run, "export_state", exported_late)
    works.finish()
    assert (counted(far), counted(here)) == (23.0, 24.0)
    works.finish()
    assert counted(far) == counted(here) == 24.0


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
        with pytest.raises(StorageUnavailable):
            works.run_rounds(1)
    assert not here.status().control.paused
    works.close()
    push(here, 1)
    joined(region())
    assert (counted(far), counted(here)) == (2.0, 3.0)
    assert not here.status().control.paused


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


def test_a_region_waits_for_its_run(here: Run, far: Run, region: Callable[..., Region]) -> None:
    works = region()
    joining = under_way(works.advance)
    here.create(OF_REGION)
    here.initialize({"count": torch.full((NUMEL,), 3.0)})
    assert joining.result().stage == "moving"


def test_units_of_a_gradient_that_a_move_has_dropped_are_handed_out_again(
    here: Run, region: Callable[..., Region]
) -> None:
    begin(here)
    data = here.data("train")
    data.create({"length": 4, "unit": 1})
    works = joined(region())
    with here.lease() as lease:
        claimed = data.claim(lease.granted, 2)
        units = {"train": [claimed.units[0].unit]}
        here.push({"count": -torch.ones(NUMEL)}, lease.claim(0, units=units))
        push(here, 1)
        works.run_rounds(1)
    assert here.status().data["train"].done == 1
    assert here.status().metrics[ROUND_METRIC].value == 2.0


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
