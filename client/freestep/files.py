"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

__all__ = ["is_stdout", "writing"]

_STDOUT = 1


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file to write, which has its new content once the block ends, or else is as it was before.

    Its mode stays. Of a link, that is the file to which it leads. What is no regular file, such as a pipe or a device,
    is written through, and so is the process's standard output. Raises OSError.
    """
    if is_stdout(path):
        with open(_STDOUT, "wb", closefd=False) as file:
            yield file
        return
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    # Containers that share a directory have the same process numbers.
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            with suppress(FileNotFoundError):
                _take_mode(file.fileno(), target)
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _take_mode(descriptor: int, path: Path) -> None:
    """Gives an open file the mode of another: what was its owner's alone stays so. Raises OSError."""
    mode = stat.S_IMODE(path.stat().st_mode)
    # Some file systems have one mode for all files, and refuse to be given any.
    if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
        os.fchmod(descriptor, mode)


def is_stdout(path: Path) -> bool:
    """Whether a path is "-", or leads to what the process's standard output is, as /dev/stdout does."""
    try:
        return str(path) == "-" or os.path.samestat(os.stat(path), os.fstat(_STDOUT))
    except OSError:
        return False
