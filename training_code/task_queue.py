"""Which task next: handed out to the workers of a run, held back, set aside after two crashes, ended by a STOP file.

Terms: *worker* = one of the processes that torchrun started (alone it is the only one); *try* = a worker has begun a
task. Under torchrun every try leaves a file, ``tries/<task>.<number>``, which is removed when the task is finished and
when the worker is asked to end; two left mean that the task took its worker down twice: it is set aside, so that the
others finish. A task with one file left runs alone in its worker, so that no other is blamed.

Source: experience with torchrun; it restarts all workers when one dies, so only what is in files is known then.
"""

import signal
import sys
import time
from contextlib import contextmanager

from arc_loader import ArcDataset
from run_tools import task_file
from torchrun_tools import Counter, run_begin, this_worker

STOP_FILE = "STOP"  # in the output folder: workers finish the tasks they have and begin no other
MOST_TRIES = 2


class TimeIsUp(Exception):
    """The time limit of a run is reached."""


class RunClock:
    """The time of a run, counted from its first start by torchrun, and its limit."""

    def __init__(self, hours=None):
        """Start the clock.

        hours: the limit; a part of it, one per cent and at least half a minute, is kept for writing the results.
        """
        self.begin, self.seconds = run_begin(), None
        if hours is not None:
            self.seconds = hours * 3600 - max(30.0, 36 * hours)

    def left(self):
        """Return the seconds that are left, None without a limit."""
        return None if self.seconds is None else self.begin + self.seconds - time.time()

    @contextmanager
    def running(self):
        """Raise ``TimeIsUp`` in the with-block when the time is up, whatever it is doing."""
        if self.seconds is None:
            yield
            return
        if self.left() <= 0:
            raise TimeIsUp

        def ring(*_):
            raise TimeIsUp

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, self.left())
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def task_order(run, tasks, tokens):
    """Return the names of the tasks in the order in which they are begun; tokens: {test input: of its prompts}.

    With a time limit shortest first, so that as many as possible are finished; else with several workers longest first,
    so that none of them ends long after the others. One worker that trains per task has similar ones side by side.
    """
    length = dict.fromkeys(tasks.challenge, 0)
    for name, number in tokens.items():
        length[ArcDataset.get_base_key(name)] += number
    if run.config.time_limit is not None or (run.config.ttt == "per-task" and run.worker.count == 1):
        return sorted(length, key=length.get)
    return sorted(length, key=length.get, reverse=True) if run.worker.count > 1 else list(length)


def tasks_at_once(run, names):
    """Return how many tasks a worker has under way: all, if it is alone and has time; else few of them."""
    if run.config.tasks_at_once is not None:
        return run.config.tasks_at_once
    if run.worker.count == 1 and run.config.time_limit is None:
        return len(names)
    return 1 if run.device == "cpu" else max(1, len(names) // (8 * run.worker.count))


class TaskQueue:
    """Gives a worker one task after the other until none is left for it; iterate over it.

    None among the tasks says: none now, ask again when one that is under way has been reported by ``finished``.
    """

    def __init__(self, output, names, at_once=1):
        """Prepare the queue.

        output: the run's folder. names: all tasks in order, equal in all workers. at_once: most tasks that this worker
        has under way.
        """
        self.output, self.names, self.at_once = output, names, at_once
        self.counter, self.under_way, self.keeps_tries = Counter("tasks"), set(), this_worker().count > 1
        self.done, self.stopped = set(), False
        self.end_signals = (signal.SIGTERM, signal.SIGINT) if self.keeps_tries else ()

    def finished(self, name):
        """Note that a task is finished, here or by another worker."""
        self.done.add(name)
        self.under_way.discard(name)
        for file in self._tries(name):
            file.unlink(missing_ok=True)

    def set_aside(self):
        """Return the names of the tasks that were set aside."""
        return [name for name in self.names if len(self._tries(name)) >= MOST_TRIES]

    def _tries(self, name):
        files = [task_file(self.output / "tries", name, f".{number}") for number in range(1, MOST_TRIES + 1)]
        return [file for file in files if file.exists()]

    def __iter__(self):
        with self._forgotten_when_asked_to_end():
            while True:
                while len(self.under_way) >= self.at_once:  # takes none from the others that it cannot begin
                    yield None
                i = self.counter.next()
                if i >= len(self.names):
                    return
                name, tries = self.names[i], self._tries(self.names[i])
                if name in self.done or len(tries) >= MOST_TRIES:
                    continue
                while tries and self.under_way:
                    yield None
                if (self.output / STOP_FILE).exists():
                    self.stopped = True
                    return
                self._begin(name, len(tries) + 1)
                yield name
                while tries and self.under_way:
                    yield None

    def _begin(self, name, number):
        self.under_way.add(name)
        if self.keeps_tries:
            file = task_file(self.output / "tries", name, f".{number}")
            file.parent.mkdir(exist_ok=True)
            file.touch()

    def forget(self):
        """Take the tries of this worker back: it ends for a reason that is none of its tasks'."""
        for name in self.under_way if self.keeps_tries else ():
            self._tries(name)[-1].unlink(missing_ok=True)
        self.under_way.clear()  # a second signal may come

    @contextmanager
    def _forgotten_when_asked_to_end(self):
        """Take the tries back when the worker is asked to end (by a user, or torchrun after another one died)."""

        def end(number, _):
            self.forget()
            sys.exit(128 + number)

        before = {number: signal.signal(number, end) for number in self.end_signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
