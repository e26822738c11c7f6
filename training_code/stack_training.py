"""Train the adapters of several tasks at once: what K runs of ``training_tools.train_lora`` do, in one.

Every optimiser step has the texts of that step of every task; they are packed into as few forward passes as memory
allows. Losses, gradient clipping, AdamW and learning rates are each task's own, so that every adapter is that of a
separate run apart from rounding. Tasks may have different numbers of steps.

Source: per-task test-time training of arXiv 2505.07859; many adapters at once as in ``adapter_stack``.
"""

import functools
import math
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest

import bitsandbytes as bnb
import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from torch.nn import functional as F
from tqdm import tqdm
from transformers import get_scheduler

from adapter_stack import AdapterStack, aligned
from adapter_tools import autocast_dtype
from cuda_recorder import CudaRecorder
from lora_layers import grouped_product_works
from packing import NO_LABEL, pack, packed_attention, position_ids_of, to_device, varlen_possible
from recomputation import Recomputation
from training_passes import (MEASURED_TOKENS, USED_MEMORY, RecordedPasses, largest_pack, memory_share, memory_taken,
                             pad_pack)

GRADIENT_NORM = 1.0  # to which a task's gradients are clipped, as transformers' Trainer does
FULL_PASS = 65536  # tokens after which a GPU gains no speed from longer passes
CPU_PASS = 4096  # the same for a CPU
SHORT_PASS = 4096  # tokens of a pass that is worth recomputing activations for, where memory is scarce
MOST_MEMBERS = 64  # tasks at once
BYTES_OF_WEIGHT = 26  # weight, gradient and AdamW's two states in fp32, and casts while a pass lasts
FIRST_MEASURED, MEASURED_EVERY = 4, 10  # steps after which a time limit looks at the speed
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "cu_seq_lens_q", "max_length_q")
OPTIMIZERS = ("auto", "adamw_torch_fused", "adamw_torch", "adamw_8bit")


@dataclass
class Member:
    """A task of a stack: the texts of its steps, and what its training has been so far."""

    steps: list  # of each optimiser step: its texts, (tokens, labels) of int64 (T,) each
    losses: list = field(default_factory=list)  # of each step done, nats per reply token
    rates: list = field(default_factory=list)  # learning rate of the LoRA matrices in each step done

    def counts(self):
        """Return texts, tokens and loss_tokens of the steps done."""
        texts = [text for step in self.steps[: len(self.losses)] for text in step]
        return {"texts": len(texts), "tokens": sum(len(tokens) for tokens, _ in texts),
                "loss_tokens": sum(int((labels[1:] != NO_LABEL).sum()) for _, labels in texts)}  # fmt: skip

    def history(self):
        """Return a dict of step, loss and learning_rate for each step done."""
        return [{"step": i, "loss": loss, "learning_rate": rate}
                for i, (loss, rate) in enumerate(zip(self.losses, self.rates, strict=True), 1)]  # fmt: skip


def make_member(rows, collate, settings):
    """Return the `Member` of one task, its texts in the order in which a Trainer with these settings takes them.

    rows: tokens of its texts, as of `training_tools.tokens_of_texts`. collate: a `trainers.Collator` that pads.
    """
    batch = collate([{"input_ids": ids} for ids in rows])
    texts = [(batch["input_ids"][i, : len(ids)].numpy(), batch["labels"][i, : len(ids)].numpy())
             for i, ids in enumerate(rows)]  # fmt: skip
    per_step = settings.batch_size * settings.gradient_accumulation
    steps_per_epoch = math.ceil(len(texts) / per_step)
    n_steps = settings.max_steps if settings.max_steps > 0 else math.ceil(settings.epochs * steps_per_epoch)
    sampler, steps = SeedableRandomSampler(texts, data_seed=settings.seed), []
    for epoch in range(math.ceil(n_steps / steps_per_epoch)):
        sampler.set_epoch(epoch)
        order = list(sampler)
        steps += [[texts[i] for i in order[start : start + per_step]] for start in range(0, len(order), per_step)]
    return Member(steps[:n_steps])


# ---- forward passes ----

def _padded(text):
    """Return a text whose length is a multiple of `ALIGNED`: what stands behind its end reaches nothing."""
    tokens, labels = text
    missing = aligned(len(tokens)) - len(tokens)
    return np.pad(tokens, (0, missing), mode="edge"), np.pad(labels, (0, missing), constant_values=NO_LABEL)


def _passes(texts, most_tokens):
    """Cut [(member, text)] into passes of at most so many tokens, of one text at least."""
    passes, tokens = [], math.inf
    for member, text in texts:
        if tokens + len(text[0]) > most_tokens:
            passes.append([])
            tokens = 0
        passes[-1].append((member, text))
        tokens += len(text[0])
    return passes


def _make_batch(stack, texts, n_labels, position_ids):
    """Return the batch of a pass, on the stack's device.

    texts: [(member, padded text)] in the order of the members. n_labels: (K,) of each member in the whole step.
    """
    sizes = [0] * stack.size
    for member, (tokens, _) in texts:
        sizes[member] += len(tokens)
    batch = pack([text for _, text in texts], position_ids) | stack.rows(sizes) | {"n_labels": n_labels}
    return to_device(batch, stack.weights.device)


def _pad_batch(batch, most_texts, longest, length):
    """Pad a batch as `training_passes.pad_pack` does; the filling rows belong to the last member."""
    padded, last = pad_pack(batch, most_texts, longest, length), len(batch["offsets"]) - 1
    length = padded["input_ids"].shape[1]
    missing = length - batch["input_ids"].shape[1]
    offsets = batch["offsets"].clamp(max=length)
    offsets[-1] = length
    return padded | {"offsets": offsets,
                     "member_of_row": F.pad(batch["member_of_row"], (0, missing), value=last)}  # fmt: skip


def _compute(stack, dtype, batch):
    """Run one pass forward and backward; return each member's part of its loss (K,).

    dtype: of `adapter_tools.autocast_dtype`. batch: of `_make_batch`, perhaps padded.
    """
    device, members = stack.weights.device, batch["member_of_row"]
    stack.use(batch["offsets"], members)
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = stack.model(**inputs, use_cache=False).logits[0]
    losses = F.cross_entropy(logits[:-1].float(), batch["labels"][0, 1:], ignore_index=NO_LABEL, reduction="none")
    losses = torch.zeros(stack.size, device=device).index_add(0, members[0, :-1], losses) / batch["n_labels"]
    stack.add_gradients(losses.sum())
    return losses.detach()


# ---- learning rates ----

class _Rates:
    """The learning rates of all members: each has the schedule of its own number of steps."""

    def __init__(self, settings, members):
        self.settings, self.n_steps = settings, [len(member.steps) for member in members]
        self.shares = [self._shares(n, n) for n in self.n_steps]

    def _shares(self, n_steps, planned):
        """Return the function step -> share of the peak rate; with fewer steps than planned the warm-up shrinks too."""
        settings = self.settings
        warmup = settings.warmup_steps or math.ceil(settings.warmup_ratio * planned)
        warmup = math.ceil(warmup * n_steps / planned)
        optimizer = torch.optim.SGD([torch.zeros(1)])
        return get_scheduler(settings.scheduler, optimizer, warmup, n_steps).lr_lambdas[0]

    def shorten(self, n_steps, members):
        """Bring all members down to so many steps."""
        for i, member in enumerate(members):
            if n_steps < self.n_steps[i]:
                self.n_steps[i] = n_steps
                self.shares[i] = self._shares(max(1, n_steps), len(member.steps))


def _make_optimizer(stack, settings):
    """Return the optimiser, with one parameter group per member and learning rate, and the members of the groups."""
    groups, owners = [], []
    for i in range(stack.size):
        rates = (settings.learning_rate, settings.embedding_learning_rate)
        for (weights, gradients), rate in zip(stack.rows_of_member(i), rates, strict=False):
            parameter = torch.nn.Parameter(weights)
            parameter.grad = gradients
            groups.append({"params": [parameter], "lr": rate, "peak": rate})
            owners.append(i)
    if settings.optimizer not in OPTIMIZERS:
        raise ValueError(f"optimizer {settings.optimizer!r}: several tasks at once are trained by one of "
                         f"{', '.join(OPTIMIZERS)}")
    if settings.optimizer == "adamw_8bit":
        return bnb.optim.AdamW8bit(groups, weight_decay=settings.weight_decay), owners
    return torch.optim.AdamW(groups, weight_decay=settings.weight_decay, fused=True), owners


# ---- training ----

@contextmanager
def _in_training(model, recomputation=None):
    """Let a model, all its parts, be in training in the with-block, and in evaluation mode afterwards."""
    model.train()
    try:
        yield
    finally:
        model.eval()
        if recomputation is not None:
            recomputation.use(0)


@contextmanager
def _pass_runner(stack, members, settings, dtype, most_tokens, recomputation, prepared):  # noqa: PLR0913
    """Give the with-block a function (batch) -> losses (K,) that runs a pass, by CUDA graphs where they pay.

    most_tokens: of a pass. recomputation: `Recomputation` or None. prepared: function (seconds), told what making them
    took.
    """
    device, recorded = stack.weights.device, None

    def compute(batch):
        if recomputation is not None:
            recomputation.prepare(batch["input_ids"].numel(), memory_share(recorded))
        return _compute(stack, dtype, batch)

    grouped = varlen_possible(device, dtype) and grouped_product_works(device, torch.bfloat16)
    if not settings.cuda_graphs or not grouped:
        yield compute
        return
    steps = zip_longest(*(member.steps for member in members), fillvalue=())
    lengths = [[aligned(len(tokens)) for own in step for tokens, _ in own] for step in steps]
    longest, most_texts = max(map(max, lengths)), max(map(len, lengths))
    largest = max(largest_pack(step, most_texts, most_tokens) for step in lengths)

    def pad(batch, length):
        return _pad_batch(batch, most_texts, longest, length)

    recorded = RecordedPasses(compute, pad, CudaRecorder(device), largest, lambda line: None, prepared)
    with closing(recorded):
        yield recorded.run


def train_stack(stack, members, settings, room, seconds=None, show=True):  # noqa: PLR0913
    """Train all members of a stack, in place; their losses and learning rates are noted in `members`.

    The model is in evaluation mode afterwards.

    stack: `AdapterStack`; members: a `Member` for each of its adapters; settings: `TrainingSettings`, of which
    gradient_checkpointing, packing and save_every are not used; room: `Room` of the device; seconds: about the most
    that the training may take (None: any number): it is shortened for all alike to the steps that fit, learning rates
    included. show: a progress line.

    Returns a dict: tokens, loss_tokens, steps (of the longest member), seconds, tokens_per_second.

    Raises FloatingPointError when a loss is no number.
    """
    model = stack.model
    begin, position_ids = time.perf_counter(), position_ids_of(model)
    dtype = autocast_dtype(model, settings.mixed_precision)
    optimizer, owners = _make_optimizer(stack, settings)
    rates, step, totals = _Rates(settings, members), 0, {"tokens": 0, "loss_tokens": 0}
    losses, first_end = [], begin  # (K,) of every step; when the first one ended
    bar = tqdm(total=max(rates.n_steps), desc=f"training {stack.size} adapters", unit="step", disable=not show,
               leave=None)  # fmt: skip
    preparing = []  # seconds
    recomputation = room.recomputation_of(stack.size)
    passes = _pass_runner(stack, members, settings, dtype, room.most_tokens, recomputation, preparing.append)
    with packed_attention(model), stack.in_place(), _in_training(model, recomputation), passes as run_pass, bar:
        while step < max(rates.n_steps):
            texts = [(i, _padded(text)) for i, member in enumerate(members) if step < rates.n_steps[i]
                     for text in member.steps[step]]  # fmt: skip
            n_labels = torch.zeros(stack.size)
            for i, (_, labels) in texts:
                n_labels[i] += int((labels[1:] != NO_LABEL).sum())
            totals["tokens"] += sum(len(text[0]) for i in range(stack.size) if step < rates.n_steps[i]
                                    for text in members[i].steps[step])  # fmt: skip
            totals["loss_tokens"] += int(n_labels.sum())
            losses.append(sum(run_pass(_make_batch(stack, part, n_labels.clamp(min=1), position_ids))
                              for part in _passes(texts, room.most_tokens)))  # fmt: skip
            _step(stack, optimizer, owners, rates, step, members)
            step += 1
            bar.total = max(rates.n_steps)
            bar.update()
            now = time.perf_counter()
            if seconds is not None and step < FIRST_MEASURED and now - begin > seconds:
                rates.shorten(step, members)
            elif step in (1, FIRST_MEASURED) or step % MEASURED_EVERY == 0:
                _note_losses(members, losses, bar, totals["tokens"] / (now - begin))
                now = time.perf_counter()  # all is done by now
                if step == 1:  # which prepares much
                    first_end = now
                    preparing.clear()
                elif seconds is not None:
                    left, per_step = seconds - (now - begin), (now - first_end - sum(preparing)) / (step - 1)
                    rates.shorten(step + max(0, int(left / max(per_step, 1e-9))), members)
    _note_losses(members, losses, bar, 0.0)
    for member, n_steps in zip(members, rates.n_steps, strict=True):
        del member.losses[n_steps:]  # of steps that only others had
    spent = time.perf_counter() - begin
    return totals | {"steps": step, "seconds": spent, "tokens_per_second": totals["tokens"] / spent}


@torch.no_grad()
def _step(stack, optimizer, owners, rates, step, members):  # noqa: PLR0913
    """Take an optimiser step for the members that have one."""
    norms = torch.linalg.vector_norm(stack.gradients, dim=1, keepdim=True)
    stack.gradients.mul_((GRADIENT_NORM / (norms + 1e-6)).clamp(max=1.0))
    for group, owner in zip(optimizer.param_groups, owners, strict=True):
        if step < rates.n_steps[owner]:
            group["lr"] = group["peak"] * rates.shares[owner](step)
        else:
            group["params"][0].grad = None  # this member has had its last step
    for i, member in enumerate(members):
        if step < rates.n_steps[i]:
            member.rates.append(rates.settings.learning_rate * rates.shares[i](step))
    optimizer.step()
    stack.gradients.zero_()


def _note_losses(members, losses, bar, speed):
    """Hand the losses of new steps to the members; refuse one that is no number."""
    done = min(len(member.losses) for member in members)
    if done == len(losses):
        return
    new = torch.stack(losses[done:]).tolist()  # the one place that waits for the device
    for i, row in enumerate(new, done):
        for member, loss in zip(members, row, strict=True):
            if not math.isfinite(loss):
                raise FloatingPointError(f"the training loss is {loss} in step {i + 1}: lower the learning rate "
                                         "(--per-task.learning-rate, --per-task.embedding-learning-rate)")  # fmt: skip
            member.losses.append(loss)
    bar.set_postfix({"loss": f"{np.mean(new[-1]):.4f}", "tokens/s": f"{speed:,.0f}"}, refresh=False)


# ---- memory ----

@dataclass(frozen=True)
class Room:
    """What a device has room for."""

    most_tokens: int  # of a forward pass, unless a single text has more
    free: float  # bytes for adapters and activations
    per_token: float  # bytes of activations that are all kept
    per_member: float  # bytes of an adapter with all that its training needs
    recomputation: Recomputation | None = None  # None: passes of any length keep their activations

    def fits(self, n_members, tokens):
        """Tell whether so many adapters can be trained with passes of so many tokens."""
        tokens, per_token = min(tokens, self.most_tokens), self.per_token
        if self.recomputation is not None and tokens <= SHORT_PASS:
            per_token = self.recomputation.recomputed
        return n_members * self.per_member + tokens * per_token <= self.free

    def recomputation_of(self, n_members):
        """Return the recomputation of a training with so many adapters, None if there is none."""
        left = self.free - n_members * self.per_member
        return self.recomputation and replace(self.recomputation, free=left)


def measure_room(model, member, longest, mixed_precision="auto"):
    """Return the `Room` of a model's device, measured by passes.

    member: whose texts the passes have; longest: tokens of the longest text of all, which has to fit.
    """
    n_weights = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    device = next(model.parameters()).device
    if device.type != "cuda":
        return Room(max(CPU_PASS, longest), math.inf, 0.0, 0.0)
    per_member, dtype = BYTES_OF_WEIGHT * n_weights, autocast_dtype(model, mixed_precision)
    free = functools.partial(_free_memory, per_member)
    found = Recomputation.measured(model, longest, functools.partial(_measure, model, member, device, dtype), free)
    most_tokens = min(FULL_PASS, found.keeps_all())
    room = Room(most_tokens, found.free + per_member, found.kept, per_member)
    if found.layers_for(longest) == 0:
        return replace(room, most_tokens=max(most_tokens, longest))
    short = min(SHORT_PASS, longest, int(max(0.0, found.free) / found.recomputed))
    return replace(room, most_tokens=max(most_tokens, short, 1), recomputation=found)


def _free_memory(per_member):
    """Return the bytes of the current GPU that are free for activations beside one adapter."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0] * USED_MEMORY - per_member


def _measure(model, member, device, dtype):
    """Return the bytes of activations per token of a pass, infinity if there are not enough."""
    texts, stack = [], AdapterStack(model, 1)
    for step in member.steps:
        for text in step:
            if not texts or sum(len(tokens) for _, (tokens, _) in texts) < MEASURED_TOKENS:
                texts.append((0, _padded(text)))
    n_labels, position_ids = torch.ones(1), position_ids_of(model)
    with packed_attention(model), stack.in_place(), _in_training(model):
        for part in (texts[:1], texts):  # with the first kernels are made, and workspaces taken
            batch = _make_batch(stack, part, n_labels, position_ids)
            taken = memory_taken(functools.partial(_compute, stack, dtype, batch))
    return taken / sum(len(tokens) for _, (tokens, _) in texts)


def group_is_full(tokens, more, room):
    """Tell whether a group of tasks cannot take another one.

    A group's steps fill a pass, or memory, or it has `MOST_MEMBERS` tasks; on a CPU, where several tasks gain nothing,
    it has one. tokens: most tokens of a step of each task in the group; more: of the other one; room: `Room`, or None.
    """
    if room is None or room.free == math.inf or len(tokens) >= MOST_MEMBERS:
        return True
    together = sum(tokens) + more
    return together > room.most_tokens or not room.fits(len(tokens) + 1, together)
