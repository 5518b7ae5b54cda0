"""`make chaos`: runs seeds, each a schedule of faults; prints what failed, with the shortest history that was found."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chaos.coverage import WINDOWS
from chaos.runner import Outcome, run, shortened
from chaos.schedule import scheduled

_TRIES = 8
_ALL = 40
"""Seeds that are enough to meet every window."""


def main() -> int:
    command = argparse.ArgumentParser(prog="python -m chaos", description=__doc__)
    command.add_argument("--seeds", type=int, default=_ALL, help="how many")
    command.add_argument("--first", type=int, default=0, help="the first one")
    command.add_argument(
        "--at-once", type=int, default=os.cpu_count() or 1, help="schedules that run beside each other"
    )
    command.add_argument("--bug", default="", help="a bug to put into the service: see chaos/service.py")
    command.add_argument("--keep", type=Path, default=None, help="the folder for histories; one of its own without")
    given = command.parse_args()
    folder = given.keep or Path(tempfile.mkdtemp(prefix="freestep-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    hit: Counter[str] = Counter()
    failed: list[Outcome] = []
    pushes = 0

    def carry_out(seed: int) -> Outcome:
        return run(scheduled(seed), folder / f"seed-{seed}", given.bug)

    with ThreadPoolExecutor(given.at_once) as threads:
        for outcome in threads.map(carry_out, range(given.first, given.first + given.seeds)):
            hit += outcome.windows
            pushes += outcome.pushes
            if outcome.faults:
                failed.append(outcome)
                print(outcome, flush=True)
            else:
                print(outcome.summary, flush=True)
            if not outcome.faults and given.keep is None:
                shutil.rmtree(outcome.folder, ignore_errors=True)
    for outcome in failed:
        seed = outcome.schedule.seed
        shortest = shortened(outcome, folder / f"seed-{seed}-shorter", _TRIES, given.bug)
        print(f"--- the shortest that failed of seed {seed}\n{shortest}", flush=True)
    print(f"{given.seeds} schedules, {pushes} pushes; windows: {dict(hit)}")
    missed = WINDOWS.keys() - hit.keys()
    for window in missed:
        print(f"never hit: {window} ({WINDOWS[window]})")
    # Few seeds cannot meet all of them.
    return 1 if failed or (missed and given.seeds >= _ALL) else 0


if __name__ == "__main__":
    raise SystemExit(main())
