"""Starts the fork server: it imports torch while its caller looks whether the cells fit this machine."""

import multiprocessing
import signal
import sys
import threading
from multiprocessing import forkserver

FOR_CELLS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_PRELOAD = ["runner.launch.fork_preload"]


def warm_up() -> None:
    """Start the template unless it runs.

    It inherits that the signals which ask cells to stop are ignored: they are not meant for it.
    """
    if sys.platform == "darwin":
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    main = threading.current_thread() is threading.main_thread()
    before = {n: signal.signal(n, signal.SIG_IGN) for n in FOR_CELLS} if main else {}
    forkserver.ensure_running()
    for number, handler in before.items():
        signal.signal(number, handler)
