"""What several ranks send each other in a step, timed: `torchrun --nproc-per-node N -m bench.collectives`.

Options of `train` make it another step. The exchange is the trainer's own, with the additions that it is made for: NCCL
between GPUs, gloo on a CPU. The rates are of the bytes that one rank sends; it receives as many in the same time. The
step beside it is the ranks' own, timed whole, sending included.
"""

import json
import sys
from pathlib import Path
from statistics import median

import torch

from bench.ceilings import device_name
from model.gpt import count_parameters
from prepare import InputError
from prepare.arguments import Parser, command
from train.config import TrainConfig, parse_given
from train.device import complete, keep_to_the_cores_allowed
from train.place import place_of, quiet, take_one_gpu
from train.ranks import Ranks
from train.ranks.traffic import measured, seconds_of, traffic
from train.recipes import vocab_size
from train.resilience.durable import replace_file
from train.results.provenance import versions
from train.results.run_folder import source_commit
from train.tune.steps import make_step


def measure(config: TrainConfig, ranks: Ranks) -> dict:
    """Figures of a step of `config`, which is complete. All ranks call it."""
    shape = config.model_config(vocab_size(config.recipe))
    step, batches, values = make_step(config, shape, ranks=ranks)
    whole = seconds_of(lambda: step(batches, values), ranks, config.device, times=10)
    exchanges, gathers = measured(step.optimizer, config.device)
    whole, exchange, gather = (median(seconds) for seconds in (whole, exchanges, gathers))
    sent = traffic(step.optimizer, config)
    sending = exchange * sent.exchanges + gather
    return {
        "device": device_name(config.device), "ranks": ranks.size, "threads": torch.get_num_threads(),
        "sums": config.sums, "commit": source_commit(), "versions": versions(),
        "tokens": config.total_batch_size, "parameters": count_parameters(shape)["total"],
        "exchange_seconds": exchanges,
        "exchange_mb": sent.exchange / 1e6, "exchanges": sent.exchanges, "exchange_ms": 1e3 * exchange,
        "gather_mb": sent.gather / 1e6, "gather_ms": 1e3 * gather, "calls": sent.calls,
        "step_ms": 1e3 * whole, "share_percent": 100 * sending / whole,
    }  # fmt: skip


def report(found: dict) -> None:
    print(f"{found['ranks']} ranks, each {found['device']}, {found['threads']} threads; sums: {found['sums']}")
    for name, times in (("exchange", found["exchanges"]), ("gather", 1)):
        mb, ms = found[f"{name}_mb"], found[f"{name}_ms"]
        print(f"{name:<9} {times:>2} a step, {found['calls']} collectives: {mb:>8.2f} MB sent by a rank, {ms:>8.2f} ms,"
              f" {mb / ms:>7.2f} GB/s")  # fmt: skip
    whole = f"a step of {found['tokens']:,} tokens: {found['step_ms']:.1f} ms"
    print(f"{whole}, of which {found['share_percent']:.1f} % are these")


def main(args: list[str] | None = None) -> int:
    parser = Parser("bench.collectives", __doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options, others = parser.parse_known_args(args)
    try:
        place = place_of()
        take_one_gpu(place)
        with quiet(place):
            config = TrainConfig(**parse_given(others))
            if place.size < 2:
                raise InputError("one process has nobody to send to: torchrun --nproc-per-node 2 -m bench.collectives")
            keep_to_the_cores_allowed()
            ranks = Ranks(place)
            ranks.join(config.device != "cpu" and torch.cuda.is_available())
            found = measure(ranks.all_do(lambda: complete(config, place.size)), ranks)
            report(found)
            if options.json and place.first:
                replace_file(options.json, (json.dumps(found, indent=2) + "\n").encode())
            ranks.close()
    except (InputError, OSError) as error:
        if place_of().first:
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    command(main)
