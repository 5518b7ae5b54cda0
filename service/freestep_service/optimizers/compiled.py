"""The seam to numba, which compiles loops for the CPU: to machine code, without the GIL, kept on disk.

Loops are compiled to IEEE arithmetic, in which vector instructions give what scalar ones do: what comes out for an
element does not depend on where in a vector it stands, and so not on how a model is cut into shards. Numbers that
loops are given are fp32, and rules hold no literals: a single double would make doubles of all.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
import torch
from llvmlite import binding
from numba import config, njit, types
from numba.extending import overload, register_jitable
from torch import Tensor

__all__ = ["compiled", "inlined", "is_compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def _cache() -> Path | None:
    """Where machine code is kept, in a folder for just these sources and this kind of processor; None where nothing can
    be written.

    numba itself looks at the file of the loop alone, and would go on with the machine code of an older rule.
    """
    features = binding.get_host_cpu_features().flatten()
    digest = sha256(repr((numba.__version__, binding.get_host_cpu_name(), features)).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    try:
        folder = _caches() / digest.hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK) else None


def _caches() -> Path:
    """The user's folder for what can be made again. Raises RuntimeError where there is no home."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "freestep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "freestep"


_CACHE = _cache()
if _CACHE is not None:
    vars(config)["CACHE_DIR"] = str(_CACHE)


def compiled(loop: F, name: str = "", *, reassociate: bool = False) -> F:
    """The loop as machine code, made for the types it is first called with.

    name: of what it carries, where the same lines make several loops. numba keeps a file for each name; services that
        start at the same time could take one loop for another if they shared it.
    reassociate: sums may be taken in any order, as vector instructions take them; NaN and infinity stay what they are.
    """
    if name:
        loop.__qualname__ += f".{name}"
    fastmath = {"reassoc"} if reassociate else False
    return cast(F, njit(nogil=True, error_model="numpy", fastmath=fastmath, cache=_CACHE is not None)(loop))


def inlined(rule: F) -> F:
    """The function itself, which compiled loops may call from now on."""
    return register_jitable(rule)


def is_compiled(vector: Tensor) -> bool:
    """Whether it is for compiled loops: what is not on the host, or not fp32, is for torch."""
    return vector.device.type == "cpu" and vector.dtype == torch.float32


def _sqrt(x: Any) -> Callable[[Any], Any] | None:
    return (lambda x: math.sqrt(x)) if isinstance(x, types.Float) else None


# Rules take roots by torch's name, of tensors as of numbers.
overload(torch.sqrt, strict=False)(_sqrt)
