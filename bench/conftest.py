"""Options of the suite, its ceilings, and the table after it."""

import time

import pytest
import torch

from bench import ceilings as measured_ceilings
from bench.suite.results import step_table, table
from train.device import ask_for_workspace, keep_to_the_cores_allowed
from train.results.run_folder import source_commit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = pytest.StashKey[list]()
STEPS = pytest.StashKey[dict]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    group = parser.getgroup("timebox")
    group.addoption("--bench-seconds", type=float, metavar="S", help="after so long begin no other case, and finish")
    group.addoption("--providers", metavar="A,B", help="time these alone, for example triton,eager,liger")


def pytest_configure(config):
    keep_to_the_cores_allowed()
    ask_for_workspace()
    config.stash[ROWS] = []
    config.stash[STEPS] = {}
    config.stash[STARTED] = time.monotonic()


def out_of_time(limit: float | None, started: float) -> bool:
    return limit is not None and time.monotonic() - started > limit


@pytest.fixture(autouse=True)
def _within_its_time(request):
    limit = request.config.getoption("--bench-seconds")
    if out_of_time(limit, request.config.stash[STARTED]):
        pytest.skip(f"--bench-seconds {limit:g} are over")


@pytest.fixture(autouse=True)
def _the_gpu_survives(request):
    """A kernel that reads or writes where it may not breaks the GPU for its process: nothing after it has a time."""
    yield
    if DEVICE == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            pytest.exit(f"{request.node.nodeid} broke the GPU for this process ({reason})", returncode=1)


@pytest.fixture(scope="session")
def ceilings():
    """Of this device, measured before the first op."""
    return measured_ceilings.measure(DEVICE)


@pytest.fixture(scope="session")
def commit():
    return source_commit()


@pytest.fixture
def rows(request):
    """The rows of the table, to append to."""
    return request.config.stash[ROWS]


@pytest.fixture
def steps(request):
    """Whole steps by name, as bench/test_step.py measured them."""
    return request.config.stash[STEPS]


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["device"] = measured_ceilings.device_name(DEVICE)
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()


def pytest_benchmark_group_stats(config, benchmarks, group_by):
    """pytest-benchmark's own table is for what has none of ours."""
    others = [b for b in benchmarks if not {"provider", "step", "options"} & b["extra_info"].keys()]
    return [(None, others)] if others else []


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section(f"ops on {measured_ceilings.device_name(DEVICE)}")
        for line in table(config.stash[ROWS]):
            terminalreporter.write_line(line)
    if config.stash[STEPS]:
        terminalreporter.section(f"whole steps on {measured_ceilings.device_name(DEVICE)}")
        for line in step_table(config.stash[STEPS]):
            terminalreporter.write_line(line)
    reasons = {}
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
            reasons[reason] = reasons.get(reason, 0) + 1
    for reason, count in reasons.items():
        terminalreporter.write_line(f"not measured ({count}): {reason}")
