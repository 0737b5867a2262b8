"""`python -m train`: prepare if need be, train inside the budget, evaluate, summarise."""

import sys

from prepare import InputError
from prepare.errors import STDERR, lost_output, one_line, silence
from prepare.words import printable

from .resilience.signals import UNREAD, Interrupted, Signals

MEND = "make room there, change its permissions, or name another folder with --run-dir, --data or TIMEBOX_HOME"


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 FAIL, or a hang; 2 bad arguments or bad input; 130, 143 interrupted; 141 nobody reads
    the output."""
    with Signals() as signals:
        try:
            code = _train(args, signals)
            sys.stdout.flush()
            return code
        except (InputError, OSError) as error:
            if isinstance(error, BrokenPipeError) and lost_output(error):  # ends as quietly as cat does
                return Interrupted(signals.received or UNREAD).exit_code
            line = f"error: {one_line(error, MEND)}"
            print(f"\n{line}" if sys.stdout.isatty() else line, file=sys.stderr)
            return 2
        except Interrupted as interrupted:
            try:
                print(f"\n{interrupted}", file=sys.stderr)
            except BrokenPipeError:  # Ctrl-C ends also the `tee` that reads it
                silence(STDERR)
            return interrupted.exit_code


def _train(args: list[str] | None, signals: Signals) -> int:
    # Imported here, since PyTorch takes seconds: Ctrl-C in the meantime is no traceback either.
    from .experiment import experiment
    from .memory import is_out_of_memory
    from .resilience.resume import parse
    from .step import TrainingError

    try:
        return experiment(parse(args), signals)
    except TrainingError as error:
        print(f"\nFAIL: {printable(error)}", flush=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise InputError("out of memory before the first step: lower --depth or --seq-len") from None


if __name__ == "__main__":
    sys.exit(main())
