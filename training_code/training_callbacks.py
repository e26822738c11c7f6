"""What accompanies a training: its progress line, its losses, its totals, its time limit, and signals to stop.

Under torchrun all workers run these callbacks alike, since they add up and decide together; the first writes and shows.
"""

import contextlib
import json
import math
import signal
import threading
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import TrainerCallback, get_scheduler

from arc_files import write_json
from torchrun_tools import average_over_workers, largest_over_workers, sum_over_workers, this_worker

LOG_EVERY = 10  # steps after which losses are asked for; in between nothing waits for a GPU
HISTORY_FILES = ("training_loss.json", "training_loss.png")
FIRST_MEASURED, MEASURED_EVERY = 4, 10  # steps of a start after which a time limit looks at the speed


class NothingToTrain(Exception):
    """All steps that a training may take are taken, before it has begun."""


class Totals(TrainerCallback):
    """What a training took, over all its starts and workers: kept in every checkpoint, as its last file."""

    FILE = "totals.json"

    def __init__(self, checkpoint, limit):
        """Go on from the totals in a checkpoint's folder (None: start at zero); limit: the training's `TimeLimit`."""
        self.seen, seconds, self.limit = {"texts": 0, "tokens": 0, "loss_tokens": 0}, 0.0, limit  # by this worker
        if checkpoint is not None:
            saved = json.loads(Path(checkpoint, self.FILE).read_text())
            seconds = saved["seconds"]
            if this_worker().first:  # goes on with those of all
                self.seen.update({name: saved[name] for name in self.seen})
        self.start = time.perf_counter() - seconds

    def on_save(self, args, state, control, **_):
        totals = self.values()  # when all workers are here, their parts of the checkpoint are written
        if this_worker().first:
            write_json(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE, totals)

    def sums(self):
        """Return texts, tokens and loss_tokens that went through the models of all workers; all have to ask."""
        return dict(zip(self.seen, sum_over_workers(self.seen.values()), strict=True))

    def values(self):
        """Return these sums, and seconds; of a training that its time limit has shortened also steps_planned."""
        planned = {} if self.limit.planned is None else {"steps_planned": self.limit.planned}
        return self.sums() | {"seconds": time.perf_counter() - self.start} | planned


class Progress(TrainerCallback):
    """One progress line with loss, speed and time left; keeps the history and stops at a loss that is no number.

    Attributes:
        losses: tensors, the losses of the steps since the last log; the trainer appends them.
        history: one {'step', 'loss', 'learning_rate'} per optimiser step.
    """

    def __init__(self, option_prefix, totals):
        self.option_prefix = option_prefix
        self.totals, self.tokens_before, self.begin = totals, 0, 0.0  # for the speed since this start
        self.speed = 0.0  # tokens per second
        self.losses, self.rates, self.history = [], [], []
        self.bar = None

    def on_train_begin(self, args, state, control, **_):
        self.history = [_history_entry(log, log["step"]) for log in state.log_history if "loss" in log]
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step",
                        disable=not this_worker().first, leave=None)  # stays, unless it stands under another bar
        self.tokens_before, self.begin = self.totals.sums()["tokens"], time.perf_counter()

    def on_optimizer_step(self, args, state, control, lr_scheduler=None, **_):
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_log(self, args, state, control, logs=None, **_):
        if logs is None or "loss" not in logs:
            return
        losses, first = torch.stack([loss.float() for loss in self.losses]), state.global_step - len(self.losses) + 1
        average_over_workers(losses)
        entries = [{"step": step, "loss": loss, "learning_rate": rate}
                   for step, (loss, rate) in enumerate(zip(losses.tolist(), self.rates, strict=True), first)]
        self.losses.clear()
        self.rates.clear()
        for entry in entries:
            if not math.isfinite(entry["loss"]):
                raise FloatingPointError(f"the training loss is {entry['loss']} in step {entry['step']}: "
                                         f"lower the learning rate ({self.option_prefix}learning-rate, "
                                         f"{self.option_prefix}embedding-learning-rate)")
        self.history += entries
        state.log_history[-1:] = entries  # a checkpoint has them all
        self.speed = (self.totals.sums()["tokens"] - self.tokens_before) / (time.perf_counter() - self.begin)
        self.bar.set_postfix({"loss": f"{entries[-1]['loss']:.4f}", "tokens/s": f"{self.speed:,.0f}"}, refresh=False)

    def on_step_end(self, args, state, control, **_):
        self.bar.total = state.max_steps  # a time limit may have lowered it
        self.bar.update(state.global_step - self.bar.n)
        control.should_log |= control.should_save or control.should_training_stop

    def close(self):
        """End the progress line."""
        if self.bar is not None:
            self.bar.close()


def _history_entry(log, step):
    return {"step": step, "loss": log["loss"], "learning_rate": log["learning_rate"]}


def _time_when_done():
    """Return the time, in seconds, when a GPU has done everything that was launched."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


class TimeLimit(TrainerCallback):
    """Shortens a training, learning rates included, to the steps that there is time for; never lengthens it again."""

    def __init__(self, seconds):
        """Give a training so many seconds from now on (None: any number)."""
        self.end = math.inf if seconds is None else time.perf_counter() + seconds
        self.planned = None  # steps without the limit, once it has shortened the training
        self.checkpoint = None  # folder that this start goes on from
        self.begin, self.first_end = 0, 0.0  # steps done before this start; when its first step ended
        self.excluded, self.new = 0.0, 0.0  # seconds that do not count: of all steps after that, of this step
        self.prepared = 0.0  # all such seconds of this worker

    def exclude(self, seconds):
        """Leave seconds that have just passed out of the speed: something was prepared that the next steps need not.

        Under torchrun the others wait meanwhile, or prepare something too: in each step the longest of all counts.
        """
        self.new += seconds
        self.prepared += seconds

    def on_train_begin(self, args, state, control, lr_scheduler=None, **_):
        self.begin = state.global_step
        if self.checkpoint is not None:  # what an earlier start has shortened stays so
            saved = json.loads(Path(self.checkpoint, "trainer_state.json").read_text())
            self._shorten(saved["max_steps"], args, state, lr_scheduler)
        self._shorten(self._agree(self._steps_in_time(state)), args, state, lr_scheduler)

    def on_epoch_begin(self, args, state, control, **_):
        if state.global_step >= state.max_steps:  # the Trainer itself would take one step more
            raise NothingToTrain

    def on_step_end(self, args, state, control, lr_scheduler=None, **_):
        if self.end == math.inf:
            return
        self.excluded, self.new = self.excluded + largest_over_workers(self.new), 0.0
        if state.global_step == self.begin + 1:
            self.first_end, self.excluded = _time_when_done(), 0.0
        self._shorten(self._agree(self._steps_in_time(state)), args, state, lr_scheduler)
        if state.global_step >= state.max_steps:
            control.should_training_stop = True
            control.should_save |= args.save_strategy == "steps"  # as at every end of a training

    def _steps_in_time(self, state):
        """Return how many steps, with those done, there is time for, as far as is known after this one."""
        done = state.global_step - self.begin
        measured = done >= FIRST_MEASURED and (done - FIRST_MEASURED) % MEASURED_EVERY == 0
        now = _time_when_done() if done < FIRST_MEASURED or measured else time.perf_counter()
        left = self.end - now
        if left <= 0:
            return state.global_step
        if self.end == math.inf or not measured:
            return state.max_steps
        per_step = (now - self.first_end - self.excluded) / (done - 1)  # without the first, which prepares much
        return min(state.max_steps, state.global_step + int(left / max(per_step, 1e-9)))

    @staticmethod
    def _agree(n_steps):
        """Return the number of the first worker."""
        return sum_over_workers([n_steps if this_worker().first else 0])[0]

    def _shorten(self, n_steps, args, state, lr_scheduler):
        """Bring a training down to so many steps, if it has more."""
        if n_steps >= state.max_steps:
            return
        self.planned = self.planned or state.max_steps
        state.max_steps = n_steps
        groups = [{"params": [torch.zeros(1)]} for _ in lr_scheduler.base_lrs]
        warmup = math.ceil(args.warmup_steps * n_steps / self.planned)
        lr_scheduler.lr_lambdas = get_scheduler(args.lr_scheduler_type, torch.optim.SGD(groups), warmup,
                                                n_steps).lr_lambdas
        shares = [share(lr_scheduler.last_epoch) for share in lr_scheduler.lr_lambdas]
        lr_scheduler._last_lr = [rate * share for rate, share in zip(lr_scheduler.base_lrs, shares, strict=True)]
        for group, rate in zip(lr_scheduler.optimizer.param_groups, lr_scheduler._last_lr, strict=True):
            group["lr"] = rate


class StopSignals(TrainerCallback):
    """Ends a training after the step in which a signal came, with a checkpoint; at a second signal at once."""

    def __init__(self):
        self.number, self.saved = None, False  # of the signal; whether there is a checkpoint since

    def take(self, number, _):
        """Take a signal."""
        if self.number is not None:
            raise KeyboardInterrupt
        self.number = number
        tqdm.write("the training stops after this step, with a checkpoint; another signal stops it at once")

    def on_step_end(self, args, state, control, **_):
        control.should_save |= self.number is not None

    def on_save(self, args, state, control, **_):
        self.saved = self.number is not None

    def on_step_begin(self, args, state, control, **_):
        if self.saved:
            raise KeyboardInterrupt


@contextlib.contextmanager
def stopped_after_a_step(settings):
    """Give a training in the with-block the `StopSignals` that Ctrl-C and SIGTERM reach; after it they act as before.

    Without checkpoints, and beside other workers of torchrun, which would wait for each other, no signal reaches them.
    """
    stop, before = StopSignals(), {}
    if settings.save_every and this_worker().count == 1 and threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, stop.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if stop.number is not None:
            signal.raise_signal(stop.number)


def write_history(output_path, history, title="Training loss"):
    """Write the loss of every step, a list of {'step', 'loss'}, to `HISTORY_FILES`; without any step nothing."""
    if not history:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers, picture = (output_path / name for name in HISTORY_FILES)
    write_json(numbers, history)
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([entry["step"] for entry in history], [entry["loss"] for entry in history])
    axes.set(xlabel="step", ylabel="loss (nats per reply token)", title=title)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)
