"""The thread count sees what a process may use, not what the machine has."""

import os

import pytest

from tfinfer.errors import InputError
from tfinfer.session.threads import Threads, thread_count

V1_MOUNT = "33 31 0:30 {shown} /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct\n"
V2_MOUNT = "41 31 0:38 {shown} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw\n"
PERIOD = 100_000


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def machine(root, siblings):
    """`siblings[n]` is what hardware thread n says of its core."""
    for number, text in enumerate(siblings):
        write(root, f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", text + "\n")


def v2(root, group, limits, shown="/"):
    write(root, "proc/self/cgroup", f"1:name=systemd:/elsewhere\n0::{group}\n")
    write(root, "proc/self/mountinfo", "1 0 8:1 / / rw - ext4 /dev/vda rw\n" + V2_MOUNT.format(shown=shown))
    for folder, limit in limits.items():
        write(root, f"sys/fs/cgroup/{folder}/cpu.max", f"{limit} {PERIOD}\n")


def v1(root, group, limits, shown="/"):
    write(root, "proc/self/cgroup", f"7:memory:/elsewhere\n4:cpu,cpuacct:{group}\n0::/\n")
    write(root, "proc/self/mountinfo", V1_MOUNT.format(shown=shown))
    for folder, limit in limits.items():
        write(root, f"sys/fs/cgroup/cpu/{folder}/cpu.cfs_quota_us", f"{limit}\n")
        write(root, f"sys/fs/cgroup/cpu/{folder}/cpu.cfs_period_us", f"{PERIOD}\n")


def count(root, processors):
    return thread_count(None, root=root, affinity=frozenset(processors))


@pytest.fixture
def eight(tmp_path, monkeypatch):
    """Eight processors, each a core of its own."""
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    machine(tmp_path, [str(n) for n in range(8)])
    return tmp_path


@pytest.mark.parametrize("asked", [1, 7, 1024])
def test_what_is_asked_for_is_taken(asked, tmp_path):
    assert thread_count(asked, root=tmp_path) == Threads(asked, f"{asked}: asked for")


@pytest.mark.parametrize("asked", [0, -1, 1025, True, 2.0, "2", float("nan")])
def test_what_is_no_count_is_refused(asked):
    with pytest.raises(InputError, match="threads: expected an integer from 1 to 1024"):
        thread_count(asked)


def test_all_cores_of_the_machine(eight):
    assert count(eight, range(8)) == Threads(8, "8: the machine has 8 cores")


def test_affinity_is_the_limit(eight):
    assert count(eight, [0, 5]) == Threads(2, "2: cpu affinity allows 2 cores")
    assert count(eight, [3]) == Threads(1, "1: cpu affinity allows 1 core")


def test_hardware_threads_of_one_core_count_once(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    machine(tmp_path, ["0,2", "1,3", "0,2", "1,3"])
    assert count(tmp_path, range(4)) == Threads(2, "2: the machine has 2 cores (4 hardware threads)")
    assert count(tmp_path, [0, 2]) == Threads(1, "1: cpu affinity allows 1 core (2 hardware threads)")
    assert count(tmp_path, [0, 1]) == Threads(2, "2: cpu affinity allows 2 cores")


def test_without_topology_every_processor_is_a_core(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert count(tmp_path, range(3)).count == 3


@pytest.mark.parametrize("tree", [v1, v2])
@pytest.mark.parametrize("quota, wanted, said", [(150_000, 2, "1.5 processors"), (100_000, 1, "1 processor")])
def test_a_quota_is_rounded_up(eight, tree, quota, wanted, said):
    tree(eight, "/pod/box", {"pod/box": quota})
    assert count(eight, range(8)) == Threads(wanted, f"{wanted}: the cgroup quota allows {said}")


@pytest.mark.parametrize("tree", [v1, v2])
def test_the_least_quota_of_all_parents_holds(eight, tree):
    tree(eight, "/pod/box", {"": 600_000, "pod": 300_000, "pod/box": 500_000, "stranger": 100_000})
    assert count(eight, range(8)).count == 3


@pytest.mark.parametrize("tree, unlimited", [(v1, "-1"), (v2, "max")])
def test_no_limit_is_no_limit(eight, tree, unlimited):
    tree(eight, "/pod", {"pod": unlimited})
    assert count(eight, range(8)).count == 8


@pytest.mark.parametrize("tree", [v1, v2])
def test_a_quota_above_the_cores_does_not_matter(eight, tree):
    tree(eight, "/pod", {"pod": 9_900_000})
    assert count(eight, [1, 2]).reason == "2: cpu affinity allows 2 cores"


@pytest.mark.parametrize("tree", [v1, v2])
def test_a_container_sees_its_group_as_the_top(eight, tree):
    """Without a cgroup namespace the group is named as on the host, but mounted at the top."""
    tree(eight, "/docker/abc", {"": 200_000}, shown="/docker/abc")
    assert count(eight, range(8)).count == 2


@pytest.mark.parametrize("tree", [v1, v2])
def test_a_group_below_the_mounted_top(eight, tree):
    tree(eight, "/docker/abc/inner", {"inner": 100_000}, shown="/docker/abc")
    assert count(eight, range(8)).count == 1


@pytest.mark.parametrize("tree", [v1, v2])
def test_a_group_outside_of_the_namespace_ends_at_the_top(eight, tree):
    tree(eight, "/../../other", {"": 400_000})
    write(eight, "sys/other/cpu.max", f"100000 {PERIOD}")
    assert count(eight, range(8)).count == 4


@pytest.mark.parametrize("text", ["", "max", "0 100000", "100000", "100000 0", "-5 x", "\x00"])
def test_nonsense_in_the_files_is_no_limit(eight, text):
    v2(eight, "/pod", {})
    write(eight, "sys/fs/cgroup/pod/cpu.max", text)
    write(eight, "proc/self/cgroup", "0::/pod\nnonsense\n::\n")
    assert count(eight, range(8)).count == 8


def test_a_system_without_affinity_reports_its_processors(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert thread_count() == Threads(6, "6: the system reports 6 processors")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert thread_count().count == 1


def test_this_machine():
    found = thread_count()
    assert 1 <= found.count <= (os.cpu_count() or 1)
    assert found.reason.startswith(f"{found.count}: ")
