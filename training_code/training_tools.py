"""Train LoRA adapters: the one training loop behind fine-tuning and test-time training.

Owns the settings of a training run (`TrainingSettings`) and `train_lora`, which hands formatted tasks to the Trainer of
`trainers.py`, proves that no token was lost on the way, and writes the loss history and its picture.

Follows "The LLM ARChitect" (2024), section on training. differs: transformers' own Trainer unless the model was loaded
by unsloth, so that it runs without unsloth and on a CPU; a text is never cut here (cutting whole pairs is
`ArcDataset.get_task`).
"""

import contextlib
import functools
import gc
import hashlib
import json
import math
import random
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from accelerate.data_loader import SeedableRandomSampler
from datasets import Dataset
from torch import nn
from tqdm import tqdm
from transformers import PrinterCallback, SchedulerType, TrainingArguments
from transformers.training_args import OptimizerNames

from adapter_tools import autocast_dtype
from arc_loader import ArcDataset, TaskTooLongError
from arc_files import write_json
from cuda_recorder import CudaRecorder
from model_tools import model_identity
from lora_layers import fast_layers, single_adapter
from packing import can_pack, packed_attention, position_ids_of, varlen_possible
from plain_search import is_unsloth_model
from recomputation import Recomputation
from run_tools import memory_advice
from text_tokens import token_ids
from torchrun_tools import from_first, process_group, this_worker
from trainers import Collator, SharedBatches, TwoRates, TwoRateTrainer, batches_of_worker
from training_callbacks import (LOG_EVERY, NothingToTrain, Progress, TimeLimit, Totals, stopped_after_a_step,
                                write_history)
from training_passes import (MEASURED_TOKENS, RECORDED_SHARE, USED_MEMORY, Gradients, RecordedPasses, largest_pack,
                             memory_share, pad_pack)
from unsloth_backend import unsloth_trainer_classes

# optimisers of packages that are not required here, or for other devices, and learning-rate schedules that ask for more
OTHER_PACKAGES = ("galore", "lomo", "adalomo", "grokadamw", "schedule_free", "apollo", "stable_adamw",
                  "adamw_torch_4bit", "adamw_torch_8bit", "adamw_torch_xla", "adamw_torch_npu", "adamw_anyprecision")
WITH_ARGUMENTS = ("reduce_lr_on_plateau", "greedy", "cosine_with_min_lr", "cosine_warmup_with_min_lr",
                  "warmup_stable_decay")
MOST_SEED = 2**31  # of those that a user gives; numpy takes twice as large ones, and offsets are added
SPEED_ALONE = ("cuda_graphs", "gradient_checkpointing")  # settings that change no result, but for rounding


@dataclass(frozen=True)
class TrainingSettings:
    """Everything but data and model that decides the result of a training run."""

    learning_rate: float = 1e-4  # peak rate of the LoRA matrices
    embedding_learning_rate: float = 1e-5  # peak rate of the fully trained embeddings and output layer
    batch_size: int = 4  # texts in one forward pass; packed, as many as take no more tokens than so many of the longest
    gradient_accumulation: int = 2  # forward passes per optimiser step
    epochs: float = 1.0  # passes over the data
    max_steps: int = -1  # stop after this many optimiser steps (-1: no limit)
    warmup_ratio: float = 0.25  # share of all steps with a rising learning rate
    warmup_steps: int = 0  # the same as a number of steps (if above 0, used instead of the share)
    weight_decay: float = 0.0  # AdamW's weight decay
    scheduler: str = "cosine"  # shape of the learning rate after the warm-up
    # a name known to transformers; auto: adamw_torch_fused, but adamw_8bit if its states took over 1/8 of a GPU
    optimizer: str = "auto"
    # recompute activations in the backward pass: less memory, a third more time; None: in as many layers as the memory
    # for a pass demands, in all where it is not measured (on a CPU, in float16, by unsloth, texts that are not packed)
    gradient_checkpointing: bool | None = None
    cuda_graphs: bool = True  # replay packed passes as CUDA graphs on a GPU, where that turns out to be faster
    packing: bool = True  # lay texts end to end, on fast layers; False: pad them, on transformers' and peft's own
    # matrix products in 16 bits: auto: as the base; bf16: on an fp32 base too, if the device has bf16; no: as stored
    mixed_precision: Literal["auto", "bf16", "no"] = "auto"
    mask_first_n_examples: int = 1  # first replies of every text that are not learned
    save_every: int = 0  # steps between checkpoints from which a killed training goes on (0: none)
    seed: int = 42  # start values of the adapter and order of the texts


def setting_problems(settings, prefix="--"):
    """Return what is wrong with the settings of a training, a list of sentences that name the options.

    settings: `TrainingSettings`, which may have a `lora_rank`; prefix: how their options begin.
    """
    rates = ("learning_rate", "embedding_learning_rate", "weight_decay")
    problems = {f"{prefix}{name.replace('_', '-')} {value}: it must be {least} or more": value < least
                for name, least in (("batch_size", 1), ("gradient_accumulation", 1), ("lora_rank", 1), ("repeats", 1),
                                    ("warmup_steps", 0), ("mask_first_n_examples", 0), ("save_every", 0), ("seed", 0),
                                    *((rate, 0) for rate in rates))
                if (value := getattr(settings, name, least)) is not None}  # fmt: skip
    optimizers = ["auto", *(name.value for name in OptimizerNames if not name.value.startswith(OTHER_PACKAGES))]
    schedulers = [name.value for name in SchedulerType if name.value not in WITH_ARGUMENTS]
    problems |= {
        f"{prefix}epochs {settings.epochs}: it must be above 0": settings.max_steps <= 0 and not settings.epochs > 0,
        f"{prefix}seed {settings.seed}: it must be at most {MOST_SEED}": settings.seed > MOST_SEED,
        f"{prefix}warmup-ratio {settings.warmup_ratio}: it must be 0 to 1": not 0 <= settings.warmup_ratio <= 1,
        f"{prefix}optimizer {settings.optimizer}: there are {', '.join(optimizers)}":
            settings.optimizer not in optimizers,
        f"{prefix}scheduler {settings.scheduler}: there are {', '.join(schedulers)}":
            settings.scheduler not in schedulers}
    return [problem for problem, is_there in problems.items() if is_there]


def fitting_texts(views, len_name, fmt_opts):
    """Format views, with as many demonstration pairs as the token limit leaves room for.

    views: `ArcDataset`; len_name: the part of the text that the limit `fmt_opts['max_tokens']` holds for.
    Returns (list of dicts with key and text, of the views that fit with one pair at least; {task: why} for the tasks
    without any).
    """
    texts, left_out, fitting = [], {}, set()
    for key in views.keys:
        task = ArcDataset.get_base_key(key)
        try:
            text = views.get_task(key, len_name=len_name, **fmt_opts)[1]
            texts.append({"key": text["key"], "text": text["text"]})  # its parts would take twice as much memory again
            fitting.add(task)
        except TaskTooLongError as error:
            left_out.setdefault(task, str(error))
    return texts, {task: why for task, why in left_out.items() if task not in fitting}


def tokens_of_texts(tokenizer, texts, max_tokens=None):
    """Return the tokens of formatted tasks, refusing whatever would not be learned whole: a list of int32 arrays (T,).

    texts: list of format dicts with 'key' and 'text', as `ArcDataset.as_list` returns.

    Raises ValueError, naming the text, if it is longer than `max_tokens` (start token not counted, as in
    `ArcDataset.get_task`) or if the tokenizer makes anything but one token of each character; or if there is none.
    """
    if not texts:
        raise ValueError("there is no text to train on")
    rows = token_ids(tokenizer, [text["text"] for text in texts])
    for text, row in zip(texts, rows, strict=True):
        _check_length(tokenizer, text, row, max_tokens)
    return rows


def tokenise_texts(tokenizer, texts, max_tokens=None):
    """Tokenise formatted tasks once, as `tokens_of_texts` does.

    Returns a `datasets.Dataset` with the columns name, input_ids, n_tokens (with the start token), in the order given.
    """
    rows = tokens_of_texts(tokenizer, texts, max_tokens)
    n_tokens = [len(row) for row in rows]
    starts = pa.array(np.cumsum([0, *n_tokens]))
    return Dataset(pa.table({  # made of arrays: `Dataset.from_dict` would look at every token
        "name": [text["key"] for text in texts], "n_tokens": pa.array(n_tokens, pa.int32()),
        "input_ids": pa.LargeListArray.from_arrays(starts, pa.array(np.concatenate(rows)))}))


def _check_length(tokenizer, text, row, max_tokens):
    n_expected = ArcDataset.count_tokens(text["text"])
    if max_tokens is not None and n_expected > max_tokens:
        raise ValueError(f"{text['key']}: a training text of {n_expected} tokens is over the limit of {max_tokens}: "
                         "drop pairs with ArcDataset.get_task, or raise --max-tokens")
    n_tokens = len(row) - (row[0] == tokenizer.bos_token_id)
    if n_tokens != n_expected:
        raise ValueError(f"{text['key']}: the tokenizer makes {n_tokens} tokens of a text of {n_expected}: it must "
                         "have one token per character (model_tools.keep_single_char_tokens)")


def train_lora(model, tokenizer, texts, fmt_opts, settings, output_path, option_prefix="--",  # noqa: PLR0913
               seconds=None):
    """Train the adapter of a model on formatted tasks, in place; under torchrun all workers do it together.

    model: a PeftModel of `model_tools.create_lora`, or of `unsloth_backend.create_unsloth_lora`, which is trained by
    unsloth's trainer; texts: list of format dicts ('key', 'text') of
    `ArcDataset.as_list(**fmt_opts)`; fmt_opts: format options, whose `max_tokens` is the limit of a text;
    option_prefix: how the command line's options for `settings` begin, for messages that name them; seconds: about the
    most that the training may take from now on (None: any number). When the speed is known, the training is shortened
    to the steps that fit, its learning rates included; with 0 or less the adapter stays as it is.
    Writes `training_loss.json` and `training_loss.png` to `output_path`, and checkpoints to `output_path/checkpoints`
    if `settings.save_every` asks for them; a training of the same model that was killed goes on from the last one.
    The same settings and texts give the same adapter, on a GPU apart from rounding; the caller's random state is left
    as it was.

    Under torchrun every worker calls this with the same arguments. They share the texts of every step, so that apart
    from rounding the result is that of a single process, in all of them; the first writes the files.

    Returns a dict: texts, tokens and loss_tokens that went through the models of all workers, steps, last loss,
    seconds; of a training that went on from a checkpoint over all its starts. tokens_per_second is the speed since the
    last start, optimizer the one chosen; if the time shortened the training there is also steps_planned, without it;
    on a GPU also peak_gib, the most memory of this process so far, and prepared_seconds, what measuring and recording
    CUDA graphs took since the last start, and, where memory demanded it, recomputed_above, the tokens of the longest
    pass that kept all activations. Without any step the loss is None.

    Raises ValueError for a text that is too long or not tokenised one to one, or for checkpoints of another training;
    RuntimeError when memory runs out or a text did not reach the model; FloatingPointError when the loss is no number.

    Source: the training part of the published run scripts. differs: with checkpoints, texts packed; loss over replies
    counted per token over all accumulated batches (today's Trainer) instead of per batch.
    """
    limit = TimeLimit(seconds)
    output_path = Path(output_path)
    output_path.mkdir(parents=True, exist_ok=True)
    dataset = tokenise_texts(tokenizer, texts, fmt_opts.get("max_tokens"))
    lengths = list(dataset["n_tokens"])
    longest = max(lengths)
    if is_unsloth_model(model) and longest > model.max_seq_length:
        raise ValueError(f"a training text has {longest} tokens, of which unsloth would keep {model.max_seq_length}, "
                         "as many as the model is made for: lower --max-tokens or use the backend 'transformers'")
    worker = this_worker()
    if worker.first:
        _tell_uneven_shares(settings, worker.count, option_prefix)
    checkpoint, optimizer = from_first("checkpoint to go on from",  # and the optimiser, for workers' GPUs may differ
                                       lambda: _find_checkpoint(output_path, model, settings, texts))
    limit.checkpoint, totals = checkpoint, Totals(checkpoint, limit)
    progress = Progress(option_prefix, totals)
    packs = settings.packing and not is_unsloth_model(model) and can_pack(model, longest)
    gradients = _gradients(model, settings) if packs else None
    with (process_group("cuda" if _on_gpu(model) else "cpu"), _global_random_state_kept(), _model_state_kept(model),
          _packed_passes(model, gradients) if packs else contextlib.nullcontext(), warnings.catch_warnings(),
          stopped_after_a_step(settings) as stop):
        # of peft, about embeddings in the checkpoints, which are trained and belong there
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")
        trainer = _make_trainer(
            model, tokenizer, _training_arguments(model, settings, optimizer, output_path, len(texts)),
            data_collator=Collator(tokenizer, fmt_opts, settings.mask_first_n_examples,
                                    position_ids_of(model) if packs else None),
            train_dataset=dataset.select_columns(["input_ids"]), callbacks=[limit, stop, progress, totals],
            embedding_learning_rate=settings.embedding_learning_rate, seen=totals.seen, losses=progress.losses,
            gradients=gradients, record=gradients and _recording(model, settings, lengths, limit.exclude),
            share_batches=functools.partial(SharedBatches, lengths, settings, worker,
                                            most_tokens=gradients and settings.batch_size * longest))
        trainer.remove_callback(PrinterCallback)
        _decide_recomputation(trainer, model, dataset, lengths, settings)
        try:
            with contextlib.suppress(NothingToTrain), memory_advice(
                    f"training with batch size {settings.batch_size} and texts of up to {longest} tokens",
                    _advice(option_prefix, output_path, settings)):
                trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            progress.close()
            keeps_all = trainer.recomputation and trainer.recomputation.keeps_all(memory_share(trainer.recorded))
            trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_fp32_wrapper=False)  # no autocast afterwards
        stats = totals.values() | {
            "steps": trainer.state.global_step, "loss": progress.history[-1]["loss"] if progress.history else None,
            "tokens_per_second": progress.speed, "optimizer": str(trainer.args.optim.value)}
        del trainer  # and by `gc` what refers to it: the optimiser's states, and DistributedDataParallel's reducer,
        gc.collect()  # whose end can wait for ever where it ends the process group too
    _check_all_seen(stats, lengths, settings, order_known=not is_unsloth_model(model))
    if worker.first:
        tell_shortened(stats)
        write_history(output_path, progress.history)
    stats = from_first("training statistics", lambda: stats)
    if not _on_gpu(model):
        return stats
    on_gpu = {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "prepared_seconds": limit.prepared}
    return stats | on_gpu | ({} if keeps_all is None else {"recomputed_above": keeps_all})


def tell_shortened(stats):
    """Say that a time limit shortened a training, if it did."""
    if "steps_planned" in stats:
        tqdm.write(f"the time limit shortened the training from {stats['steps_planned']} to {stats['steps']} steps")


def _tell_uneven_shares(settings, n_workers, option_prefix):
    """Say that some workers wait for others in every step, where this is so."""
    size = settings.batch_size * settings.gradient_accumulation
    if size % n_workers:
        tqdm.write(f"{option_prefix}batch-size times {option_prefix}gradient-accumulation is {size}: in every "
                   f"step {n_workers - size % n_workers} of {n_workers} workers get one text less and wait for the "
                   "others; the result is the same")


def _gradients(model, settings):
    """Return the `Gradients` to which packed passes add up; None where the Trainer does it: it scales float16's."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    one_kind = len({(parameter.dtype, parameter.device) for parameter in trained}) == 1
    return Gradients(trained) if one_kind and autocast_dtype(model, settings.mixed_precision) != torch.float16 else None


@contextlib.contextmanager
def _packed_passes(model, gradients):
    """Let a model compute packed batches on fast layers in the with-block; gradients: `Gradients` to add up to."""
    lora = functools.partial(single_adapter, sum_of=gradients and gradients.of)
    with (packed_attention(model), fast_layers(model, lora),
          gradients.zeroed_alone(model) if gradients else contextlib.nullcontext()):
        yield


def _recording(model, settings, lengths, prepared):
    """Return the function that makes `RecordedPasses` (see `TwoRates`), None where none can be recorded.

    lengths: of all texts, in tokens. prepared: of `RecordedPasses`.
    """
    device = next(parameter.device for parameter in model.parameters() if parameter.requires_grad)
    possible = varlen_possible(device, autocast_dtype(model, settings.mixed_precision)) and not _has_dropout(model)
    if not possible or not settings.cuda_graphs:
        return None
    n_texts, n_passes = batches_of_worker(settings, this_worker().count)
    most_texts, longest = n_texts * n_passes, max(lengths)
    largest = largest_pack(lengths, most_texts, settings.batch_size * longest)

    def pad(batch, length):
        return pad_pack(batch, most_texts, longest, length)

    return lambda run_pass: RecordedPasses(run_pass, pad, CudaRecorder(device), largest, tqdm.write, prepared)


def _decide_recomputation(trainer, model, dataset, lengths, settings):
    """Let a trainer recompute activations where memory demands it, unless the settings decide.

    dataset: of `tokenise_texts`; lengths: of all its texts. A pass of some texts is measured.
    """
    if settings.gradient_checkpointing is not None or trainer.gradients is None or not _on_gpu(model):
        return  # as its arguments say
    n_texts, n_passes = batches_of_worker(settings, this_worker().count)
    largest = largest_pack(lengths, n_texts * n_passes, settings.batch_size * max(lengths))
    few = np.argsort(lengths)[: max(1, int(np.searchsorted(np.cumsum(np.sort(lengths)), MEASURED_TOKENS)))]
    batches = [trainer.data_collator([dataset[int(i)] for i in part]) for part in (few[:1], few)]  # kernels made first

    def per_token():
        taken = trainer.memory_of_pass(batches, autocast_dtype(model, settings.mixed_precision))
        torch.cuda.empty_cache()
        return taken / sum(lengths[i] for i in few)

    def free():
        states = (2 if "8bit" in trainer.args.optim else 8) * trainer.gradients.flat.numel()  # AdamW's two of a weight
        return torch.cuda.mem_get_info()[0] * USED_MEMORY - states

    share = 1.0 if trainer.recorded is None else RECORDED_SHARE  # of a pass that is recorded
    recomputation = Recomputation.measured(model, largest, per_token, free, _has_dropout(model), share)
    trainer.args.gradient_checkpointing = not recomputation.layers  # of another kind, which cannot be told one by one
    if recomputation.layers_for(largest, share):
        trainer.recomputation = recomputation


def _has_dropout(model):
    """Tell whether a model draws random numbers in training."""
    return any(isinstance(module, nn.Dropout) and module.p for module in model.modules())


def _on_gpu(model):
    """Tell whether a model computes on a GPU; unsloth keeps some frozen weights of such a model in main memory."""
    return any(parameter.device.type == "cuda" for parameter in model.parameters())


def _make_trainer(model, tokenizer, arguments, **options):
    """Make the trainer for a model: unsloth's for a model loaded by unsloth, else that of transformers."""
    if not is_unsloth_model(model):
        return TwoRateTrainer(model=model, args=arguments, **options)
    trained = [(parameter, parameter.data) for parameter in model.parameters() if parameter.requires_grad]
    unsloth_trainer = type("UnslothTwoRateTrainer", (TwoRates, unsloth_trainer_classes()[0]), {})
    trainer = unsloth_trainer(model=model, args=arguments, processing_class=tokenizer, **options)
    for parameter, data in trained:  # trl rounds the adapter of a 4-bit base to bf16
        parameter.data = data
    return trainer


def _advice(option_prefix, output_path, settings):
    """Return what to do about a lack of memory; settings of existing checkpoints cannot be changed."""
    advice = (f"lower {option_prefix}batch-size (and raise {option_prefix}gradient-accumulation by the same factor for "
              "the same result) or --max-tokens")
    if settings.save_every:
        advice += f"; delete {output_path / 'checkpoints'}, if there are any: they go with the old values"
    return advice


def _training_arguments(model, settings, optimizer, output_path, n_texts):
    """Translate the settings; whatever could drop or cut data is off."""
    on_gpu = _on_gpu(model)
    if settings.max_steps > 0:
        n_steps = settings.max_steps
    else:
        n_batches = math.ceil(n_texts / settings.batch_size)
        n_steps = math.ceil(settings.epochs * math.ceil(n_batches / settings.gradient_accumulation))
    warmup_steps = settings.warmup_steps or math.ceil(settings.warmup_ratio * n_steps)
    half = autocast_dtype(model, settings.mixed_precision)
    if n_steps <= warmup_steps:
        tqdm.write(f"all {n_steps} steps of the training belong to its warm-up of {warmup_steps} steps: the learning "
                   f"rate comes to {(n_steps - 1) / warmup_steps:.0%} of its peak")
    batch_size, n_passes = batches_of_worker(settings, this_worker().count)
    options, make, checkpointing = {}, TrainingArguments, settings.gradient_checkpointing is not False
    if is_unsloth_model(model):  # recomputes activations in its own way; here nothing is left that could cut a text
        checkpointing, make = False, unsloth_trainer_classes()[1]
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}, "packing": False, "max_length": None,
                   "loss_type": "nll"}
    arguments = make(
        output_dir=str(output_path / "checkpoints" if settings.save_every else output_path),
        learning_rate=settings.learning_rate, lr_scheduler_type=settings.scheduler, warmup_steps=warmup_steps,
        weight_decay=settings.weight_decay, optim=optimizer,
        per_device_train_batch_size=batch_size, gradient_accumulation_steps=n_passes,
        num_train_epochs=settings.epochs, max_steps=settings.max_steps, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": _has_dropout(model)},
        bf16=half == torch.bfloat16, fp16=half == torch.float16, use_cpu=not on_gpu,
        seed=settings.seed, data_seed=settings.seed,
        save_strategy="steps" if settings.save_every else "no", save_steps=settings.save_every or 500,
        save_total_limit=2, disable_tqdm=True,
        logging_strategy="steps", logging_steps=LOG_EVERY, logging_first_step=True, logging_nan_inf_filter=False,
        ddp_find_unused_parameters=False,  # under torchrun; there are none
        report_to="none", eval_strategy="no", remove_unused_columns=False, dataloader_drop_last=False,
        dataloader_pin_memory=on_gpu, **options)
    arguments._n_gpu = min(arguments.n_gpu, 1)  # one device; several would be a silently larger batch
    if not on_gpu:
        arguments._setup_devices = torch.device("cpu")  # beside other workers it is cpu:0, which torch.load rejects
    return arguments


def _pick_optimizer(model, name):
    """Return the name of the optimiser: for 'auto' the faster one where its states (8 bytes a weight) leave room."""
    if name != "auto":
        return name
    states = 8 * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    small = not _on_gpu(model) or states <= torch.cuda.get_device_properties(0).total_memory / 8
    return "adamw_torch_fused" if small else "adamw_8bit"


def complete_checkpoints(output_path):
    """Return the folders of the complete checkpoints of a training in `output_path`, oldest first."""
    complete = [file.parent for file in (Path(output_path) / "checkpoints").glob(f"checkpoint-*/{Totals.FILE}")]
    return sorted(complete, key=lambda path: int(path.name.split("-")[1]))


def _find_checkpoint(output_path, model, settings, texts):
    """Return the path of the last complete checkpoint of the same training, or None, and its optimiser's name.

    Notes whose checkpoints the folder holds. An optimiser that was picked stays that of a training on another GPU.
    """
    file, checkpoints = output_path / "checkpoints" / "training.json", complete_checkpoints(output_path)
    optimizer = _pick_optimizer(model, settings.optimizer)
    if not settings.save_every and not checkpoints:
        return None, optimizer
    digest = hashlib.sha256()
    for i, text in enumerate(texts):
        digest.update(("\0" * (i > 0) + f"{text['key']}\0{text['text']}").encode())
    identity = {"settings": {entry.name: getattr(settings, entry.name) for entry in fields(TrainingSettings)
                             if entry.name not in (*SPEED_ALONE, "save_every")},
                "texts": digest.hexdigest(), "model or adapter": model_identity(model)}
    if checkpoints:
        saved = json.loads(file.read_text())
        optimizer = saved.pop("picked", optimizer)
        wanted, there = ({**made["settings"], **made} for made in (identity, saved))
        if different := [name for name in wanted if name != "settings" and there.get(name) != wanted[name]]:
            raise ValueError(f"{file.parent} holds checkpoints of a training with other {', '.join(different)}: "
                             "choose another output path or delete the folder")
    if settings.save_every:
        write_json(file, identity | {"picked": optimizer}, indent=2)
    return str(checkpoints[-1]) if checkpoints else None, optimizer


@contextlib.contextmanager
def _global_random_state_kept():
    """Give back the caller's global random states, which the Trainer seeds."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


@contextlib.contextmanager
def _model_state_kept(model):
    """Train the model in the with-block, and leave it ready for inference, as it came: cache on, no recomputation."""
    use_cache, model.config.use_cache = model.config.use_cache, False  # keys and values are not asked for again
    own = dict(vars(model))
    model.train()  # all its parts; a new adapter's model says that it is in training though its base is not
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for name in {"_is_accelerate_prepared", "forward"} - own.keys():  # else the next training had no autocast, and
            vars(model).pop(name, None)  # the model would hold itself in memory
        model.config.use_cache = use_cache
        model.zero_grad(set_to_none=True)
        model.eval()


def _check_all_seen(stats, lengths, settings, order_known=True):
    """Prove that every token of every text of the steps that were done went through the model.

    lengths: of all texts, in tokens. order_known: their order in an epoch follows from the seed; else the tokens of
    a part of an epoch are not known, only how many texts it has.
    """
    step_size = settings.batch_size * settings.gradient_accumulation
    epochs, steps = divmod(stats["steps"], math.ceil(len(lengths) / step_size))
    n_texts, n_tokens = epochs * len(lengths), epochs * sum(lengths)
    if steps:
        sampler = SeedableRandomSampler(lengths, data_seed=settings.seed)
        sampler.set_epoch(epochs)
        order = list(sampler)[: steps * step_size]
        n_texts, n_tokens = n_texts + len(order), n_tokens + sum(lengths[i] for i in order)
    if steps and not order_known:
        n_tokens = stats["tokens"]
    if (stats["texts"], stats["tokens"]) != (n_texts, n_tokens):
        raise RuntimeError(f"{stats['steps']} steps have {n_texts} texts with {n_tokens} tokens, but {stats['texts']} "
                           f"texts with {stats['tokens']} tokens reached the model")
