"""What is lent of a shard's state stays as it is, whatever becomes of the state, and no vector is ever two people's."""

from __future__ import annotations

import random

import pytest
import torch

from freestep.api.models import RunSpec
from freestep.wire.manifest import Manifest
from freestep_service.state.buffers import Vector
from freestep_service.state.log import Entry
from freestep_service.state.shard import Shard
from freestep_service.state.views import PointView

NUMEL = 5


@pytest.fixture
def shard() -> Shard:
    """A shard that counts: all of y is the step that it has reached."""
    spec = RunSpec.model_validate(
        {
            "optimizer": {"algorithm": "sgd", "lr": 1.0},
            "aggregation": {"policy": "async"},
            "parameters": [{"name": "w", "shape": [NUMEL]}],
        }
    )
    shard = Shard(spec, Manifest(spec.parameters), torch.device("cpu"))
    shard.initialize(torch.zeros(NUMEL), epoch=1)
    return shard


def advance(shard: Shard) -> None:
    shard.apply(Entry(shard.seq + 1, shard.epoch, advance=True, gradient=torch.full((NUMEL,), -1.0)))


def y(shard: Shard) -> Vector:
    """A copy of y."""
    out = Vector(NUMEL)
    shard.copy_point("y", out.tensor())
    return out


def assert_holds(vector: Vector, step: int) -> None:
    assert torch.equal(vector.tensor(), torch.full((NUMEL,), float(step)))


def test_nothing_moves_where_a_loan_ends_before_the_next_step(shard: Shard) -> None:
    homes, spare = set(), Vector(NUMEL)
    for step in range(3):
        view = shard.lend(spare)
        assert (view.epoch, view.step, view.is_copy) == (1, step, False)
        assert_holds(view.vector, step)
        homes.add(id(view.vector))
        assert view.end() is spare
        advance(shard)
    assert len(homes) == 1
    assert_holds(y(shard), 3)


def test_the_state_goes_on_in_the_spare_vector_while_the_lent_one_is_read(shard: Shard) -> None:
    spare = Vector(NUMEL)
    view = shard.lend(spare)
    advance(shard)
    advance(shard)
    assert_holds(view.vector, 0)
    assert_holds(y(shard), 2)
    assert view.end() is view.vector
    assert shard.lend(Vector(NUMEL)).vector is spare


def test_what_is_lent_already_is_copied(shard: Shard) -> None:
    first, spare = shard.lend(Vector(NUMEL)), Vector(NUMEL)
    second = shard.lend(spare)
    assert second.is_copy
    assert second.vector is spare
    advance(shard)
    for view in (first, second):
        assert_holds(view.vector, 0)
    assert second.end() is spare


def test_a_state_that_is_replaced_leaves_its_loan_alone(shard: Shard) -> None:
    cut = shard.copy_state()
    advance(shard)
    spare = Vector(NUMEL)
    view = shard.lend(spare)
    shard.load(cut, epoch=2)
    advance(shard)
    assert_holds(view.vector, 1)
    assert_holds(y(shard), 1)
    # The spare vector was never needed.
    assert view.end() is spare


@pytest.mark.parametrize("seed", range(5))
def test_every_loan_keeps_its_step_through_any_schedule(shard: Shard, seed: int) -> None:
    chance = random.Random(seed)
    free, views = [Vector(NUMEL) for _ in range(3)], list[PointView]()
    for _ in range(200):
        match chance.choice(["lend", "end", "advance"]):
            case "lend" if free:
                views.append(shard.lend(free.pop()))
            case "end" if views:
                free.append(views.pop(chance.randrange(len(views))).end())
            case "advance":
                advance(shard)
        for view in views:
            assert_holds(view.vector, view.step)
        for vector in free:
            vector.tensor().fill_(-1.0)
        assert_holds(y(shard), shard.step)
    assert len({id(vector) for vector in free}) == len(free)
    assert len(free) + len(views) == 3
