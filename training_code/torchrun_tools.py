"""Several processes for one run, as `torchrun` starts them: who am I, a common counter, waiting for each other.

Terms: *worker* = one of the processes, each with a GPU of its own where there are any; *start* = torchrun starts all
workers anew when one dies; its store outlives that, so everything here is kept apart by the number of the start.

    torchrun --standalone --nproc-per-node 2 training_code/run_evaluation_Mini_with_ttt.py

torchrun comes with torch; the package of that name on PyPI is something else.
"""

import contextlib
import functools
import json
import os
import sys
import time
import uuid
from collections import Counter as Counts
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed
from tqdm import tqdm

POLL_SECONDS = 0.1
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_RANK",
          "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables that torchrun sets
LONGEST_WAIT = timedelta(days=7)  # for the others: a training or an evaluation of theirs
_asked = Counts()  # how often this process has asked for what is numbered, by name


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
    """Return this process's place among the workers; it is the only one where torchrun did not start it.

    The first call, which has to come before CUDA is used, leaves the process only its own GPU, as number 0: whatever
    takes "the GPU" then takes the right one.
    """
    return Worker() if "TORCHELASTIC_RUN_ID" not in os.environ else _worker_of_torchrun()


@functools.cache
def _worker_of_torchrun():
    worker = Worker(*(int(os.environ[name]) for name in (*_NAMES[:3], "TORCHELASTIC_RESTART_COUNT")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    numbers = visible.split(",") if visible is not None else [str(number) for number in range(worker.local_rank + 1)]
    if worker.local_rank < len(numbers):
        os.environ["CUDA_VISIBLE_DEVICES"], os.environ["LOCAL_RANK"] = numbers[worker.local_rank], "0"
    return worker


@contextlib.contextmanager
def alone():
    """Let this process, also in the eyes of libraries, be the only worker in the with-block."""
    this_worker()  # still knows its own GPU
    names = [name for name in os.environ if name.startswith("TORCHELASTIC_")] + list(_NAMES)
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def quiet_unless_first():
    """Let all workers but the first write nothing to the terminal but warnings and errors."""
    if not this_worker().first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (for the rest of the process)
        tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)


@functools.cache
def _torchrun_store():
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return torch.distributed.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=LONGEST_WAIT)


@functools.cache
def _this_start():
    """Return a name of this start of the workers, the same for all of them; all have to ask.

    On one host this is the number of the start. On several hosts each torchrun counts only the deaths of its own
    workers, so the numbers differ: there the first worker makes a name up, and says for whom it is.
    """
    worker = this_worker()
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        return str(worker.start)
    store, me = torch.distributed.PrefixStore("starts", _torchrun_store()), uuid.uuid4().hex
    if worker.first:
        store.set("name", me)
        others = [store.get(f"{me}/{rank}").decode() for rank in range(1, worker.count)]  # waits for them
        store.set(f"{me}/for", json.dumps([me, *others]))
        return me
    while True:  # the name that is there can be that of an earlier start
        name = store.get("name").decode()
        store.set(f"{name}/{worker.rank}", me)
        if store.check([f"{name}/for"]) and json.loads(store.get(f"{name}/for"))[worker.rank] == me:
            return name
        time.sleep(POLL_SECONDS)


def common_store(name):
    """Return torchrun's store for one purpose of this start; there is none without torchrun."""
    return torch.distributed.PrefixStore(f"{name}/{_this_start()}", _torchrun_store())


def run_begin():
    """Return the time (seconds since 1970) at which this run began: of its first start, the same for all workers."""
    now = str(time.time())
    if this_worker().count == 1:
        return float(now)
    store = torch.distributed.PrefixStore("run", _torchrun_store())
    return float(store.compare_set("begin", "", now).decode())


class Counter:
    """Hands out 0, 1, 2... so that each number goes to one worker."""

    def __init__(self, name):
        """Begin at 0 in every start of the workers."""
        self.store, self.own = (common_store(name) if this_worker().count > 1 else None), -1

    def next(self):
        """Return the next number."""
        self.own = self.own + 1 if self.store is None else self.store.add("next", 1) - 1
        return self.own


def wait_for_all(name, meanwhile=None):
    """Wait until every worker has come to the place of this name, which each passes once in a start.

    meanwhile: a function that is called again and again while this worker waits, and once when all have come.
    """
    worker = this_worker()
    if worker.count == 1:
        return
    store = common_store(f"wait/{name}")
    store.add("arrived", 1)
    meanwhile = meanwhile or (lambda: None)
    while store.add("arrived", 0) < worker.count:
        meanwhile()
        time.sleep(POLL_SECONDS)
    meanwhile()


def from_first(name, make):
    """Return in all workers what the function `make` returns in the first, a value of JSON; only there it is called.

    The first waits for nobody. All that ask under one name do so equally often.
    """
    worker = this_worker()
    if worker.count == 1:
        return make()
    _asked[name] += 1
    store = common_store(f"from first/{name}/{_asked[name]}")
    if worker.first:
        store.set("value", json.dumps(make()))
    return json.loads(store.get("value"))


@contextlib.contextmanager
def process_group(device):
    """Join the workers for collective operations (training) in the with-block; a single one is alone in it.

    device: torch device type, which decides the backend: nccl for 'cuda', gloo for 'cpu'.
    """
    worker = this_worker()
    if worker.count == 1:
        with alone():  # torchrun may have started it all the same
            yield
        return
    _asked["process group"] += 1
    store = common_store(f"process group/{_asked['process group']}")
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=worker.rank,
                                         world_size=worker.count)
    yield
    torch.distributed.destroy_process_group()  # after an error the others are not there for it


def sum_over_workers(numbers):
    """Return the sums of a list of whole numbers over all workers of the process group; alone they are the same."""
    if this_worker().count == 1:
        return list(numbers)
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.tensor(list(numbers), dtype=torch.int64, device=device)
    torch.distributed.all_reduce(sums)
    return sums.tolist()


def largest_over_workers(number):
    """Return the largest of the numbers of all workers of the process group; alone it is the own one."""
    if this_worker().count == 1:
        return number
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    largest = torch.tensor(number, dtype=torch.float64, device=device)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX)
    return largest.item()


def average_over_workers(values):
    """Replace a tensor in place by its mean over all workers of the process group; alone it stays as it is."""
    if this_worker().count > 1:
        torch.distributed.all_reduce(values)
        values /= this_worker().count


def copy_of_first(tensors):
    """Replace tensors in place by those of the first worker of the process group."""
    if this_worker().count > 1:
        for tensor in tensors:
            torch.distributed.broadcast(tensor.detach(), 0)
