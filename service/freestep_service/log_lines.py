"""Lines of the log: for people, or of JSON for programs.

The law of this file: one event is one line, whatever its text. A message that begins with `run %s` is of that run;
other fields (worker, step, key, ...) are given as `extra` where the line is written.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal

__all__ = ["JsonLines", "PeoplesLines", "set_up_logging"]

_STANDARD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName", "color_message"}
"""What every record has, and what uvicorn adds for terminals."""
_OF_A_RUN = "run %s"


class PeoplesLines(logging.Formatter):
    """Time, level, logger and message. A name from elsewhere begins no line and moves no cursor."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without its traceback."""
        return _printable(super().formatMessage(record))


class JsonLines(logging.Formatter):
    """An object a line: time (UTC), level, logger, message, the record's own fields, and error, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        document: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            document["error"] = self.formatException(record.exc_info)
        return json.dumps(document, default=str)


def set_up_logging(level: str, format: Literal["text", "json"]) -> None:
    """Has the process's lines written to stderr.

    Args:
        level: The lowest of the service's own that is. Of libraries nothing below `info` is, since they tell at `debug`
            what they send, credentials of a storage among it.
        format: Of which kind they are.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JsonLines() if format == "json" else PeoplesLines())
    lowest = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(lowest, logging.INFO), handlers=[handler])
    logging.getLogger("freestep").setLevel(lowest)
    # It logs every request that is relayed.
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    found = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    is_of_a_run = isinstance(record.msg, str) and record.msg.startswith(_OF_A_RUN)
    if is_of_a_run and isinstance(record.args, tuple) and record.args:
        found.setdefault("run", record.args[0])
    return found


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
