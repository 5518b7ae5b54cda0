"""Looks for known vulnerabilities of the packages that are installed in an environment: `make audit`.

Exits with 1 if there are any. Advisories come from the package index (or `--vulnerability-service osv`): of a package
that is not found there nothing is known, which is said, and is no failure.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

_LIST = """
from importlib.metadata import distributions
for each in distributions():
    if not each.read_text("direct_url.json"):
        print(f"{each.metadata['Name']}=={each.version.partition('+')[0]}")
"""
"""Prints what an environment has from an index, without the local part of versions, which no advisory names."""


def audited(python: str, options: list[str]) -> list[dict[str, Any]] | None:
    """What pip-audit says of each package of an interpreter's environment; None if it could not ask anybody."""
    installed = subprocess.run([python, "-c", _LIST], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        requirements, report = Path(folder, "requirements.txt"), Path(folder, "report.json")
        requirements.write_text("".join(sorted(set(installed.splitlines(keepends=True)))))
        command = [sys.executable, "-m", "pip_audit", "--requirement", str(requirements), "--no-deps", "--disable-pip"]
        command += ["--progress-spinner", "off", "--format", "json", "--output", str(report), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if not report.is_file():
            sys.stderr.write(done.stderr)
            return None
        packages: list[dict[str, Any]] = json.loads(report.read_text())["dependencies"]
        return packages


def main(python: str, *options: str) -> int:
    packages = audited(python, list(options)) or []
    unknown = [each["name"] for each in packages if "skip_reason" in each]
    looked_up = len(packages) - len(unknown)
    found = [(each, fault) for each in packages for fault in each.get("vulns", ())]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no version"
        sys.stdout.write(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}\n")
    if not looked_up:
        sys.stdout.write("NOT AUDITED: no advisories can be had from here, so nothing is known of any package\n")
    else:
        sys.stdout.write(f"{len(found)} known vulnerabilities in {looked_up} packages\n")
        if unknown:
            sys.stdout.write(f"not audited, since there are no advisories for them: {', '.join(unknown)}\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
