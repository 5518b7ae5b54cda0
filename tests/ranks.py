"""Two ranks of a torch.distributed group, each a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from forked import Script
from ports import free_port

__all__ = ["run_ranks"]


def run_ranks(script: Path, *arguments: str, called: Sequence[str] = ("RANK",), **environment: str) -> None:
    """Runs a script as both ranks, until they have ended without an error.

    called: the variables that tell a process its number. environment: of both, beside the place where they meet.
    """
    # As torchrun gives its processes.
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **environment}
    with ExitStack() as stack:
        numbered = [{**group, **dict.fromkeys(called, str(number))} for number in range(2)]
        scripts = [stack.enter_context(Script(script, *arguments, **each)) for each in numbered]
        assert [each.wait() for each in scripts] == [0, 0]
