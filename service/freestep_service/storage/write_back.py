"""Has the kernel write a part of a file to its disk before anybody waits for it, where the system can be told to."""

from __future__ import annotations

import ctypes

__all__ = ["begin_write_back"]

_WRITE = 2
"""SYNC_FILE_RANGE_WRITE, of linux/fs.h."""
_call = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _call is not None:
    _call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


def begin_write_back(descriptor: int, at: int, length: int) -> None:
    """Begins to write a range to the disk; on Linux only.

    It promises nothing, and what goes wrong, such as a file system that does not have it, the next fdatasync says.
    """
    if _call is not None:
        _call(descriptor, at, length, _WRITE)
