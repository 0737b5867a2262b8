"""The old name of `train.tune`."""

import sys

from prepare.arguments import command
from prepare.words import command_line


def main() -> int:
    now = command_line("train.tune", *sys.argv[1:])
    print(f"error: bench.tune is called train.tune now, and keeps what it finds: {now}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    command(main)
