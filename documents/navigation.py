"""The order of the site's pages, by their paths in docs/."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["ELSEWHERE", "NAVIGATION", "Entries", "paths"]

Entries = list[tuple[str, "str | Entries"]]

ELSEWHERE = {
    "SECURITY.md": "security.md",
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "docker/README.md": "guides/compose.md",
    "README.md": "readme.md",
}
"""Pages of the site that are kept elsewhere in the repository than in docs/."""

NAVIGATION: Entries = [
    ("Start", [("Where to read", "index.md"), ("Five minutes", "start.md")]),
    (
        "Concepts",
        [
            ("x, y and z", "concepts/points.md"),
            ("Steps, staleness, epochs", "concepts/staleness.md"),
            ("Exactly once", "concepts/exactly-once.md"),
            ("Glossary", "glossary.md"),
        ],
    ),
    (
        "Guides",
        [
            ("Training", [
                ("A worker", "guides/worker.md"),
                ("From schedulefree", "guides/from-schedulefree.md"),
                ("Trainer, Lightning, Accelerate", "guides/frameworks.md"),
                ("Evaluators", "guides/evaluators.md"),
                ("Looking at a run", "guides/looking.md"),
                ("The dashboard", "dashboard.md"),
                ("Events and history", "events.md"),
                ("Curves in trackers", "follow.md"),
                ("Live control", "control.md"),
                ("Slow links", "guides/slow-links.md"),
                ("Regions", "guides/regions.md"),
                ("Data that counts once", "data-units.md"),
                ("Choosing a policy", "guides/policies.md"),
                ("Tuning", "guides/tuning.md"),
                ("BatchNorm", "guides/batchnorm.md"),
                ("Several GPUs", "guides/several-gpus.md"),
            ]),
            ("Running the service", [
                ("One box", "guides/one-box.md"),
                ("Compose", "guides/compose.md"),
                ("Kubernetes", "guides/kubernetes.md"),
                ("Spot instances, from zero", "spot-instances.md"),
                ("Tokens", "guides/tokens.md"),
                ("TLS", "guides/tls.md"),
                ("One run over several processes", "guides/shards.md"),
                ("Back up, restore, move", "guides/backup.md"),
                ("Upgrade", "guides/upgrade.md"),
            ]),
        ],
    ),
    (
        "Reference",
        [
            ("The protocol", "protocol.md"),
            ("HTTP API", "reference/http.md"),
            ("JSON", "reference/json.md"),
            ("Problems", "reference/problems/README.md"),
            ("Python", "reference/python.md"),
            ("Command", "reference/commands.md"),
            ("Settings", "reference/settings.md"),
            ("Metrics, alerts, traces, logs", "metrics.md"),
            ("Algorithms", "algorithms.md"),
            ("Hyperparameters", "reference/hyperparameters.md"),
        ],
    ),
    ("The lab", [("Evidence", "lab.md")]),
    ("Speed", [("Figures", "speed.md"), ("How far a service goes", "scale.md"), ("The race against DDP", "race.md")]),
    (
        "Reliability",
        [("Promises", "reliability.md"), ("The journal", "journal.md"), ("Runs under faults", "chaos.md")],
    ),
    ("Security", [("Security", "security.md")]),
    (
        "Decisions",
        [("Decisions", "decisions/README.md"), ("Architecture", "architecture.md"), ("Development", "development.md"),
         ("Changes", "changelog.md")],
    ),
]  # fmt: skip


def paths(entries: Entries) -> Iterator[str]:
    """The pages of the navigation."""
    for _, below in entries:
        if isinstance(below, str):
            yield below
        else:
            yield from paths(below)
