"""`python -m train`: prepare if need be, train inside the budget, evaluate, summarise."""

import signal
import sys

from prepare import InputError

from .config import parse
from .experiment import experiment
from .loop import TrainingError


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that files are closed and the loader's thread ends."""


def _terminate(signum, frame):
    raise Terminated


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 FAIL; 2 bad arguments or bad input; 130, 143 interrupted."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return experiment(parse(args))
    except TrainingError as error:
        print(f"\nFAIL: {error}", flush=True)
        return 1
    except (InputError, OSError) as error:
        print(f"\nerror: {error}" if sys.stdout.isatty() else f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except Terminated:
        print("\nterminated", file=sys.stderr)
        return 143


if __name__ == "__main__":
    sys.exit(main())
