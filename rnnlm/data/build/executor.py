"""Pools of workers: run tasks on any concurrent.futures.Executor, and survive the death of its workers.

Each worker process is an executor of its own with one task at a time, so that a death tells which task it was in: that
one is tried again when all others are done, alone, with all memory there is; the second time it has failed. The others
go on meanwhile. Ctrl-C ends a worker's task between two units; workers never outlive their parent. The price: a worker
waits for its parent between two tasks, some tenths of a millisecond.
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
from multiprocessing.synchronize import Event
from typing import Any

from rnnlm.config import BuildConfig
from rnnlm.errors import UserError

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt(3); set, they no longer grow by themselves
LARGE_BYTES = 2**22


def killed_twice(tasks: Iterable[object], ways_out: str = "") -> UserError:
    """What to say of tasks that killed their worker twice."""
    names = "; ".join(map(str, tasks))
    return UserError(f"{names}: killed its worker twice, out of memory perhaps; use fewer build.workers{ways_out}")


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


class _Slot:
    """An executor with room for some tasks at once; made when it is first used, and again after it broke."""

    def __init__(self, make: Callable[[], Executor]):
        self.make = make
        self.executor: Executor | None = None
        self.running: dict[Future[None], Any] = {}  # the task of each future

    def submit(self, function: Callable[[Any, Any], None], context: Any, task: Any) -> bool:
        """Begin a task; False: a worker of this executor has died, and the futures that are running will say so.

        Raises:
            BrokenExecutor: even a new one is broken.
        """
        is_new = self.executor is None
        self.executor = self.executor or self.make()
        try:
            self.running[self.executor.submit(function, context, task)] = task
        except BrokenExecutor:
            self.shut_down()
            if is_new:
                raise
            return not self.running and self.submit(function, context, task)
        return True

    def shut_down(self) -> None:
        """End the executor: one that lost a worker is no use any more, its other workers end too."""
        if self.executor is not None:
            self.executor.shutdown()
        self.executor = None


class WorkerPool:
    """Runs tasks on some executors, each of which is made again when one of its workers dies."""

    def __init__(
        self,
        make: Callable[[], Executor],
        workers: int,
        executors: int = 1,
        stop: Callable[[], None] = lambda: None,
        close: Callable[[], None] = lambda: None,
    ):
        """Executors are made when there are tasks.

        Args:
            workers: tasks at once, on all executors together.
            executors: how many to make; tasks that run in the same one are suspected together when it breaks.
            stop: called at the end: tasks that are running see it by `stopping`.
            close: called when all executors have ended.
        """
        self.workers, self.stop, self.close = workers, stop, close
        self._slots = [_Slot(make) for _ in range(executors)]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        for slot in self._slots:
            for future in slot.running:  # what has not begun
                future.cancel()
        for slot in self._slots:
            slot.shut_down()
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
        self._settle()
        waiting, suspects, failed = deque(tasks), deque[Any](), list[Any]()
        failures: Counter[int] = Counter()  # by id of the task: tasks need not be hashable

        while True:
            self._submit(function, context, waiting, self.workers // len(self._slots))
            running = [future for slot in self._slots for future in slot.running]
            if not running and not waiting:
                if not suspects:
                    return failed
                waiting.append(suspects.popleft())  # alone: when its worker dies again, it was this one

            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot = next(each for each in self._slots if future in each.running)
                task = slot.running.pop(future)
                if _is_done(future, slot):
                    on_done(task)
                    continue
                failures[id(task)] += 1
                (suspects if failures[id(task)] < 2 else failed).append(task)

    def _settle(self) -> None:
        """Wait for what is left of a call that raised; what has not begun does not."""
        for slot in self._slots:
            for future in slot.running:
                future.cancel()
            wait(slot.running)
            slot.running.clear()

    def _submit(self, function: Callable[[Any, Any], None], context: Any, tasks: deque[Any], limit: int) -> None:
        """Hand on tasks until every executor has as many as its limit."""
        for slot in self._slots:
            while tasks and len(slot.running) < limit and slot.submit(function, context, tasks[0]):
                tasks.popleft()


def _is_done(future: Future[None], slot: _Slot) -> bool:
    """Whether the task of a future that ended is done; not when its worker died or had too little memory."""
    error = future.exception()
    if error is None:
        return True
    if isinstance(error, BrokenExecutor):
        slot.shut_down()
    elif not isinstance(error, MemoryError) and type(error).__name__ != "KilledWorker":  # Dask's BrokenExecutor
        raise error
    return False


_stop: Event | None = None  # in a worker process: whether its parent wants it to end


def stopping() -> bool:
    """Whether a task that has reached the end of a unit is to return there: nobody waits for the rest."""
    return _stop is not None and _stop.is_set()


def _start_worker(stop: Event) -> None:
    """A worker leaves Ctrl-C to its parent, which lets it finish its unit, and does not outlive it."""
    global _stop
    _stop = stop
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
    stop = context.Event()
    return WorkerPool(
        lambda: ProcessPoolExecutor(1, context, _start_worker, (stop,)), workers, executors=workers, stop=stop.set
    )


def pool_of(build: BuildConfig, workers: int, executor: Callable[[], Executor] | None = None) -> WorkerPool:
    """The pool that a build section asks for; `executor` makes another one, where a caller brings it."""
    if executor is not None:
        return WorkerPool(executor, workers)
    return dask_pool(build.dask) if build.dask else process_pool(workers)


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
    workers = 2 * sum(client.ncores().values())  # so that none waits for its next task
    return WorkerPool(client.get_executor, max(1, workers), close=client.close)
