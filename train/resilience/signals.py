"""SIGINT and SIGTERM: the first asks, the second ends the process at once."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prepare.errors import STDOUT, silence

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
SAME = 1.0  # seconds
# Nobody reads what is printed, as after `| head -n 1`: ends as if it had been sent. Windows has no such signal.
UNREAD = getattr(signal, "SIGPIPE", 13)


class Interrupted(BaseException):
    """A signal came. Unwinds like KeyboardInterrupt, so that files are closed and threads end."""

    def __init__(self, number: int):
        super().__init__(WORDS.get(number, "nobody reads the output"))
        self.exit_code = 128 + number


class Signals:
    """While it is entered, the first signal raises Interrupted, or is only noted inside `deferred`. The second is the
    system's to handle: no code of ours runs any more, so none can do harm, and none can be waited for in vain.

    `relayed`: by torchrun, which passes on the signal that it gets itself; one that was sent to all processes comes
    twice then. A repeat within a second is the same signal.
    """

    def __init__(self, relayed: bool = False):
        self.received: int | None = None
        self._relayed, self._since, self._ending = relayed, 0.0, False
        self._deferred = False
        self._before = {}

    def __enter__(self) -> "Signals":
        for number in WORDS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as a shell has it for what runs in the background
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        if self._relayed and self.received is not None and time.monotonic() - self._since < SAME:
            return
        if not self._relayed or self.received is not None:
            for each in self._before:
                signal.signal(each, signal.SIG_DFL)
        if self._relayed and self.received is not None:
            os.kill(os.getpid(), number)
        self.received, self._since = number, time.monotonic()
        if self._ending:
            return
        if not self._deferred:
            raise Interrupted(number)
        line = f"\n{WORDS[number]}: finishing the step and writing a checkpoint; a second signal stops at once\n"
        with suppress(OSError):  # Ctrl-C ends also the `tee` that reads it
            os.write(2, line.encode())  # the handler may stand inside a print

    def came(self) -> bool:
        return self.received is not None

    def unread(self) -> None:
        """To be called inside `deferred` where a line could not be printed for want of a reader. Nothing is printed any
        more, and it is as if a signal had come, unless one has: Ctrl-C in `| tee` is a Ctrl-C first."""
        silence(STDOUT)
        self.received = self.received or UNREAD

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal sets `received` and nothing else; Interrupted is raised at the end, unless another exception
        is on its way: then torchrun's signal, which ends all ranks because one has failed, is no news."""
        self._deferred = True
        try:
            yield
        except BaseException:
            self._ending = self._relayed
            raise
        finally:
            self._deferred = False
        if self.received is not None:
            raise Interrupted(self.received)
