"""What a run reports: the smoothed loss, the utilisation, the log line, the values of the summary."""

import math
from dataclasses import dataclass

import torch

from model import GPTConfig, flops_per_token, flops_per_token_causal
from model.flops import H100_PEAK, device_peak
from prepare.words import printable


@dataclass(frozen=True)
class Utilisation:
    """Model FLOP/s over a peak, in percent, by each of the accountings; None where there is no peak to divide by."""

    mfu: float | None  # the published convention, against an H100
    mfu_causal: float | None  # only the query-key pairs that a causal window visits, against an H100
    mfu_device: float | None  # the convention, against this GPU's own dense bf16 peak


def utilisation(config: GPTConfig, device: torch.device, tokens_per_second: float, gpus: int = 1) -> Utilisation:
    """MFU at a pace of all `gpus` together, against as many peaks. On a CPU there is none; on a GPU that the table does
    not know, no share of its own peak."""
    if device.type != "cuda" or not tokens_per_second:
        return Utilisation(None, None, None)
    tokens_per_second /= gpus
    rate = 100 * tokens_per_second * flops_per_token(config)
    own = device_peak(torch.cuda.get_device_name(device))
    causal = 100 * tokens_per_second * flops_per_token_causal(config)
    return Utilisation(rate / H100_PEAK, causal / H100_PEAK, rate / own if own else None)


Value = float | int | str | None  # of a summary; None where there is none, as MFU on a CPU

DIGITS = {  # after the point, of a summary's floats
    "val_bpb": 6, "unigram_bpb": 6, "mfu_percent": 2, "mfu_causal_percent": 2, "mfu_device_percent": 2,
    "tokens_per_second": 0, "overshoot_seconds": 3, "checkpoint_seconds": 3, "eval_seconds": 3,
}  # fmt: skip


def shown(key: str, value: Value) -> str:
    """A value of the summary as it is printed; one from a file that has them as text, as it is there."""
    if value is None:
        return "n/a"
    return f"{value:.{DIGITS.get(key, 1)}f}" if isinstance(value, float) else str(value)


def jsonable(summary: dict[str, Value]) -> dict[str, Value]:
    """With None for what is infinite or no number: JSON has no word for these."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in summary.items()}


def log_line(
    *, step: int, progress: float, loss: float, lr_multiplier: float, dt: float, tokens_per_second: float,
    mfu: float | None, epoch: int, remaining: float, columns: int | None = None,
) -> str:  # fmt: skip
    """One step in one line. `dt` and `remaining` in seconds, `progress` from 0 to 1, `mfu` in percent or None.

    With `columns`, at most so many characters: what matters least is left out first, then all is said more shortly.
    """
    share = "n/a" if mfu is None else f"{mfu:.1f}%"
    parts = {
        "step": f"step {step:05d} ({100 * progress:.1f}%)",
        "loss": f"loss: {loss:.6f}",
        "lrm": f"lrm: {lr_multiplier:.2f}",
        "dt": f"dt: {1000 * dt:.0f}ms",
        "pace": f"tok/sec: {tokens_per_second:,.0f}",
        "mfu": f"mfu: {share}",
        "epoch": f"epoch: {epoch}",
        "remaining": f"remaining: {remaining:.0f}s",
    }
    lines = [" | ".join(parts.values())]
    if columns is None:
        return lines[0]
    for least in ("lrm", "epoch", "dt"):
        del parts[least]
        lines.append(" | ".join(parts.values()))
    parts["step"] = f"step {step:05d}"
    lines.append(" | ".join(parts.values()))
    pace = f"{tokens_per_second / 1000:.0f}k" if tokens_per_second >= 10_000 else f"{tokens_per_second:.0f}"
    lines.append(f"step {step} loss {loss:.4f} tok/s {pace} mfu {share} left {remaining:.0f}s")
    return next((line for line in lines if len(line) <= columns), lines[-1][:columns])


SHOWN_OF_A_SAMPLE = 60  # characters, where nothing else limits the line


def eval_line(row: dict, columns: int | None = None) -> str:
    """An evaluation on the way in one line, and of its sample what there is room for: in `columns` characters, where
    they are given."""
    bpb = "n/a" if row["val_bpb"] is None else f"{row['val_bpb']:.6f}"
    line = f"eval {row['step']:05d} ({100 * row['progress']:.1f}%) | val_bpb: {bpb} on {row['val_rows']} rows"
    line += f" | took: {row['seconds']:.1f}s | "
    sample = printable(" ".join(row["sample"].split()))
    return (line + (sample if columns else sample[:SHOWN_OF_A_SAMPLE]))[:columns]
