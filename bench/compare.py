"""The old name of `bench.regressions`. Two runs are compared by `train.compare`."""

import sys

from prepare.arguments import command
from prepare.words import command_line


def main() -> int:
    now = command_line("bench.regressions", *sys.argv[1:])
    print(f"error: bench.compare is called bench.regressions now: {now}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    command(main)
