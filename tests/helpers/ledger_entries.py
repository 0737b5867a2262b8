"""Made-up entries of a ledger, for the tests of what reads it."""

import dataclasses
import random
from pathlib import Path

from train.results.judge import judge
from train.results.ledger import Ledger


def entry(run: str, bpb: float | None = None, **fields) -> dict:
    """A run's entry as it is before it is judged; without `bpb`, of a run that failed."""
    evaluation = {"split": "val", "split_sha256": "a" * 64, "rows": 40, "code_sha256": "c" * 64}
    comparable = {"evaluation": evaluation, "budget": "300 s after 10 steps", "machine": "a GPU"}
    return {
        "kind": "run",
        "time": "2026-11-24T20:00:00+00:00",
        "run": run,
        "group": run,
        "confirms": None,
        "description": "",
        "seed": 42,
        "budget": comparable["budget"],
        "outcome": "finished" if bpb is not None else "failed",
        "error": "" if bpb is not None else "loss is nan",
        "val_bpb": bpb,
        "memory_gb": 44.0 if bpb is not None else None,
        "audit": "ok" if bpb is not None else None,
        "comparable": comparable if bpb is not None else {},
        "commit": "1234567",
        "seconds": {"total": 320.0},
        **fields,
    }


def add(ledger: Ledger, *entries: dict) -> list[dict]:
    """Judges and appends, as a run does. Returns the rows as they stand there."""
    rows = []
    for one in entries:
        with ledger.locked():
            row = one | dataclasses.asdict(judge(one, ledger.runs(one)))
            ledger.append(row)
        rows.append(row)
    return rows


def a_night(folder: Path, count: int) -> Ledger:
    """`count` experiments: slow progress, many that lead nowhere, some that diverge, some that crash."""
    rng = random.Random(0)
    ledger, best, rows = Ledger(folder), 0.9979, []
    for i in range(count):
        kind = rng.random()
        bpb = None if kind < 0.06 else rng.uniform(1.2, 3.5) if kind < 0.09 else best + rng.gauss(0.004, 0.006)
        one = entry(f"r{i:03d}", bpb if i else best, description=f"idea {i} | of the night", time=_minute(i))
        one |= dataclasses.asdict(judge(one, rows))
        best = min(best, bpb or best)
        rows.append(one)
    with ledger.locked():
        for row in rows:
            ledger.append(row)
    return ledger


def _minute(i: int) -> str:
    return f"2026-11-24T{i // 60:02d}:{i % 60:02d}:00+00:00"
