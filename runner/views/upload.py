"""The process that brings metrics to MLflow and to the further views of `track.also`.

`python -m runner.views.upload --root R --until-closed NAME` uploads until standard input closes.
"""

import argparse
import random
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from runner.machine.errors import EspalierError
from runner.views.mlflow import Uploader, one_writer, open_store, sync
from runner.views.other_views import ViewFeeder

_EVERY_S, _LONGEST_PAUSE_S = 2.0, 60.0
Deliver = Callable[[str, str | None], int]


def upload_until_closed(
    root: Path,
    sweeps: Sequence[str],
    uri: str | None,
    only: str | None = None,
    also: Sequence[str] = (),
) -> None:
    """Deliver every few seconds until standard input closes, then once more; retry on errors.

    Args:
        uri: of the MLflow store; None is the embedded one, "off" none.
        only: the fingerprint of the one cell to deliver.
        also: further views. Each has a thread: it does not wait for the lock of MLflow's store.

    Raises:
        EspalierError: MLflow has not got everything.
        RuntimeError: a further view has not.
    """
    done = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.buffer.read()
        done.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    problems: list[str] = []
    threads = [
        threading.Thread(target=_feed_view, args=(root, view, sweeps, only, done, problems))
        for view in also
    ]
    for thread in threads:
        thread.start()
    try:
        if uri != "off":
            with open_store(root, uri):
                _deliver_until(done, _in_turn(root, uri), sweeps, only)
    finally:
        for thread in threads:
            thread.join()
    if problems:
        raise RuntimeError("; ".join(problems))


def _in_turn(root: Path, uri: str | None) -> Deliver:
    """Return what delivers a sweep, one process of a root at a time."""
    with one_writer(root, uri):
        uploader = Uploader(root, uri)

    def deliver(sweep: str, only: str | None) -> int:
        with one_writer(root, uri):
            return uploader.deliver(sweep, only)

    return deliver


def _feed_view(
    root: Path,
    view: str,
    sweeps: Sequence[str],
    only: str | None,
    done: threading.Event,
    problems: list[str],
) -> None:
    try:
        with closing(ViewFeeder(root, view)) as feeder:
            _deliver_until(done, feeder.deliver, sweeps, only)
    except Exception as error:
        problems.append(f"{view} has not got everything: {type(error).__name__}: {error}")


def _deliver_until(
    done: threading.Event, deliver: Deliver, sweeps: Sequence[str], only: str | None
) -> None:
    pause_s = _EVERY_S
    while not done.wait(pause_s):
        try:
            for sweep in sweeps:
                deliver(sweep, only)
            pause_s = _EVERY_S
        except Exception as error:  # training goes on, whatever a server does
            print(f"not delivered, trying again: {error}", file=sys.stderr, flush=True)
            # A random pause, so that many uploaders of a slow server do not return at once.
            pause_s = min(_LONGEST_PAUSE_S, pause_s * random.uniform(1.0, 3.0))
    for sweep in sweeps:
        deliver(sweep, only)


def feed_views(root: Path, sweep: str, views: Sequence[str]) -> int:
    """Bring further views up to date with a sweep; return the number of points sent."""
    sent = 0
    for view in views:
        with closing(ViewFeeder(root, view)) as feeder:
            sent += feeder.deliver(sweep)
    return sent


def main() -> None:
    """Command line of the uploader process."""
    parser = argparse.ArgumentParser(prog="python -m runner.views.upload", description=__doc__)
    parser.add_argument("sweeps", nargs="+")
    parser.add_argument("--root", type=Path, default=Path("."))
    parser.add_argument("--uri")
    parser.add_argument("--only", metavar="FINGERPRINT")
    parser.add_argument("--also", action="append", default=[], metavar="VIEW")
    parser.add_argument("--until-closed", action="store_true")
    given = parser.parse_args()
    try:
        if given.until_closed:
            upload_until_closed(given.root, given.sweeps, given.uri, given.only, given.also)
        else:
            print(sync(given.root, given.sweeps, given.uri))
    except (EspalierError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
