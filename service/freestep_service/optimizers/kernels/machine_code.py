"""Where numba keeps the machine code of compiled loops, so that only the first start on a machine compiles them.

numba compares the modification time of the file that a loop stands in with that of its code, and so would reuse the
code of a loop whose rule, in another file, has changed. Hence each version of these sources has a directory of its own,
as has each kind of processor, since the code is for its instructions.
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from pathlib import Path

import numba
from llvmlite import binding

__all__ = ["cache_directory"]


_PACKAGE = Path(__file__).parents[1]


def cache_directory(package: Path = _PACKAGE) -> Path | None:
    """The directory for the code of a package's sources, which exists; None where none can be written."""
    features = binding.get_host_cpu_features().flatten()
    digest = sha256(repr((numba.__version__, binding.get_host_cpu_name(), features)).encode())
    for source in sorted(package.rglob("*.py")):
        digest.update(source.read_bytes())
    try:
        directory = _caches() / digest.hexdigest()[:16]
        directory.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return directory if os.access(directory, os.W_OK) else None


def _caches() -> Path:
    """The user's directory for what can be made again. Raises RuntimeError where there is no home."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "freestep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freestep"
