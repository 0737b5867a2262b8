"""Tests marked `gpu` take the GPU and have a session to themselves, `pytest -m gpu`. In every other there is none, not
even for the processes that a test starts, and the kernels run in Triton's interpreter: no process can have both, and no
test that means the CPU takes a GPU by default, where there is one."""

import os
import pickle
import random
import signal
import string
from pathlib import Path

import pytest
import torch

from prepare import prepare
from prepare.limits import num_cores
from tests.helpers.alike import no_machines_memory, short_end
from tests.helpers.kernel_memory import watch_memory
from tests.helpers.payloads import Payload
from tests.helpers.prepare_corpus import write_corpus

# One thread here and in every process that a test starts: matrices are too small to share, and beside other processes
# two threads that wait for each other take ten times as long (bench/LOG.md, 2026-11-28).
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

os.environ.pop("TIMEBOX_RUNS", None)  # whoever runs the tests may have a ledger there

# `make test` is a make: one that a test starts is none of its, and has neither its options nor its ARGS.
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES"):
    os.environ.pop(name, None)

# A shell's background job ignores SIGINT, and so would every process that a test starts to interrupt it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_need_a_gpu = pytest.StashKey[list[str]]()  # the tests' names, as pytest's command line takes them


def takes_the_gpu(config) -> bool:
    return config.option.markexpr == "gpu" and torch.cuda.is_available()


def pytest_configure(config):
    """Before Triton is first imported, and before CUDA is first asked what there is."""
    if takes_the_gpu(config):
        return
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.helpers.quick_interpreter import quicken

    quicken()


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config, items):
    """Without a GPU the tests that need one are left out together: one line at the end, instead of a skip for each."""
    needy = [item for item in items if item.get_closest_marker("gpu")]
    config.stash[_need_a_gpu] = [item.nodeid for item in needy]
    if hasattr(config, "workeroutput"):  # one of several processes: the one that prints collects nothing by itself
        config.workeroutput["need a GPU"] = config.stash[_need_a_gpu]
    if needy and not takes_the_gpu(config):
        config.hook.pytest_deselected(items=needy)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node):
    if left_out := getattr(node, "workeroutput", {}).get("need a GPU"):
        node.config.stash[_need_a_gpu] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """A process for each core that may be used. Tests on a GPU stay in this one: which of them fit into its memory
    together is known by file alone (bench/gpu_tests.py runs them so), and some measure time."""
    return 0 if takes_the_gpu(config) else num_cores()


def pytest_terminal_summary(terminalreporter, config):
    if not takes_the_gpu(config) and (needy := config.stash.get(_need_a_gpu, [])):
        terminalreporter.write_line(f"{len(needy)} tests left out: they take a GPU, by python -m bench.gpu_tests")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """`pytest tests -m gpu` has nothing left to run where there is no GPU, and that is no failure."""
    nothing = session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
    if nothing and not takes_the_gpu(session.config) and session.config.stash.get(_need_a_gpu, []):
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """The shapes of the tests that need a GPU are made for one of 80 GB. What a smaller one has no room for is left out
    there, and said; on one of that size running out of memory is a failure."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        total = torch.cuda.get_device_properties(0).total_memory if takes_the_gpu(item.config) else 0
        if not 0 < total < 75 * 2**30 or not item.get_closest_marker("gpu"):
            raise
        pytest.skip(f"too large for this GPU's {total / 2**30:.0f} GiB")


@pytest.fixture(autouse=True)
def _default_ops():
    """A run sets the ops of its process; a test that comes after one, in whichever order, knows nothing of it."""
    import kernels

    kernels.set_ops(None)
    yield
    kernels.set_ops(None)


@pytest.fixture
def gpu_test_files(request) -> set[str]:
    """The names of the files with a test that needs a GPU, among those that this session was given."""
    return {Path(name.partition("::")[0]).name for name in request.config.stash[_need_a_gpu]}


@pytest.fixture(autouse=True)
def _the_gpu_survives(request):
    """A kernel that reads or writes where it may not breaks the GPU for its process: all that follows would fail with
    it. Memory goes back, because other processes test beside this one (bench/gpu_tests.py)."""
    yield
    if request.node.get_closest_marker("gpu"):
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            pytest.exit(f"{request.node.nodeid} broke the GPU for this process ({reason})", returncode=1)


@pytest.fixture
def pictures():
    """Asked for by a test that wants to see what a run draws."""


@pytest.fixture(autouse=True)
def _on_any_machine(request, monkeypatch):
    """Runs in processes of their own have the machine's memory, and end as ever."""
    no_machines_memory(monkeypatch)
    short_end(monkeypatch, "pictures" in request.fixturenames)


@pytest.fixture(params=[pytest.param("real", marks=pytest.mark.gpu), "pretended"])
def gpu(request, monkeypatch):
    """A CUDA device: the real one, or one that is pretended, on which the references run, for want of time."""
    if request.param == "real":
        yield
        return
    import kernels
    from tests.helpers.pretend_gpu import PretendGpu

    with PretendGpu(monkeypatch) as device:
        kernels.set_ops("reference")
        yield device
        kernels.set_ops(None)


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Every op runs its kernels: what they leave unwritten is NaN, interpreted bf16 is what a GPU's is, and an address
    that a GPU would not forgive is an error."""
    from kernels import set_ops  # imports Triton, which must know of its interpreter first
    from tests.helpers.kernel_checks import exact_bfloat16, fill_empty_with_nan

    watch_memory(monkeypatch)
    fill_empty_with_nan(monkeypatch)
    exact_bfloat16(monkeypatch)
    set_ops("triton")
    yield
    set_ops(None)


@pytest.fixture
def in_fp64(monkeypatch):
    """A step computes in fp64, where two orders of one sum differ in no digit that counts. In fp32 AdamW turns a
    gradient near zero, which such a difference is enough to turn round, into a whole step of either sign."""
    monkeypatch.setattr("train.optimizer.iterate_dtype", lambda *_: torch.float64)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder prepared from a few hundred short documents: 512 tokens of vocabulary, some 40,000 of text."""
    source = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 7))) for _ in range(400)]
    for i in range(300):
        text = " ".join(rng.choices(words, weights=range(400, 0, -1), k=rng.randint(20, 200)))
        (source / f"{i:03d}.txt").write_text(text + ".\n", encoding="utf-8")
    return prepare(str(source), out=tmp_path_factory.mktemp("prepared") / "corpus", vocab_size=512)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """A prepared folder that is read in milliseconds: 25 documents, 270 tokens of vocabulary. To be left as it was."""
    path = tmp_path_factory.mktemp("small")
    return prepare(str(write_corpus(path / "text", 25)), path / "data", vocab_size=270)


@pytest.fixture(scope="session")
def small_run(small_data):
    """The folder of a finished run of two steps of a model of one layer, with its checkpoint. To be left as it was."""
    from train.__main__ import main  # imports Triton, which must know of its interpreter first

    path = small_data.parent / "run"
    tiny = [
        "--device", "cpu", "--depth", "1", "--d-model", "32", "--head-dim", "16", "--seq-len", "16", "--no-autocast",
        "--device-batch-size", "2", "--total-batch-size", "32", "--untimed-steps", "0", "--steps", "2",
        "--keep-checkpoints",
    ]  # fmt: skip
    assert main([*tiny, "--data", str(small_data), "--run-dir", str(path)]) == 0
    return path


@pytest.fixture
def payload(tmp_path):
    """What makes a folder where it is unpickled; at the end of the test there must be none."""
    payload = Payload(tmp_path / "it-ran")
    pickle.loads(pickle.dumps(payload))
    payload.marker.rmdir()  # it would have worked
    yield payload
    assert not payload.marker.exists()
