"""What the control groups of a container, or of a batch system, leave this process of the machine's memory and cores.

Source: the kernel's documentation of cgroup v2 (`memory.max`, `cpu.max`) and v1 (`memory.limit_in_bytes`,
`cpu.cfs_quota_us`).
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class ControlGroup(NamedTuple):
    folder: Path
    version: int


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[ControlGroup]:
    """Those of this process that may limit `controller`; none where there is no Linux. Every level's limit holds."""
    try:
        entries = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for entry in entries:
        _, controllers, path = entry.split(":", 2)
        if not controllers:
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in controllers.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        # Inside a container the path may be the host's, of which only the mount is seen.
        group = Path(path.lstrip("/"))
        yield from (ControlGroup(mount / level, version) for level in (group, *group.parents))


def control_group_bytes(root: Path = Path("/")) -> int | None:
    """What memory limits leave free, in bytes; None where there is none (in v1 each group has one, as large as can be).
    Linux kills what goes past one without a word."""
    free = []
    for folder, version in control_groups("memory", root):
        limit, usage, prefix = {
            1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
            2: ("memory.max", "memory.current", ""),
        }[version]
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # the root group has no limit, others need not be seen, a sandbox's may be empty
            continue
        if most != "max":
            # Of what counts as used, the cache of files is given up before anything is killed.
            cache = sum(int(stat.get(f"{prefix}{name}", 0)) for name in ("active_file", "inactive_file"))
            free.append(max(0, int(most) - used + cache))
    return min(free, default=None)


def control_group_cores(root: Path = Path("/")) -> float | None:
    """What CPU quotas allow: seconds of all cores together a second. None where there is no quota."""
    cores = []
    for folder, version in control_groups("cpu", root):
        names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        try:
            quota, period = map(int, " ".join((folder / name).read_text() for name in names).split())
        except (OSError, ValueError):  # not seen; "max", which is none; or a sandbox that leaves the files empty
            continue
        if quota > 0 and period > 0:  # v1 has -1 for none
            cores.append(quota / period)
    return min(cores, default=None)


def num_cores() -> int:
    """Cores this process may use: at least one, a quota rounded to the nearest."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = control_group_cores()
    return cores if quota is None else max(1, min(cores, round(quota)))
