"""Signals to a process that trains: while it sets up, and a second one in the middle of a step."""

import signal
import time
from pathlib import Path

import pytest

from tests.helpers.tiny_run import TINY, rows, start
from train.resilience.checkpoint import checkpoint_folders, read_checkpoint
from train.results.ledger import Ledger


def wait_for_line(stream, beginning: str) -> None:
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(beginning):
            return
    pytest.fail(f"no line {beginning!r} in {seen}")


def test_a_second_signal_stops_at_once(corpus, tmp_path):
    """In the middle of a step, which takes a second here; what was there before stays."""
    folder = tmp_path / "run"
    slow = ["--total-batch-size", str(4 * 32 * 256), "--checkpoint-every", "0"]
    process = start(*TINY, "--data", str(corpus), "--run-dir", str(folder), *slow)
    wait_for_line(process.stdout, "step 00001")
    process.send_signal(signal.SIGINT)
    wait_for_line(process.stderr, "interrupted: finishing the step")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=600)
    assert process.returncode == -signal.SIGINT  # which a shell reports as 130
    assert rows(folder)[-1]["step"] <= 1  # it may have come between the printed line and its row
    left = checkpoint_folders(folder / "checkpoints")
    assert left
    assert all(read_checkpoint(path) for path in left)


@pytest.mark.parametrize("asked", [True, False])
def test_what_has_no_reader_any_more_is_interrupted(asked, corpus, tmp_path):
    """As after `| head -n 5`, and after Ctrl-C in `2>&1 | tee run.log`, which ends the tee too."""
    folder = tmp_path / "run"
    process = start(*TINY, "--data", str(corpus), "--run-dir", str(folder), "--total-batch-size", str(4 * 32 * 128))
    wait_for_line(process.stdout, "step 00001")
    if asked:
        process.send_signal(signal.SIGINT)
        wait_for_line(process.stderr, "interrupted: finishing the step")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(timeout=600) == (130 if asked else 141)
    assert read_checkpoint(checkpoint_folders(folder / "checkpoints")[0]).step == len(rows(folder))
    (entry,) = Ledger.beside(folder).runs()
    assert entry["outcome"] == "interrupted"


def test_a_run_that_was_stopped_knows_for_how_long(corpus, tmp_path):
    """As by Ctrl-Z and `fg`; its checkpoint knows it too."""
    folder = tmp_path / "run"
    options = ["--data", str(corpus), "--run-dir", str(folder), "--untimed-steps", "0", "--hang-timeout", "0"]
    process = start(*TINY, *options, "--time-budget", "600")
    wait_for_line(process.stdout, "step 00001")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.5)
    process.send_signal(signal.SIGCONT)
    wait_for_line(process.stdout, f"step {len(rows(folder)) + 2:05d}")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    checkpoint = read_checkpoint(checkpoint_folders(folder / "checkpoints")[0])
    assert checkpoint.values["budget"]["stopped_seconds"] > 1.0


def test_a_signal_while_it_sets_up(corpus, tmp_path):
    """As soon as the handler is there, which is long before PyTorch is."""
    process = start(*TINY, "--data", str(corpus), "--run-dir", str(tmp_path / "run"))
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        process.kill()
        pytest.skip("when the handler is there is seen in /proc, which is Linux's")
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 143
    assert (out, err) == ("", "\nterminated\n")
    assert not (tmp_path / "run").exists()
