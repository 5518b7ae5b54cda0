"""A pod's volumes as folders of the node's: claims that outlive it, data of Secrets, scratch space.

A claim's folder is made as a provisioner makes it: it belongs to root, and only `fsGroup` opens it to others.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pods.fields import Unsupported, known
from pods.references import Objects, data_of

__all__ = ["Claims", "Volumes"]


class Claims:
    """The folders of PersistentVolumeClaims, by their names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def folder(self, name: str) -> Path:
        place = self._folder / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def lose(self, name: str) -> None:
        """Loses what is in a claim for the next pod that has it; who has it now keeps it until its end."""
        (self._folder / name).rename(self._folder / f"lost-{secrets.token_hex(4)}")


class Volumes:
    """One pod's volumes, in a folder of the pod's, which `remove` deletes."""

    def __init__(self, pod: Mapping[str, Any], folder: Path, claims: Claims, objects: Objects) -> None:
        self._pod = pod
        self._folder = folder
        self._claims = claims
        self._objects = objects
        self._group = pod["spec"].get("securityContext", {}).get("fsGroup")
        self._places: dict[str, Path] = {}

    def make(self) -> None:
        """Makes them. Raises Unsupported, and KeyError for what a volume names and is not there."""
        for volume in self._pod["spec"].get("volumes", []):
            self._places[volume["name"]] = self._made(volume)

    def remove(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def mounts(self, container: Mapping[str, Any]) -> list[str]:
        """A container's mounts as SOURCE:TARGET:OPTIONS."""
        found = []
        for mount in container.get("volumeMounts", []):
            known(mount, f"a mount of {container['name']}", "name", "mountPath", "readOnly")
            source = self._places[mount["name"]]
            found.append(f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else 'rw'}")
        return found

    def _made(self, volume: Mapping[str, Any]) -> Path:
        known(volume, "a volume", "name", "emptyDir", "persistentVolumeClaim", "secret")
        place = self._folder / volume["name"]
        if "persistentVolumeClaim" in volume:
            place = self._claims.folder(volume["persistentVolumeClaim"]["claimName"])
            self._open(place)
        elif "emptyDir" in volume:
            place.mkdir(parents=True)
            os.chmod(place, 0o777)
            self._open(place)
        else:
            self._write(place, volume["secret"])
        return place

    def _write(self, place: Path, secret: Mapping[str, Any]) -> None:
        """Writes what is asked for of a Secret, a file for each item."""
        known(secret, "a Secret's volume", "secretName", "items", "defaultMode")
        place.mkdir(parents=True)
        data = data_of(self._objects, secret["secretName"])
        for each in secret["items"]:
            file = place / each["path"]
            if file.parent != place:
                raise Unsupported(f"an item's path {each['path']}")
            file.write_bytes(data[each["key"]])
            os.chmod(file, secret["defaultMode"] if self._group is None else secret["defaultMode"] | 0o040)
            self._give(file)

    def _open(self, place: Path) -> None:
        """Lets the pod's group write, as the kubelet does."""
        if self._group is not None:
            self._give(place)
            os.chmod(place, os.stat(place).st_mode & 0o7777 | 0o2070)

    def _give(self, place: Path) -> None:
        if self._group is not None:
            os.chown(place, -1, self._group)
