"""The race: its worlds, its device, its tasks, its looks, how rates are tuned, and what is planned and run."""

from __future__ import annotations

import re
from collections.abc import Callable
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import torch
from schedulefree import AdamWScheduleFree

from benchmarks.goodput.kills import SERVICE, schedule
from benchmarks.race.device import Device
from benchmarks.race.looks import Album, looks, moments, x_of
from benchmarks.race.methods import METHODS, TRIES
from benchmarks.race.one_race import Race
from benchmarks.race.plan import AROUND_S, FULL, QUICK, chosen, estimated_s, in_order, tuned
from benchmarks.race.results import Results
from benchmarks.race.session import Session
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
    [
        (9.0, [1.0, 2.0, 4.0, 8.0]),
        (0.0, [0.5, 1.0, 2.0, 4.0]),
        (2.7, [1.0, 2.0, 2.8, 4.0]),
        (1.7, [1.0, 1.4, 2.0, 4.0]),
    ],
    ids=["above", "below", "inside, above the middle", "inside, below the middle"],
)
def test_a_rate_more_is_tried_beside_the_best_of_the_grid(best: float, tried: list[float]) -> None:
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
    # Of a world that is named alone, what is planned.
    assert {(each.world, each.task) for each in chosen(FULL, ["kills", "link"])} == {
        ("kills", "characters"),
        ("link", "digits"),
    }
    for unknown in ("slow-7/*/digits", "slow-7"):
        with pytest.raises(ValueError, match=re.escape(unknown)):
            chosen(FULL, ["slow-6/*/digits", unknown])


def test_a_part_of_the_plan_says_something_of_all() -> None:
    entrants = chosen(FULL)
    races = in_order(FULL, entrants)
    assert len(races) == len(set(races)) == sum(WORLDS[each.world].seeds for each in entrants)
    assert races[: len(entrants)] == [(each, FULL.seeds[0]) for each in entrants]
    assert {seed for each, seed in races if each.world == "kills"} == set(FULL.seeds)


def test_the_whole_takes_three_quarters_of_an_hour_and_the_quick_form_seconds() -> None:
    assert 30 * 60 < estimated_s(FULL, chosen(FULL)) <= 45 * 60
    assert estimated_s(QUICK, chosen(QUICK)) < 30
    assert FULL.tuning_seed not in FULL.seeds


def test_each_method_has_a_rate_of_its_own_or_another_methods() -> None:
    assert {len(METHODS[method].grid) for _, method in tuned(chosen(FULL))} == {TRIES - 1}
    assert {method for _, method in tuned(chosen(FULL, ["kills/torch*/digits"]))} == {"ddp"}


# A session


class Raced:
    """Runs races in no time; those of `broken` fail."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.races: list[Race] = []

    def __call__(self, race: Race, data: Path) -> dict[str, Any]:
        self.races.append(race)
        if race.method == self.broken:
            raise RuntimeError("process 2 ended with 1:\nits log")
        return {"steps": 1, "curve": [[0.0, 0, 2.0, 0.1], [race.seconds, 9, abs(race.lr - 0.01), 0.9]]}


def session(run: Raced, file: Path, seconds: float = inf) -> Session:
    return Session(FULL, Results(file), file.parent, run, seconds)


def test_what_is_there_is_not_run_again(tmp_path: Path) -> None:
    entrants, first, second = chosen(FULL, ["slow-2"]), Raced(), Raced()
    session(first, tmp_path / "results.json").race(entrants)
    trials = [race for race in first.races if race.seed == FULL.tuning_seed]
    assert len(trials) == TRIES * len(tuned(entrants)) and {race.world for race in trials} == {"equal"}
    raced = [race for race in first.races if race.seed != FULL.tuning_seed]
    assert [race.method for race in raced] == [each.method for each in entrants]
    # What each is raced with is the best of what was tried of it.
    assert {race.lr for race in raced if race.method in ("ddp", "sync", "ringmaster")} == {0.01}
    session(second, tmp_path / "results.json").race(entrants)
    assert second.races == []
    results = Results(tmp_path / "results.json")
    results.forget(chosen(FULL, ["slow-2/ringmaster/digits"]))
    session(second, tmp_path / "results.json").race(entrants)
    assert {race.method for race in second.races} == {"ringmaster"} and len(second.races) == TRIES + 1


def test_no_race_begins_that_would_end_too_late(tmp_path: Path) -> None:
    run = Raced()
    # Long enough for a race of 8 s, not for one of 30.
    short = session(run, tmp_path / "results.json", AROUND_S + 20.0)
    short.race(chosen(FULL, ["equal/sync/characters", "kills/sync/characters"]))
    assert not short.is_complete
    assert {race.world for race in run.races} == {"equal"}
    assert Results(tmp_path / "results.json").has(run.races[-1])


def test_a_race_that_fails_keeps_no_other_from_being_run(tmp_path: Path) -> None:
    run = Raced(broken="ringmaster")
    failing = session(run, tmp_path / "results.json")
    failing.race(chosen(FULL, ["slow-2"]))
    assert failing.failures == ["slow-2/ringmaster/digits"]
    results = Results(tmp_path / "results.json")
    assert results.missing == {"slow-2/ringmaster/digits": "with seed 0, process 2 ended with 1"}
    assert {race["method"] for race in results.races.values()} == {"ddp", "sync", "local", "diloco"}
    session(Raced(), tmp_path / "results.json").race(chosen(FULL, ["slow-2"]))
    assert Results(tmp_path / "results.json").missing == {}
