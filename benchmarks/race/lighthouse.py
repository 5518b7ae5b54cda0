"""torchft's lighthouse, by which its replicas find each other: `python -m benchmarks.race.lighthouse PORT REPLICAS`."""

from __future__ import annotations

import sys
import threading

from torchft.coordination import LighthouseServer

_TICK_MS, _HEARTBEAT_MS, _JOIN_MS = 20, 1000, 100
"""Who is silent for the second of these counts as dead."""


def main() -> None:
    server = LighthouseServer(
        bind=f"[::]:{sys.argv[1]}",
        min_replicas=1,
        join_timeout_ms=_JOIN_MS,
        quorum_tick_ms=_TICK_MS,
        heartbeat_timeout_ms=_HEARTBEAT_MS,
    )
    assert server.address()
    threading.Event().wait()


if __name__ == "__main__":
    main()
