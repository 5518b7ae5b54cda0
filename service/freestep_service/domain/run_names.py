"""Which texts name a run."""

from __future__ import annotations

import re

__all__ = ["LONGEST_NAME", "RUN_NAME", "is_run_name"]

LONGEST_NAME = 128
"""Characters."""
RUN_NAME = rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{LONGEST_NAME - 1}}}"
"""A regular expression."""
_RUN_NAME = re.compile(RUN_NAME)


def is_run_name(text: str) -> bool:
    """Whether a run may have this name."""
    return _RUN_NAME.fullmatch(text) is not None
