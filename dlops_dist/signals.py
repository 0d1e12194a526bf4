"""Ctrl-C and SIGTERM as a wish to stop where nothing is lost."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = signal.SIGINT, signal.SIGTERM


@contextmanager
def stop_signals(say: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """Take the first Ctrl-C or SIGTERM as a wish to stop once the step is saved, the second as one to stop at once.

    Yields whether there is such a wish.
    """
    wished = threading.Event()

    def wish(*_: object) -> None:
        if wished.is_set():
            raise KeyboardInterrupt
        wished.set()
        say("stopping as soon as the step is saved; once more stops at once")

    before = {number: signal.signal(number, wish) for number in SIGNALS}
    try:
        yield wished.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
