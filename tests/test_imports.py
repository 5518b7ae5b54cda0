"""The rules of the house that a machine can hold: which way imports point, and where things may stand."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from freestep_service.web.problems import STATUSES

ROOT = Path(__file__).parent.parent
SERVICE = ROOT / "service" / "freestep_service"
CLIENT = ROOT / "client" / "freestep"


def test_imports_point_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def imported(file: Path) -> set[str]:
    """The modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_the_service_takes_of_the_client_what_both_sides_share() -> None:
    shared = re.compile(r"freestep(\.(api|wire|errors)(\..*)?)?")
    for file in SERVICE.rglob("*.py"):
        foreign = {name for name in imported(file) if name.split(".")[0] == "freestep" and not shared.fullmatch(name)}
        assert not foreign, file


def test_only_the_commands_that_load_it_and_local_runs_know_the_service() -> None:
    knowing = {
        file.name
        for file in CLIENT.rglob("*.py")
        if any(name.startswith("freestep_service") for name in imported(file))
    }
    assert knowing == {"cli.py", "local_run.py"}


@pytest.mark.parametrize("file", sorted(SERVICE.rglob("*.py")), ids=lambda file: str(file.relative_to(SERVICE)))
def test_refusals_have_their_status_codes_in_one_place(file: Path) -> None:
    if file.name == "problems.py":
        return
    numbers = [
        node.value
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and node.value in STATUSES.values()
    ]
    assert not numbers


@pytest.mark.parametrize("file", sorted(SERVICE.rglob("*.py")), ids=lambda file: str(file.relative_to(SERVICE)))
def test_settings_and_clients_are_made_by_those_who_start_a_service(file: Path) -> None:
    """Not while a module is imported."""
    made = {
        ast.unparse(node.func).split(".")[-1]
        for statement in ast.parse(file.read_text()).body
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        for node in ast.walk(statement)
        if isinstance(node, ast.Call)
    }
    assert not made & {"Settings", "Store", "Redis", "RedisCluster", "Client", "FastAPI", "create_app", "connect"}
