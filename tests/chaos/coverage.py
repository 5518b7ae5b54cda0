"""Which of the moments that matter a history has hit: a run of the chaos tests that never met them proves nothing."""

from __future__ import annotations

from collections import Counter

from chaos.history import History
from chaos.service import BETWEEN

__all__ = ["WINDOWS", "windows"]

WINDOWS = {
    "replayed": "a retry met its receipt",
    "retried": "a push whose answer was lost was sent again",
    "killed between": "a process died after a push was staged and before it was answered",
    "taken over": "so did the owner of some of several shards, while others had their parts",
    "behind": "Redis had lost what a shard had seen",
    "fenced": "a push came under a lease that had ended or was fenced off",
    "torn": "the end of a journal was torn",
    "went back": "the run went back to a checkpoint",
    "dropped": "a push was too stale",
}


def windows(history: History) -> Counter[str]:
    """How often each window was hit."""
    found: Counter[str] = Counter()
    is_sharded = any(each.part is not None for push in history.pushes.values() for each in push.attempts)
    for push in history.pushes.values():
        found["replayed"] += any(each.receipt and each.receipt.replayed for each in push.receipts)
        found["retried"] += len(push.attempts) > 1 and push.attempts[0].end == "unknown"
        found["fenced"] += any(each.reason == "lease-expired" for each in push.attempts)
        found["dropped"] += push.receipt is not None and push.receipt.decision == "dropped"
    for line in history.seen:
        found["behind"] += line["what"] == "behind"
        found["torn"] += line["what"] == "torn"
        if line["what"] == "hit" and line["point"] in BETWEEN and line["action"] in ("kill", "segv", "power"):
            found["killed between"] += 1
            found["taken over"] += is_sharded
    found["went back"] += len({pull.epoch for pull in history.pulls}) > 1
    return +found
