"""Several processes for one run, as `torchrun` starts them: who am I, a common counter, waiting for each other.

Terms: *worker* = one of the processes, each with a GPU of its own where there are any; *start* = torchrun starts all
workers anew when one dies; its store outlives that, so everything here is kept apart by the number of the start.

    torchrun --standalone --nproc-per-node 2 training_code/run_evaluation_Mini_with_ttt.py

torchrun comes with torch; the package of that name on PyPI is something else.
"""

import functools
import os
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed

POLL_SECONDS = 0.1
LONGEST_WAIT = timedelta(days=7)  # for the others: a training or an evaluation of theirs


@dataclass(frozen=True)
class Worker:
    """This process among the workers of a run."""

    rank: int = 0  # 0 writes what there is once
    count: int = 1  # of workers on all hosts
    local_rank: int = 0  # among those of this host: the number of its GPU
    start: int = 0  # how often torchrun has started the workers anew

    @property
    def first(self):
        """Tell whether this is the worker that writes what there is once."""
        return self.rank == 0


def this_worker():
    """Return this process's place among the workers; it is the only one where torchrun did not start it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Worker()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT")
    return Worker(*(int(os.environ[name]) for name in names))


@functools.cache
def _torchrun_store():
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=LONGEST_WAIT)


def common_store(name):
    """Return torchrun's store for one purpose of this start; there is none without torchrun."""
    return torch.distributed.PrefixStore(f"{name}/{this_worker().start}", _torchrun_store())


class Counter:
    """Hands out 0, 1, 2... so that each number goes to one worker."""

    def __init__(self, name):
        """Begin at 0 in every start of the workers."""
        self.store, self.own = (common_store(name) if this_worker().count > 1 else None), -1

    def next(self):
        """Return the next number."""
        self.own = self.own + 1 if self.store is None else self.store.add("next", 1) - 1
        return self.own


def wait_for_all(name):
    """Wait until every worker has come to the place of this name, which each passes once in a start."""
    worker = this_worker()
    if worker.count == 1:
        return
    store = common_store(f"wait/{name}")
    store.add("arrived", 1)
    while store.add("arrived", 0) < worker.count:
        time.sleep(POLL_SECONDS)


def join_process_group(device):
    """Join the workers for collective operations (training), once; alone nothing happens.

    device: torch device type, which decides the backend: nccl for 'cuda', gloo for 'cpu'.
    """
    worker = this_worker()
    if worker.count > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo", store=common_store("process group"), rank=worker.rank,
            world_size=worker.count)  # fmt: skip
