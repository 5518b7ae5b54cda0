"""Curves as TensorBoard's files: DIR/RUN has those of a run, so that `tensorboard --logdir DIR` compares runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tensorboard.summary import Writer

__all__ = ["TensorBoard", "opened"]


class TensorBoard:
    """A tracker that writes a file which TensorBoard reads.

    Args:
        writer: Of the file.
    """

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds points, which are in the file by then."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step=step)
        self._writer.flush()


@contextmanager
def opened(place: str, run: str, key: str) -> Iterator[TensorBoard]:
    """Opens a new file; TensorBoard joins those of a directory. Raises OSError."""
    writer = Writer(str(Path(place) / run))
    try:
        yield TensorBoard(writer)
    finally:
        writer.close()
