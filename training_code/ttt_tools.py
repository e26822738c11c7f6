"""Test-time training (TTT): the adapter that an evaluation trains on the demonstration pairs of its tasks.

Owns its settings (`TTTSettings`), its texts, and the adapters' folders:

    finetuned_model/                    adapter of all tasks (--ttt joint)
    finetuned_model_per_task/<task>/    adapter of one task (--ttt per-task), until its candidates are there

An adapter is taken over only if it was trained on the same model, data and settings (its *identity*, stored beside it).

Follows "The LLM ARChitect" (2024) and arXiv 2505.07859, sections on test-time training.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import shutil
from dataclasses import asdict, dataclass, replace

import numpy as np
from tqdm import tqdm

from arc_files import write_json
from arc_loader import ArcDataset
from evaluation_results import as_made, note_training, serves
from model_tools import create_lora, load_peft_state, merge_peft_into_base, save_model_and_tokenizer
from run_tools import set_aside, task_file
from training_callbacks import HISTORY_FILES, Totals, write_history
from training_tools import SPEED_ALONE, TrainingSettings, complete_checkpoints, fitting_texts
from torchrun_tools import alone, this_worker, wait_for_all
from unsloth_training import TRAINERS

TRAINING_DATA_SEED = 0
TRAINING_PART = 0.5  # of the time that is left, where there is a time limit; the rest is for search and scoring
IDENTITY_FILE = "identity.json"  # beside an adapter: what it was made of, and what its training took


@dataclass(frozen=True)
class TTTSettings(TrainingSettings):
    """Test-time training: the settings of the training and how its texts are made from the demonstration pairs."""

    repeats: int = 48  # presentations of every task (with all_symmetries: of every task under each symmetry)
    all_symmetries: bool = False  # each of the 8 symmetries equally often, instead of random ones
    lora_rank: int = 64  # rank of the adapter
    lora_alpha: int = 16  # scale of the adapter (rank-stabilised: alpha / sqrt(rank))
    max_tokens: int | None = None  # longest training text, where that is less than the limit of the search


# all tasks at once, as the published run scripts do
JOINT_TRAINING = TTTSettings(batch_size=2, gradient_accumulation=2, warmup_ratio=0.25, mask_first_n_examples=0)
# an adapter for each task, as the 2025 paper does; where several are trained at once (task_adapters.py), activations
# are recomputed only if memory demands it
PER_TASK_TRAINING = TTTSettings(repeats=8, all_symmetries=True, lora_rank=32, batch_size=1, gradient_accumulation=1,
                                warmup_ratio=0.5, mask_first_n_examples=1)
# the same two for Mini: a small model learns at higher rates, and needs no memory saved
MINI_JOINT_TRAINING = replace(JOINT_TRAINING, repeats=32, gradient_accumulation=1, learning_rate=5e-4,
                              embedding_learning_rate=5e-5, gradient_checkpointing=False, mixed_precision="bf16",
                              save_every=1000)
MINI_PER_TASK_TRAINING = replace(PER_TASK_TRAINING, learning_rate=5e-4, embedding_learning_rate=5e-5,
                                 gradient_checkpointing=False, mixed_precision="bf16")


def only_tasks(tasks, names):
    """Return the tasks with these names alone."""
    return ArcDataset(challenge={name: tasks.challenge[name] for name in names},
                      solutions={name: tasks.solutions[name] for name in names if name in tasks.solutions},
                      is_fake=tasks.is_fake, is_orig=True)


def train_on_demonstrations(run, model_tok, tasks):
    """Add an adapter and train it on the demonstration pairs of all tasks, unless an earlier start has done so.

    With `ttt='per-task'` the adapter is added only; `find_candidates` trains it anew for every task. An adapter for all
    tasks is merged into an fp32 base, which changes nothing but rounding and makes the search a quarter faster.
    Returns the pair (model, tokenizer) to search with.
    """
    model, tokenizer = model_tok
    if run.config.ttt == "none":
        return model_tok
    lora = create_lora(model, r=run.training.lora_rank, alpha=run.training.lora_alpha, seed=training_seed(run))
    if run.config.ttt == "joint":
        print("\n== test-time training", flush=True)
        stats = train_or_load(run, (lora, tokenizer), tasks, adapter_folder(run), together=True,
                              seconds=training_seconds(run))
        note_training(run.record, stats)
        run.record.save()
        if run.config.bits == 32:
            return merge_peft_into_base(lora), tokenizer
    return lora, tokenizer


def training_seconds(run, share=1.0):
    """Return the most seconds that a training may take: its part of a share of the time left; None without a limit."""
    left = run.clock.left()
    return None if left is None else TRAINING_PART * share * left


def training_seed(run):
    """Return the seed of the training."""
    return run.training.seed + run.config.seed


def adapter_folder(run, task=None):
    """Return the folder of the adapter of all tasks, or of one."""
    return run.output / "finetuned_model" if task is None else task_file(run.output / "finetuned_model_per_task", task)


def train_or_load(run, model_tok, tasks, folder, together=False, seconds=None):  # noqa: PLR0913
    """Load the adapter in `folder` if it is the one that training on these tasks gives; train and save it if not.

    together: whether all workers of torchrun train this one adapter; else it is this worker's own. seconds: most
    seconds of training. Returns what the training returns, None if the adapter stays untrained: not one demonstration
    pair fits, or no second is left.
    """
    model, tokenizer = model_tok
    texts, identity = prepare_training(run, tasks, tokenizer)
    unfinished = folder.with_name(folder.name + ".training")
    with contextlib.nullcontext() if together else alone():
        if this_worker().first:
            set_others_aside((folder, unfinished), identity)
        wait_for_all("adapters of other runs are set aside")
        saved = saved_notes(folder)
        if saved is not None:
            tqdm.write(f"adapter loaded from {folder}")
            run.adapter["identity"] = saved["identity"]
            load_peft_state(model, folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return saved["stats"]
        if not texts:
            tqdm.write("no demonstration pair fits: the adapter stays untrained")
            return None
        if this_worker().first:
            write_json(unfinished / IDENTITY_FILE, {"identity": identity}, indent=2)
        stats = TRAINERS[run.config.backend](
            model, tokenizer, texts, run.fmt_opts(tokenizer, training=True),
            replace(run.training, seed=training_seed(run)), unfinished, option_prefix=f"--{run.config.ttt}.",
            seconds=seconds)
        if not stats["steps"]:
            return None
        run.adapter["identity"] = identity = as_made(identity, stats)
        if not together:
            history = json.loads((unfinished / "training_loss.json").read_text())
            stats["losses"] = [entry["loss"] for entry in history]
        if this_worker().first:
            save_model_and_tokenizer(unfinished, model, tokenizer)
            write_json(unfinished / IDENTITY_FILE, {"identity": identity, "stats": stats}, indent=2)
            unfinished.rename(folder)
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)  # only now: until here they can be gone on from
        wait_for_all("the adapter is saved")
        return stats


def saved_notes(folder):
    """Return what is stored beside the adapter in a folder, None without a folder.

    To an unfinished training its time limit belongs only if it has shortened the training before the last checkpoint.
    """
    file = folder / IDENTITY_FILE
    if not folder.exists():
        return None
    notes = json.loads(file.read_text()) if file.exists() else {"identity": {}}
    if notes["identity"] and "stats" not in notes:
        checkpoints = complete_checkpoints(folder)
        totals = json.loads((checkpoints[-1] / Totals.FILE).read_text()) if checkpoints else {}
        notes["identity"] = as_made(notes["identity"], totals)
    return notes


def set_others_aside(folders, identity):
    """Set the folders aside whose adapter is not the one asked for; one that is comes back in its place."""
    for folder in folders:
        saved = saved_notes(folder)
        if saved is not None and not serves(saved["identity"], identity):
            different = [name for name in identity if saved["identity"].get(name) != identity[name]]
            why = f"of another run (other {', '.join(different)})" if saved["identity"] else f"without {IDENTITY_FILE}"
            tqdm.write(f"the adapter in {folder} is {why}: kept as {set_aside(folder)}")
        for other in sorted(folder.parent.glob(f"{glob.escape(folder.name)}_[0-9]*")):
            if not folder.exists() and serves(saved_notes(other)["identity"], identity):
                tqdm.write(f"the adapter in {other} is the one asked for: back as {other.rename(folder)}")


def training_identity(run, tasks, max_tokens):
    """Return all that decides the adapter, to compare with what was saved; None without training.

    max_tokens: the token limit of the training, None where it cuts no text.
    """
    if run.training is None:
        return None
    demonstrations = {name: task["train"] for name, task in tasks.challenge.items()}
    settings = {name: value for name, value in asdict(run.training).items()
                if name not in ("max_tokens", "save_every", *SPEED_ALONE)}  # fmt: skip
    identity = {"model": run.record.values["model"]["identity"], "ttt": run.config.ttt, "backend": run.config.backend,
                "settings": settings, "seed": run.config.seed, "time_limit": run.config.time_limit,
                "fmt_opts": run.fmt_opts() | {"max_tokens": max_tokens}, "tasks": digest(demonstrations)}
    return json.loads(json.dumps(identity))


def prepare_training(run, tasks, tokenizer):
    """Return (formatted training texts, identity of the adapter trained on them); what does not fit is named."""
    fmt_opts, settings = run.fmt_opts(tokenizer, training=True), run.training
    seed = TRAINING_DATA_SEED + run.config.seed
    pairs = tasks.remove_test_data()
    if settings.all_symmetries:
        views = pairs.augment(tp="all", rt="all", n=settings.repeats, perm=True, shfl_ex=True, seed=seed)
    else:
        views = pairs.repeat(settings.repeats, seed=seed).augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=seed)
    texts, left_out = fitting_texts(views, "text", fmt_opts)
    for name, reason in left_out.items():
        tqdm.write(f"not trained on {name}: {reason}")
    whole = {text["key"] for text in texts}.issuperset(views.keys)  # a text that was cut has another key
    return texts, training_identity(run, tasks, None if whole else fmt_opts["max_tokens"])


def write_mean_loss(output, trainings):
    """Write the loss of every step, as the mean over tasks of trainings of their own, as `write_history` does.

    output: folder, from which those of an earlier run are removed. trainings: what each took, None for none.
    """
    losses = [training["losses"] for training in trainings if training and "losses" in training]
    steps = itertools.zip_longest(*losses)  # a training may have fewer
    means = [np.mean([loss for loss in step if loss is not None]) for step in steps]
    for name in HISTORY_FILES:
        (output / name).unlink(missing_ok=True)
    write_history(output, [{"step": i, "loss": float(loss)} for i, loss in enumerate(means, 1)],
                  f"Training loss, mean of {len(losses)} tasks")


def digest(value):
    """Return a hash of a value, arrays in it as lists."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=np.ndarray.tolist).encode()).hexdigest()
