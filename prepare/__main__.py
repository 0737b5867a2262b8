"""`python -m prepare`: text to a folder of tokens."""

import argparse
import signal
import sys

from .arguments import Parser, hear_interrupts
from .errors import MEND, InputError, one_line
from .home import DEFAULT_SOURCE


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0, 2 (bad arguments or input), 130 (Ctrl-C), 143 (SIGTERM)."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that temporary folders are removed
    try:
        hear_interrupts()
        return _run(_parser().parse_args(argv))
    except (InputError, OSError) as e:
        print(f"error: {one_line(e, MEND)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> Parser:
    parser = Parser("prepare", "Turns text into the folder of tokens that train reads.")
    parser.add_argument(
        "--source", default=DEFAULT_SOURCE, metavar="stdlib|climbmix|FOLDER",
        help="the text: this Python's own standard library, the published shards, or a folder with .parquet and .jsonl"
             " (of `text`), .txt and .md (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=int, metavar="V", help="tokens, special ones included (default: 8192)")
    parser.add_argument("--out", metavar="FOLDER", help="what to write (default: $TIMEBOX_HOME/<source>, without that"
                        " variable ~/.cache/timebox/<source>)")  # fmt: skip
    parser.add_argument("--shards", type=int, metavar="N", help="climbmix: training shards to fetch (default: 10)")
    parser.add_argument("--base-url", metavar="URL", help="climbmix: where the shards are served")
    parser.add_argument("--seed", type=int, metavar="N", help="of the shuffle (default: 0)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from .build import prepare, summary
    from .dataset import Dataset

    if args.source != "climbmix" and (args.shards, args.base_url) != (None, None):
        raise InputError("--shards and --base-url are for --source climbmix: leave them out, or name that source")
    # What is not given is left to the defaults of `prepare`.
    folder = prepare(**{name: value for name, value in vars(args).items() if value is not None})
    print(summary(Dataset.open(folder, verify=False).manifest, folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
