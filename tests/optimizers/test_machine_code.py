"""Folders of machine code: those that were not used for long are removed, and nothing else is."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

from forked import Script
from freestep_service.optimizers.kernels.machine_code import UNUSED_S, prune


def folder(caches: Path, name: str, unused_s: float, now: float) -> Path:
    """A folder with code in it that was last used so many seconds ago."""
    made = caches / name
    (made / "sweep_1234").mkdir(parents=True)
    (made / "sweep_1234" / "sweep.nbi").write_bytes(b"code")
    os.utime(made, (now - unused_s, now - unused_s))
    return made


def filled(caches: Path) -> set[str]:
    """Makes folders of several ages; those that are to stay."""
    caches.mkdir(exist_ok=True)
    now = caches.stat().st_mtime
    kept = {
        folder(caches, "0" * 16, 0, now),
        folder(caches, "1" * 16, UNUSED_S - 60, now),
        # Other programs' own, or not a folder of code at all.
        folder(caches, "torch", 2 * UNUSED_S, now),
        folder(caches, "2" * 15, 2 * UNUSED_S, now),
        folder(caches, ".other", 2 * UNUSED_S, now),
    }
    for number in range(8):
        folder(caches, f"{number:016x}"[::-1] if number else "f" * 16, UNUSED_S + 60, now)
    folder(caches, f".{'a' * 16}.going-01234567", UNUSED_S + 60, now)
    return {each.name for each in kept}


def test_folders_unused_for_long_are_removed(tmp_path: Path) -> None:
    kept = filled(tmp_path)
    prune(tmp_path / ("0" * 16))
    assert {each.name for each in tmp_path.iterdir()} == kept
    assert all((each / "sweep_1234" / "sweep.nbi").exists() for each in tmp_path.iterdir())


FOLDER = """
import sys, warnings
from freestep_service.optimizers.kernels.machine_code import folder_of_code
warnings.simplefilter("error")
print("ready", flush=True)
sys.stdin.readline()
print(folder_of_code(), flush=True)
"""


def test_processes_that_start_at_once_prune_together(tmp_path: Path) -> None:
    with ExitStack() as stack:
        scripts = [stack.enter_context(Script(FOLDER, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(4)]
        assert [script.read_line() for script in scripts] == ["ready"] * 4
        first, *others = scripts
        first.write_line("")
        own = Path(first.read_line())
        kept = filled(tmp_path)
        # The folder in use is as old as those to be removed.
        long_ago = own.stat().st_mtime - 2 * UNUSED_S
        os.utime(own, (long_ago, long_ago))
        for script in others:
            script.write_line("")
        assert [script.read_line() for script in others] == [str(own)] * 3
    assert {each.name for each in tmp_path.iterdir()} == {*kept, own.name}
    assert own.stat().st_mtime > long_ago
