"""Runs that the real wandb follows, offline, and the real trackio: what arrives there, and what it costs a run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from tests.helpers.stopped_run import interrupt, main
from tests.helpers.tiny_run import TINY, rows, run_main
from train.config import ROOT
from train.results.ledger import Ledger
from train.results.track.about import numbers

STEPS = ["--steps", "6", "--untimed-steps", "2"]
BLOCK, HEAD = 32_768, 7  # of wandb's files, in the format of LevelDB's log


@pytest.fixture(autouse=True)
def _offline(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def records(path: Path):
    """What wandb has written into one of its files."""
    data, at, part = path.read_bytes(), HEAD, b""
    assert data[:4] == b":W&B"
    while at + HEAD <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEAD:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + HEAD : at + HEAD + size]
        at += HEAD + size
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def items(pairs) -> dict:
    return {"/".join(pair.nested_key) or pair.key: json.loads(pair.value_json) for pair in pairs}


class Written:
    """All that the files of a run below `folder`/wandb say, one process's after the other's."""

    def __init__(self, folder: Path):
        wandb.teardown()  # its process writes on after a run has ended, until this one waits for it, here or at its end
        self.config, self.history, self.summary, self.ids, self.exits = {}, [], {}, [], []
        for path in sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime):
            for record in records(path):
                match record.WhichOneof("record_type"):
                    case "run":
                        self.run = record.run
                        self.ids.append(record.run.run_id)
                        self.config |= items(record.run.config.update)
                    case "history":
                        self.history.append(items(record.history.item))
                    case "summary":
                        self.summary |= items(record.summary.update)
                    case "exit":
                        self.exits.append(record.exit.exit_code)


def test_what_arrives_at_wandb(corpus, tmp_path, capfd):
    run = tmp_path / "run"
    given = [*STEPS, "--track", "wandb", "--description", "what it tries", "--group", "g"]
    assert run_main(corpus, run, *given) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert [line for line in captured.out.replace(str(tmp_path), "").splitlines() if "wandb" in line] == [
        "track:  wandb, offline (wandb sync /run/wandb/offline-run-* sends it)"
    ]
    written = Written(run)
    assert (written.run.project, written.run.display_name, written.run.run_group) == ("timebox", "run", "g")
    assert written.run.notes == "what it tries"
    assert written.ids == [(run / "wandb-id").read_text().strip()]
    assert (written.config["depth"], written.config["model"]["vocab_size"]) == (2, 512)
    logged = [numbers(row) for row in rows(run)]
    assert [row["_step"] for row in written.history] == [0, 1, 2, 3, 4, 5]
    for row, ours in zip(written.history, logged, strict=True):
        assert {"step": row["_step"], **row}.items() >= ours.items()
    summary = json.loads((run / "summary.json").read_text())
    for key in ("val_bpb", "verdict", "status", "audit", "num_steps", "recipe"):
        assert written.summary[key] == summary[key], key
    assert written.summary["sample"] == (run / "sample.txt").read_text(errors="replace")
    assert written.exits == [0]


def test_nothing_of_this_machine_is_in_its_files(corpus, tmp_path):
    run = tmp_path / "run"
    assert run_main(corpus, run, *STEPS, "--track", "wandb") == 0
    secrets = [str(tmp_path), str(corpus.parent), str(ROOT), str(Path.home()), socket.gethostname(), sys.executable]
    assert Written(run).exits == [0]
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    content = path.read_bytes()
    assert [secret for secret in secrets if len(secret) > 3 and secret.encode() in content] == []
    assert [path.name for path in run.glob("wandb/offline-run-*/files/*")] == []


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_a_process_of_its_own_that_asks_nothing_of_a_network(corpus, tmp_path, tracker):
    """Every way out is a proxy that nobody calls; and what is printed is what a run without it prints."""
    listener, called = socket.create_server(("127.0.0.1", 0)), []

    def listen():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            called.append(connection.recv(200))
            connection.close()

    Thread(target=listen, daemon=True).start()
    proxy = f"http://127.0.0.1:{listener.getsockname()[1]}"
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    environment |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY"), proxy)
    environment |= {"NO_PROXY": "", "no_proxy": ""}
    printed = []
    for track in ("none", tracker):
        command = [sys.executable, "-m", "train", *TINY, *STEPS, "--data", str(corpus), "--track", track]
        done = subprocess.run([*command, "--run-dir", str(tmp_path / track / "run")], cwd=ROOT, env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        printed.append([line.split(":")[0].split("|")[0] for line in done.stdout.splitlines()])
    listener.close()
    assert called == []
    assert [line for line in printed[1] if not line.startswith("track")] == printed[0]
    weights = [(tmp_path / track / "run" / "model.safetensors").read_bytes() for track in ("none", tracker)]
    assert weights[0] == weights[1]


def test_a_resumed_run_is_the_same_run_of_wandb(corpus, tmp_path, capfd):
    folder = interrupt(corpus, tmp_path / "run", *STEPS, "--track", "wandb", step=2)
    first = Written(folder)
    assert ([row["_step"] for row in first.history], first.exits) == ([0, 1, 2], [1])
    capfd.readouterr()
    assert main("--resume", str(folder)) == 0
    assert capfd.readouterr().err == ""
    written = Written(folder)
    assert len(written.ids) == 2
    assert len({*written.ids}) == 1
    assert [row["_step"] for row in written.history] == [0, 1, 2, 3, 4, 5]
    assert written.exits == [1, 0]
    assert written.summary["val_bpb"] == json.loads((folder / "summary.json").read_text())["val_bpb"]


# A run whose wandb stands still from its third step on, or is gone.
HURT = """
import os, signal, sys
import psutil
import train.__main__, train.results.track
from train.results.progress import Reporter
from train.results.track.wandb import SERVICE
train.results.track.PATIENCE = 3.0
report = Reporter.step

def reported(self, budget, values, *args):
    report(self, budget, values, *args)
    if values.step == 2:
        for child in psutil.Process().children():
            if child.name() == SERVICE:
                child.send_signal(getattr(signal, sys.argv[1]))
                print("hurt", file=sys.stderr)

Reporter.step = reported
sys.exit(train.__main__.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("number", ["SIGSTOP", "SIGKILL"])
def test_a_run_ends_whatever_becomes_of_wandb(corpus, tmp_path, number):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HURT, number, *TINY, *STEPS, "--data", str(corpus), "--run-dir", str(run)]
    done = subprocess.run([*command, "--track", "wandb"], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    hurt, note, *rest = done.stderr.splitlines()
    assert hurt == "hurt"
    assert note.startswith("note: --track wandb is dropped, and the run goes on: ")
    assert rest == []
    assert Ledger(tmp_path).runs()[0]["outcome"] == "finished"


def test_what_arrives_at_trackio(corpus, tmp_path):
    """In a process of its own: it reads at its import where its files are."""
    run = tmp_path / "run"
    given = [*TINY, *STEPS, "--data", str(corpus), "--run-dir", str(run), "--track", "trackio", "--group", "g"]
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "trackio"), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "train", *given], cwd=ROOT, env=environment, check=True, capture_output=True)
    read = "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; (name,) = S.get_runs('timebox');" \
           "print(json.dumps([name, S.get_run_config('timebox', name), S.get_logs('timebox', name)]))"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", read], env=environment, check=True, capture_output=True, text=True)
    name, config, logs = json.loads(done.stdout)
    assert name == f"run-{(run / 'trackio-id').read_text().strip()}"
    assert config["depth"] == 2
    assert [row["loss"] for row in logs[:6]] == [row["loss"] for row in rows(run)]
    assert [row["step"] for row in logs[:6]] == [0, 1, 2, 3, 4, 5]
    summary = json.loads((run / "summary.json").read_text())
    assert logs[6]["summary/val_bpb"] == pytest.approx(summary["val_bpb"])
    assert logs[6]["summary/verdict"] == summary["verdict"]
    assert logs[6]["sample"] == (run / "sample.txt").read_text(errors="replace")
