"""No system has to have what only Unix has: every module is imported, and a run trained, without it. It shows what can
be shown on Linux, and no more: macOS and Windows have not been tried."""

import json
import subprocess
import sys

from tests.helpers.tiny_run import TINY
from train.config import ROOT

# What Windows lacks goes away where our own code could see it; PyTorch and the others are imported before, as they are.
WITHOUT = """
import importlib, os, pathlib, signal, sys, torch, torch.distributed, matplotlib.pyplot, scipy.stats, psutil
import numpy, tokenizers, tiktoken, safetensors.torch, tqdm, torch.utils.tensorboard
for name in ("fcntl", "resource", "termios", "pwd", "grp", "pty"):
    sys.modules[name] = None
for name in [name for name in vars(signal) if name in WORDS.split()]:
    delattr(signal, name)
for name in ("killpg", "pread", "pwrite", "getloadavg", "sched_getaffinity", "getpgid", "setsid", "fork"):
    delattr(os, name)
folder_or_file = os.open
def opened(path, flags, *mode, **more):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return folder_or_file(path, flags, *mode, **more)
os.open = opened
"""
WORDS = "SIGPIPE SIGCONT SIGSTOP SIGTSTP SIGKILL SIGHUP SIGQUIT SIGALRM SIGUSR1 SIGUSR2 SIGCHLD SIGXCPU siginterrupt"

EVERY_MODULE = """
for room in ("prepare", "model", "kernels", "train", "bench"):
    for path in sorted(pathlib.Path(room).rglob("*.py")):
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        if path.stem not in ("__main__", "conftest") and not name.startswith("bench.suite"):
            try:
                importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != "transformers":  # which nothing of ours needs
                    raise
"""
RUN = """
import train.__main__
sys.exit(train.__main__.main(sys.argv[1:]))
"""



def test_every_module_is_imported_and_a_run_trains(corpus, tmp_path):
    run = tmp_path / "run"
    program = WITHOUT.replace("WORDS", repr(WORDS)) + EVERY_MODULE + RUN
    arguments = [*TINY, "--data", str(corpus), "--run-dir", str(run), "--steps", "3"]
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert summary["num_steps"] == 3
    assert summary["peak_rss_mb"] > 10
    assert "has no locks (this system has no flock)" in done.stderr
    assert (tmp_path / "results.tsv").read_text().count("\n") == 2
