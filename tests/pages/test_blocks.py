"""Every block of code of the documents runs, in its order and with what its document has prepared; or says why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

import freestep
from freestep.errors import FreestepError
from harness import TOKEN, ThreadService
from meanwhile import DEADLINE_S
from pages.blocks import LANGUAGES, Block, blocks_of, documents, indented_blocks, unknown_in

TESTED_ELSEWHERE = {
    "docs/data-units.md": {"python"},  # tests/client/test_documented_units.py
    "docs/spot-instances.md": {"bash"},  # tests/deploy/test_recipe.py
}
TRAINS = "docs/guides/worker.md"
"""The document whose blocks train the run `readme` ..."""
AFTER_TRAINING = {
    *(f"docs/guides/{name}.md" for name in ("backup", "evaluators", "looking")),
    *(f"docs/{name}.md" for name in ("dashboard", "events", "follow")),
}
"""... which these look at."""
NOT_RUN = [
    pytest.param(block, id=f"{block.document}:{block.line}")
    for document in documents()
    for block in blocks_of(document)
    if block.language == "bash" and not block.is_run
]


@pytest.fixture
def names(service: ThreadService) -> Iterator[dict[str, Any]]:
    """What blocks of Python find, and leave to the next ones; optimizers are closed."""
    found: dict[str, Any] = {
        "accuracy": lambda model: 1.0,
        "cross_entropy": cross_entropy,
        "freestep": freestep,
        "model": torch.nn.Linear(20, 2),
        "torch": torch,
    }
    yield found
    for value in list(found.values()):
        if isinstance(value, freestep.RemoteOptimizer | freestep.LocalSteps):
            with suppress(FreestepError):
                value.close()


def run(block: Block, names: dict[str, Any], service: ThreadService, folder: Path) -> None:
    text = re.sub(r"http://(127\.0\.0\.1|elsewhere|any-of-them):8000", service.url, block.text)
    if block.language == "python":
        # Lines of tracebacks are those of the document.
        exec(compile("\n" * block.line + text, block.document, "exec"), names)
    else:
        environment = {
            **os.environ,
            "FREESTEP_DATA_DIR": str(service.settings.data_dir),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONWARNINGS": "",
        }
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, f"{block.document}:{block.line}\n{done.stdout}{done.stderr}"


def prepare(document: str, names: dict[str, Any], service: ThreadService, folder: Path) -> None:
    """What a reader of the document has by then."""
    text = "".join(block.text for block in blocks_of(document))
    if document in AFTER_TRAINING:
        for block in blocks_of(TRAINS):
            run(block, names, service, folder)
    if "freestep-data/admin-token" in text:
        (folder / "freestep-data").mkdir()
        (folder / "freestep-data" / "admin-token").write_text(TOKEN)
    if "Trainer(" in text:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True)
        names.update(Trainer=Trainer, args=arguments, texts=[])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.parametrize("document", documents())
def test_blocks_run(
    document: str, names: dict[str, Any], service: ThreadService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FREESTEP_URL", service.url)
    monkeypatch.setenv("FREESTEP_RUN", re.sub(r"\W", "-", document))
    service.delete_runs()
    prepare(document, names, service, tmp_path)
    for block in blocks_of(document):
        if block.is_run and block.language in {"python", "bash"} - TESTED_ELSEWHERE.get(document, set()):
            run(block, names, service, tmp_path)


@pytest.mark.parametrize("block", NOT_RUN)
def test_what_is_not_run_exists(block: Block) -> None:
    assert block.note.removeprefix("not run: ")
    assert not list(unknown_in(block.text))


@pytest.mark.parametrize("document", documents())
def test_blocks_say_what_they_are(document: str) -> None:
    assert not {block.language for block in blocks_of(document)} - LANGUAGES
    assert not indented_blocks(document)


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("freestep runs list --json    # all", []),
        ("FREESTEP_URL=local python train.py", []),
        ("make demo", []),
        ("freestep runs frob", ["freestep runs frob"]),
        ("freestep runs list --frob", ["freestep runs list --frob"]),
        ("freestep serve --data-dir D --frob", ["freestep serve --frob"]),
        ("make frob", ["frob"]),
        ("python -m frob", ["python frob"]),
        ("python frob.py", ["python frob.py"]),
        ("frob", ["frob"]),
    ],
)
def test_what_does_not_exist_is_found(text: str, unknown: list[str]) -> None:
    assert list(unknown_in(text)) == unknown
