"""The units of the service and of workers, as systemd reads them; no systemd has to run for that."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy.fronts import ROOT

SERVICE = ROOT / "deploy" / "systemd" / "freestep.service"
USER_DATA = ROOT / "deploy" / "worker" / "user-data.sh"
EXPOSURE = 20
"""Tenths, of 100: what systemd calls OK ends with 50."""


def worker_unit() -> str:
    found = re.search(r"<<UNIT\n(.*?)^UNIT$", USER_DATA.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1].replace("$URL", "https://train.example.org").replace("$RUN", "mnist")


def installed(name: str, folder: Path) -> Path:
    """A unit as a file, with a program that every machine has; skips the test where systemd's tools are missing."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = SERVICE.read_text() if name == "freestep" else worker_unit()
    file = folder / f"{name}.service"
    file.write_text(re.sub(r"(?m)^ExecStart=\S+", f"ExecStart={shutil.which('true')}", text))
    return file


@pytest.mark.parametrize("name", ["freestep", "freestep-worker"])
def test_a_unit_is_what_systemd_reads(tmp_path: Path, name: str) -> None:
    unit = installed(name, tmp_path)
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    # It names others of the machine's own units too.
    complaints = [line for line in done.stderr.splitlines() if unit.name in line]
    assert (done.returncode, complaints) == (0, [])


def test_the_service_may_do_little(tmp_path: Path) -> None:
    unit = installed("freestep", tmp_path)
    command = ["systemd-analyze", "security", "--offline=true", "--json=short", f"--threshold={EXPOSURE}", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lacking = [each["name"] for each in json.loads(done.stdout) if each["set"] is False] if done.stdout else []
    assert done.returncode == 0, lacking


def test_the_first_lines_are_all_that_user_data_needs() -> None:
    """A variable that is not set would end the script."""
    text = USER_DATA.read_text()
    assert set(re.findall(r"\$\{?(\w+)", text)) == set(re.findall(r"(?m)^([A-Z]+)=", text))
    assert subprocess.run(["bash", "-n", str(USER_DATA)], timeout=60).returncode == 0
