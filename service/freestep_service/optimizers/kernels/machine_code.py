"""Where the machine code of compiled loops is kept, so that only the first start on a machine compiles them.

numba looks at the file of a loop alone, and would go on with the machine code of an older rule. So the code of these
sources, on this kind of processor, has a folder of its own among the caches; and the folders of other versions are
removed when none has used them for long.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import numba
from llvmlite import binding

__all__ = ["folder_of_code", "prune"]

UNUSED_S = 30 * 24 * 3600.0
"""Seconds for which a folder is kept after its last use."""
_OURS = re.compile(r"[0-9a-f]{16}")
_GOING = re.compile(r"\.[0-9a-f]{16}\.going-[0-9a-f]{8}")
"""Of a folder that is being removed, or whose removal was cut short."""


def folder_of_code() -> Path | None:
    """The folder for the code of these sources; None where nothing can be written.

    That it is used now is noted in its time of modification.
    """
    features = binding.get_host_cpu_features().flatten()
    digest = sha256(repr((numba.__version__, binding.get_host_cpu_name(), features)).encode())
    for source in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = _caches() / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except (OSError, RuntimeError):
        return None
    with suppress(OSError):
        prune(folder)
    return folder if os.access(folder, os.W_OK) else None


def _caches() -> Path:
    """The user's folder for what can be made again. Raises RuntimeError where there is no home."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "freestep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freestep"


def prune(used: Path) -> None:
    """Removes the folders beside one that is used now which were last used UNUSED_S before it.

    Any number of processes may do so at once, and start with what one of them removes: a folder goes under another
    name first, which only one of them can give it, and whoever misses its code compiles it again. Nothing else in the
    directory is touched, which may be other programs' too.
    """
    now = used.stat().st_mtime
    for other in list(used.parent.iterdir()):
        with suppress(OSError):
            if now - other.stat().st_mtime < UNUSED_S:
                continue
            if _OURS.fullmatch(other.name):
                other = other.rename(other.with_name(f".{other.name}.going-{secrets.token_hex(4)}"))
            elif not _GOING.fullmatch(other.name):
                continue
            shutil.rmtree(other, ignore_errors=True)
