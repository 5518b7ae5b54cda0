"""Memory that is counted before it is allocated: the accounting, the machine's limits, and what a run needs."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forms import FORMS
from freestep.api.control import ControlRequest
from freestep.api.models import RunSpec
from freestep.errors import InvalidSpec
from freestep.wire.manifest import Manifest
from freestep_service.domain.aggregation import Policy
from freestep_service.domain.control import Control, ControlChange
from freestep_service.state.bodies import room
from freestep_service.state.buffers import Vector
from freestep_service.state.memory_budget import (
    MemoryBudget,
    available_memory,
    machine_memory,
    run_bytes,
    snapshot_vectors,
)
from freestep_service.state.shard import Entry, Shard
from freestep_service.state.staging import staging_vectors
from meanwhile import at_once

STEADY = settings(derandomize=True, deadline=None)
PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
MIB = 1024**2

NAMED = st.tuples(st.sampled_from("abc"), st.integers(0, 60) | st.none())
AMOUNT = st.tuples(st.just(""), st.integers(-60, 60))


@STEADY
@given(st.lists(NAMED | AMOUNT, max_size=30))
def test_no_more_is_reserved_than_there_is(calls: list[tuple[str, int | None]]) -> None:
    budget, named, amounts = MemoryBudget(100), dict[str, int](), list[int]()
    for name, size in calls:
        free = 100 - sum(named.values()) - sum(amounts)
        assert budget.free == free >= 0
        if size is None:
            budget.cancel(name)
            named.pop(name, None)
        elif name:
            fits = size <= free + named.get(name, 0)
            try:
                budget.reserve(name, size)
            except InvalidSpec as error:
                assert not fits
                assert error.extensions["needed_bytes"] == size
                assert error.extensions["free_bytes"] == free + named.get(name, 0)
                assert error.extensions["total_bytes"] == 100
            else:
                assert fits
                named[name] = size
        elif size >= 0:
            assert budget.try_reserve(size) == (size <= free)
            if size <= free:
                amounts.append(size)
        elif amounts:
            budget.release(amounts.pop())


def test_a_run_that_does_not_fit_is_told_the_figures() -> None:
    budget = MemoryBudget(4 * 1024**3)
    budget.reserve("first", 3 * 1024**3)
    with pytest.raises(
        InvalidSpec, match=r"^the run needs up to 1\.50 GiB of memory, and 1\.00 GiB of 4\.00 GiB are free$"
    ):
        budget.reserve("second", 1536 * MIB)
    assert budget.free == 1024**3
    # The first may become larger.
    budget.reserve("first", 4 * 1024**3)
    assert budget.free == 0


def test_what_is_held_is_counted_whether_or_not_it_is_free() -> None:
    budget, missing = MemoryBudget(100), list[int]()
    budget.recall = missing.append
    assert budget.lend(10)
    assert budget.count("first", 80) == 0 and not missing
    assert budget.count("second", 70) == 50
    # What is lent is given back, too.
    assert missing == [60] and budget.free == -60
    budget.give_back(10)
    with pytest.raises(InvalidSpec) as refusal:
        budget.reserve("second", 71)
    assert refusal.value.extensions["free_bytes"] == 20
    with pytest.raises(InvalidSpec, match=r"0\.00 GiB of 0\.00 GiB are free") as refusal:
        budget.reserve("third", 1)
    assert refusal.value.extensions["free_bytes"] == 0
    assert not budget.try_reserve(1) and not budget.lend(1)
    # What a name has, it keeps.
    budget.reserve("second", 70)
    budget.reserve("second", 60)
    assert budget.free == -40
    assert budget.count("first", 30) == 0 and budget.free == 10


def test_threads_reserve_no_more_than_there_is() -> None:
    budget = MemoryBudget(100)

    def take() -> int:
        return sum(budget.try_reserve(1) for _ in range(1000))

    assert sum(at_once(*[take] * 4)) == 100
    budget.release(100)
    assert budget.free == 100


def test_names_come_before_what_is_lent() -> None:
    budget, missing = MemoryBudget(100), list[int]()
    budget.recall = missing.append
    # As much again has to be free.
    assert not budget.lend(51)
    assert budget.lend(50) and not budget.lend(26) and budget.lend(25)
    assert budget.free == 25 and not budget.try_reserve(26)
    budget.reserve("first", 25)
    assert not missing
    budget.reserve("second", 60)
    assert missing == [60] and budget.free == -60
    with pytest.raises(InvalidSpec):
        budget.reserve("third", 16)
    assert missing == [60]
    budget.give_back(75)
    assert budget.free == 15


def machine(root: Path, cgroup: str, mountinfo: str, limits: dict[str, str]) -> Path:
    """The files of a machine, under a directory that stands for its root."""
    for path, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo, **limits}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


V2 = "29 22 0:26 {root} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "30 24 0:25 / /sys/fs/cgroup/cpu rw shared:9 - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime shared:10 - cgroup cgroup rw,memory\n"
)
ELSE = "22 1 0:20 / /proc rw shared:12 - proc proc rw\n"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"user.slice/app.scope/memory.max": f"{64 * MIB}\n"}, 64 * MIB),
        # The least of those above one another.
        ({"user.slice/app.scope/memory.max": f"{64 * MIB}\n", "user.slice/memory.max": f"{32 * MIB}\n"}, 32 * MIB),
        ({"user.slice/app.scope/memory.max": "max\n", "user.slice/memory.max": f"{32 * MIB}\n"}, 32 * MIB),
        ({"memory.max": f"{16 * MIB}\n"}, 16 * MIB),
        ({"user.slice/app.scope/memory.max": "max\n"}, PHYSICAL),
        ({"user.slice/app.scope/memory.max": "\n"}, PHYSICAL),
        ({"user.slice/app.scope/memory.max": f"{PHYSICAL + MIB}\n"}, PHYSICAL),
        # Others' limits.
        ({"system.slice/memory.max": f"{8 * MIB}\n"}, PHYSICAL),
        ({}, PHYSICAL),
    ],
)
def test_limits_of_cgroups_version_2(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    files = {f"sys/fs/cgroup/{path}": text for path, text in limits.items()}
    root = machine(tmp_path, "0::/user.slice/app.scope\n", ELSE + V2.format(root="/"), files)
    assert machine_memory(root) == expected


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"docker/abc/memory.limit_in_bytes": f"{64 * MIB}\n"}, 64 * MIB),
        ({"docker/abc/memory.limit_in_bytes": "9223372036854771712\n"}, PHYSICAL),
        ({"docker/memory.limit_in_bytes": f"{32 * MIB}\n"}, 32 * MIB),
    ],
)
def test_limits_of_cgroups_version_1(tmp_path: Path, limits: dict[str, str], expected: int) -> None:
    files = {f"sys/fs/cgroup/memory/{path}": text for path, text in limits.items()}
    cgroup = "9:name=systemd:/\n4:memory,hugetlb:/docker/abc\n1:cpu:/other\n0::/\n"
    assert machine_memory(machine(tmp_path, cgroup, V1.format(root="/") + ELSE, files)) == expected


@pytest.mark.parametrize(
    ("cgroup", "mount_root"),
    [
        # A container that sees its own part of the hierarchy: by its path outside, in a namespace, and beside it.
        ("4:memory:/docker/abc\n", "/docker/abc"),
        ("4:memory:/\n", "/"),
        ("4:memory:/../def\n", "/"),
        ("4:memory:/elsewhere\n", "/docker/abc"),
    ],
)
def test_limits_in_a_container(tmp_path: Path, cgroup: str, mount_root: str) -> None:
    files = {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{64 * MIB}\n"}
    assert machine_memory(machine(tmp_path, cgroup, V1.format(root=mount_root), files)) == 64 * MIB


def test_a_machine_without_cgroups_has_what_it_has(tmp_path: Path) -> None:
    assert machine_memory(tmp_path) == PHYSICAL
    assert machine_memory(machine(tmp_path, "", ELSE, {})) == PHYSICAL
    assert 0 < machine_memory() <= PHYSICAL


MEMINFO = "MemTotal:       1000000 kB\nMemFree:          10000 kB\nMemAvailable:     {} kB\n"


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 100 * MIB),
        ({"a/memory.max": f"{64 * MIB}\n", "a/memory.current": f"{24 * MIB}\n"}, 40 * MIB),
        ({"memory.max": f"{64 * MIB}\n", "memory.current": f"{24 * MIB}\n", "a/memory.max": "max\n"}, 40 * MIB),
        ({"a/memory.max": f"{64 * MIB}\n", "a/memory.current": f"{65 * MIB}\n"}, 0),
        # Pages of files are had back.
        (
            {
                "a/memory.max": f"{64 * MIB}\n",
                "a/memory.current": f"{60 * MIB}\n",
                "a/memory.stat": f"anon 1\ninactive_file {30 * MIB}\nactive_file 7\n",
            },
            34 * MIB,
        ),
        ({"a/memory.max": f"{640 * MIB}\n", "a/memory.current": "0\n"}, 100 * MIB),
    ],
)
def test_what_is_available_is_what_machine_and_cgroups_leave(
    tmp_path: Path, limits: dict[str, str], expected: int
) -> None:
    files = {f"sys/fs/cgroup/{path}": text for path, text in limits.items()}
    files["proc/meminfo"] = MEMINFO.format(100 * 1024)
    assert available_memory(machine(tmp_path, "0::/a\n", V2.format(root="/"), files)) == expected


def test_what_is_available_in_a_cgroup_of_version_1(tmp_path: Path) -> None:
    limits = {"limit_in_bytes": 64 * MIB, "usage_in_bytes": 60 * MIB}
    files = {f"sys/fs/cgroup/memory/memory.{name}": f"{size}\n" for name, size in limits.items()}
    files["sys/fs/cgroup/memory/memory.stat"] = f"inactive_file 5\ntotal_inactive_file {MIB}\n"
    files["proc/meminfo"] = MEMINFO.format(100 * 1024)
    assert available_memory(machine(tmp_path, "4:memory:/\n", V1.format(root="/"), files)) == 5 * MIB


def test_a_system_that_does_not_say_what_is_available(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        available_memory(machine(tmp_path, "", "", {"proc/meminfo": "MemTotal: 1 kB\n"}))
    if sys.platform == "linux":
        assert 0 < available_memory() < PHYSICAL


def run_spec(form: str, **changes: Any) -> RunSpec:
    parameters = [{"name": "w", "shape": [3000, 7]}, {"name": "v", "shape": [1001], "group": "g"}]
    return RunSpec.model_validate({"optimizer": FORMS[form], "parameters": parameters, "groups": {"g": {}}, **changes})


def memory_of_tensors() -> dict[int, int]:
    """Where tensors' memory is, and how many bytes of it there are."""
    gc.collect()
    storages = [each.untyped_storage() for each in gc.get_objects() if type(each) is Tensor]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def allocated(spec: RunSpec, index: int, shards: int) -> int:
    """Bytes of the tensors that a shard has when all that it may hold at once is there."""
    before = memory_of_tensors()
    part = Manifest.of(spec).part(index, shards)
    policy = Policy.of(spec.aggregation)
    shard = Shard(spec, part, torch.device("cpu"), room(part))
    shard.initialize(torch.ones(part.numel), epoch=1)
    for seq in range(1, 1 + max(3, policy.kept)):
        gradient = torch.ones(part.numel)
        shard.apply(Entry(seq, 1, advance=not policy.groups, gradient=gradient, worker=f"w{seq}", loss=1.0))
    copy = shard.copy_state()
    bodies = [Vector(part.numel) for _ in range(staging_vectors(policy, shards))]
    points = [Vector(part.numel, room(part)) for _ in range(snapshot_vectors(shards))]
    del gradient
    after = memory_of_tensors()
    assert len(copy.tensors) == len(shard._buffers) + policy.gathered_vectors and bodies and points
    return sum(size for place, size in after.items() if place not in before)


@pytest.mark.parametrize(
    "aggregation",
    [
        {"policy": "async"},
        {"policy": "async", "robust": "clip"},
        {"policy": "buffered", "batch": 8},
        {"policy": "buffered", "batch": 8, "robust": "trimmed_mean", "beta": 0.1},
        {"policy": "sync"},
        {"policy": "sync", "robust": "coordinate_median", "max_batch": 5},
    ],
)
@pytest.mark.parametrize("form", ["sgd", "adamw_schedule_free", "schedule_free_wrapper-adam-amsgrad"])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_run_needs_what_its_shards_allocate(form: str, aggregation: dict[str, Any], shards: int) -> None:
    spec = run_spec(form, aggregation=aggregation)
    whole = Manifest.of(spec)
    parts = [whole.part(index, shards) for index in range(shards)]
    made = [allocated(spec, index, shards) for index in range(shards)]
    # While a state is loaded, y is there once more, in a vector that any point fits into.
    made = [size + max(4 * part.numel, room(part)) for size, part in zip(made, parts, strict=True)]
    staged = 4 * whole.numel if shards > 1 else 0
    assert run_bytes(spec, shards, shards) == sum(made) + staged
    assert run_bytes(spec, 1, shards) == max(made) + staged
    assert run_bytes(spec, 0, shards) == staged


POLICIES: dict[str, dict[str, Any]] = {
    "async": {"policy": "async"},
    "sync": {"policy": "sync"},
    "buffered": {"policy": "buffered", "batch": 3},
}


@pytest.mark.parametrize("before", POLICIES)
@pytest.mark.parametrize("after", POLICIES)
def test_a_shard_that_follows_another_policy_has_what_one_of_that_policy_has(before: str, after: str) -> None:
    spec = run_spec("sgd", aggregation=POLICIES[before])
    part = Manifest.of(spec)
    shard = Shard(spec, part, torch.device("cpu"), room(part))
    shard.initialize(torch.ones(part.numel), epoch=1)
    ones, own = torch.ones(part.numel), Policy.of(spec.aggregation)
    shard.apply(Entry(1, 1, advance=not own.groups, gradient=ones, worker="one"))
    then = run_spec("sgd", aggregation=POLICIES[after])
    policy = Policy.of(then.aggregation)
    changed = Control().after(spec, ControlRequest(aggregation=POLICIES[after]), "")
    # As lua/change_run.lua, which makes the update that the new policy finds complete.
    shard.apply(Entry(2, 1, advance=own.groups and not policy.groups, control=ControlChange(changed, "", "")))
    assert shard.gathered_vectors == policy.gathered_vectors
    assert (shard._accumulated is not None) == (own.groups and policy.groups)
    for seq in (3, 4):
        shard.apply(Entry(seq, 1, advance=not policy.groups, gradient=ones, worker=f"w{seq}"))
    copy = shard.copy_state()
    assert len(copy.tensors) == len(shard._buffers) + policy.gathered_vectors
    assert sum(each.nbytes for each in copy.tensors.values()) == shard.state_bytes(policy.gathered_vectors)
    back = Shard(spec, part, torch.device("cpu"), room(part))
    back.load(copy, 2)
    assert back.gathered_vectors == policy.gathered_vectors
    # What is undone of it comes back with the state.
    back.apply(Entry(5, 2, advance=policy.groups and not own.groups, control=ControlChange(Control(), "", "")))
    assert back.gathered_vectors == own.gathered_vectors
    assert (back._accumulated is not None) == (own.groups and policy.groups)


def test_a_direction_takes_a_vector_of_its_own() -> None:
    parameters = [{"name": "w", "shape": [30, 7]}]
    sizes = []
    for base in ("adamw", "muon"):
        optimizer = {"algorithm": "schedule_free_wrapper", "base": {"algorithm": base, "lr": 0.1}}
        sizes.append(run_bytes(RunSpec.model_validate({"optimizer": optimizer, "parameters": parameters}), 1, 1))
    assert sizes[1] - sizes[0] == 4 * 30 * 7


def test_a_state_on_a_gpu_takes_no_host_memory_but_for_its_copy() -> None:
    spec = run_spec("adamw_schedule_free", aggregation={"policy": "buffered", "batch": 8})
    numel = Manifest.of(spec).numel
    difference = run_bytes(spec, 1, 1) - run_bytes(spec, 1, 1, torch.device("cuda"))
    # y, z, exp_avg_sq and the accumulator, and y once more.
    assert difference == 4 * numel * 5


@STEADY
@given(numel=st.integers(0, 10_000), shards=st.integers(1, 8))
def test_more_shards_here_need_no_less(numel: int, shards: int) -> None:
    document = {"optimizer": FORMS["sgd"], "parameters": [{"name": "w", "shape": [numel]}]}
    spec = RunSpec.model_validate(document)
    sizes = [run_bytes(spec, here, shards) for here in range(shards + 1)]
    assert sizes == sorted(sizes)
