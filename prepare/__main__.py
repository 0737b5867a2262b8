"""`python -m prepare`: text to a folder of tokens."""

import argparse
import signal
import sys
from dataclasses import fields

from .arguments import Parser, hear_interrupts
from .errors import MEND, InputError, one_line
from .home import BUILT_IN_SOURCES, DEFAULT_SOURCE, FETCHED_SOURCES


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
        "--source", default=DEFAULT_SOURCE, metavar="|".join([*BUILT_IN_SOURCES, "FOLDER", "FILE"]),
        help="the text: this Python's own standard library, a published corpus, a folder with .parquet, .arrow, .jsonl,"
             " .txt and .md, the last three also as .gz or .zst, or one such file (default: %(default)s). Files and"
             " folders whose names begin with the word val, valid or validation are the validation split, with test the"
             " holdout",
    )  # fmt: skip
    parser.add_argument("--text-column", metavar="NAME", help="of .parquet and .arrow, and the key of .jsonl (default:"
                        " text)")  # fmt: skip
    parser.add_argument("--separator", metavar="TEXT",
                        help="between the documents of a .txt or .md file, as it is: '<|endoftext|>', or in bash"
                        " $'\\n\\n' for an empty line (default: each file is one document)")  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", default=None,
                        help="leave out, and count, what cannot be read, instead of ending there")  # fmt: skip
    parser.add_argument("--vocab-size", type=int, metavar="V", help="tokens, special ones included (default: 8192)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="the tokenizer of another prepared folder, instead of one"
                        " learned from this text: results on the two are then in the same tokens")  # fmt: skip
    parser.add_argument("--out", metavar="FOLDER", help="what to write (default: $TIMEBOX_HOME/<source>, without that"
                        " variable ~/.cache/timebox/<source>)")  # fmt: skip
    parser.add_argument("--shards", type=int, metavar="N", help="of a published corpus: training files to fetch"
                        " (default: climbmix 10, fineweb-edu 1, tinystories all 4)")  # fmt: skip
    parser.add_argument("--base-url", metavar="URL", help="of a published corpus: a mirror. For climbmix where its"
                        " shards are, for the others what stands for https://huggingface.co")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and how large it is, and end"
                        " there")  # fmt: skip
    parser.add_argument("--seed", type=int, metavar="N", help="of the shuffle (default: 0)")
    return parser


def _run(args: argparse.Namespace) -> int:
    from .build import prepare, summary
    from .files import read_json
    from .plan import plan
    from .readers import Reading
    from .shards import MANIFEST

    if args.source not in FETCHED_SOURCES and (args.shards, args.base_url) != (None, None):
        named = ", ".join(FETCHED_SOURCES)
        raise InputError(f"--shards and --base-url are for --source {named}: leave them out, or name one of these")
    # What is not given is left to the defaults of `prepare`.
    given = {name: value for name, value in vars(args).items() if value is not None}
    if given.pop("dry_run"):
        reading = Reading(**{f.name: given[f.name] for f in fields(Reading) if f.name in given})
        print(plan(args.source, reading, args.shards, args.base_url), flush=True)
        return 0
    folder = prepare(**given)
    print(summary(read_json(folder / MANIFEST, "prepare it again"), folder), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
