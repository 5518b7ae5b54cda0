"""The weights at which a metric was best, in a file."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from freestep.answers import Snapshot
from freestep.errors import EpochChanged, FreestepError, IdempotencyConflict, MalformedTensors
from freestep.export import write_safetensors
from freestep.files import is_stdout
from freestep.tensor_file import read_tensors

__all__ = ["BestWeights", "Mode", "needs_mode"]

logger = logging.getLogger("freestep")

_RUN_ID = "freestep.run_id"

Mode = Literal["max", "min"]
"""Whether larger or smaller values are better."""

_SMALLER_IS_BETTER = {
    "bpb", "bpc", "cer", "entropy", "err", "error", "loss", "mae", "mse", "nll", "perplexity", "ppl", "rmse", "wer",
}  # fmt: skip
"""Words in the names of metrics that are usually minimized."""


def needs_mode(metric: str) -> bool:
    """Whether a metric's name says that smaller values may be better, so that the mode has to be said."""
    return not _SMALLER_IS_BETTER.isdisjoint(re.split(r"[^a-z]+", metric.lower()))


class BestWeights:
    """Reports a metric, and keeps x of its best value in a safetensors file; made by `Run.keep_best`.

    The file is replaced as a whole. Its metadata has the run, epoch and step of x, the metric, its value and the mode,
    so an evaluator that is started anew continues with it. Attributes: `value`, `epoch` and `step` of the best x, None
    before there is one; `metric`, `mode` and `path`.

    Example:
        >>> best = run.keep_best("accuracy", "best.safetensors")
        >>> for step, x in run.watch("x", every=100):
        ...     best(x, accuracy(x))

    Args:
        report: Reports a value, as `Run.report` does.
        read_id: Reads the run's id, None where the service tells none.
        run: The run's name.
        metric: As for `Run.keep_best`.
        path: As for `Run.keep_best`.
        mode: As for `Run.keep_best`.
    """

    def __init__(
        self,
        report: Callable[..., Any],
        read_id: Callable[[], str | None],
        run: str,
        metric: str,
        path: Path,
        mode: Mode | None,
    ) -> None:
        if mode not in (None, *get_args(Mode)):
            raise FreestepError(f'mode must be "max" or "min", not {mode!r}')
        if mode is None and needs_mode(metric):
            raise FreestepError(f'is a smaller or a larger {metric!r} better? Say mode="min" or mode="max"')
        self.metric = metric
        self.mode: Mode = mode or "max"
        self.path = path
        self.value: float | None = None
        self.epoch: int | None = None
        self.step: int | None = None
        self._report = report
        self._found_id: str | None = None
        """The id of the run whose weights the file has."""
        self._metadata = {"freestep.run": run, "freestep.metric": metric, "freestep.mode": self.mode}
        self._read_id = read_id
        if is_stdout(path) or (path.exists() and not path.is_file()):
            raise FreestepError(f"{path} is no regular file: the weights are replaced as a whole")
        if path.exists():
            self._continue()

    def __call__(self, x: Snapshot, value: float) -> bool:
        """Reports the metric's value at x, and writes x to the file if no value has been better.

        A value that the service does not take is not kept either, and a warning is logged: the run went back to an
        earlier step meanwhile, or another value was reported for this step.

        Args:
            x: From `Run.watch` or `Run.pull`.
            value: The metric's value at x, finite.

        Returns:
            Whether x was written to the file.

        Raises:
            FreestepError: These are not x of the run; or the file is of an earlier run of its name.
            OSError: The file cannot be written; it is as it was before.
        """
        if not isinstance(x, Snapshot) or (x.run, x.point) != (self._metadata["freestep.run"], "x"):
            raise FreestepError(f"{self.metric!r} is of x of the run {self._metadata['freestep.run']!r}: pass what "
                                "Run.watch or Run.pull has given")  # fmt: skip
        value = float(value)
        self._require_same_run()
        try:
            self._report(self.metric, value, x.step, epoch=x.epoch)
        except (EpochChanged, IdempotencyConflict) as error:
            logger.warning("%s %g at step %d is not kept: %s", self.metric, value, x.step, error)
            return False
        if self.value is not None and not (value > self.value if self.mode == "max" else value < self.value):
            return False
        write_safetensors(self.path, x, {**self._metadata, "freestep.value": repr(value)})
        self.value, self.epoch, self.step = value, x.epoch, x.step
        return True

    def _require_same_run(self) -> None:
        """At the first value, since there need be no run before."""
        if _RUN_ID not in self._metadata:
            run_id = self._read_id() or ""
            if self._found_id not in (None, run_id):
                raise FreestepError(f"{self.path} is of an earlier run of this name: name another file")
            self._metadata[_RUN_ID] = run_id

    def _continue(self) -> None:
        """Reads from the file what was best."""
        try:
            _, metadata = read_tensors(self.path)
            self.value = float(metadata["freestep.value"])
            self.epoch, self.step = int(metadata["freestep.epoch"]), int(metadata["freestep.step"])
            self._found_id = metadata[_RUN_ID]
        except (MalformedTensors, KeyError, ValueError):
            raise FreestepError(f"{self.path} exists and was not written by keep_best: name another file") from None
        for key, wanted in self._metadata.items():
            if (found := metadata.get(key)) != wanted:
                word = key.removeprefix("freestep.")
                raise FreestepError(f"{self.path} has the {word} {found!r}, not {wanted!r}: name another file")
