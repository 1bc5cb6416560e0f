"""Workers: run tasks on any concurrent.futures.Executor, and survive the death of its workers.

A task whose worker dies is tried again, alone, so that it cannot take others with it; the second time it is set aside.
Ctrl-C lets what has begun end; workers never outlive their parent. The price: a pool that lost one worker is made anew,
which takes a second.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Executor, Future, ProcessPoolExecutor, wait
from contextlib import suppress
from typing import Any

from rnnlm.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3); set, they no longer grow by themselves
LARGE_BYTES = 2**22


class Inline(Executor):
    """Runs each task at once, in this process."""

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """Run it; the future is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(fn(*arguments, **options))
        except Exception as error:
            future.set_exception(error)
        return future


class Workers:
    """Runs tasks on an executor; one whose worker dies is tried again, alone, and the second time set aside."""

    def __init__(self, make: Callable[[], Executor], width: int, close: Callable[[], None] = lambda: None):
        self.make, self.width, self.close = make, width, close
        self._executor: Executor | None = None
        self._running: dict[Future[None], Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._running:  # what has not begun; what has is let finish
            future.cancel()
        if self._executor is not None:
            self._executor.shutdown()
        self.close()

    def run(
        self,
        function: Callable[[Any, Any], None],
        setting: Any,
        tasks: Iterable[Any],
        done: Callable[[Any], None],
    ) -> list[Any]:
        """Run all; calls done(task) after each. The tasks that killed their worker twice.

        Raises:
            Whatever else a task raises, as soon as it does.
        """
        waiting, suspects, aside = deque(tasks), deque[Any](), list[Any]()
        strikes: Counter[int] = Counter()
        running = self._running
        while waiting or suspects or running:
            source, limit = (suspects, 1) if suspects else (waiting, 2 * self.width)
            while source and len(running) < limit:
                new = self._executor is None
                self._executor = self._executor or self.make()
                try:
                    future = self._executor.submit(function, setting, source[0])
                except BrokenExecutor:  # found out only now; what was running will say so too
                    self._give_up()
                    if new:
                        raise  # a new one is broken at once: so would the next be
                    if running:
                        break
                    continue
                running[future] = source.popleft()
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                error = future.exception()
                if error is None:
                    done(task)
                    continue
                if not isinstance(error, (BrokenExecutor, MemoryError)) and type(error).__name__ != "KilledWorker":
                    raise error
                if isinstance(error, BrokenExecutor):
                    self._give_up()
                strikes[id(task)] += 1
                (suspects if strikes[id(task)] < 2 else aside).append(task)
        return aside

    def _give_up(self) -> None:
        """A pool that lost one worker is no use any more: the others end too."""
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = None


def _start_worker() -> None:
    """A worker leaves Ctrl-C to its parent, which lets it finish its unit, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return_memory()
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def return_memory() -> None:
    """Have glibc give large blocks back when they are freed: else it keeps more of them the larger they were."""
    with suppress(OSError, AttributeError):  # another C library
        for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
            ctypes.CDLL(None).mallopt(option, LARGE_BYTES)


def pool(workers: int) -> Workers:
    """Processes of this machine; one is this process itself."""
    return_memory()
    if workers <= 1:
        return Workers(Inline, 1)
    context = multiprocessing.get_context("spawn")  # nothing of the parent's threads is copied
    return Workers(lambda: ProcessPoolExecutor(workers, context, _start_worker), workers)


def dask(address: str) -> Workers:
    """The workers of a Dask cluster.

    Raises:
        UserError: Dask is not installed, or no scheduler answers.
    """
    try:
        import distributed
    except ImportError as error:
        raise UserError(f"build.dask={address}: needs Dask; pip install 'rnnlm[dask]'") from error
    try:
        client: Any = distributed.Client(address)  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UserError(f"build.dask={address}: no scheduler answers there ({error})") from error
    return Workers(client.get_executor, max(1, sum(client.ncores().values())), client.close)
