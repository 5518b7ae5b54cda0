"""What needs no tensors does not import torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

import freestep


def imported_by(program: str) -> set[str]:
    """The top-level modules that a new process has imported at the end of a program."""
    report = "; import sys; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", program + report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "program",
    [
        "import freestep.cli",
        "import freestep; freestep.Client('http://127.0.0.1:9').run('any'); freestep.RunSpec; freestep.RunNotFound",
    ],
)
def test_the_command_and_the_control_plane_do_not_import_torch(program: str) -> None:
    assert not imported_by(program) & {"torch", "numpy", "freestep_service"}


def test_names_that_need_torch_are_imported_when_they_are_used() -> None:
    assert "torch" in imported_by("from freestep import *; assert issubclass(LocalSteps, RemoteOptimizer)")


@pytest.mark.parametrize("name", freestep.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert name in dir(freestep)
    assert getattr(freestep, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = freestep.nothing
