"""The race: its worlds, its device, its tasks, its looks, how rates are tuned, and what is planned."""

from __future__ import annotations

from collections.abc import Callable
from math import inf, nan
from pathlib import Path

import pytest
import torch
from schedulefree import AdamWScheduleFree

from benchmarks.goodput.kills import SERVICE, schedule
from benchmarks.race.device import Device
from benchmarks.race.looks import Album, looks, moments, x_of
from benchmarks.race.methods import METHODS
from benchmarks.race.plan import FULL, QUICK, chosen, estimated_s, tuned
from benchmarks.race.tasks import TASKS, Task
from benchmarks.race.told import Told
from benchmarks.race.tuning import best_rate, tune
from benchmarks.race.worlds import WORLDS

# Worlds


def test_one_worker_is_slow_and_the_others_are_not() -> None:
    world = WORLDS["slow-6"]
    assert [world.slowness(0, worker, 4, 1.0) for worker in range(4)] == [1.0, 1.0, 1.0, 6.0]


def test_speeds_are_drawn_each_second_by_the_seed() -> None:
    world = WORLDS["drawn"]
    drawn = [world.slowness(1, 0, 4, float(at)) for at in range(500)]
    assert drawn == [world.slowness(1, 0, 4, at + 0.9) for at in range(500)]
    assert drawn != [world.slowness(2, 0, 4, float(at)) for at in range(500)]
    assert drawn != [world.slowness(1, 1, 4, float(at)) for at in range(500)]
    assert 1.0 <= min(drawn) < 1.1 and 5.5 < max(drawn) <= 6.0


def test_workers_are_killed_and_what_they_meet_at_is_not() -> None:
    assert {kill.victim for kill in schedule(1, 5.0, 500.0, 2)} == {SERVICE, 0, 1}
    assert {kill.victim for kill in schedule(1, 5.0, 500.0, 2, spares_service=True)} == {0, 1}


def test_in_every_race_of_that_world_somebody_is_killed() -> None:
    for world in WORLDS.values():
        kills = [world.kills(seed, FULL.share * world.seconds, FULL.workers) for seed in FULL.seeds]
        assert all(kills) if world.kill_mean else not any(kills), world


# The device


class Clock:
    now = 10.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.mark.parametrize(("computing", "is_in_time", "end"), [(0.03, True, 10.1), (0.2, False, 10.2)])
def test_a_gradient_is_there_when_the_device_has_had_its_time(computing: float, is_in_time: bool, end: float) -> None:
    clock = Clock()
    device = Device(0.05, lambda at: 2.0 if at == 10.0 else 1.0, lambda: clock.now, clock.sleep)
    device.begin()
    clock.now += computing
    assert device.wait() is is_in_time
    assert clock.now == pytest.approx(end)
    # Of a gradient that is there already, there is nothing to wait for.
    assert device.wait()
    assert clock.now == pytest.approx(end)


# Tasks


@pytest.fixture(scope="module", params=TASKS)
def task(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Task:
    return TASKS[request.param](tmp_path_factory.mktemp("data"))


def test_weights_and_batches_are_the_seeds(task: Task) -> None:
    first, same, other = (task.model(seed) for seed in (0, 0, 1))
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(first.parameters(), other.parameters(), strict=True))
    taken = [next(task.batches(*which)) for which in ((0, 0, 0), (0, 0, 0), (0, 1, 0), (1, 0, 0), (0, 0, 7))]
    assert all(torch.equal(one, two) for one, two in zip(taken[0], taken[1], strict=True))
    assert all(not torch.equal(taken[0][0], each[0]) for each in taken[2:])


def test_all_gradients_of_a_model_are_one_bucket_of_ddp(task: Task) -> None:
    # DDP sums its first megabyte apart.
    assert 4 * sum(each.numel() for each in task.model(0).parameters()) < 1 << 20


def test_training_lowers_the_loss_on_what_is_held_out(task: Task) -> None:
    model = task.model(0)
    before, _ = task.worth(model.state_dict())
    assert before > max(task.targets)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005)
    for _, pair in zip(range(20), task.batches(0, 0, 0), strict=False):
        optimizer.zero_grad()
        task.loss(model, pair).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    after, accuracy = task.worth(model.state_dict())
    assert after < before and 0.0 < accuracy <= 1.0


# Looks


def test_a_look_at_x_leaves_the_optimizer_as_it_was() -> None:
    def trained(sees: bool) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        optimizer = AdamWScheduleFree(net.parameters(), lr=0.1)
        optimizer.train()
        x: dict[str, torch.Tensor] = {}
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.ones(3)).sum().backward()
            optimizer.step()
            if sees:
                x = x_of(net, optimizer)
        y = [each.detach().clone() for each in net.parameters()]
        optimizer.eval()
        return y, x or {name: each.detach().clone() for name, each in net.named_parameters()}

    (y, x), (same_y, same_x) = trained(True), trained(False)
    assert all(torch.equal(one, two) for one, two in zip(y, same_y, strict=True))
    assert all(torch.equal(x[name], same_x[name]) for name in x)
    assert not torch.equal(x["weight"], y[0])


def test_looks_whose_moments_have_passed_are_taken_once(tmp_path: Path) -> None:
    at = moments(2.0, 0.5)
    assert at == [0.5, 1.0, 1.5, 2.0]
    asked = 0

    def x() -> dict[str, torch.Tensor]:
        nonlocal asked
        asked += 1
        return {"w": torch.tensor(float(asked))}

    # It began so long ago that all moments have passed, and the first one is another's.
    album = Album(tmp_path, began=0.0, moments=at, since=1.0)
    album.take(x)
    album.take(x)
    assert asked == 1
    assert [None if each is None else float(each["w"]) for each in looks(tmp_path, at)] == [None, 1.0, 1.0, 1.0]
    (tmp_path / "look-2.pt").unlink()
    Album(tmp_path, began=0.0, moments=at[:2]).take(x)
    assert [None if each is None else float(each["w"]) for each in looks(tmp_path, at)] == [2.0, 2.0, 2.0, 1.0]
    # Moments that are still to come are not looked at.
    Album(tmp_path / "none", began=1e12, moments=at).take(x)
    assert asked == 2


def test_a_worker_is_told_all_in_a_line() -> None:
    told = Told("ddp", "equal", "digits", 3, 0.005, 1, 4, "folder", "data", 8.0, 0.5, "127.0.0.1", "127.0.0.1:1")
    threads = torch.get_num_threads()
    try:
        assert Told.parse(told.text()) == told
    finally:
        torch.set_num_threads(threads)


# Tuning


def valley(best: float) -> Callable[[float], float]:
    return lambda rate: abs(rate - best)


@pytest.mark.parametrize(
    ("best", "tried"),
    [(2.0, [1.0, 2.0, 4.0]), (9.0, [1.0, 2.0, 4.0, 8.0]), (0.0, [0.5, 1.0, 2.0, 4.0])],
    ids=["inside", "above", "below"],
)
def test_a_best_rate_at_the_edge_has_one_tried_beyond_it(best: float, tried: list[float]) -> None:
    found = tune(valley(best), [1.0, 2.0, 4.0])
    assert list(found) == tried
    assert best_rate(found) == min(tried, key=valley(best))


def test_rates_that_diverge_are_not_the_best() -> None:
    assert best_rate({1.0: nan, 2.0: 3.0, 4.0: inf}) == 2.0


# The plan


def test_what_is_run_can_be_named() -> None:
    assert [each.name for each in chosen(FULL, ["slow-6/ddp/digits"])] == ["slow-6/ddp/digits"]
    assert {each.world for each in chosen(FULL, ["*/sync/characters"])} == set(WORLDS)
    assert {each.method for each in chosen(FULL, ["kills/*/digits"])} == set(METHODS) - {"ddp"}
    with pytest.raises(ValueError, match=r"slow-7/\*/digits"):
        chosen(FULL, ["slow-6/*/digits", "slow-7/*/digits"])


def test_the_whole_takes_about_an_hour_and_the_quick_form_seconds() -> None:
    assert 30 * 60 < estimated_s(FULL, chosen(FULL)) < 65 * 60
    assert estimated_s(QUICK, chosen(QUICK)) < 30
    assert FULL.tuning_seed not in FULL.seeds


def test_each_method_has_a_rate_of_its_own_or_another_methods() -> None:
    budgets = {len(METHODS[method].grid) for _, method in tuned(chosen(FULL))}
    assert budgets == {FULL.rates}
    assert {method for _, method in tuned(chosen(FULL, ["kills/torch*/digits"]))} == {"ddp"}
