"""`python -m train.evaluate RUN`: val_bpb of a finished run, or with --holdout of text that nothing else ever reads."""

import json
import sys
from datetime import UTC, datetime
from pathlib import Path

from kernels import choose
from prepare import Dataset, InputError, evaluate_bpb
from prepare.arguments import Parser, command
from prepare.errors import one_line
from prepare.words import printable

from .config import TrainConfig
from .device import keep_to_the_cores_allowed, on_device, pick_device
from .memory import halving, is_out_of_memory
from .results.audit import ROUNDED_MEAN, audit
from .results.ledger import HOLDOUT, Ledger, name_of
from .results.run_folder import load_run
from .step import TrainStep
from .tune import saved_tiles

AUDITED_ROWS = 8


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 the audit found something; 2 bad arguments or bad input."""
    parser = Parser("train.evaluate", __doc__)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--holdout", action="store_true",
                        help="score the holdout split instead of validation; the ledger counts every look")  # fmt: skip
    parser.add_argument("--audit", action="store_true", help="check that the number is what it says")
    parser.add_argument("--data", help="prepared folder (default: the one the run was trained on)")
    parser.add_argument("--eval-tokens", type=int, help="0: all (default: as the run)")
    parser.add_argument("--device-batch-size", type=int, help="rows at a time (default: as the run)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="(default: cuda where there is one)")
    options = parser.parse_args(args)
    try:
        return evaluate(options)
    except (InputError, OSError) as error:
        print(f"error: {one_line(error, 'name another RUN, or another folder with --data')}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory, with one row at a time: free memory, or take --device cpu", file=sys.stderr)
        return 2


def evaluate(options) -> int:
    keep_to_the_cores_allowed()
    device = pick_device(options.device)
    model, tokenizer, saved = load_run(options.run, device)
    config = TrainConfig.from_json(saved["config"])
    choose(saved_tiles(saved).table)
    config = on_device(config, model.config, device)
    model.to_forward_dtype(config.forward_dtype)
    try:
        data = Dataset.open(options.data or saved["data"]["folder"])
    except InputError as error:
        if not options.audit:
            raise
        print(f"audit: FAIL\n  data: {printable(error)}")
        return 1
    if data.tokenizer.fingerprint != tokenizer.fingerprint:
        raise InputError(f"{data.folder} has another tokenizer than the run: name the run's own folder with --data")
    score = TrainStep(model, None, config.autocast).token_losses
    tokens = config.eval_tokens if options.eval_tokens is None else options.eval_tokens
    rows = config.device_batch_size if options.device_batch_size is None else options.device_batch_size
    evaluation = halving(
        lambda rows: evaluate_bpb(
            score, data, split="holdout" if options.holdout else "val", seq_len=config.seq_len, batch_size=rows,
            max_tokens=tokens or None, packing=config.packing, device=device,
        ), rows, device,
    )  # fmt: skip
    if options.holdout:  # a look that cannot be counted shows nothing
        uses = count_holdout_use(Path(options.run), evaluation.bpb, evaluation.fingerprint)
    print(f"{'holdout' if options.holdout else 'val'}_bpb: {evaluation.bpb:.6f}")
    for key, value in {"unigram_bpb": f"{evaluation.unigram_bpb:.6f}", **evaluation.fingerprint}.items():
        print(f"{key}: {value}")
    if options.holdout:
        print(f"holdout_uses: {uses}")
    if not options.audit:
        return 0
    recorded = None if options.data else recorded_summary(Path(options.run))
    found = halving(
        lambda rows: audit(
            score, model, data, config.ops, config.seq_len, config.packing, batch_size=rows, rows=AUDITED_ROWS,
            recorded=recorded and recorded["fingerprint"],
        ), rows, device,
    )  # fmt: skip
    if recorded and options.eval_tokens is None and not options.holdout:
        found += check_recorded(evaluation.bpb, recorded["val_bpb"])
    print("\n  ".join(["audit: FAIL", *found]) if found else "audit: ok")
    return 1 if found else 0


def count_holdout_use(run: Path, bpb: float, fingerprint: dict) -> int:
    """Notes in the ledger that the holdout was looked at, and returns how often that was: each look spends it a little,
    since what is decided on it is no longer independent of it."""
    ledger = Ledger.beside(run)
    with ledger.locked():
        ledger.append(
            {
                "kind": HOLDOUT,
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "run": name_of(run),
                "holdout_bpb": bpb,
                "fingerprint": fingerprint,
            }
        )
        return ledger.holdout_uses()


def recorded_summary(run: Path) -> dict | None:
    """What the run's own evaluation found, and on what; None where there is no readable summary."""
    try:
        found = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        known = {"split_sha256", "tokenizer_sha256"} <= found["fingerprint"].keys() and float(found["val_bpb"])
        return found if known else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def check_recorded(bpb: float, recorded: float | str) -> list[str]:
    """Whether the run's summary has this number, but for what another device rounds otherwise."""
    recorded = float(recorded)  # older summaries have it as text
    off = not abs(recorded / bpb - 1) <= ROUNDED_MEAN
    return [f"bpb: {recorded:.6f} in summary.json, and {bpb:.6f} now"] if off else []


if __name__ == "__main__":
    command(main)
