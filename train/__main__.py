"""`python -m train`: prepare if need be, train inside the budget, evaluate, summarise."""

import sys

from prepare import InputError
from prepare.errors import one_line

from .signals import Interrupted, Signals

MEND = "make room there, change its permissions, or name another folder with --run-dir, --data or TIMEBOX_HOME"


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 FAIL, or a hang; 2 bad arguments or bad input; 130, 143 interrupted."""
    with Signals() as signals:
        try:
            return _train(args, signals)
        except (InputError, OSError) as error:
            line = f"error: {one_line(error, MEND)}"
            print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr)
            return 2
        except Interrupted as interrupted:
            print(f"\n{interrupted}", file=sys.stderr)
            return interrupted.exit_code


def _train(args: list[str] | None, signals: Signals) -> int:
    # Imported here, since PyTorch takes seconds: Ctrl-C in the meantime is no traceback either.
    from .experiment import experiment
    from .loop import TrainingError
    from .memory import is_out_of_memory
    from .resume import parse

    try:
        return experiment(parse(args), signals)
    except TrainingError as error:
        print(f"\nFAIL: {error}", flush=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("out of memory before the first step: lower --depth or --seq-len") from None


if __name__ == "__main__":
    sys.exit(main())
