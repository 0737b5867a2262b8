"""Every way in which Triton may have no way to a GPU is one line with its mend, before anything is compiled."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import kernels
from prepare import InputError
from prepare.words import install_line
from train import device
from train.launching import check_launching

triton = pytest.importorskip("triton")
common = sys.modules["kernels.common"]

# Compilers, as shell scripts: of one without Python's headers, of one without libraries, of one that writes nonsense.
NO_HEADERS = "echo 'way.c:1:10: fatal error: Python.h: No such file or directory' >&2; echo 'terminated' >&2; exit 1"
NO_LIBRARY = "echo '/usr/bin/ld: cannot find -l:libcuda.so.1' >&2; echo 'collect2: error' >&2; exit 1"
NONSENSE = 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"'


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Triton's own, as far as it builds a module when it is asked for its target; none is in the cache."""
    from triton.runtime.build import compile_module_from_src

    def get_current_target():
        return compile_module_from_src(src="#include <Python.h>\n", name="way")

    driver = SimpleNamespace(get_current_target=get_current_target)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    return driver


def line(capfd) -> str:
    """What is said, in one line; nothing else reaches the terminal."""
    with pytest.raises(InputError) as raised:
        check_launching()
    assert capfd.readouterr() == ("", "")
    said = str(raised.value)
    assert said.startswith("Triton cannot launch kernels here: ")
    assert said.endswith(", or train with --ops reference")
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("script", "words"), [
    (NO_HEADERS, "the C compiler does not find Python.h; install Python's headers (python3-dev)"),
    (NO_LIBRARY, "the C compiler fails (/usr/bin/ld: cannot find -l:libcuda.so.1); install gcc, or name another in CC"),
    ("exit 3", "the C compiler fails (exit code 3); install gcc"),
    (NONSENSE, "; name a folder of your own in TRITON_CACHE_DIR, where programs may be executed"),
])  # fmt: skip
def test_a_compiler_that_fails(script, words, driver, tmp_path, monkeypatch, capfd):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert words in line(capfd)


@pytest.mark.parametrize(("named", "words"), [
    ("/no/such/gcc", "CC names /no/such/gcc: No such file or directory; name a C compiler there, or none"),
    ("", "CC names nothing: "),
    (None, "there is no C compiler; install gcc, or name one in CC"),
])  # fmt: skip
def test_no_compiler(named, words, driver, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PATH", str(tmp_path))
    if named is None:
        monkeypatch.delenv("CC", raising=False)
    else:
        monkeypatch.setenv("CC", named)
    assert words in line(capfd)


def test_a_cache_that_cannot_be_written(driver, tmp_path, monkeypatch, capfd):
    """Also where Triton found what it needs there: new kernels will not find their place."""
    driver.get_current_target = lambda: None
    (tmp_path / "cache").touch()
    assert f"{tmp_path / 'cache'}: File exists; name a folder of your own in TRITON_CACHE_DIR" in line(capfd)


@pytest.mark.parametrize(("error", "words"), [
    (AssertionError("libcuda.so cannot found!\nPlease make sure GPU is set up"), "libcuda.so.1 is not found; "),
    (RuntimeError("0 active drivers ([]). There should only be one."), "0 active drivers ([]). There should only be"),
    (OSError(28, "No space left on device"), "No space left on device; make room"),
    (KeyError(), "KeyError; "),
])  # fmt: skip
def test_other_ways(error, words, driver, capfd):
    def fail():
        os.write(2, b"words of a library\n")
        raise error

    driver.get_current_target = fail
    assert words in line(capfd)


def test_no_triton(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "triton", None)
    assert f"it is not installed; {install_line('-e', '.')}" in line(capfd)


def test_a_way(driver, tmp_path, capfd):
    driver.get_current_target = lambda: os.write(2, b"a warning\n")
    check_launching()
    assert capfd.readouterr().out == ""
    assert not list(Path(tmp_path / "cache").iterdir())


def test_whoever_takes_the_kernels_asks_first(monkeypatch):
    def refuse():
        raise InputError("no way")

    monkeypatch.setattr(device, "check_launching", refuse)
    for ops in (None, "triton"):
        with pytest.raises(InputError, match="no way"):
            device.pick_ops(ops, "cuda")
    assert device.pick_ops("reference", "cuda") == "reference"
    kernels.set_ops(None)


def test_no_gpu_is_no_architecture_and_no_way_to_one_is_an_error(driver, monkeypatch):
    def fail():
        raise RuntimeError("Failed to find C compiler")

    driver.get_current_target = fail
    there = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))
    monkeypatch.setattr(triton.backends, "backends", {"nvidia": there})
    assert common.gpu_arch() == 0
    there.driver.is_active = lambda: True
    with pytest.raises(RuntimeError, match="C compiler"):
        common.gpu_arch()
