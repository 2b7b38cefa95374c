"""What SIGTERM and Ctrl-C do: end the work at once, or when a step is done; a second one kills.

The exit status is 128 and the signal's number, as a shell has it: 130 for SIGINT, 143 for SIGTERM.
"""

import _thread
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_AS_ONE: Final = 0.1  # seconds; `timeout` sends a signal to its child, and then to the whole group
_LOOKS: Final = 0.5  # seconds between two looks at whether a process lives
_GRACE: Final = 5.0  # for a worker to end by itself
_AS_ONE_UNDER_TORCHRUN: Final = 5.0  # it passes on what a terminal has sent to all processes


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; ``line`` is what was said about it, if anything was."""

    line = ""


class Stopped(SystemExit):
    """SIGTERM, or the end of a command: an exit status; ``line`` as of :class:`Interrupted`."""

    line = ""


def stopped(number: int, line: str = "") -> Interrupted | Stopped:
    """Return the exception that ends the work after a signal; in a command it is an exit status."""
    in_command = _current is not None and _current.in_command
    interrupts = number == signal.SIGINT and not in_command
    error = Interrupted(line) if interrupts else Stopped(128 + number)
    error.line = line
    return error


class Listener:
    """The handler of both signals: which one came first, and whether it waits."""

    def __init__(self, *, in_command: bool = False) -> None:
        self.in_command = in_command
        self.number = 0  # of the first signal
        self.waits = False
        self._restored: list[Callable[[], object]] = []

    def __call__(self, number: int, frame: Any) -> None:
        """Take the first signal, in the main thread and between two of its instructions."""
        if self.number:
            return
        self.number = number
        if not self.waits:
            raise stopped(number)
        if os.isatty(2):
            os.write(2, b"\nstopping when this step is done; once more to stop at once\n")

    def begin(self) -> None:
        """Take the place of other handlers, except where a signal is ignored, as by ``nohup``."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_kill_at_second, args=(read,), daemon=True).start()
        self._restored = [partial(signal.set_wakeup_fd, before)]
        for number in SIGNALS:
            if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                signal.signal(number, self)
                self._restored.append(partial(signal.signal, number, handler))
        self._restored += [partial(os.write, write, b"\0"), partial(os.close, write)]

    def end(self) -> None:
        """Restore the handlers from before."""
        for restore in self._restored:
            restore()

    def end_in_child(self) -> None:
        """Restore them in a fork, which has the pipe and no thread that reads it."""
        for restore in self._restored[:-2]:
            restore()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Do not wait inside of this context: what is lost there can be done again."""
        before, self.waits = self.waits, False
        try:
            if self.number:
                raise stopped(self.number)
            yield
        finally:
            self.waits = before


def _kill_at_second(read: int) -> None:
    """End the process at the second signal, which need not wait until long C code returns."""
    together = _AS_ONE_UNDER_TORCHRUN if "TORCHELASTIC_RUN_ID" in os.environ else _AS_ONE
    first = None
    while (number := os.read(read, 1)[0]) != 0:
        if number in SIGNALS:
            now = time.monotonic()
            if first is not None and now - first >= together:
                os._exit(128 + number)
            first = first or now
    os.close(read)


_current: Listener | None = None


def _forked() -> None:
    global _current
    if _current is not None:
        _current.end_in_child()
        _current = None


os.register_at_fork(after_in_child=_forked)


@contextmanager
def listening(*, in_command: bool = False) -> Iterator[Listener]:
    """Raise :class:`Interrupted` or :class:`Stopped` at a signal that comes inside this context.

    Outside the main thread nothing changes. A command knows no :class:`Interrupted`, of which typer
    would keep nothing.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield Listener()
        return
    if _current is not None:
        yield _current
        return
    listener = _current = Listener(in_command=in_command)
    listener.begin()
    try:
        yield listener
    finally:
        _current = None
        listener.end()


@contextmanager
def waiting() -> Iterator[Listener]:
    """Only note a signal that comes inside this context; whoever does the work looks for it."""
    with listening() as listener:
        before, listener.waits = listener.waits, True
        try:
            yield listener
        finally:
            listener.waits = before


def end_with(process: int) -> None:
    """Have this process end when another does, as by a signal, without a file half written."""

    def watch() -> None:
        while _lives(process):
            time.sleep(_LOOKS)
        _thread.interrupt_main()
        time.sleep(_GRACE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
