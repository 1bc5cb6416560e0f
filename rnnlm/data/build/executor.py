"""Pools of workers: run tasks on any concurrent.futures.Executor, and survive the death of its workers.

A task whose worker dies is tried again, alone, so that it cannot take others with it; the second time it has failed.
Ctrl-C lets what has begun end; workers never outlive their parent. The price: a pool that lost one worker is recreated,
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


class WorkerPool:
    """Runs tasks on an executor, which is recreated when one of its workers dies."""

    def __init__(self, make: Callable[[], Executor], workers: int, close: Callable[[], None] = lambda: None):
        self.make, self.workers, self.close = make, workers, close
        self._executor: Executor | None = None
        self._running: dict[Future[None], Any] = {}  # the task of each future

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for future in self._running:  # what has not begun; what has is let finish
            future.cancel()
        self._shut_down()
        self.close()

    def run(
        self,
        function: Callable[[Any, Any], None],
        context: Any,
        tasks: Iterable[Any],
        on_done: Callable[[Any], None] = lambda task: None,
    ) -> list[Any]:
        """Call function(context, task) for all tasks, and on_done(task) after each; those that failed twice.

        Raises:
            Whatever else a task raises, as soon as it does.
        """
        waiting, retries, failed = deque(tasks), deque[Any](), list[Any]()
        failures: Counter[int] = Counter()  # by id of the task: tasks need not be hashable

        while waiting or retries or self._running:
            if retries:  # alone: when its worker dies, no other task is suspected
                self._submit(function, context, retries, 1)
            else:  # twice as many as workers, so that none waits for its next one
                self._submit(function, context, waiting, 2 * self.workers)

            for future in wait(self._running, return_when=FIRST_COMPLETED).done:
                task = self._running.pop(future)
                if self._is_done(future):
                    on_done(task)
                    continue
                failures[id(task)] += 1
                (retries if failures[id(task)] < 2 else failed).append(task)

        return failed

    def _submit(self, function: Callable[[Any, Any], None], context: Any, tasks: deque[Any], limit: int) -> None:
        """Hand on tasks until so many are running."""
        while tasks and len(self._running) < limit:
            is_new = self._executor is None
            self._executor = self._executor or self.make()
            try:
                future = self._executor.submit(function, context, tasks[0])
            except BrokenExecutor:  # found out only now; the futures that are running will raise it too
                self._shut_down()
                if is_new:
                    raise  # a new one is broken at once: so would the next be
                if self._running:
                    return
                continue
            self._running[future] = tasks.popleft()

    def _is_done(self, future: Future[None]) -> bool:
        """Whether the task of a future that ended is done; not when its worker died or had too little memory."""
        error = future.exception()
        if error is None:
            return True
        if isinstance(error, BrokenExecutor):
            self._shut_down()
        elif not isinstance(error, MemoryError) and type(error).__name__ != "KilledWorker":  # Dask's BrokenExecutor
            raise error
        return False

    def _shut_down(self) -> None:
        """End the executor: one that lost a worker is no use any more, its other workers end too."""
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


def process_pool(workers: int) -> WorkerPool:
    """Processes of this machine; one is this process itself."""
    return_memory()
    if workers <= 1:
        return WorkerPool(Inline, 1)
    context = multiprocessing.get_context("spawn")  # nothing of the parent's threads is copied
    return WorkerPool(lambda: ProcessPoolExecutor(workers, context, _start_worker), workers)


def dask_pool(address: str) -> WorkerPool:
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
    return WorkerPool(client.get_executor, max(1, sum(client.ncores().values())), client.close)
