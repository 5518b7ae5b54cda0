"""A region's run as a worker of its parent's: rounds, moves, and what is pushed of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from freestep import (
    FreestepError,
    Region,
    RemoteOptimizer,
    Run,
    RunState,
)
from freestep.region_move import ROUND_METRIC
from harness import ThreadService
from meanwhile import under_way, wait_until
from region_sides import NUMEL, OF_REGION, WHOLE, begin, count, counted, joined, push, sides
from trained import TOLERANCE, held, network, pulled, step


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


def test_a_run_is_no_parent_of_itself(here: Run, tmp_path: Path) -> None:
    with pytest.raises(FreestepError, match=f"the run '{here.name}' is no parent of itself"):
        Region(here, here, tmp_path / "place", every=1)
    assert not list(tmp_path.iterdir())


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
