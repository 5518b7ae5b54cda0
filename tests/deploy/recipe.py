"""The commands of docs/spot-instances.md, carried out on a machine of which all but root's part is real.

A `Machine` is a folder. Paths such as /etc and /var are in it, commands of apt, ufw and the like do nothing, and
systemctl asks the test to do with a unit's own file what systemd would. All else is what the document says.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import forked
from deploy.fronts import ROOT
from meanwhile import DEADLINE_S

__all__ = ["Machine", "Unit", "blocks"]

_DOCUMENT = ROOT / "docs" / "spot-instances.md"
_IDLE = ("apt-get", "useradd", "chown", "ufw", "certbot", "pip", "systemctl")
"""Commands that need a machine of their own; what they are called with is noted."""
_PATH = re.compile(r"(?<![\w./~-])/(etc|opt|var|usr/local)/")
_END = "the block has ended"


def blocks() -> dict[str, list[str]]:
    """The document's blocks of bash, by the heading that they stand below."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"(?m)^##+ ", _DOCUMENT.read_text())[1:]:
        heading, _, text = section.partition("\n")
        found[heading.lstrip("0123456789. ")] = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return found


class Unit:
    """A unit's process, started as its file says; from a process that has loaded what it needs (`forked`)."""

    def __init__(self, machine: Machine, text: str, log: Path, **environment: str) -> None:
        text = machine.there(text)
        self.fields = [line.partition("=")[::2] for line in text.splitlines() if re.match(r"[A-Z]\w*=", line)]
        self._signal = signal.Signals[self.value("KillSignal", "SIGTERM")]
        folder = Path(self.value("WorkingDirectory"))
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in self.fields:
            if name == "EnvironmentFile":
                environment |= _assignments(Path(value).read_text())
            elif name == "Environment":
                environment |= _assignments("\n".join(shlex.split(value)))
        environment = {**machine.environment, **environment}
        self.log = log
        log.touch()
        self._process = forked.start_program(shlex.split(self.value("ExecStart")), folder, log, environment)

    def value(self, name: str, default: str = "") -> str:
        """The value of a setting that stands once."""
        return next((value for key, value in self.fields if key == name), default)

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def stop(self) -> None:
        """As `systemctl stop`."""
        if self.is_alive():
            assert self._process.pid is not None
            os.kill(self._process.pid, self._signal)
            forked.join(self._process)

    def kill(self) -> None:
        self._process.kill()
        forked.join(self._process)


class Machine:
    """A machine in a folder, and a shell on it, in a clone of what the document needs of the repository.

    environment: what its commands find beside PATH and HOME.
    """

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        programs, home, self.clone = folder / "stand-ins", folder / "home", folder / "clone"
        for each in (programs, home, self.clone, folder / "var/cache", folder / "etc/systemd/system"):
            each.mkdir(parents=True)
        (self.clone / "deploy").symlink_to(ROOT / "deploy")
        self._noted = folder / "noted"
        self._noted.touch()
        for name in _IDLE:
            _program(programs / name, f'echo "{name} $*" >>{self._noted}')
        _program(programs / "ssh", 'shift; exec bash -c "${*//"$SSH_FROM"/"$SSH_TO"}"')
        _program(programs / "python3", _MAKES_ENVIRONMENTS.format(python=sys.executable, programs=programs))
        # What is compiled once need not be compiled again.
        cache = Path(os.environ.get("NUMBA_CACHE_DIR") or Path.home() / ".cache" / "freestep")
        cache.mkdir(parents=True, exist_ok=True)
        (folder / "var/cache/freestep").symlink_to(cache)
        path = f"{programs}:{folder}/usr/local/bin:{os.environ['PATH']}"
        self.environment = {"PATH": path, "HOME": str(home), "PYTHONUNBUFFERED": "1", **environment}
        self._shell = subprocess.Popen(
            ["bash", "-euo", "pipefail"],
            cwd=self.clone,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def there(self, text: str) -> str:
        """A text whose paths are those of this machine."""
        return _PATH.sub(lambda match: f"{self.folder}/{match[1]}/", text)

    def type(self, commands: str) -> str:
        """Has the shell carry out a block of commands; what they print. Fails if one of them does."""
        assert self._shell.stdin is not None and self._shell.stdout is not None
        self._shell.stdin.write(f"{self.there(commands)}\necho '{_END}'\n")
        self._shell.stdin.flush()
        printed = ""
        for line in self._shell.stdout:
            printed += line
            if line.endswith(f"{_END}\n"):
                return printed.removesuffix(f"{_END}\n")
        raise AssertionError(f"{commands}\nended with\n{printed}")

    def noted(self) -> list[str]:
        """What the commands that do nothing were called with since this was asked last."""
        lines = self._noted.read_text().splitlines()
        self._noted.write_text("")
        return lines

    def file(self, path: str) -> Path:
        return Path(self.there(path))

    def unit(self, name: str, **environment: str) -> Unit:
        """Starts a unit that is installed."""
        text = self.file(f"/etc/systemd/system/{name}.service").read_text()
        return Unit(self, text, self.folder / f"{name}.log", **environment)

    def close(self) -> None:
        assert self._shell.stdin is not None and self._shell.stdout is not None
        self._shell.stdin.close()
        self._shell.wait(DEADLINE_S)
        self._shell.stdout.close()


_MAKES_ENVIRONMENTS = """\
[ "$1 $2" = "-m venv" ] || exec {python} "$@"
mkdir -p "$3/bin"
printf '#!/bin/sh\\nexec {python} "$@"\\n' >"$3/bin/python"
printf '#!/bin/sh\\nexec {python} -m freestep.cli "$@"\\n' >"$3/bin/freestep"
cp {programs}/pip "$3/bin/pip"
chmod +x "$3"/bin/*
"""
"""python3: an environment that it makes has what the tests' own one has."""


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!{shutil.which('bash')}\n{script}\n")
    path.chmod(0o755)


def _assignments(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {name: value for name, _, value in (line.partition("=") for line in lines)}
