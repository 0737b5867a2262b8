"""Where a number comes from: the commit and what differs from it, the machine, the versions, the code that evaluates.

Read when a run begins: the files may be edited while it goes.
"""

import hashlib
import inspect
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from prepare.words import quoted

from ..config import ROOT
from ..step import TrainStep

# With `prepare/` and `TrainStep.token_losses`: the code that evaluates, and the one that checks it.
EVALUATING_FILES = (
    "kernels/linear_cross_entropy.py", "kernels/cpu/linear_cross_entropy.py", "train/results/audit.py",
)  # fmt: skip
PACKAGES = ("numpy", "safetensors", "tiktoken", "tokenizers", "torch", "triton")


def source_state() -> dict:
    """`commit` in full, whether the tree was `dirty`, and then the `diff_sha256` of what differs from the commit:
    changes, and Python files that git does not know. All None outside a repository."""
    try:
        commit = _git("rev-parse", "HEAD").decode().strip()
        diff = _git("diff", "HEAD", "--binary")
        unknown = _git("ls-files", "-z", "--others", "--exclude-standard", "--", "*.py").split(b"\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None, "diff_sha256": None}
    for name in unknown:
        path = ROOT / os.fsdecode(name)
        diff += name + b"\0" + (path.read_bytes() if path.is_file() else b"")  # an editor's lock is a link to nowhere
    return {
        "commit": commit,
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff).hexdigest() if diff else None,
    }


def changes(at_most: int = 200_000) -> bytes:
    """What the run's code changed, its commit against that one's parent and what is not committed, as git prints it;
    empty outside a repository. Commits that are reset are gone by morning."""
    try:
        parent = _git("rev-parse", "--verify", "--quiet", "HEAD~1").decode().strip()
    except (OSError, subprocess.CalledProcessError):
        parent = "HEAD"  # the first commit changed nothing
    try:
        diff = _git("diff", parent)
    except (OSError, subprocess.CalledProcessError):
        return b""
    if len(diff) <= at_most:
        return diff
    return diff[:at_most] + f"\n[cut: {len(diff) - at_most:,} bytes more]\n".encode()


def why_no_commit() -> tuple[str, str]:
    """Why `source_state` knows no commit, and what mends that."""
    try:
        _git("rev-parse", "HEAD")
    except OSError:
        return "git is not installed", "install git"
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace")
        if "dubious ownership" in said:  # as of a folder that a container was given from outside
            mend = f"git config --global --add safe.directory {quoted(_worktree(said))}"
            return f"the repository {ROOT} belongs to another user, so git does not read it", mend
        if "not a git repository" in said:
            return f"{ROOT} is no git repository", "git init && git add . && git commit -m start"
    return f"git knows no commit of {ROOT}", "git add . && git commit -m start"


def _worktree(said: str) -> str:
    """The folder that git names in its advice, which may lie above ours."""
    found = re.search(r"safe\.directory (.+)", said)
    return shlex.split(found[1])[0] if found else str(ROOT)


def no_identity() -> bool:
    """Whether git has no name or address for its commits, and so would refuse to make one."""
    try:
        _git("var", "GIT_AUTHOR_IDENT")
        _git("var", "GIT_COMMITTER_IDENT")
    except OSError:
        return False
    except subprocess.CalledProcessError:
        return True
    return False


def short_commit(state: dict) -> str | None:
    """Of a `source_state`, with a + where something differed from it; None outside a repository."""
    return state["commit"] and state["commit"][:7] + "+" * state["dirty"]


def named_state(name: str | None) -> dict:
    """The `source_state` that `short_commit` gave this name, as far as a name tells."""
    return {"commit": name and name.rstrip("+"), "dirty": name and name.endswith("+"), "diff_sha256": None}


def _git(*args: str) -> bytes:
    command, english = ["git", "-C", str(ROOT), *args], os.environ | {"LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, check=True, env=english).stdout


def evaluating_code_sha256() -> str:
    """One hash over what turns a model into a val_bpb: all of `prepare/`, the loss, `token_losses`, and the audit."""
    digest = hashlib.sha256()
    files = sorted((ROOT / "prepare").rglob("*.py")) + [ROOT / name for name in EVALUATING_FILES]
    for path in files:
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update(inspect.getsource(TrainStep.token_losses).encode())
    return digest.hexdigest()


def machine(device: str, ranks: int = 1) -> dict:
    """What the run's speed depends on. Runs on machines of one `name` are comparable: it says how many there are where
    there are several."""
    times = f"{ranks}x " if ranks > 1 else ""
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 2**30, 1)}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {"gpu": properties.name, "gpu_memory_gb": round(properties.total_memory / 2**30, 1)}
        return {"name": times + properties.name, "ranks": ranks, **gpu, **found}
    return {"name": f"{times}{found['cpu']}, threads: {torch.get_num_threads()}", "ranks": ranks, **found}


def cpu_name() -> str:
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def versions() -> dict:
    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # there is no Triton for macOS
            found[name] = None
    return found | {"torch": torch.__version__}  # which build it is, its package does not always say
