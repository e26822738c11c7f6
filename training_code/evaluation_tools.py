"""The steps of an evaluation run: every `run_evaluation_*.py` is its configuration and a list of these calls.

Load tasks and model, train on the demonstration pairs (test-time training, TTT), make views, find and rank candidates,
write the submission, check the written file. Everything finished is kept in the output folder, so a run that was
killed goes on where it was and ends with the same submission:

    finetuned_model/              adapter of all tasks, or finetuned_model/<task>/ for one task at a time
    inference_cache/              results of single searches and scorings
    candidates/<task>.json        ranked candidates of a finished task
    submission.json  record.json  solved_task.png

A result is taken over only if it was made with the same model, data and settings (its *identity*, stored beside it).

Follows "The LLM ARChitect" (2024), sections on test-time training, candidate generation and selection.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

from arc_downloader import download_arc_data
from arc_loader import ArcDataset
from draw_tools import draw_run
from evaluation_results import RankedResults
from inference_tools import ResultCache, inference_run
from model_tools import create_lora, load_model, load_peft_state, model_identity, reset_lora, save_model_and_tokenizer
from run_tools import (PUBLISHED_FORMAT, REPOSITORY, RunRecord, model_location, pick_device, set_aside, shown_path,
                       task_file, write_json)
from training_tools import TrainingSettings, fitting_texts, train_lora

VIEW_OPTIONS = {"tp": "all", "rt": "all", "perm": True, "shfl_ex": True}
VIEW_SEED, TRAINING_DATA_SEED = 10000, 0


@dataclass(frozen=True)
class TTTSettings(TrainingSettings):
    """Test-time training: the settings of the training and how its texts are made from the demonstration pairs."""

    repeats: int = 48  # presentations of every task (with all_symmetries: of every task under each symmetry)
    all_symmetries: bool = False  # each of the 8 symmetries equally often, instead of random ones
    lora_rank: int = 64  # rank of the adapter
    lora_alpha: int = 16  # scale of the adapter (rank-stabilised: alpha / sqrt(rank))


# all tasks at once, as the published run scripts do
JOINT_TRAINING = TTTSettings(batch_size=2, gradient_accumulation=2, warmup_ratio=0.25, mask_first_n_examples=0)
# one task at a time, as the 2025 paper does
PER_TASK_TRAINING = TTTSettings(repeats=8, all_symmetries=True, lora_rank=32, batch_size=1,
                                     gradient_accumulation=1, warmup_ratio=0.5, mask_first_n_examples=1)


@tyro.conf.configure(tyro.conf.SuppressFixed)
@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that decides the result of an evaluation run."""

    script: tyro.conf.Fixed[str]  # name of the run script, without .py
    model: str  # folder of the model (relative: from the repository's root) or its name on the hub
    bits: Literal[4, 16, 32] | None = 4  # precision of the weights: NF4, bf16, fp32; None: 16 on a GPU, 32 on a CPU
    device: Literal["cpu", "cuda"] | None = None  # where to run; None: a GPU if there is one
    limit: int | None = 0  # only the N tasks with the shortest prompts; 0: all; None: 40 on a GPU, 10 on a CPU
    tasks: str = ""  # only these tasks, separated by commas
    challenges: Path | None = None  # tasks in Kaggle's format; None: the ARC-AGI-1 evaluation set
    solutions: Path | None = None  # their solutions; without them nothing is scored (hidden test set)
    output_path: Path | None = None  # where results go; None: output_evaluation_<name of the script>
    seed: int = 0  # added to all published seeds (training data 0, training 42, views 10000); 0: as published
    record: bool = False  # also write the run's record to results/<script>.json
    max_tokens: int | None = None  # longest training text, and longest prompt with its reply; None: the format's limit
    fmt_opts: tyro.conf.Fixed[dict] = field(default_factory=lambda: dict(PUBLISHED_FORMAT))  # prompt format
    ttt: Literal["joint", "per-task", "none"] = "joint"  # train on all tasks at once, on one at a time, or not at all
    joint: TTTSettings = JOINT_TRAINING  # used with --ttt joint
    per_task: TTTSettings = PER_TASK_TRAINING  # used with --ttt per-task
    repeats: int = 2  # times 8 symmetries = number of views that candidates are searched in
    min_prob: float = 0.1  # the search finds all replies that are more probable than this
    scoring_views: Literal["per_candidate", "shared", "search"] = "per_candidate"  # own ones, one set, those searched
    score_rule: str = "mul_all_prob"  # selection rule (a name in selection.py) that decides the two attempts


@dataclass(frozen=True)
class Run:
    """A started run: its configuration, and what follows from it."""

    config: EvaluationConfig
    output: Path
    device: str
    record: RunRecord

    @property
    def training(self):
        """Return the settings of the chosen kind of test-time training; None without training."""
        return {"joint": self.config.joint, "per-task": self.config.per_task, "none": None}[self.config.ttt]

    def fmt_opts(self, tokenizer=None):
        """Return the format options of the run, with the tokenizer's end token if it is given."""
        options = dict(self.config.fmt_opts)
        if tokenizer is not None:
            options["reply_end"] = options["reply_end"].replace("<eos>", tokenizer.eos_token)
        if self.config.max_tokens is not None:
            options["max_tokens"] = self.config.max_tokens
        return options


def start_run(config):
    """Open the output folder and the record of a run."""
    output = Path(config.output_path or REPOSITORY / ("output_" + config.script.removeprefix("run_")))
    output.mkdir(parents=True, exist_ok=True)
    record = RunRecord(config, config.script, output, copy_to_results=config.record)
    return Run(config, output, pick_device(config.device), record)


# ---- tasks and model ----

def load_tasks(run):
    """Load the tasks to solve, with their solutions where there are any.

    Raises ValueError for a task asked for that the file does not have, or solutions given without their tasks.
    """
    config = run.config
    if config.challenges is None:
        if config.solutions is not None:
            raise ValueError("--solutions needs --challenges, the file with the tasks that they belong to")
        folder = REPOSITORY / "input" / "arc-prize-2024"
        download_arc_data(folder)
        challenges, solutions = (folder / f"arc-agi_evaluation_{part}.json" for part in ("challenges", "solutions"))
    else:
        challenges, solutions = config.challenges, config.solutions
    tasks = ArcDataset.load_from_json(str(challenges))
    if solutions is not None:
        tasks = tasks.load_solutions(str(solutions))
    names = _choose_tasks(run, tasks, challenges)
    chosen = only_tasks(tasks, names)
    print(f"{len(names)} of the {len(tasks.challenge)} tasks in {challenges}, with {len(chosen.keys)} test inputs"
          + ("" if solutions is not None else "; no solutions, so nothing will be scored"))
    run.record.save(tasks=names)
    return chosen


def only_tasks(tasks, names):
    """Return the tasks with these names alone."""
    return ArcDataset(challenge={name: tasks.challenge[name] for name in names},
                      solutions={name: tasks.solutions[name] for name in names if name in tasks.solutions},
                      is_fake=tasks.is_fake, is_orig=True)


def _choose_tasks(run, tasks, challenges):
    """Return the names of the tasks asked for, sorted."""
    config = run.config
    names = sorted(tasks.challenge)
    limit = config.limit
    if config.tasks:
        wanted = [ArcDataset.base_key_replace_invalid_chars(name.strip()) for name in config.tasks.split(",")]
        if unknown := sorted(set(wanted) - set(names)):
            raise ValueError(f"--tasks: {', '.join(unknown)} not in {challenges}")
        names = sorted(set(wanted))
    if limit is None:
        on_default_set = not config.tasks and config.challenges is None
        limit = (40 if run.device.startswith("cuda") else 10) if on_default_set else 0
    if not limit:
        return names
    longest = dict.fromkeys(names, 0)
    for key in tasks.keys:
        name = ArcDataset.get_base_key(key)
        if name in longest:
            longest[name] = max(longest[name], tasks.get_length(key, "input", **run.fmt_opts()))
    return sorted(sorted(names, key=lambda name: (longest[name], name))[:limit])


def load_model_and_tokenizer(run):
    """Load the model, in the precision that the configuration or the device asks for."""
    bits = run.config.bits or (16 if run.device.startswith("cuda") else 32)
    location = model_location(run.config.model)
    with run.record.stage("load model"):
        model, tokenizer = load_model(location, bits=bits, device=run.device)
        run.record.save(model={"location": shown_path(location), "bits": bits, "identity": model_identity(model),
                               "parameters": sum(parameter.numel() for parameter in model.parameters())})
    return model, tokenizer


# ---- test-time training ----

def train_on_demonstrations(run, model_tok, tasks):
    """Add an adapter and train it on the demonstration pairs of all tasks, unless an earlier start has done so.

    With `ttt='per-task'` the adapter is added only; `find_candidates` trains it anew for every task.
    Returns the pair (model, tokenizer) to search with.
    """
    model, tokenizer = model_tok
    if run.config.ttt == "none":
        return model_tok
    lora = create_lora(model, r=run.training.lora_rank, alpha=run.training.lora_alpha, seed=_training_seed(run))
    if run.config.ttt == "joint":
        print("\n== test-time training", flush=True)
        _train_or_load(run, (lora, tokenizer), tasks, run.output / "finetuned_model")
    return lora, tokenizer


def _training_seed(run):
    return run.training.seed + run.config.seed


def _train_or_load(run, model_tok, tasks, folder):
    """Load the adapter in `folder` if it is the one that training on these tasks gives; train and save it if not."""
    model, tokenizer = model_tok
    identity_file = folder / "identity.json"
    identity = _training_identity(run, tasks)
    if identity_file.exists():
        saved = json.loads(identity_file.read_text())
        different = [name for name in identity if saved["identity"].get(name) != identity[name]]
        if not different:
            tqdm.write(f"adapter loaded from {folder}")
            load_peft_state(model, folder)
            _note_training(run, saved["stats"])
            return
        tqdm.write(f"the adapter in {folder} is of another run (other {', '.join(different)}): "
                   f"kept as {set_aside(folder)}")
    texts = _training_texts(run, tasks, tokenizer)
    if not texts:
        tqdm.write("no demonstration pair fits: the adapter stays untrained")
        return
    unfinished = folder.with_name(folder.name + ".training")
    settings = replace(run.training, seed=_training_seed(run))
    stats = train_lora(model, tokenizer, texts, run.fmt_opts(tokenizer), settings, unfinished)
    shutil.rmtree(unfinished / "checkpoints", ignore_errors=True)
    save_model_and_tokenizer(unfinished, model, tokenizer)
    write_json(unfinished / identity_file.name, {"identity": identity, "stats": stats}, indent=2)
    unfinished.rename(folder)
    _note_training(run, stats)


def _training_identity(run, tasks):
    """Return all that decides the adapter, to compare with what was saved; None without training."""
    if run.training is None:
        return None
    demonstrations = {name: task["train"] for name, task in tasks.challenge.items()}
    identity = {"model": run.record.values["model"]["identity"], "ttt": run.config.ttt,
                "settings": asdict(run.training), "seed": run.config.seed, "fmt_opts": run.fmt_opts(),
                "tasks": _digest(demonstrations)}
    return json.loads(json.dumps(identity))


def _note_training(run, stats):
    """Add up what training took, also where an earlier start did it."""
    record = run.record.values
    record["seconds"]["test-time training"] = record["seconds"].get("test-time training", 0.0) + stats["seconds"]
    record["tokens"]["training"] = record["tokens"].get("training", 0) + stats["tokens"]
    run.record.save()


def _training_texts(run, tasks, tokenizer):
    """Return the formatted training texts; pairs that do not fit are cut, a task of which none fits is named."""
    fmt_opts, settings, seed = run.fmt_opts(tokenizer), run.training, TRAINING_DATA_SEED + run.config.seed
    pairs = tasks.remove_test_data()
    if settings.all_symmetries:
        views = pairs.augment(tp="all", rt="all", n=settings.repeats, perm=True, shfl_ex=True, seed=seed)
    else:
        views = pairs.repeat(settings.repeats, seed=seed).augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=seed)
    texts, left_out = fitting_texts(views, "text", fmt_opts)
    for name, reason in left_out.items():
        tqdm.write(f"not trained on {name}: {reason}")
    return texts


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=np.ndarray.tolist).encode()).hexdigest()


# ---- search, scoring, selection ----

def make_views(run, tasks):
    """Return the views to search: `repeats` times every symmetry, recoloured and with pairs in random order."""
    return tasks.repeat(run.config.repeats).augment(seed=VIEW_SEED + run.config.seed, **VIEW_OPTIONS)


def find_candidates(run, model_tok, tasks, views):
    """Search candidates in the views, score and rank them; one line per test input under one progress bar.

    Finished tasks are read from `candidates/`. With `ttt='per-task'` the adapter is trained before each task's search.
    Returns {task: [candidates per test input, best first]}; a candidate is a dict with output (H, W), correct,
    scores_inf and scores_aug, as `inference_run` returns it.
    """
    print("\n== find candidates", flush=True)
    for name, reason in _left_out(run, views).items():
        print(f"no view of {name} fits, it is answered with [[0]]: {reason}")
    with RankedResults(run, tasks, views, partial(_identity, run, tasks)) as results:
        open_tasks = [name for name in tasks.challenge if not results.take_over(name)]
        for names in [[name] for name in open_tasks] if run.config.ttt == "per-task" else [open_tasks]:
            if run.config.ttt == "per-task":
                reset_lora(model_tok[0], _training_seed(run))
                _train_or_load(run, model_tok, only_tasks(tasks, names),
                               task_file(run.output / "finetuned_model", names[0]))
            results.start_clock()
            _search(run, model_tok, views.change_keys([key for key in views.keys if views.get_base_key(key) in names]),
                    results.process)
        results.note()
    return results.candidates


def _identity(run, tasks, name):
    """Return all that decides the results of a task, to compare with what was saved."""
    trained_on = only_tasks(tasks, [name]) if run.config.ttt == "per-task" else tasks
    config = run.config
    identity = {
        "model": run.record.values["model"]["identity"], "training": _training_identity(run, trained_on),
        "fmt_opts": run.fmt_opts(), "seed": config.seed, "repeats": config.repeats, "min_prob": config.min_prob,
        "scoring_views": config.scoring_views, "score_rule": config.score_rule,
        "task": _digest([tasks.challenge[name], tasks.solutions.get(name)])}
    return json.loads(json.dumps(identity))


def _left_out(run, views):
    """Return {task: why} for the tasks of which not one view fits the limit with one demonstration pair."""
    fmt_opts = run.fmt_opts()
    room = fmt_opts["max_tokens"] - ArcDataset.max_new_tokens(**fmt_opts)
    return fitting_texts(views, "input", fmt_opts | {"max_tokens": room})[1]


def _search(run, model_tok, views, callback):
    """Run the search and the scoring of the given views, through the cache."""
    try:
        inference_run(dataset=views, fmt_opts=run.fmt_opts(model_tok[1]), model_tok=model_tok,
                      min_prob=run.config.min_prob, aug_score_opts=VIEW_OPTIONS | {"seed": VIEW_SEED + run.config.seed},
                      scoring_views=run.config.scoring_views, callback=callback, print_func=None, progress=False,
                      cache=ResultCache(run.output / "inference_cache"))
    except torch.OutOfMemoryError as error:
        raise RuntimeError("out of memory in the search: lower --max-tokens (long prompts are then cut by whole "
                           "demonstration pairs) or --bits; finished tasks are kept") from error


def finish_run(run):
    """Draw a solved task and say where everything is."""
    picture = draw_run(run.output)
    run.record.save(finished=True)
    print("\n== written")
    print(f"submission {run.output / 'submission.json'}")
    for file in run.record.files:
        print(f"record     {file}")
    print(f"picture    {picture or 'none: no task was solved'}")
