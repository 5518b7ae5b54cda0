"""The condition of a Redis that answers: what is wrong with it, which a service can be told of and cannot mend."""

from __future__ import annotations

from collections.abc import Mapping

from freestep_service.coordination.identity import IDENTITY_KEY
from freestep_service.coordination.nodes import NODE_HOSTS_KEY, NODES_KEY
from freestep_service.coordination.run_scripts import DELETED_KEY, DELETION_TIMES_KEY, RUNS_KEY
from freestep_service.coordination.secret import SECRET_KEY
from freestep_service.coordination.store import LAYOUT_KEY, Evicts, Store, reachable
from freestep_service.coordination.tokens import TOKEN_USES_KEY, TOKENS_KEY

__all__ = ["SHARED_KEYS", "faults"]

SHARED_KEYS: Mapping[str, str] = {
    RUNS_KEY: "set",
    NODES_KEY: "zset",
    NODE_HOSTS_KEY: "hash",
    LAYOUT_KEY: "string",
    DELETED_KEY: "hash",
    DELETION_TIMES_KEY: "zset",
    IDENTITY_KEY: "string",
    SECRET_KEY: "string",
    TOKENS_KEY: "hash",
    TOKEN_USES_KEY: "hash",
}
"""The keys that belong to no run, and their types."""


async def faults(store: Store) -> list[str]:
    """What is wrong, and what to do, each as a sentence without its end. Raises CoordinatorUnavailable."""
    found = []
    for policy in await store.eviction_policies():
        if policy not in (None, "noeviction"):
            found.append(f"Redis {Evicts(policy)}")
    with reachable():
        pipeline = store.client.pipeline(transaction=False)
        for key in SHARED_KEYS:
            pipeline.type(key)
        types = await pipeline.execute()
    for (key, expected), actual in zip(SHARED_KEYS.items(), types, strict=True):
        if actual not in (expected, "none"):
            found.append(
                f"WRONGTYPE {key} is a {actual} and not a {expected}: another program wrote it, DEL it, and it is "
                "written again"
            )
    return list(dict.fromkeys(found))
