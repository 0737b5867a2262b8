"""What came of a kernel's tiles, and how it is told. Milliseconds are of all its launches in a micro-step."""

import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from statistics import median

from bench.targets import Target, Tile

NO_TIME = "no time was left"  # the one fault that is none of the tile's


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def label(tile: Tile) -> str:
    """`128x64x32 w8 s3`: the blocks in the source's order, warps, stages; anything else by its name."""
    blocks = [v for k, v in tile.items() if k.lower().startswith("block") or k == "rows"]
    short = {"num_warps": "w", "NUM_WARPS": "w", "num_stages": "s"}
    rest = [f"{short[k]}{v}" for k, v in tile.items() if k in short]
    rest += [f"{k}={v}" for k, v in tile.items() if not (k.lower().startswith("block") or k == "rows" or k in short)]
    return " ".join(["x".join(map(str, blocks)), *rest])


@dataclass
class Trial:
    """A tile and what came of it; `tile` None is the present one."""

    tile: Tile | None
    compiled: dict = field(default_factory=dict)
    fault: str | None = None  # why it has no time
    error: float | None = None  # ‖difference‖ / ‖value‖ of the worst result
    seconds: list[float] = field(default_factory=list)  # of a call: the median of each visit

    @property
    def median(self) -> float:
        return median(self.seconds)


@dataclass
class Tuned:
    """What came of a target."""

    target: Target
    trials: list[Trial]  # the present tile first
    asked: dict[str, Tile] = field(default_factory=dict)  # where its tile comes from, and what stands there
    launches: float = 0.0  # in a micro-step

    @property
    def struck(self) -> int:
        """Candidates that are no use, or wrong."""
        return sum(trial.fault not in (None, NO_TIME) for trial in self.trials[1:])

    @property
    def untried(self) -> int:
        return sum(trial.fault == NO_TIME for trial in self.trials[1:])

    @property
    def timed(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.seconds]

    @property
    def present(self) -> Trial:
        return self.trials[0]

    def tile(self, trial: Trial) -> Tile:
        """Its numbers, by name; of the present tile the first that was asked for."""
        if trial.tile is not None:
            return trial.tile
        present = next(iter(self.asked.values()), {})
        return {name: present[name] for name in self.target.tiles[0] if name in present}

    def ms(self, trial: Trial) -> float:
        """Of all its launches in a micro-step."""
        return 1e3 * self.target.calls * trial.median

    @property
    def noise(self) -> float:
        """By how much the present tile's visits differ, as a share of their median."""
        return (max(self.present.seconds) - min(self.present.seconds)) / self.present.median

    @property
    def best(self) -> Trial:
        best = min(self.timed, key=lambda trial: trial.median)
        return best if best.median < (1 - self.noise) * self.present.median else self.present

    @property
    def gain(self) -> float:
        """Milliseconds of a micro-step."""
        return self.ms(self.present) - self.ms(self.best)


def report_offline(tuned: Tuned, arch: int) -> None:
    print(f"\n{tuned.target.name}: {len(tuned.trials) - 1} candidates on sm_{arch}, {tuned.struck} struck out")
    print(f"  {'tile':<28}  registers  spills   shared  CTAs/SM")
    for trial in tuned.trials:
        name = label(tuned.tile(trial)) + (" (present)" if trial is tuned.present else "")
        numbers = [trial.compiled.get(key, "-") for key in ("registers", "stack", "shared", "ctas_per_sm")]
        remark = f"  {trial.fault}" if trial.fault else ""
        print("  {:<28}  {:>9}  {:>6}  {:>7}  {:>7}{}".format(name, *numbers, remark))


HEADER = (
    f"{'kernel':<22}  launches  {'present tile':<22}  {'ms':>7}  {'rate':>13}  noise  {'best tile':<22}  {'ms':>7}"
    "     gain  timed  struck out  no time left"
)


def line_of(tuned: Tuned) -> str:
    """Milliseconds are of all launches in a micro-step."""
    target, best, present = tuned.target, tuned.best, tuned.present
    rate = f"{target.flops / present.median / 1e12:,.0f} TFLOP/s" if target.flops else (
        f"{target.bytes / present.median / 1e9:,.0f} GB/s")  # fmt: skip
    name = "-" if best is present else label(tuned.tile(best))
    return (
        f"{target.name:<22}  {tuned.launches:>8g}  {label(tuned.tile(present)):<22}  {tuned.ms(present):>7.3f}"
        f"  {rate:>13}  {tuned.noise:>5.1%}  {name:<22}  {tuned.ms(best):>7.3f}  {tuned.gain:>7.3f}"
        f"  {len(tuned.timed):>5}  {tuned.struck:>10}  {tuned.untried:>12}"
    )


def shared_lines(done: list[Tuned]) -> list[str]:
    """Of kernels that get their tile from the same place and want different ones: which is best for all of them."""
    groups: dict[tuple[str, bool], list[Tuned]] = defaultdict(list)
    for tuned in done:
        for source in tuned.asked:
            groups[source, tuned.target.fused_norms].append(tuned)
    lines = []
    for (source, _), group in groups.items():
        times = [defaultdict(lambda: float("inf")) for _ in group]  # of a tile, its module's constants left free
        for by_tile, tuned in zip(times, group, strict=True):
            for trial in tuned.timed:
                key = _without_constants(tuned, trial)
                by_tile[key] = min(by_tile[key], tuned.ms(trial))
        wanted = {_without_constants(tuned, tuned.best) for tuned in group}
        if len(wanted) > 1:
            together = min(times[0], key=lambda key: sum(by_tile[key] for by_tile in times))
            gain = sum(tuned.ms(tuned.present) for tuned in group) - sum(by_tile[together] for by_tile in times)
            names = ", ".join(tuned.target.name for tuned in group)
            lines.append(f"{source} serves {names}, which want different tiles; with {label(dict(together))} for all:"
                         f" {gain:.3f} ms a micro-step")  # fmt: skip
    return lines


def _without_constants(tuned: Tuned, trial: Trial) -> tuple:
    return tuple((k, v) for k, v in tuned.tile(trial).items() if k not in tuned.target.constants)


def report_gains(done: list[Tuned]) -> None:
    """All gains, the largest first, and their sum."""
    for fused, where in ((False, "a micro-step"), (True, "a micro-step, with --fused-norms")):
        better = sorted((t for t in done if t.target.fused_norms == fused and t.gain > 0), key=lambda t: -t.gain)
        for tuned in better:
            source = " and ".join(tuned.asked)
            print(f"{tuned.gain:>7.3f} ms  {tuned.target.name}: {label(tuned.tile(tuned.best))} in {source}")
        print(f"{sum(t.gain for t in better):>7.3f} ms  of {where}, if each gets the tile it wants")
    for line in shared_lines(done):
        print(line)


def as_json(done: list[Tuned], about: dict) -> str:
    rows = []
    for tuned in done:
        timed = bool(tuned.present.seconds)
        trials = [
            {**asdict(trial), "tile": tuned.tile(trial), "ms": tuned.ms(trial) if trial.seconds else None}
            for trial in tuned.trials
        ]
        rows.append({
            "name": tuned.target.name, "launches": tuned.launches, "calls": tuned.target.calls, "asked": tuned.asked,
            "best": tuned.tile(tuned.best) if timed else None, "gain_ms": tuned.gain if timed else None,
            "fused_norms": tuned.target.fused_norms, "trials": trials,
        })  # fmt: skip
    return json.dumps({**about, "targets": rows}, indent=1) + "\n"
