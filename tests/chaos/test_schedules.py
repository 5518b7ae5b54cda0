"""The seeds that every run of the tests carries out, and bugs that they have to find."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import pytest

from chaos.coverage import WINDOWS
from chaos.runner import Outcome, run, shortened
from chaos.schedule import Schedule, scheduled
from chaos.service import BUGS

SEEDS = 40
AT_ONCE = 4
"""Schedules wait more than they compute."""
_TRIES = 4
_BUG_TRIES = 16
"""Most bugs are found by the first or second schedule that can meet them."""
OBJECTIONS = {
    "deduplication": ("counts [2.0", "has receipts that differ", "was decided 2 times"),
    "fencing": ("counts under token",),
    "release": ("counts [", "is missing"),
    "units": ("counts 2 times",),
    "fsync": ("is missing", "is lost"),
    "changes": ("counts [", "and the rate was of"),
}
"""What tells of a bug."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_no_schedule_loses_or_repeats_a_push(tmp_path: Path) -> None:
    def carry_out(seed: int) -> Outcome:
        return run(scheduled(seed), tmp_path / f"seed-{seed}")

    with ThreadPoolExecutor(AT_ONCE) as threads:
        outcomes = list(threads.map(carry_out, range(SEEDS)))
    failed = next((outcome for outcome in outcomes if outcome.faults), None)
    if failed is not None:
        pytest.fail(str(shortened(failed, tmp_path / "shorter", _TRIES)))
    hit = sum((outcome.windows for outcome in outcomes), Counter[str]())
    assert hit.keys() == WINDOWS.keys()


def fit_for(bug: str) -> Iterator[Schedule]:
    """The schedules of these seeds that can meet a bug."""
    for seed in range(SEEDS):
        made = scheduled(seed)
        meets = {
            "fencing": any(fault.kind == "worker-twin" for fault in made.faults),
            "changes": any(fault.kind == "change" for fault in made.faults),
            # Another store would know that something is lost, and the service would refuse to go on without it.
            "fsync": made.durability == "journal"
            and made.store == "embedded"
            and any(fault.detail.endswith("power") for fault in made.faults),
        }
        if meets.get(bug, True):
            yield made


@pytest.mark.parametrize("bug", BUGS)
def test_bugs_that_are_put_in_are_found(bug: str, tmp_path: Path) -> None:
    # A schedule that is carried out again meets other moments.
    tries = enumerate(islice(cycle(fit_for(bug)), _BUG_TRIES))
    outcomes = (run(made, tmp_path / str(number), bug) for number, made in tries)
    assert any(told in fault for outcome in outcomes for fault in outcome.faults for told in OBJECTIONS[bug])
