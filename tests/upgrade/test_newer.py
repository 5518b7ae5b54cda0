"""What a newer version wrote is refused with what to do, and left as it is: on disk, in Redis, and over HTTP."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from redis import Redis

import forked
from freestep_service.domain.layout import LAYOUT
from freestep_service.storage import checksummed
from freestep_service.storage.checksummed import parse_document, write_document
from freestep_service.storage.journal_files import require_known
from freestep_service.storage.journal_format import FORMAT, Frame, Kind, encode_frame, scan
from freestep_service.storage.media import LocalStorage
from harness import ProcessService, ThreadService
from harness import store as started
from plain_calls import Api, slug
from upgrade.conftest import Left
from upgrade.redis_commands import load, save

FORMAT_OF_DOCUMENTS = 2
KINDS = {
    "run file": "runs/orderly/run.json",
    "mark": "runs/orderly/checkpoints/00000001-000000000005-000000000008/complete.json",
    "part": "runs/orderly/checkpoints/00000001-000000000005-000000000008/000000000000000-000000000000007.json",
    "closed": "runs/orderly/closed/000000000000000-000000000000007.json",
}
STATE = ("runs", "journal", "histories", "deleted")
"""The folders of a data directory that hold what outlives a service, beside its tokens."""


def contents(root: Path) -> Mapping[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def state(data_dir: Path) -> Mapping[str, bytes]:
    return {name: content for name, content in contents(data_dir).items() if name.split("/")[0] in STATE}


def make_newer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes a document as a version with the next format would: with its checksum."""
    document = parse_document(path.read_bytes(), str(path))
    with monkeypatch.context() as patch:
        patch.setattr(checksummed, "_FORMAT", FORMAT_OF_DOCUMENTS + 1)
        write_document(LocalStorage(path.parent), path.name, document)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_a_newer_format(
    left: Left,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kind: str,
) -> None:
    data_dir, path = left / "stopped", left / "stopped" / KINDS[kind]
    original = path.read_bytes()
    make_newer(path, monkeypatch)
    before = state(data_dir)
    service = start_service(data_dir)
    api = connect(service.url, "orderly")
    why = f"{path} is of format 3, and this version of freestep knows format 2: start the version that wrote it"
    assert why in api.http.get("/readyz").json()["problems"]["orderly"]
    assert caplog.text.count(why) == 1
    deleted = api.http.delete(api.path())
    if kind in ("run file", "mark"):
        assert (deleted.status_code, slug(deleted)) == (503, "shard-unavailable")
        answers = [
            api.http.get(api.path("/parameters")),
            api.http.post(api.path("/leases"), json={"worker": "w"}),
            api.http.put(api.path(), json=api.spec(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1})),
        ]
        assert {(answer.status_code, slug(answer)) for answer in answers} == {(503, "shard-unavailable")}
        assert {answer.json()["detail"] for answer in answers} == {f"the run 'orderly' cannot be opened: {why}"}
    else:
        # A part, and where a shard was left, are read when the run has begun to open: it is known, and has no step yet.
        assert (api.status()["step"], api.status()["initialized"]) == (0, False)
        for refused in (
            api.http.get(api.path("/parameters")),
            api.http.post(api.path("/leases"), json={"worker": "w"}),
        ):
            assert (refused.status_code, slug(refused)) == (503, "shard-unavailable")
        assert (deleted.status_code, slug(deleted)) == (507, "storage-unavailable")
        assert deleted.json()["detail"] == why
    service.stop()
    assert state(data_dir) == before
    # Nothing of it is lost to the version that wrote it.
    path.write_bytes(original)
    api = connect(start_service(data_dir).url, "orderly")
    assert (api.status()["epoch"], api.status()["step"]) == (1, 5)


@pytest.mark.parametrize("is_algorithm", [True, False], ids=["algorithm", "delay correction"])
def test_a_run_with_something_of_a_newer_version(
    left: Left, start_service: Callable[..., ThreadService], connect: Callable[..., Api], is_algorithm: bool
) -> None:
    data_dir, path = left / "stopped", left / "stopped" / KINDS["run file"]
    document = parse_document(path.read_bytes(), str(path))
    spec = json.loads(document["spec"])
    spec["optimizer"] |= {"algorithm": "yet_to_come"} if is_algorithm else {"delay_correction": {"name": "yet_to_come"}}
    write_document(LocalStorage(path.parent), path.name, {**document, "spec": json.dumps(spec)})
    before = state(data_dir)
    service = start_service(data_dir)
    api = connect(service.url, "orderly")
    why = api.http.get("/readyz").json()["problems"]["orderly"]
    field = "optimizer.algorithm" if is_algorithm else "optimizer.delay_correction.name"
    assert why.startswith(f"its spec is not valid in this version of freestep: {field}: must be one of ")
    assert why.endswith(": start the version that wrote it")
    assert is_algorithm or "none, auto, constant, ahead" in why
    for answer in (
        api.http.get(api.path()),
        # A worker's, whose spec this version knows: the run does not become that one.
        api.http.put(api.path(), json=api.spec(optimizer={"algorithm": "adamw_schedule_free", "lr": 0.1})),
        api.http.post(api.path("/leases"), json={"worker": "w"}),
        api.http.delete(api.path()),
    ):
        assert (answer.status_code, slug(answer)) == (503, "shard-unavailable")
        assert answer.json()["detail"] == f"the run 'orderly' cannot be opened: {why}"
    service.stop()
    assert state(data_dir) == before
    # Nothing of it is lost to the version that wrote it.
    write_document(LocalStorage(path.parent), path.name, document)
    api = connect(start_service(data_dir).url, "orderly")
    assert (api.status()["epoch"], api.status()["step"]) == (1, 5)


def test_a_journal_of_a_newer_format(
    left: Left, start_service: Callable[..., ThreadService], connect: Callable[..., Api]
) -> None:
    data_dir = left / "killed"
    (path,) = data_dir.rglob("*.journal")
    original = path.read_bytes()
    begin = next(scan(original))
    assert isinstance(begin, Frame)
    newer = encode_frame(Kind.BEGIN, {**begin.head, "format": FORMAT + 1}, 0, begin.durable, 0)
    path.write_bytes(newer + original[len(newer) :])
    before = state(data_dir)
    service = start_service(data_dir)
    api = connect(service.url, "journaled")
    why = f"{path} is of format 2, and this version of freestep knows format 1: start the version that wrote it"
    assert api.http.get("/readyz").json()["problems"] == {"journaled": why}
    for answer in (api.http.get(api.path()), api.http.delete(api.path())):
        assert (answer.status_code, slug(answer)) == (503, "shard-unavailable")
        assert answer.json()["detail"] == f"the run 'journaled' cannot be opened: {why}"
    service.stop()
    assert state(data_dir) == before
    path.write_bytes(original)
    require_known(path.parent)
    api = connect(start_service(data_dir).url, "journaled")
    assert (api.status()["epoch"], api.status()["step"]) == (1, 7)


def test_a_history_of_a_newer_format_is_left_and_its_run_goes_on_until_it_is_deleted(
    left: Left,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = left / "stopped" / "histories" / "orderly.json"
    make_newer(path, monkeypatch)
    before = path.read_bytes()
    service = start_service(left / "stopped")
    api = connect(service.url, "orderly")
    answer = api.http.get(api.path("/history"))
    assert (answer.status_code, slug(answer)) == (507, "storage-unavailable")
    assert f"{path} is of format 3" in answer.json()["detail"]
    assert api.push(api.lease(), 5).json()["step"] == 6
    assert api.http.delete(api.path()).status_code == 204
    service.stop()
    assert path.read_bytes() == before
    assert not (left / "stopped" / "runs" / "orderly").exists()


def test_a_token_of_a_newer_format_keeps_a_service_from_starting(left: Left, monkeypatch: pytest.MonkeyPatch) -> None:
    # It may be revoked.
    data_dir = left / "stopped"
    path = min((data_dir / "tokens").iterdir())
    make_newer(path, monkeypatch)
    before = state(data_dir), contents(data_dir / "tokens")
    done = forked.freestep("serve", "--port", "0", "--data-dir", str(data_dir))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        f"freestep serve: {path} is of format 3, and this version of freestep knows format 2: "
        "start the version that wrote it"
    )
    assert (state(data_dir), contents(data_dir / "tokens")) == before


def test_a_start_reads_each_token_once_and_what_is_none_not_at_all(
    left: Left, start_service: Callable[..., ThreadService], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = left / "stopped" / "tokens"
    tokens = sorted(f"tokens/{path.name}" for path in folder.iterdir())
    (folder / "aside.json.newer").write_bytes((left / "stopped" / tokens[0]).read_bytes())
    make_newer(folder / "aside.json.newer", monkeypatch)
    read, paths = LocalStorage._read, list[str]()

    def noted(storage: LocalStorage, path: str) -> bytes:
        paths.append(path)
        return read(storage, path)

    monkeypatch.setattr(LocalStorage, "_read", noted)
    service = start_service(left / "stopped")
    assert sorted(path for path in paths if path.startswith("tokens/")) == tokens
    service.stop()


# Redis


@pytest.fixture
def redis(left: Left, tmp_path: Path) -> Iterator[Redis]:
    """A Redis with what one of the last released version's services held."""
    with started("valkey", tmp_path) as url, Redis.from_url(url, decode_responses=True) as client:
        load(client, left / "shared" / "redis.jsonl")
        yield client


def held(redis: Redis, folder: Path) -> str:
    save(redis, folder / "held.jsonl")
    return (folder / "held.jsonl").read_text()


def settings(redis: Redis, left: Left) -> dict[str, object]:
    return {
        "redis_url": f"unix://{redis.connection_pool.connection_kwargs['path']}",
        "checkpoint_url": str(left / "shared" / "checkpoints"),
        "owner_ttl_seconds": 2.0,
    }


def test_a_redis_of_a_newer_layout_keeps_a_service_from_starting(left: Left, redis: Redis, tmp_path: Path) -> None:
    redis.set("{freestep:nodes}:layout", LAYOUT + 1)
    before = held(redis, tmp_path), state(left / "shared" / "data-0"), contents(left / "shared" / "checkpoints")
    given = settings(redis, left)
    done = forked.freestep(
        "serve", "--port", "0", "--data-dir", str(left / "shared" / "data-0"),
        "--redis-url", str(given["redis_url"]), "--checkpoint-url", str(given["checkpoint_url"]),
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "freestep serve: Redis has layout 2, of a newer version of freestep, and this version knows layout 1: "
        "start that version"
    )
    assert before == (
        held(redis, tmp_path), state(left / "shared" / "data-0"), contents(left / "shared" / "checkpoints")
    )  # fmt: skip


def test_a_run_of_a_newer_layout_is_left_and_the_others_go_on(
    left: Left,
    redis: Redis,
    tmp_path: Path,
    start_service: Callable[..., ThreadService],
    connect: Callable[..., Api],
) -> None:
    redis.hset("freestep:{spread}:run", "layout", LAYOUT + 1)

    def of_run() -> list[str]:
        return [line for line in held(redis, tmp_path).splitlines() if "{spread}" in line]

    before = of_run(), contents(left / "shared" / "checkpoints" / "runs")
    service = start_service(left / "shared" / "data-0", **settings(redis, left))
    api = connect(service.url, "spread")
    assert api.http.get("/readyz").json()["problems"]["spread"].startswith("Redis has layout 2")
    answer = api.http.get(api.path())
    assert (answer.status_code, slug(answer)) == (503, "coordinator-unavailable")
    assert (of_run(), contents(left / "shared" / "checkpoints" / "runs")) == before
    other = connect(service.url)
    other.create()
    assert other.push(other.lease(), 0).json()["step"] == 1
    service.stop()
    assert of_run() == before[0]


@pytest.mark.slow
def test_a_service_ends_where_a_newer_layout_has_begun(
    left: Left, redis: Redis, tmp_path: Path, start_process: Callable[..., ProcessService], connect: Callable[..., Api]
) -> None:
    """As one that was stopped for so long that it counts as gone, until a newer version had begun."""
    service = start_process(left / "shared" / "data-0", **settings(redis, left))
    api = connect(service.url)
    api.create()
    assert api.push(api.lease(), 0).json()["step"] == 1

    files = left / "shared" / "checkpoints" / "runs" / api.run

    def of_run() -> list[str]:
        return [line for line in held(redis, tmp_path).splitlines() if api.run in line and "freestep:runs" not in line]

    service.send_signal(signal.SIGSTOP)
    redis.set("{freestep:nodes}:layout", LAYOUT + 1)
    redis.hset(f"freestep:{{{api.run}}}:run", "layout", LAYOUT + 1)
    before = of_run(), contents(files)
    service.send_signal(signal.SIGCONT)
    assert service.process is not None
    assert forked.join(service.process) == 1
    assert (of_run(), contents(files)) == before
