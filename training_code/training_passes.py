"""The forward and backward passes of a packed training: gradients added up in place, on a GPU as CUDA graphs.

A pass launches thousands of kernels. Where a GPU runs them faster than Python launches them, which is so for small
models and short texts, a pass is *recorded* once and then replayed, at fixed addresses and with fixed shapes: packed
batches are padded to one of few lengths by texts that are not learned. Whether that is faster is measured at the
beginning of a training.

Source: CUDA graphs of whole passes as of the PyTorch manual; gradients of accumulated passes as in any training.
"""

import contextlib
import math
import time

import torch
from torch.nn import functional as F

from packing import NO_LABEL

LEAST_GAIN = 0.9  # a replayed pass has to take less than this share of the time of an ordinary one
LEAST_LAUNCH = 0.5  # share of the time of a pass that its launch takes, for recording to be tried: they overlap
LEAST_STEP = 64  # tokens between two lengths
MEASURED_TOKENS = 2048  # of a pass whose memory is measured
USED_MEMORY = 0.9  # share of what is free
RECORDED_SHARE = 0.5  # of that, for one pass: the first of a length runs beside the memory of the recordings
_ROWS = {"input_ids": 0, "labels": NO_LABEL, "position_ids": 0, "attention_mask": 1}  # what a filling text has there


class Gradients:
    """The gradients of trained parameters, all of one dtype, side by side in one tensor ``flat``."""

    def __init__(self, parameters):
        """parameters: list of tensors on one device."""
        self.parameters = parameters
        self.flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype,
                                device=parameters[0].device)  # fmt: skip
        parts = self.flat.split([p.numel() for p in parameters])
        self.views = [part.view_as(p) for part, p in zip(parts, parameters, strict=True)]
        self._of = dict(zip(map(id, parameters), self.views, strict=True))

    def of(self, parameter):
        """Return the gradient of a parameter."""
        return self._of[id(parameter)]

    def start_step(self):
        """Begin at zero where the last gradients are used up: then they have been taken from the parameters."""
        if self.parameters[0].grad is None:
            self.flat.zero_()
            for parameter, view in zip(self.parameters, self.views, strict=True):
                parameter.grad = view

    def add(self, loss):
        """Add the gradients of a loss."""
        add_gradients(loss, self.parameters, self.views)

    def clip(self, most):
        """Scale the gradients down to this norm, if theirs is higher; return it as it was, a tensor."""
        norm = torch.linalg.vector_norm(self.flat)
        self.flat *= (most / (norm + 1e-6)).clamp(max=1.0)
        return norm

    def drop(self, set_to_none=True):
        """Take the gradients from the parameters: the next step begins at zero."""
        for parameter in self.parameters:
            parameter.grad = None

    @contextlib.contextmanager
    def zeroed_alone(self, model):
        """Let ``model.zero_grad`` look at these gradients only in the with-block: all others stay as they are."""
        model.zero_grad = self.drop
        try:
            yield
        finally:
            del model.zero_grad


def add_gradients(loss, parameters, sums):
    """Add the gradients of a loss to tensors, one for each parameter; layers that do that themselves (``lora_layers``)
    leave none."""
    new = torch.autograd.grad(loss, parameters, allow_unused=True)
    for total, gradient in zip(sums, new, strict=True):
        if gradient is not None:
            total += gradient


def padded_length(tokens):
    """Return the least length on a grid of 8 to 16 lengths per power of two that holds so many tokens."""
    step = max(LEAST_STEP, 2 ** (tokens.bit_length() - 4))
    return -(-tokens // step) * step


def pad_pack(batch, most_texts, longest, length=None):
    """Pad a packed batch by texts that are not learned, so that its shapes are one of few.

    Args:
        batch: as of ``packing.pack``, with further tensors that stay as they are.
        most_texts: texts that a batch has at most. longest: tokens of the longest text.
        length: of a batch that stands for those of this length, of which nothing may be learned: its tokens are padded
            or cut, and its texts have equal lengths. None: the next of a few lengths that holds the batch.

    Returns:
        dict with ``attention_mask``, which keeps transformers from looking into the positions: that waits for the
        device. Every batch has ``most_texts + 1`` texts of one token at least.
    """
    borders, tokens = batch["cu_seq_lens_q"], batch["input_ids"].shape[1]
    if length is None:
        fillers = most_texts + 2 - len(borders)
        length = padded_length(tokens + fillers)
        ends = torch.arange(tokens + 1, tokens + fillers + 1, dtype=borders.dtype, device=borders.device)
        ends[-1] = length
        borders = torch.cat([borders, ends])
    else:
        borders = torch.linspace(0, length, most_texts + 2).to(borders)
    # of any batch of this length, since a recording has one value: a filling text is no longer than what the grid of
    # lengths adds, and of `length` tokens `most_texts` texts of the longest do not fill more
    longest_filler = max(LEAST_STEP, length // 8) + most_texts + 1
    rows = {"attention_mask": torch.ones_like(batch["input_ids"])} | batch
    rows = {name: F.pad(rows[name], (0, length - tokens), value=value) for name, value in _ROWS.items()}
    return batch | rows | {"cu_seq_lens_q": borders, "max_length_q": min(length, max(longest, longest_filler))}


def largest_pack(lengths, most_texts, most_tokens):
    """Return the tokens of the largest padded batch of texts.

    lengths: of all texts, in tokens. most_texts: texts that a batch has at most. most_tokens: tokens that it has at
    most, unless a single text has more.
    """
    lengths = sorted(lengths)[-most_texts:]
    return padded_length(min(sum(lengths), max(lengths[-1], most_tokens)) + most_texts)


def _weightless(batch):
    """Return a batch whose pass adds nothing but zeros."""
    return batch | {"n_labels": torch.full_like(batch["n_labels"], math.inf)}


def memory_taken(function):
    """Run a function; return the most bytes of the current GPU that it took, infinity if there were not enough."""
    torch.cuda.synchronize()
    before, enough = torch.cuda.memory_allocated(), True
    torch.cuda.reset_peak_memory_stats()
    try:
        function()
    except torch.OutOfMemoryError:
        enough = False
    if enough:
        return torch.cuda.max_memory_allocated() - before
    torch.cuda.empty_cache()  # outside of the error, which holds on to memory
    return math.inf


def memory_share(recorded):
    """Return the share of the memory for activations that a pass may take; recorded: `RecordedPasses` or None."""
    return 1.0 if recorded is None else recorded.memory_share


class RecordedPasses:
    """Runs passes over packed batches, recorded where that is faster than without.

    Attributes:
        pays: whether recordings are used; None before the second pass, which finds out.
        seconds: of an ordinary pass and of its replay, as they were measured then.
        memory_share: of the memory for activations, what a pass may take.
    """

    def __init__(self, compute, pad, recorder, largest, print_func=print, prepared=lambda seconds: None):  # noqa: PLR0913
        """Make the passes of a training.

        Args:
            compute: function (batch) -> loss, a tensor of always the same shape: runs one pass and adds up its
                gradients, as always in the same place. It must divide the loss by ``batch["n_labels"]``.
            pad: function (batch, length) -> padded batch: ``pad_pack`` with its limits.
            recorder: a ``CudaRecorder``.
            largest: of ``largest_pack``. Such a batch is recorded first: all other recordings have room in its memory.
            print_func: says what was found out.
            prepared: is told the seconds that measuring and recording took, each time.
        """
        self.compute, self.pad, self.recorder, self.print_func = compute, pad, recorder, print_func
        self.largest, self.prepared = largest, prepared
        self.pays, self.seconds, self.memory_share = None, None, 1.0
        self._recordings, self._fixed, self._loss = {}, {}, None

    def run(self, batch):
        """Run a pass; return its loss."""
        if self.pays is False:
            return self.compute(batch)
        if self._loss is None:
            self._loss = self._warm_up(batch)
            return self._loss.clone()
        padded = self.pad(batch, None)
        if self.pays is None:
            return self._measure(batch, padded)
        if not self._record(padded):
            return self.compute(batch)
        self._replay(padded)
        return self._loss.clone()

    def _measure(self, batch, padded):
        """Run a pass in the ordinary way, then see how long its replay takes; return its loss.

        Where launching it takes little of that, there is little to save. A pass of hardly any tokens tells how long
        that takes: of a longer one so much can be waiting for the device that launching waits too.
        """
        _, ordinary, loss = self._timed(lambda: self._warm_up(batch))
        weightless = _weightless(padded)
        least = self.pad(weightless, LEAST_STEP * -(-len(padded["cu_seq_lens_q"]) // LEAST_STEP))
        times = [self._timed(lambda: self._warm_up(least)) for _ in range(2)]
        launch = min(launched for launched, *_ in times)
        self.prepared(sum(seconds for _, seconds, _ in times))
        if launch < LEAST_LAUNCH * ordinary:  # perhaps by what the first pass of a length does once
            _, again, _ = self._timed(lambda: self._warm_up(_weightless(batch)))
            self.prepared(again)
            ordinary = min(ordinary, again)
        if launch < LEAST_LAUNCH * ordinary:
            self._give_up(f"a pass takes {ordinary:.3f} s, its launch only {launch:.3f} s")
            return loss
        self.recorder.release()
        if self._record(self.pad(weightless, self.largest)) and self._record(weightless):
            _, first, _ = self._timed(lambda: self._replay(weightless))  # takes longer
            _, replayed, _ = self._timed(lambda: self._replay(weightless))
            self.prepared(first + replayed)
            self.seconds = ordinary, replayed
            found = f"a pass takes {ordinary:.3f} s without, {replayed:.3f} s with them"
            if replayed < LEAST_GAIN * ordinary:
                self.pays = True
                self.print_func(f"CUDA graphs are used: {found}")
            else:
                self._give_up(f"they would save little: {found}")
        return loss

    def close(self):
        """Give back all memory; no pass can be run any more."""
        self._drop_recordings()
        self.compute = self._loss = None  # `compute` may refer to this: Python would give its memory back late

    def _warm_up(self, batch):
        return self.recorder.warm_up(lambda: self.compute(batch)).clone()

    def _drop_recordings(self):
        self.memory_share = 1.0
        self._recordings.clear()
        self._fixed.clear()
        self.recorder.release()

    def _give_up(self, why):
        """Use no recordings any more."""
        self._drop_recordings()
        self.pays = False
        self.print_func(f"CUDA graphs are not used: {why}")

    def _timed(self, function):
        """Run a function; return (seconds until all is launched, seconds until it is done, its result)."""
        self.recorder.wait()
        begin = time.perf_counter()
        result = function()
        launched = time.perf_counter() - begin
        self.recorder.wait()
        return launched, time.perf_counter() - begin, result

    def _record(self, padded):
        """Record the pass of a batch's length, unless that is done; return whether there is a recording."""
        length = padded["input_ids"].shape[1]
        if length in self._recordings:
            return True
        self._fixed[length] = {name: value.clone() if isinstance(value, torch.Tensor) else value
                               for name, value in padded.items()}  # fmt: skip
        self.recorder.wait()  # for passes before, which count
        self.memory_share, failure, begin = RECORDED_SHARE, None, time.perf_counter()
        try:
            self._warm_up(_weightless(self._fixed[length]))  # kernels of this length
            self._recordings[length], _ = self.recorder.record(
                lambda: self._loss.copy_(self.compute(self._fixed[length])))
        except RuntimeError as error:
            failure = str(error)
        self.prepared(time.perf_counter() - begin)
        if failure is not None:  # outside of the error, which holds on to memory
            self._give_up(f"a pass of {length} tokens cannot be recorded ({failure})")
        return failure is None

    def _replay(self, padded):
        length = padded["input_ids"].shape[1]
        for name, value in self._fixed[length].items():
            if isinstance(value, torch.Tensor):
                value.copy_(padded[name], non_blocking=True)
        self._recordings[length].replay()
