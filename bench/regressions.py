"""Whether anything became slower: `python -m bench.regressions NEW.json [OLD.json]`.

Both are what pytest-benchmark wrote for bench/test_ops.py or bench/test_step.py. Without OLD it is the latest file of
the same device in bench/results/. Only times of ours count, per token: another provider's is another's business. A
regression of more than 5 % is marked, in red on a terminal, and makes the exit code 1.
"""

import json
import sys
from pathlib import Path

from bench.suite.results import OURS
from prepare import InputError
from prepare.arguments import Parser, command
from prepare.words import printable

RESULTS = Path(__file__).parent / "results"
LIMIT = 5.0  # percent
RED, PLAIN = "\x1b[31m", "\x1b[0m"


def read(path: Path) -> dict:
    """A results file: its device, its date and its times in milliseconds by name. Raises InputError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        times = {}
        for benchmark in content["benchmarks"]:
            extra = benchmark["extra_info"]
            if extra.get("provider") == OURS:
                times[f"{extra['op']} {extra['shape']} {extra['direction']}"] = extra["ns_per_token"]
            elif "step" in extra:
                step = extra["step"]
                tokens = step["config"]["device_batch_size"] * step["config"]["seq_len"]
                name = f"step of {tokens:,}-token micro-steps, V = {step['model']['vocab_size']:,}"
                times[name] = 1e9 / step["tokens_per_second"]
            elif "options" in extra:
                times[f"step {extra['flags']}"] = 1e9 / extra["options"]["tokens_per_second"]
        return {"device": content["machine_info"].get("device"), "date": content["datetime"], "times": times}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: name another file") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{path} is no JSON that --benchmark-json wrote") from None


def latest(folder: Path, new: Path, results: dict) -> Path | None:
    """The newest file in `folder` that has times of ours on the same device, `new` itself left out."""
    found = []
    for path in sorted(folder.glob("**/*.json")):
        if path.resolve() == new.resolve():
            continue
        try:
            old = read(path)
        except InputError:
            continue  # a folder of results holds other JSON too
        if old["device"] == results["device"] and old["times"].keys() & results["times"].keys():
            found.append((old["date"], path))
    return max(found)[1] if found else None


def changes(old: dict[str, float], new: dict[str, float]) -> list[tuple[str, float, float, float]]:
    """(name, old, new, percent slower) of what both have, the worst first."""
    rows = [(name, old[name], new[name], 100 * (new[name] / old[name] - 1)) for name in new if name in old]
    return sorted(rows, key=lambda row: -row[3])


def report(rows: list[tuple[str, float, float, float]], limit: float, colours: bool) -> int:
    """Prints every change, and returns how many are regressions."""
    width = max(len(name) for name, *_ in rows)
    print(f"{'nanoseconds a token':<{width}}  {'old':>9}  {'new':>9}   change")
    regressions = 0
    for name, old, new, percent in rows:
        line = f"{name:<{width}}  {old:>9.4f}  {new:>9.4f}  {percent:>+6.1f} %"
        if percent > limit:
            regressions += 1
            line = f"{line}  REGRESSION"
            line = f"{RED}{line}{PLAIN}" if colours else line
        print(line)
    return regressions


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 nothing slower; 1 a regression; 2 bad input."""
    parser = Parser("bench.regressions", __doc__)
    parser.add_argument("new", type=Path)
    parser.add_argument("old", type=Path, nargs="?")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to look for OLD (default: bench/results)")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"percent (default: {LIMIT:g})")
    options = parser.parse_args(args)
    try:
        new = read(options.new)
        if not new["times"]:
            raise InputError(f"{options.new} holds no time of {OURS}: measure on a CUDA device")
        path = options.old or latest(options.results, options.new, new)
        if path is None:
            print(f"nothing to compare with: no results of {new['device']} in {printable(options.results)}")
            return 0
        old = read(path)
        if old["device"] != new["device"]:
            raise InputError(f"{path} is of {old['device']}, {options.new} of {new['device']}: compare like with like")
        rows = changes(old["times"], new["times"])
        if not rows:
            raise InputError(f"{path} and {options.new} have no case in common")
    except InputError as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 2
    print(f"against {printable(path)}")
    regressions = report(rows, options.limit, sys.stdout.isatty())
    print(f"{regressions} of {len(rows)} slower by more than {options.limit:g} %")
    return 1 if regressions else 0


if __name__ == "__main__":
    command(main)
