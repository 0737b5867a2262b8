"""`python -m train`: prepare if need be, train inside the budget, evaluate, summarise. Under torchrun each process is a
rank of one run (docs/many-gpus.md)."""

import os
import sys

from prepare import InputError
from prepare.errors import STDERR, lost_output, one_line, silence
from prepare.words import printable

from .place import Place, place_of, quiet, take_one_gpu
from .resilience.signals import UNREAD, Interrupted, Signals

MEND = "make room there, change its permissions, or name another folder with --run-dir, --data or TIMEBOX_HOME"


def main(args: list[str] | None = None) -> int:
    """Exit codes: 0 done; 1 FAIL, a hang, or another rank is gone; 2 bad arguments or bad input; 130, 143 interrupted;
    141 nobody reads the output."""
    try:
        place = place_of()
        take_one_gpu(place)
        if place.size > 1:
            # A connection that breaks is said in one line, and not in PyTorch's forty beside.
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with Signals(relayed=place.launched) as signals:
        process = Process(args, place, signals)
        try:
            with quiet(place):
                code = process.train()
            sys.stdout.flush()
        except (InputError, OSError) as error:
            if isinstance(error, BrokenPipeError) and lost_output(error):  # ends as quietly as cat does
                code = Interrupted(signals.received or UNREAD).exit_code
            else:
                line = f"error: {one_line(error, MEND)}"
                process.say(f"\n{line}" if sys.stdout.isatty() else line)
                code = 2
        except Interrupted as interrupted:
            try:
                process.say(f"\n{interrupted}")
            except BrokenPipeError:  # Ctrl-C ends also the `tee` that reads it
                silence(STDERR)
            code = interrupted.exit_code
        process.leave(code)
        return code


class Process:
    """One of the processes of a run; mostly the only one."""

    def __init__(self, args: list[str] | None, place: Place, signals: Signals):
        self.args, self.place, self.signals, self.ranks = args, place, signals, None

    def train(self) -> int:
        # Imported here, since PyTorch takes seconds: Ctrl-C in the meantime is no traceback either.
        from .experiment import experiment
        from .memory import is_out_of_memory
        from .ranks import LostRankError, Ranks
        from .resilience.resume import parse
        from .step import TrainingError

        self.ranks = Ranks(self.place)
        try:
            return experiment(parse(self.args, self.place.launched), self.signals, self.ranks)
        except TrainingError as error:
            print(f"\nFAIL: {printable(error)}", flush=True)
            return 1
        except LostRankError as error:
            if self.ranks.speaks():  # past `quiet`: rank 0 may be the one that is gone
                os.write(1, f"\nFAIL: {printable(error)}\n".encode())
            os._exit(1)  # the device may wait for what never comes
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise InputError("out of memory before the first step: lower --depth or --seq-len") from None

    def say(self, line: str) -> None:
        """On standard error, once for all ranks."""
        if self.ranks.speaks() if self.ranks else self.place.first:
            print(line, file=sys.stderr)

    def leave(self, code: int) -> None:
        """Without the others, where they do not know of it: they wait for this process as long as it is there."""
        if self.ranks is None or self.place.size == 1:
            return
        if not self.ranks.together:
            sys.stderr.flush()
            os._exit(code)
        self.ranks.close()


if __name__ == "__main__":
    sys.exit(main())
