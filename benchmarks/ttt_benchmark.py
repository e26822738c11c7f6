"""Measure test-time training of one adapter per task: many tasks at once against the Trainer, one task after the other.

    python benchmarks/ttt_benchmark.py --model pretrained_models/Mini --bits 32 --tasks 0 --output results/NAME.json
    python benchmarks/ttt_benchmark.py --shape llama-3b --bits 16 --tasks 32 --steps 8 --output results/NAME.json

Tasks are drawn at random from the ARC-AGI-1 evaluation set (0: all); their texts are those of `--ttt per-task` in
Mini's format, for the published shapes too, whose weights are random. A row says tokens per second, seconds per task of
64 steps, peak memory, and the multiple of the arithmetic floor: 4 FLOP per weight of the base and token, 6 per weight
of an adapter and token, and attention, at the rate of a large bf16 matrix product measured in the run.
"""

import gc
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from adapter_stack import AdapterStack  # noqa: E402
from arc_files import write_json  # noqa: E402
from hardware_floor import count_weights, measure_rates  # noqa: E402
from mini_model import MINI_FORMAT, make_tokenizer  # noqa: E402
from model_tools import create_lora, load_model, reset_lora  # noqa: E402
from random_models import Shape, random_model  # noqa: E402
from run_tools import current_commit, format_options, hardware, load_evaluation_set, pick_device  # noqa: E402
from smaller_gpu import free_gib  # noqa: E402
from stack_training import group_is_full, make_member, measure_room, train_stack  # noqa: E402
from trainers import Collator  # noqa: E402
from training_tools import fitting_texts, tokens_of_texts, train_lora  # noqa: E402
from ttt_tools import PER_TASK_TRAINING, only_tasks  # noqa: E402

STEPS = 64  # of a task: 8 repeats of 8 symmetries, batch 1


@dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = ""  # folder
    shape: Shape | None = None  # random weights instead
    bits: int = 16
    tasks: int = 32  # 0: all
    steps: int = STEPS  # measured
    cuda_graphs: bool = True  # replay passes as CUDA graphs where that is faster
    trainer_tasks: int = 3  # one task at a time; 0: not measured
    trainer_steps: int = 12
    members: tuple[int, ...] = ()  # most tasks at once, one row each; (): as many as fill a pass
    optimizers: tuple[str, ...] = ("auto",)  # of many at once, one row each
    gradient_checkpointing: bool = False  # recompute activations of many at once, though memory does not demand it
    lora_rank: int = 32
    lora_alpha: int = 16
    max_tokens: int = 8192
    device: str | None = None
    seed: int = 0
    output: Path | None = None


def load(config, device):
    """Return (model with an adapter, tokenizer)."""
    if config.shape is None:
        model, tokenizer = load_model(config.model, bits=config.bits, device=device)
    else:
        model, tokenizer = random_model(config.shape, config.bits, device), make_tokenizer()
    return model, tokenizer


def make_texts(config, fmt_opts):
    """Return {task: its training texts} of tasks drawn at random, the shortest first."""
    tasks = load_evaluation_set()
    names = sorted(tasks.challenge)
    chosen = np.random.default_rng(config.seed).permutation(len(names))[: config.tasks or len(names)]
    texts = {}
    for i in chosen:
        pairs = only_tasks(tasks, [names[i]]).remove_test_data()
        views = pairs.augment(tp="all", rt="all", n=8, perm=True, shfl_ex=True, seed=config.seed)
        texts[names[i]] = fitting_texts(views, "text", fmt_opts)[0]
    return dict(sorted(texts.items(), key=lambda item: max(len(text["text"]) for text in item[1])))


def floor_seconds(model, members, flops):
    """Return the arithmetic floor of the steps that members have had."""
    config = model.config.get_text_config()
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    base = count_weights(model.get_base_model())[0] - trained
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    work = 0
    for member in members:
        lengths = [len(tokens) for step in member.steps[: len(member.losses)] for tokens, _ in step]
        # attention: 2 products forward, 5 backward, over half of the pairs of tokens
        work += sum((4 * base + 6 * trained) * n + 7 * config.num_hidden_layers * width * n * n for n in lengths)
    return work / flops


def measure_stack(config, model, members, settings, most_members, flops):  # noqa: PLR0913
    """Train all members in groups of at most so many; return the row."""
    on_gpu = next(model.parameters()).device.type == "cuda"
    longest = max(len(tokens) for member in members for step in member.steps for tokens, _ in step)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    room = measure_room(model, members[0], longest, settings.mixed_precision)
    groups, sizes = [], []
    for member in members:
        tokens = max(len(tokens) for step in member.steps for tokens, _ in step)
        if not groups or len(groups[-1]) == most_members or group_is_full(sizes, tokens, room):
            groups.append([])
            sizes = []
        groups[-1].append(replace(member, steps=member.steps[: config.steps], losses=[], rates=[]))
        sizes.append(tokens)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    warm = [replace(member, steps=member.steps[:2], losses=[], rates=[]) for member in groups[0]]
    train_stack(AdapterStack(model, len(warm)), warm, settings, room, show=False)
    begin, n_tokens, rows = time.perf_counter(), 0, []
    for group in groups:
        stack = AdapterStack(model, len(group))
        stats = train_stack(stack, group, settings, room, show=False)
        rows.append({"tasks": len(group), "tokens": stats["tokens"], "seconds": stats["seconds"]})
        n_tokens += stats["tokens"]
        print(json.dumps(rows[-1]), flush=True)
        del stack
    seconds = time.perf_counter() - begin
    needed = None if room.recomputation is None else room.recomputation.keeps_all()  # beside a single adapter
    model.gradient_checkpointing_disable()
    done = [member for group in groups for member in group]
    return {"way": "many at once", "tasks": len(members), "most_at_once": max(map(len, groups)), "steps": config.steps,
            "optimizer": settings.optimizer,
            "tokens": n_tokens, "seconds": seconds, "tokens_per_second": n_tokens / seconds,
            "seconds_per_task": seconds / len(members) * STEPS / config.steps,
            "times_floor": seconds / floor_seconds(model, done, flops), "checkpointing": config.gradient_checkpointing,
            "recomputed_above": needed,
            "bytes_per_token": room.per_token, "bytes_per_member": room.per_member, "groups": rows,
            "loss": float(np.mean([member.losses[-1] for member in done])),
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None}  # fmt: skip


def measure_trainer(config, model_tok, texts, fmt_opts, settings, flops):  # noqa: PLR0913
    """Train some tasks one after the other by transformers' Trainer, padded, on peft's own layers; return the row."""
    model, tokenizer = model_tok
    on_gpu = next(model.parameters()).device.type == "cuda"
    names = list(texts)
    names = [names[i] for i in np.linspace(0, len(names) - 1, config.trainer_tasks + 2).astype(int)[1:-1]]
    settings = replace(settings, packing=False, mixed_precision="auto", max_steps=config.trainer_steps)
    collate = Collator(tokenizer, fmt_opts, settings.mask_first_n_examples, None)
    seconds, tokens, members = 0.0, 0, []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for i, name in enumerate([names[0], *names]):
        reset_lora(model, config.seed)
        with tempfile.TemporaryDirectory() as folder:
            stats = train_lora(model, tokenizer, texts[name], fmt_opts, settings, folder)
        if i == 0:  # to warm up
            continue
        member = make_member(tokens_of_texts(tokenizer, texts[name]), collate, settings)
        member.losses = [0.0] * config.trainer_steps
        members.append(member)
        seconds, tokens = seconds + stats["seconds"], tokens + stats["tokens"]
    return {"way": "Trainer, one after the other", "tasks": len(names), "most_at_once": 1, "tokens": tokens,
            "steps": config.trainer_steps, "seconds": seconds, "tokens_per_second": tokens / seconds,
            "seconds_per_task": seconds / len(names) * STEPS / config.trainer_steps,
            "times_floor": seconds / floor_seconds(model, members, flops), "checkpointing": False,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None}  # fmt: skip


def main(config):
    """Measure all rows; every row is printed and written when it is there."""
    device = torch.device(pick_device(config.device))
    free = free_gib(device.type)
    model, tokenizer = load(config, device)
    rates = measure_rates(type("Rates", (), {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else
                                             torch.float32}))  # fmt: skip
    fmt_opts = format_options(MINI_FORMAT, tokenizer, config.max_tokens)
    texts = make_texts(config, fmt_opts)
    model = create_lora(model, r=config.lora_rank, alpha=config.lora_alpha)
    settings = replace(PER_TASK_TRAINING, gradient_checkpointing=False, mixed_precision="bf16", seed=config.seed,
                       cuda_graphs=config.cuda_graphs)  # fmt: skip
    collate = Collator(tokenizer, fmt_opts, settings.mask_first_n_examples, None)
    members = [make_member(tokens_of_texts(tokenizer, own), collate, settings) for own in texts.values()]
    rows = []

    def note(row):
        rows.append(row)
        print(json.dumps({name: value for name, value in row.items() if name != "groups"}), flush=True)
        if config.output:
            options = json.loads(json.dumps({**asdict(config), "output": None}, default=str))
            figures = {"config": options, "commit": current_commit(), "hardware": hardware(), "free_gib": free,
                       "rates": rates, "rows": rows,
                       "parameters": count_weights(model.get_base_model())[0]}  # fmt: skip
            write_json(config.output, figures, indent=1)
        gc.collect()

    if config.trainer_tasks:
        note(measure_trainer(config, (model, tokenizer), texts, fmt_opts, settings, rates["flops"]))
    for most_members, optimizer in itertools.product(config.members or (len(members),), config.optimizers):
        own = replace(settings, optimizer=optimizer)
        note(measure_stack(config, model, members, own, most_members, rates["flops"]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
