"""Evidence, for the next process, that this one had been at something for long when it ended."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def after(seconds: float, file: int) -> Iterator[None]:
    """Writes a byte into an open file after so many seconds, also while a rule of `re` holds the interpreter.

    The operating system's timer rings, and the signal's handler in C writes to the wake-up file. A thread of Python
    would have to wait for the interpreter; `faulthandler.dump_traceback_later` reads frames while they run, and crashed
    a busy monitor. Nothing is written outside of the main thread, or where there is no such timer (Windows).
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    os.set_blocking(file, False)
    handler = signal.signal(signal.SIGALRM, lambda number, frame: None)
    before = signal.set_wakeup_fd(file, warn_on_full_buffer=False)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGALRM, handler)
