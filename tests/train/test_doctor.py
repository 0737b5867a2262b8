"""The doctor is for machines that are not well: whatever fails there is a finding, and what rests on it is left out."""

from types import SimpleNamespace

import pytest
import torch

from train import doctor
from train.doctor import OK, WRONG, Finding

CHECKS = ("python", "packages", "code", "gpu", "memory", "disk", "kernel", "data", "batch")


@pytest.fixture
def well(monkeypatch):
    """All is well, and there is a GPU; nothing is really looked at."""
    for name in CHECKS:
        finding = Finding(name, OK, "fine")
        if name == "data":
            monkeypatch.setattr(doctor, "dataset", lambda data, device, finding=finding: (finding, 8192))
        else:
            monkeypatch.setattr(doctor, name, lambda *args, finding=finding: finding)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def examined(capsys) -> dict[str, str]:
    """The lines by what was looked at. The exit code is that of their worst."""
    code = doctor.main([])
    *lines, last = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    wrong = sum(line.startswith(WRONG) for line in lines)
    assert code == (wrong > 0)
    assert last == ("all is well" if not wrong else f"{wrong} thing is wrong")
    return {line.split()[1]: line for line in lines}


def fail(*args):
    raise torch.AcceleratorError("CUDA error: all devices are busy\n\nsearch for `cudaError` in ...")


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize("name", CHECKS)
def test_a_check_that_fails_is_a_finding_and_the_others_are_made(name, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "dataset" if name == "data" else name, fail)
    found = examined(capsys)
    assert tuple(found) == CHECKS
    assert found[name].split(maxsplit=2)[::2] == [
        WRONG, "AcceleratorError: CUDA error: all devices are busy search for `cudaError` in ..."
    ]  # fmt: skip


@pytest.mark.usefixtures("well")
def test_what_was_found_before_a_check_failed_is_kept(monkeypatch, capsys):
    def packages():
        yield Finding("packages", OK, "the first")
        fail()

    monkeypatch.setattr(doctor, "packages", packages)
    assert doctor.main([]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " packages " in line] == [OK, WRONG]


@pytest.mark.usefixtures("well")
@pytest.mark.parametrize(("name", "left_out"), [("gpu", ("kernel", "batch")), ("kernel", ("batch",))])
def test_what_needs_the_gpu_is_left_out_where_it_is_wrong(name, left_out, monkeypatch, capsys):
    monkeypatch.setattr(doctor, name, lambda *args: Finding(name, WRONG, "too old", "buy another"))
    for other in left_out:
        monkeypatch.setattr(doctor, other, lambda *args: pytest.fail("was looked at"))
    found = examined(capsys)
    assert tuple(found) == CHECKS
    for other in left_out:
        assert found[other].split(maxsplit=2)[::2] == ["note", f"not looked at, since {name} is wrong"]


@pytest.mark.usefixtures("well")
def test_a_cpu_is_looked_at_whatever_its_gpu_lacks(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "gpu", lambda: Finding("gpu", WRONG, "no CUDA in this PyTorch"))
    found = examined(capsys)
    assert found["kernel"].startswith(OK)
    assert found["batch"].startswith(OK)


def test_a_gpu_without_bf16_and_without_memory_to_ask_for(monkeypatch, capsys, small_data):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    properties = SimpleNamespace(name="a T4", major=7, minor=5)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    assert doctor.main(["--data", str(small_data)]) == 1
    lines = {line.split()[1]: line.split()[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "}
    assert [lines[name] for name in ("gpu", "memory", "kernel", "batch")] == [WRONG, WRONG, "note", "note"]


def test_a_kernel_that_cannot_be_launched(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "/no/such/gcc")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = doctor.kernel("cuda")
    assert found.state == WRONG
    assert found.found.startswith("rms_norm fails on the GPU: Triton cannot launch kernels here: ")
