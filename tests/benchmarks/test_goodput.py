"""The benchmark of goodput: its schedule of kills, its accounts, the DDP job's checkpoint, and a short run of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from schedulefree import AdamWScheduleFree

from benchmarks.goodput import torchrun
from benchmarks.goodput.accounting import Outcome, account, pushes_behind
from benchmarks.goodput.ddp import load_checkpoint, save_checkpoint
from benchmarks.goodput.kills import SERVICE, Kill, schedule
from benchmarks.goodput.ledger import APPLIED, COMPUTED, SEEDED, Entry, Ledger, entries
from benchmarks.goodput.plot import draw
from benchmarks.goodput.supervisor import Supervisor
from freestep.demo.data import load

ROOT = Path(__file__).parents[2]


def test_kills_are_a_function_of_the_seed_and_come_as_often_as_said() -> None:
    kills = schedule(1, 5.0, 50_000.0, 2)
    assert kills == schedule(1, 5.0, 50_000.0, 2) != schedule(2, 5.0, 50_000.0, 2)
    assert len(kills) == pytest.approx(10_000, rel=0.05)
    assert [kill.at for kill in kills] == sorted(kill.at for kill in kills)
    assert {kill.victim for kill in kills} == {SERVICE, 0, 1}


def test_entries_of_several_writers_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "ledger"
    assert entries(file) == []
    one, other = Ledger(file), Ledger(file)
    computed = one.append(COMPUTED, 0, 7)
    applied = other.append(APPLIED, 1, 8, computed)
    assert computed <= applied
    assert entries(file) == [Entry(COMPUTED, 0, 7, computed, computed), Entry(APPLIED, 1, 8, applied, computed)]


def test_a_wait_ends_with_the_first_applied_push_that_was_computed_after_the_kill() -> None:
    found = [
        *(Entry(COMPUTED, 0, step, float(step), float(step)) for step in range(4)),
        # It was on its way at the first kill.
        Entry(APPLIED, 0, 1, 2.0, 0.5),
        Entry(APPLIED, 0, 2, 4.0, 3.0),
    ]
    outcome = account("job", 5.0, 10.0, found, [Kill(1.0, 0), Kill(2.5, SERVICE), Kill(9.0, SERVICE)], 2)
    assert (outcome.computed, outcome.useful, outcome.share) == (4, 2, 0.5)
    assert (outcome.after_worker, outcome.after_service) == ([3.0], [1.5, None])


def test_pushes_behind_a_run_are_those_of_the_weights_that_began_it_last() -> None:
    assert pushes_behind([Entry(COMPUTED, 0, 3, 0.0, 0.0)]) == 0
    assert (
        pushes_behind([Entry(SEEDED, 0, 0, 0.0, 0.0), Entry(SEEDED, 1, 40, 1.0, 1.0), Entry(APPLIED, 0, 1, 2.0, 2.0)])
        == 40
    )


def test_a_ddp_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def fresh() -> tuple[torch.nn.Linear, AdamWScheduleFree]:
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)
        optimizer = AdamWScheduleFree(net.parameters(), lr=0.1)
        optimizer.train()
        return net, optimizer

    def train(net: torch.nn.Linear, optimizer: AdamWScheduleFree) -> None:
        optimizer.zero_grad()
        net(torch.ones(3)).sum().backward()
        optimizer.step()

    file = tmp_path / "checkpoint.pt"
    one, other = fresh(), fresh()
    assert load_checkpoint(file, *one) == 0
    train(*one)
    save_checkpoint(file, *one, 1)
    assert load_checkpoint(file, *other) == 1
    other[1].train()
    train(*one)
    train(*other)
    assert torch.equal(one[0].weight, other[0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("waits", [[], [None], [0.5, None]])
def test_runs_are_drawn_whatever_the_waits_after_kills(tmp_path: Path, waits: list[float | None]) -> None:
    draw([Outcome("freestep, journal", mean, 10.0, 5, 4, waits, []) for mean in (5.0, 15.0)], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_ranks_of_a_ddp_job_come_back_after_one_was_killed(tmp_path: Path) -> None:
    load(tmp_path / "digits.pt")
    given = [str(tmp_path / name) for name in ("digits.pt", "ledger", "checkpoint.pt")]
    supervisor = Supervisor(tmp_path / "log", torchrun.ENVIRONMENT)

    def all_step(since: float) -> bool:
        found = entries(tmp_path / "ledger")
        return {each.worker for each in found if each.kind == APPLIED and each.computed > since} == {0, 1}

    try:
        supervisor.keep(0, torchrun.arguments(2, "benchmarks.goodput.ddp", [*given, "1000", str(tmp_path / "stop")]))
        for killed in (1, 0):
            began = time.monotonic()
            while not all_step(began):
                assert supervisor.failures == []
                time.sleep(0.05)
            torchrun.kill_rank(tmp_path, killed)
        ended = time.monotonic()
        while not all_step(ended):
            time.sleep(0.05)
    finally:
        supervisor.end([0])
    # At its first start and after each kill, and at no other time.
    assert (tmp_path / "log").read_text().count("failed (exitcode") == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_short_run_counts_every_job(tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    command = [sys.executable, "-m", "benchmarks.goodput", "--quick", "--json", "--plot", str(plot)]
    done = subprocess.run([*command, "--durabilities", "checkpoint"], cwd=ROOT, check=True, capture_output=True)
    runs = json.loads(done.stdout)["runs"]
    assert [run["job"] for run in runs] == ["freestep, checkpoint", "DDP, torchrun"]
    assert all(0 < run["computed"] and 0 <= run["useful"] <= run["computed"] for run in runs)
    assert plot.read_bytes().startswith(b"\x89PNG")
