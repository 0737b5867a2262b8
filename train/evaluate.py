"""`python -m train.evaluate RUN`: val_bpb of a finished run, or with --holdout of text that nothing else ever reads."""

import sys

from prepare import Dataset, InputError, evaluate_bpb
from prepare.arguments import Parser

from .config import TrainConfig
from .memory import is_out_of_memory
from .runs import load_run
from .step import TrainStep
from .trainer import pick_device


def main(args: list[str] | None = None) -> int:
    parser = Parser(prog="python -m train.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--holdout", action="store_true", help="score the holdout split instead of validation")
    parser.add_argument("--data", help="prepared folder (default: the one the run was trained on)")
    parser.add_argument("--eval-tokens", type=int, help="0: all (default: as the run)")
    parser.add_argument("--device-batch-size", type=int, help="rows at a time (default: as the run)")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    options = parser.parse_args(args)
    try:
        device = pick_device(options.device)
        model, tokenizer, saved = load_run(options.run, device)
        config = TrainConfig(**saved["config"])
        data = Dataset.open(options.data or saved["data"]["folder"])
        if data.tokenizer.fingerprint != tokenizer.fingerprint:
            raise InputError(f"{data.folder} has another tokenizer than the run: name the run's own folder with --data")
        tokens = config.eval_tokens if options.eval_tokens is None else options.eval_tokens
        rows = config.device_batch_size if options.device_batch_size is None else options.device_batch_size
        evaluation = evaluate_bpb(
            TrainStep(model, None, bool(config.autocast and device == "cpu")).token_losses,
            data, split="holdout" if options.holdout else "val", seq_len=config.seq_len,
            batch_size=rows, max_tokens=tokens or None, packing=config.packing, device=device,
        )  # fmt: skip
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print("error: out of memory: take fewer rows at a time with --device-batch-size", file=sys.stderr)
        return 2
    print(f"{'holdout' if options.holdout else 'val'}_bpb: {evaluation.bpb:.6f}")
    for key, value in {"unigram_bpb": f"{evaluation.unigram_bpb:.6f}", **evaluation.fingerprint}.items():
        print(f"{key}: {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
