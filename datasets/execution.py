"""Running the same task on many items: here, in processes of this machine, or on a dask cluster.

A task is a function that can be pickled, whose result depends on its item alone and whose work another attempt takes up
where it is needed, so that it may run anywhere and again. A task whose process dies, whatever the reason, is tried
again; a task that raises is not.

Processes are spawned, so a script that calls this starts with `if __name__ == "__main__":`.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing.connection import wait as wait_for_end
from typing import Literal, TypeVar

import torch

from neurosde.validation import check_count, optional_package

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 3  # of a task whose process died: as many as dask's allowed-failures


@dataclass(frozen=True)
class Execution:
    """Who does the work: makes shards of a cube, or cells of a benchmark."""

    workers: int | None = field(
        default=None, metadata={"help": "processes that share the work (default this one only)"}
    )
    executor: Literal["processes", "dask"] = field(default="processes", metadata={"help": "what runs the workers"})
    scheduler: str | None = field(
        default=None, metadata={"help": "address of a dask scheduler (default a cluster of --workers processes here)"}
    )

    def __post_init__(self) -> None:
        if self.workers is not None:
            check_count(self.workers, "workers")
        if self.scheduler is not None and self.executor != "dask":
            raise ValueError(f"scheduler is for executor dask; got executor {self.executor}. Add --executor dask.")
        if self.scheduler is not None and self.workers is not None:
            raise ValueError(f"the scheduler at {self.scheduler} has its own workers; leave --workers out.")

    @property
    def alone(self) -> bool:
        """Whether this process does it all."""
        return self.workers is None and self.executor == "processes"


def run_tasks(
    task: Callable[[Item], Result], items: Sequence[Item], execution: Execution
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) of every item as they come, in any order.

    Args:
        task: what to do with an item; picklable, as items and results are.
        items: what to do it with.
        execution: who does it.

    Raises:
        OSError: a task's process died again and again, or the scheduler cannot be reached.
        ImportError: dask is wanted and not installed.
    """
    if execution.executor == "dask":
        yield from _with_dask(task, items, execution)
    elif execution.workers is None:
        for item in items:
            yield item, task(item)
    else:
        yield from _with_processes(task, items, min(execution.workers, len(items)))


def _with_processes(
    task: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    threads = max(1, torch.get_num_threads() // workers)
    waiting, deaths = list(range(len(items))), Counter[int]()
    while waiting:
        running: dict[Future[Result], int] = {}
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(threads,)
        )
        try:
            while waiting or running:
                while waiting and len(running) < workers:  # no more than can run, so that a death is one of theirs
                    item = waiting.pop(0)
                    running[pool.submit(task, items[item])] = item
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    result = future.result()
                    yield items[running.pop(future)], result
        except BrokenProcessPool as error:  # all that ran are lost, and nobody says with which of them it began
            lost = sorted(running.values())
            deaths.update(lost)
            if any(deaths[i] > RETRIES for i in lost):
                raise OSError(
                    f"processes died {RETRIES + 1} times while at {', '.join(str(items[i]) for i in lost)}; if memory "
                    "is short, give fewer --workers"
                ) from error
            waiting = lost + waiting
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a word; the parent has the word
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for_end([parent.sentinel])
        os._exit(1)  # a parent that was killed told nobody

    threading.Thread(target=follow, daemon=True).start()


def _with_dask(
    task: Callable[[Item], Result], items: Sequence[Item], execution: Execution
) -> Iterator[tuple[Item, Result]]:
    distributed = optional_package("distributed", "dask")
    if execution.scheduler is None:
        where = distributed.LocalCluster(
            n_workers=min(execution.workers or os.cpu_count() or 1, len(items)), threads_per_worker=1, processes=True,
            dashboard_address=None, silence_logs=logging.ERROR,
        )  # fmt: skip
    else:
        where = execution.scheduler
    try:
        try:
            client = distributed.Client(where)
        except (OSError, ValueError) as error:
            raise OSError(
                f"no dask scheduler at {where} ({error}); start one with `dask scheduler`, or leave --scheduler out"
            ) from error
        with client:
            futures = client.map(task, items, pure=False)
            owners = {future.key: item for future, item in zip(futures, items, strict=True)}
            try:
                for future in distributed.as_completed(futures):
                    yield owners[future.key], future.result()
            except distributed.KilledWorker as error:
                raise OSError(
                    f"dask's workers died again and again; if memory is short, take fewer: {error}"
                ) from error
    finally:
        if execution.scheduler is None:
            where.close()
