"""What a container's control groups leave of the machine, from files as Linux shows them."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench.conftest
import train.device
from bench import ceilings, profile
from prepare import limits
from prepare.limits import control_group_bytes, control_group_cores
from tests.helpers.tiny_run import run_main
from train import doctor, evaluate, replay, sample
from train.memory import available_bytes

MB = 2**20
FILES = {  # limit, usage, what memory.stat's lines start with
    "v2": ("memory.max", "memory.current", ""),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
}


def control_group(folder, version: str, limit: int | str, used: int, cache: tuple[int, int] = (0, 0)):
    """The files that Linux shows of one group. In v1 a total counts the groups below as well."""
    limit_file, usage_file, prefix = FILES[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / usage_file).write_text(f"{used}\n")
    lines = [f"{prefix}active_file {cache[0]}", f"{prefix}inactive_file {cache[1]}", f"{prefix}anon 12345"]
    if prefix:
        lines = ["active_file 1", "inactive_file 2", *lines]
    (folder / "memory.stat").write_text("\n".join(lines) + "\n")


def membership(root, *entries: str):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text("".join(f"{entry}\n" for entry in entries))


CASES = {
    "v2": ("sys/fs/cgroup", "0::/batch/job", "max"),
    "v1": ("sys/fs/cgroup/memory", "4:cpu,memory:/batch/job", 9223372036854771712),
}


@pytest.mark.parametrize("version", CASES)
def test_the_tightest_control_group_counts(tmp_path, version):
    """Files in the cache are given up before a process is killed."""
    mount, entry, unlimited = CASES[version]
    membership(tmp_path, "9:name=systemd:/", entry)
    groups = tmp_path / mount
    control_group(groups / "batch/job", version, unlimited, used=10 * MB)
    control_group(groups / "batch", version, 700 * MB, used=300 * MB, cache=(20 * MB, 30 * MB))
    assert control_group_bytes(tmp_path) == 450 * MB
    control_group(groups / "batch/job", version, 400 * MB, used=10 * MB)
    assert control_group_bytes(tmp_path) == 390 * MB
    control_group(groups / "batch/job", version, 400 * MB, used=401 * MB)
    assert control_group_bytes(tmp_path) == 0


@pytest.mark.parametrize("version", CASES)
def test_a_container_that_sees_its_own_group_only(tmp_path, version):
    """Of the path that the host has for it there is nothing inside."""
    mount, entry, _ = CASES[version]
    membership(tmp_path, entry)
    control_group(tmp_path / mount, version, 512 * MB, used=100 * MB)
    assert control_group_bytes(tmp_path) == 412 * MB
    (tmp_path / mount / "memory.stat").write_text("")  # not every sandbox that shows these files fills this one
    assert control_group_bytes(tmp_path) == 412 * MB
    for path in (tmp_path / mount).iterdir():
        path.write_text("")
    assert control_group_bytes(tmp_path) is None


def test_without_control_groups_or_limits(tmp_path):
    assert control_group_bytes(tmp_path) is None  # no Linux
    membership(tmp_path, "0::/batch")
    assert control_group_bytes(tmp_path) is None  # the root group of v2 has no such files
    control_group(tmp_path / "sys/fs/cgroup/batch", "v2", "max", used=MB)
    assert control_group_bytes(tmp_path) is None


CPU_CASES = {  # where the groups are, this process's, the files of a quota, and of none
    "v2": (*CASES["v2"][:2], {"cpu.max": "{} 100000"}, {"cpu.max": "max 100000"}),
    "v1": (
        "sys/fs/cgroup/cpu", "7:cpu,cpuacct:/batch/job",
        {"cpu.cfs_quota_us": "{}", "cpu.cfs_period_us": "100000"},
        {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
    ),
}  # fmt: skip


def write(folder, files: dict[str, str], *values: int):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text.format(*values) + "\n")


@pytest.mark.parametrize("version", CPU_CASES)
def test_the_tightest_quota_counts(tmp_path, version):
    mount, entry, quota, none = CPU_CASES[version]
    assert control_group_cores(tmp_path) is None  # no Linux
    membership(tmp_path, "9:name=systemd:/", entry)
    assert control_group_cores(tmp_path) is None  # the root group of v2 has no such file
    write(tmp_path / mount / "batch/job", none)
    assert control_group_cores(tmp_path) is None
    write(tmp_path / mount / "batch", quota, 250_000)
    assert control_group_cores(tmp_path) == 2.5
    write(tmp_path / mount / "batch/job", quota, 400_000)
    assert control_group_cores(tmp_path) == 2.5
    write(tmp_path / mount / "batch/job", quota, 50_000)
    assert control_group_cores(tmp_path) == 0.5
    for text in ("", "0 0" if version == "v2" else "0"):  # a sandbox may show the files and limit nothing
        write(tmp_path / mount / "batch/job", dict.fromkeys(quota, text))
        assert control_group_cores(tmp_path) == 2.5


@pytest.mark.parametrize(("quota", "cores"), [(None, 8), (64.0, 8), (8.0, 8), (2.6, 3), (2.2, 2), (0.1, 1)])
def test_the_cores_of_a_quota(monkeypatch, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8), raising=False)
    monkeypatch.setattr(limits, "control_group_cores", lambda: quota)
    assert limits.num_cores() == cores


@pytest.fixture
def two_threads(monkeypatch):
    """As in a process of its own, in which nobody has said how many."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize(("cores", "said", "threads"), [(1, None, 1), (1, "2", 2), (2, None, 2), (3, None, 2)])
def test_a_run_has_no_more_threads_than_cores(corpus, tmp_path, capsys, monkeypatch, two_threads, cores, said, threads):
    monkeypatch.setattr(train.device, "num_cores", lambda: cores)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert run_main(corpus, tmp_path / "run", "--steps", "1", "--untimed-steps", "0") == 0
    assert ("device: cpu, 1 thread," if threads == 1 else "device: cpu, 2 threads,") in capsys.readouterr().out
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("program", [evaluate, replay, sample])
def test_what_computes_later_has_no_more_either(tmp_path, monkeypatch, two_threads, program):
    """Other threads may give other last digits."""
    monkeypatch.setattr(train.device, "num_cores", lambda: 1)
    assert program.main([str(tmp_path / "no run")]) == 2
    assert torch.get_num_threads() == 1


def test_what_is_measured_has_no_more_either(tmp_path, monkeypatch, two_threads):
    monkeypatch.setattr(train.device, "num_cores", lambda: 1)
    programs = {
        "suite": lambda: bench.conftest.pytest_configure(SimpleNamespace(stash={})),
        "profile": lambda: profile.main(["--save", str(tmp_path / "no folder" / "trace.json")]),
        "ceilings": lambda: ceilings.main([]),
    }
    monkeypatch.setattr(ceilings, "measure", lambda device: ceilings.Ceilings(flops=1.0, bandwidth=1.0))
    for name, program in programs.items():
        torch.set_num_threads(2)
        program()
        assert torch.get_num_threads() == 1, name


@pytest.mark.parametrize("cores", [1, 2**20])
def test_the_doctor_names_the_cores_that_are_allowed(monkeypatch, cores):
    monkeypatch.setattr(doctor, "num_cores", lambda: cores)
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: 4)
    assert (" 4 cores of which this process may use 1" in doctor.memory("cpu").found) == (cores == 1)


@pytest.fixture
def conftest(request):
    return request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests" / "conftest.py"))


def test_only_tests_that_are_marked_see_a_gpu(conftest, monkeypatch):
    """Nor do the processes that others start."""
    assert not torch.cuda.is_available()
    seen = subprocess.run([sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert seen.stdout == "\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = {"": False, "not gpu": False, "gpu": True}
    assert {m: conftest.takes_the_gpu(SimpleNamespace(option=SimpleNamespace(markexpr=m))) for m in chosen} == chosen


def test_no_test_depends_on_the_memory_that_is_free():
    """What is free, and what a container allows, changes while tests run."""
    assert available_bytes("cpu") == 16 * 2**30
    assert control_group_bytes() is None
    assert control_group_cores() is None


def test_there_is_a_process_of_tests_for_each_core_allowed(request, conftest, monkeypatch):
    monkeypatch.setattr(conftest, "num_cores", lambda: 3)
    assert conftest.pytest_xdist_auto_num_workers(request.config) == 3
    monkeypatch.setattr(conftest, "takes_the_gpu", lambda config: True)
    assert conftest.pytest_xdist_auto_num_workers(request.config) == 0
