"""Starts the fork server, which imports torch while the launcher checks the cells."""

import multiprocessing
import signal
import sys
import threading
from multiprocessing import forkserver

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_PRELOAD = ["runner.launch.fork_preload"]


def warm_up() -> None:
    """Start the fork server unless it runs; it ignores the signals that stop cells."""
    if sys.platform == "darwin":
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, signal.SIG_IGN) for n in STOP_SIGNALS} if main else {}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)
