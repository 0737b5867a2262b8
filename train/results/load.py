"""What else the machine did while a run trained: a run that was disturbed is no worse for it, and its row says so."""

import os
import subprocess
import time

import psutil

from ..leases import others_lent

WORTH_SAYING = 0.10  # of the pace: runs of one code differ by less on a machine with nothing else to do


class Load:
    """From here to `end`."""

    def __init__(self, device: str):
        self.device = device
        self._start, self._busy, self._own = time.monotonic(), _busy(), _own()

    def end(self) -> dict:
        """Cores that other processes took, on average; GPUs of the machine that other runs have now (`--gpu`); on a GPU
        its clock, and what held that down."""
        passed = max(time.monotonic() - self._start, 1e-3)
        others = (_busy() - self._busy) - (_own() - self._own)
        lent = others_lent(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
        found = {"other_cores": round(max(0.0, others) / passed, 2), "other_gpus_lent": lent}
        return found | (gpu_clock() if self.device == "cuda" else {})


def _busy() -> float:
    """Seconds of all cores, whoever worked."""
    times = psutil.cpu_times()
    waited = sum(getattr(times, name, 0.0) for name in ("idle", "iowait"))
    # Time of guests is part of that of users.
    return sum(times) - waited - sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice"))


def _own() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def gpu_clock() -> dict:
    """The clock of the multiprocessors and its limit, in MHz, and why it is held down; nothing where nobody can tell.
    Asked right after the last step, while the GPU is still warm."""
    reasons = ("hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown", "sw_power_cap")
    fields = ["clocks.sm", "clocks.max.sm", *(f"clocks_event_reasons.{reason}" for reason in reasons)]
    number = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={number}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
        clock, limit, *active = [part.strip() for part in said.splitlines()[0].split(",")]
        held = [reason for reason, word in zip(reasons, active, strict=True) if word == "Active"]
        return {"gpu_mhz": int(clock), "gpu_max_mhz": int(limit), "held_down_by": held}
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return {}


def pace_note(run: dict, other: dict) -> str:
    """Where a run was slower or faster than another by more than chance: by how much, and what may have done it."""
    ours, theirs = (e.get("summary") or {} for e in (run, other))
    if run["budget"].endswith(" steps") and " s " not in run["budget"]:
        return ""  # it changes no number
    if not (ours.get("tokens_per_second") and theirs.get("tokens_per_second")):
        return ""
    change = ours["tokens_per_second"] / theirs["tokens_per_second"] - 1
    if abs(change) <= WORTH_SAYING:
        return ""
    text = f"{abs(change):.0%} {'more' if change > 0 else 'fewer'} tokens a second"
    load, before = (e.get("load") or {} for e in (run, other))
    causes = []
    size = (ours.get("num_params_M") or 0.0) / (theirs.get("num_params_M") or 1.0) - 1
    if "num_params_M" in ours and abs(size) > 0.01:
        causes.append(f"the model has {abs(size):.0%} {'more' if size > 0 else 'fewer'} parameters")
    cores = load.get("other_cores", 0.0) - before.get("other_cores", 0.0)
    if change < 0 and cores > 0.2:
        causes.append(f"other processes took {load['other_cores']:.1f} cores, there {before.get('other_cores', 0):.1f}")
    lent = load.get("other_gpus_lent", 0) - before.get("other_gpus_lent", 0)
    if change < 0 and lent > 0:
        causes.append(f"other runs had {load['other_gpus_lent']} GPUs of the machine, there"
                      f" {before.get('other_gpus_lent', 0)}")  # fmt: skip
    held = [why for why in load.get("held_down_by", []) if why not in before.get("held_down_by", [])]
    if change < 0 and held:
        causes.append(f"the GPU's clock was held down ({', '.join(held)})")
    if change > 0 and cores < -0.2:
        causes.append(f"there other processes took {before['other_cores']:.1f} cores")
    if change > 0 and lent < 0:
        causes.append(f"there other runs had {before['other_gpus_lent']} GPUs of the machine")
    return f"{text}: {'; '.join(causes) or 'no other load was seen'}"
