"""A function in a script of the user's that measures x; its errors are shown as Python shows them."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from freestep.answers import Snapshot
from freestep.commands.shared import fail
from freestep.leaving import is_leaving

__all__ = ["UserFunction"]


class UserFunction:
    """The function that `SCRIPT.py:FUNCTION` names. What is wrong with it ends the command.

    The script is run as a module, so that code below `if __name__ == "__main__":` is not; its folder is in sys.path.
    """

    def __init__(self, reference: str) -> None:
        script, _, self._name = reference.rpartition(":")
        self._reference = reference
        if not script or not self._name.isidentifier():
            fail(2, f"{reference} is not of the form SCRIPT.py:FUNCTION")
        path = Path(script)
        if path.suffix != ".py" or not path.is_file():
            fail(2, f"there is no script {script}")
        found = getattr(self._load(path), self._name, None)
        if not callable(found):
            fail(2, f"{script} has no function {self._name}")
        self._function: Callable[..., Any] = found
        try:
            self._takes_step = "step" in inspect.signature(found).parameters
        except ValueError:
            # Of some functions that are written in C nobody can tell.
            self._takes_step = False

    def __call__(self, x: Snapshot) -> dict[str, float]:
        """The metrics at x; a number that is returned alone is called like the function."""
        try:
            returned = self._function(x, step=x.step) if self._takes_step else self._function(x)
        except SystemExit as error:
            _require_code(error, f"{self._reference} called sys.exit() at step {x.step}, and returned no metrics")
            raise
        except Exception as error:
            self._fail(f"{self._reference} failed at step {x.step}", error)
        metrics = returned if isinstance(returned, Mapping) else {self._name: returned}
        try:
            return {str(name): float(value) for name, value in metrics.items()}
        except (TypeError, ValueError, OverflowError, RuntimeError):
            fail(1, f"{self._reference} returned {returned!r}: a number, or a dict of numbers by name, is needed")

    def _load(self, path: Path) -> Any:
        # Processes that the script starts may import it by this name.
        name = path.stem if path.stem not in sys.modules else f"evaluated_{path.stem}"
        sys.path.insert(0, str(path.resolve().parent))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except SystemExit as error:
            _require_code(
                error,
                f"{path} called sys.exit() before anything was evaluated: put what it does as a program below "
                "`if __name__ == '__main__':`",
            )
            raise
        except Exception as error:
            self._fail(f"{path} failed", error)
        return module

    def _fail(self, what: str, error: Exception) -> NoReturn:
        """Shows the user's part of the traceback."""
        place = error.__traceback__
        while place is not None and place.tb_frame.f_code.co_filename.startswith((__file__, "<frozen importlib")):
            place = place.tb_next
        sys.stderr.write("".join(traceback.format_exception(type(error), error, place)))
        fail(1, f"{what}: {type(error).__name__}: {error}")


def _require_code(end: SystemExit, message: str) -> None:
    """Ends the command with a message where the script has ended it as if it had done its work."""
    if not (end.code or is_leaving()):
        fail(1, message)
