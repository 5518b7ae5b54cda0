"""The code of docs/data-units.md runs, block after block, as a reader would run it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from freestep import Client
from harness import ThreadService

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "data-units.md"
FILES = 4


def test_every_block_runs_and_ends_with_the_last_unit(
    service: ThreadService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shards").mkdir()
    for number in range(FILES):
        examples = [(torch.full((20,), float(number)), torch.tensor(number % 2)) for _ in range(40)]
        torch.save(examples, tmp_path / "shards" / f"{number}.pt")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    runs = []
    for block in blocks:
        runs += re.findall(r'run="(\w+)"', block)
        text = block.replace("http://127.0.0.1:8000", service.url)
        exec(compile(text, str(DOCUMENT), "exec"), names)
    assert runs == ["units", "files", "rounds"]
    with Client(service.url) as client:
        found = {run: client.run(run).data().status() for run in runs}
        for run in runs:
            client.run(run).delete()
    assert all(each.exhausted and not each.holders for each in found.values())
    assert [each.examples_done for each in found.values()] == [2000, FILES, 1000]
