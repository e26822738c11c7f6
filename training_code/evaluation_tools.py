"""The steps of an evaluation run: every `run_evaluation_*.py` is its configuration and a list of these calls.

Load tasks and model, train on the demonstration pairs (test-time training, TTT), make views, find and rank candidates,
write the submission, check the written file. Everything finished is kept in the output folder, so a run that was
killed goes on where it was and ends with the same submission:

    finetuned_model/                    adapter of all tasks (--ttt joint)
    finetuned_model_per_task/<task>/    adapter of one task (--ttt per-task), until its candidates are there
    finetuned_model_per_task/kept       empty: a start was told to keep these adapters
    inference_cache/                    results of searches and scorings, per test input
    candidates/<task>.json              ranked candidates of a finished task
    tries/                              tasks that workers of torchrun have begun, see task_queue.py
    training_loss.png                   of --ttt per-task: the mean over all tasks
    submission.json  record.json  solved_task.png  score_curve.png  report.html
    lock                                held by the run that writes here

Under torchrun every worker runs the same script: all train the adapter of all tasks together, then each takes one task
after the other; the first one writes what there is once.

A result is taken over only if it was made with the same model, data and settings (its *identity*, stored beside it).
The token limit is part of it only where it cut something, so a lower one keeps whatever fits anyway.

Follows "The LLM ARChitect" (2024), sections on test-time training, candidate generation and selection.
"""

import contextlib
import functools
import itertools
import json
import math
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

from arc_loader import ArcDataset
from draw_tools import draw_run
from evaluation_results import RankedResults, keep_submission
from inference_tools import ResultCache, inference_run
from model_tools import load_model, model_identity, reset_lora
from report import write_report
from run_tools import (PUBLISHED_FORMAT, REPOSITORY, RunRecord, format_options, full_bits, load_evaluation_set,
                       lock_folder, make_folder, memory_advice, model_location, pick_device, shown_path)
from score_curve import draw_score_curve
from search import EngineSettings
from searched_views import VIEW_OPTIONS, VIEW_SEED, fit_views, make_views, report_fits  # noqa: F401
from selection import all_score_algos, more_score_algos
from stack_training import OPTIMIZERS
from task_adapters import TaskAdapters, can_train_together
from task_queue import RunClock, TaskQueue, TimeIsUp, task_order, tasks_at_once
from torchrun_tools import Worker, quiet_unless_first, this_worker, wait_for_all
from training_tools import MOST_SEED, setting_problems, tokens_of_texts
from ttt_tools import (IDENTITY_FILE, JOINT_TRAINING, MINI_JOINT_TRAINING, MINI_PER_TASK_TRAINING,  # noqa: F401
                       PER_TASK_TRAINING, TTTSettings, adapter_folder, digest, only_tasks, train_on_demonstrations,
                       train_or_load, training_identity, training_seconds, training_seed, write_mean_loss)
from unsloth_backend import check_unsloth

PLACEHOLDER_TASKS = 3  # solved of Kaggle's public test set, which the hidden one takes the place of


@tyro.conf.configure(tyro.conf.SuppressFixed)
@dataclass(frozen=True)
class EvaluationConfig:
    """Everything that decides the result of an evaluation run."""

    script: tyro.conf.Fixed[str]  # name of the run script, without .py
    model: str  # folder of the model (relative: from the repository's root) or its name on the hub
    bits: Literal[4, 16, 32] | None = 4  # precision of the weights: NF4, bf16, fp32; None: bf16 on a GPU, else fp32
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
    # one adapter for all tasks, one for each, or none; None: per-task on a GPU with the default backend, else joint
    ttt: Literal["joint", "per-task", "none"] | None = "joint"
    backend: Literal["transformers", "unsloth"] = "transformers"  # what trains; unsloth: see requirements-unsloth.txt
    joint: TTTSettings = JOINT_TRAINING  # used with --ttt joint
    per_task: TTTSettings = PER_TASK_TRAINING  # used with --ttt per-task
    keep_adapters: bool = False  # with --ttt per-task: keep every task's adapter after its search
    time_limit: float | None = None  # hours for the whole run: training and search are cut to it; None: no limit
    # under way in each worker; None: all in one without a time limit, else 1 on CPUs, 1/8 of a worker's share on GPUs
    tasks_at_once: int | None = None
    repeats: int = 2  # times 8 symmetries = number of views that candidates are searched in
    min_prob: float | None = 0.1  # all replies more probable than this are found; None: the greedy one of each view
    scoring_views: Literal["per_candidate", "shared", "search"] = "search"  # own ones, one set, those searched
    search: Literal["tree", "plain"] = "tree"  # all views of many tasks at once, or one view after the other
    engine: EngineSettings = EngineSettings()  # used with --search tree: memory, drafts; changes the speed only
    score_rule: str | None = None  # see selection.py; None: mul_all_prob, or product_of_experts with views "search"


@dataclass(frozen=True)
class Run:
    """A started run: its configuration, and what follows from it."""

    config: EvaluationConfig
    output: Path
    device: str
    record: RunRecord
    clock: RunClock
    worker: Worker  # this process among those of torchrun
    lock: object = None  # open as long as no other run may write to the output folder
    engine_stats: dict = field(default_factory=dict)  # counters of the engine, filled in by the search
    adapter: dict = field(default_factory=dict)  # identity of the trained adapter of all tasks, once there is one
    to_submit: list = field(default_factory=list)  # the tasks that the submission is for, one `ArcDataset`

    @property
    def training(self):
        """Return the settings of the chosen kind of test-time training; None without training."""
        return {"joint": self.config.joint, "per-task": self.config.per_task, "none": None}[self.config.ttt]

    @property
    def score_rule(self):
        """Return the name of the selection rule that decides the attempts."""
        by_views = "product_of_experts" if self.config.scoring_views == "search" else "mul_all_prob"
        return self.config.score_rule or by_views

    def fmt_opts(self, tokenizer=None, training=False):
        """Return the format options of the run, with the tokenizer's end token if it is given.

        training: with the token limit of the test-time training, which may be lower.
        """
        options = format_options(self.config.fmt_opts, tokenizer, self.config.max_tokens)
        lower = self.training.max_tokens if training and self.training else None
        return options if lower is None else options | {"max_tokens": min(lower, options["max_tokens"])}


def start_run(config):
    """Check the options; open the output folder and the record of a run."""
    quiet_unless_first()
    _check_options(config)
    clock, device = RunClock(config.time_limit), pick_device(config.device)
    together = device == "cpu" or config.backend == "unsloth"
    config = replace(config, bits=config.bits or full_bits(device),
                     ttt=config.ttt or ("joint" if together else "per-task"))
    if config.backend == "unsloth" and config.ttt != "none":
        check_unsloth(device, config.bits)
    output = Path(config.output_path or REPOSITORY / ("output_" + config.script.removeprefix("run_")))
    model_location(config.model)  # raises before anything is written
    make_folder(output)
    worker = this_worker()
    lock = lock_folder(output) if worker.first else None
    record = RunRecord(config, config.script, output, copy_to_results=config.record)
    return Run(config, output, device, record, clock, worker, lock)


def _check_options(config):
    """Raise ValueError for a value that no step could work with."""
    rules = [rule.__name__ for rule in [*all_score_algos, *more_score_algos]]
    fmt_opts = format_options(config.fmt_opts, max_tokens=config.max_tokens)
    room = ArcDataset.max_new_tokens(**fmt_opts)
    problems = {
        f"--score-rule {config.score_rule}: there are {', '.join(rules)}": config.score_rule not in (None, *rules),
        f"--min-prob {config.min_prob}: it must be above 0 and at most 1, or None":
            config.min_prob is not None and not 0 < config.min_prob <= 1,
        f"--limit {config.limit}: it must be 0 (all tasks) or more": (config.limit or 0) < 0,
        f"--repeats {config.repeats}: it must be 1 or more": config.repeats < 1,
        f"--max-tokens {config.max_tokens}: the largest reply alone has {room} tokens": fmt_opts["max_tokens"] <= room,
        f"--challenges {config.challenges}: there is no such file": not Path(config.challenges or __file__).is_file(),
        f"--solutions {config.solutions}: there is no such file": not Path(config.solutions or __file__).is_file(),
        "--joint.max-tokens and --per-task.max-tokens must be 1 or more":
            any(kind.max_tokens is not None and kind.max_tokens < 1 for kind in (config.joint, config.per_task)),
        f"--seed {config.seed}: it must be 0 to {MOST_SEED}": not 0 <= config.seed <= MOST_SEED,
        f"--time-limit {config.time_limit}: it must be more than 0 hours":
            config.time_limit is not None and not 0 < config.time_limit < math.inf,
        f"--tasks-at-once {config.tasks_at_once}: it must be 1 or more":
            config.tasks_at_once is not None and config.tasks_at_once < 1,
        "--backend unsloth trains one adapter for all tasks, in a process of its own: use it with --ttt joint":
            config.backend == "unsloth" and config.ttt == "per-task",
    }
    found = [problem for problem, is_there in problems.items() if is_there]
    found += setting_problems(config.joint, "--joint.") + setting_problems(config.per_task, "--per-task.")
    if config.per_task.packing and config.per_task.optimizer not in OPTIMIZERS:
        found.append(f"--per-task.optimizer {config.per_task.optimizer}: packed it is one of {', '.join(OPTIMIZERS)}")
    if found:
        raise ValueError("; ".join(found))


# ---- tasks and model ----

def load_tasks(run):
    """Load the tasks to solve, with their solutions where there are any.

    Raises ValueError for a task asked for that the file does not have, a task without any test input, or solutions
    given without their tasks.
    """
    config = run.config
    if config.challenges is None:
        if config.solutions is not None:
            raise ValueError("--solutions needs --challenges, the file with the tasks that they belong to")
        tasks, source = load_evaluation_set(), "the ARC-AGI-1 evaluation set"
    else:
        tasks, source = ArcDataset.load_from_json(str(config.challenges)), config.challenges
        if config.solutions is not None:
            tasks = tasks.load_solutions(str(config.solutions))
    names = _choose_tasks(run, tasks, source)
    chosen = only_tasks(tasks, names)
    print(f"{len(names)} of the {len(tasks.challenge)} tasks in {source}, with {len(chosen.keys)} test inputs"
          + ("" if tasks.solutions else "; no solutions, so nothing will be scored"))
    run.record.save(tasks=names)
    unasked = [] if config.tasks else _not_asked(tasks, tasks.challenge)
    run.to_submit.append(tasks if tasks.is_fake else only_tasks(tasks, names + unasked))
    keep_submission(run, {})  # from now on there is one
    return chosen


def _choose_tasks(run, tasks, source):
    """Return the names of the tasks asked for, sorted."""
    config = run.config
    names = sorted(tasks.challenge)
    limit = config.limit
    if config.tasks:
        wanted = [ArcDataset.base_key_replace_invalid_chars(name.strip())
                  for name in config.tasks.split(",") if name.strip()]
        if unknown := sorted(set(wanted) - set(names)):
            raise ValueError(f"--tasks: {', '.join(unknown)} not in {source}")
        names = sorted(set(wanted))
    if nothing_asked := _not_asked(tasks, names):
        if config.tasks or len(nothing_asked) == len(names):
            raise ValueError(f"{source}: no test input in {', '.join(nothing_asked)}: name tasks to solve with --tasks")
        print(f"{source}: no test input in {', '.join(nothing_asked)}: these tasks are submitted without answers")
        names = [name for name in names if name not in nothing_asked]
    if limit is None:
        on_default_set = not config.tasks and config.challenges is None
        limit = (40 if run.device.startswith("cuda") else 10) if on_default_set else 0
    if tasks.is_fake and not limit and not config.tasks:
        limit = PLACEHOLDER_TASKS
        print(f"this is the public placeholder of a hidden test set: only {limit} tasks are solved, to try everything")
    if not limit:
        return names
    longest = dict.fromkeys(names, 0)
    for key in tasks.keys:
        name = ArcDataset.get_base_key(key)
        if name in longest:
            longest[name] = max(longest[name], tasks.get_length(key, "input", **run.fmt_opts()))
    return sorted(sorted(names, key=lambda name: (longest[name], name))[:limit])


def _not_asked(tasks, names):
    """Return those of the tasks with these names that have no test input."""
    return [name for name in names if not tasks.challenge[name]["test"]]


def load_model_and_tokenizer(run):
    """Load the model, in the precision that the configuration asks for."""
    bits, location = run.config.bits, model_location(run.config.model)
    with run.record.stage("load model"):
        model, tokenizer = load_model(location, bits=bits, device=run.device)
        run.record.save(model={"location": shown_path(location), "bits": bits, "identity": model_identity(model),
                               "parameters": sum(parameter.numel() for parameter in model.parameters())})
    _check_tokenizer(run, tokenizer)
    return model, tokenizer


def _check_tokenizer(run, tokenizer):
    """Refuse a model that reads the script's prompts otherwise than by single characters."""
    tasks = run.to_submit[0]
    key = next(key for key in tasks.keys if tasks.challenge[ArcDataset.get_base_key(key)]["test"])
    prompt = tasks.get_task(key, **run.fmt_opts(tokenizer) | {"max_tokens": None})[1]["input"]
    try:
        tokens_of_texts(tokenizer, [{"key": key, "text": prompt}])
    except ValueError as error:
        raise ValueError(f"--model {run.config.model} is not made for the prompts of this script ({error}): take the "
                         "folder ...-merged that a run_finetuning script has written; Mini has scripts of its own"
                         ) from None


# ---- search, scoring, selection ----

def find_candidates(run, model_tok, tasks, views):
    """Search candidates in the views, score and rank them; one line per test input under one progress bar.

    Finished tasks are read from `candidates/`; workers of torchrun share the others. With `ttt='per-task'` the adapter
    is trained before each task's search. At the time limit, or when there is a file STOP in the output folder, the
    tasks that are not finished stay without candidates.
    Returns {task: [candidates per test input, best first]}, in the first worker of all tasks; a candidate is a dict
    with output (H, W), correct, scores_inf and scores_aug, as `inference_run` returns it.
    """
    print("\n== find candidates", flush=True)
    fits, worker = fit_views(run, views), run.worker
    report_fits(fits)
    tokens, identity = {name: fit.tokens for name, fit in fits.items()}, functools.partial(_identity, run, tasks, fits)
    names = task_order(run, tasks, tokens)
    if run.config.keep_adapters and run.config.ttt == "per-task":
        _kept_file(run).parent.mkdir(parents=True, exist_ok=True)
        _kept_file(run).touch()
    cache = ResultCache(run.output / (f"inference_cache_{worker.rank}" if worker.count > 1 else "inference_cache"))
    with cache, RankedResults(run, tasks, tokens, identity) as results:
        queue = TaskQueue(run.output, names, tasks_at_once(run, names))
        results.when_finished = functools.partial(_finished, run, queue)
        results.take_over_finished()
        _tell_missing_adapters(run, results.training)
        solve = _pick_solver(run, model_tok, fits)
        try:
            with run.clock.running():
                solve(run, model_tok, (tasks, views), queue, results, cache)
        except TimeIsUp:
            queue.forget()
            print("the time limit is reached")
        wait_for_all("search and scoring", meanwhile=results.take_over_finished)
    results.note(queue.set_aside())
    if run.worker.first:
        write_mean_loss(run.output, results.training.values())
    run.record.save(engine=run.engine_stats)
    return results.answers()


def _kept_file(run):  # empty, says: the adapters of tasks beside it stay
    return adapter_folder(run, "task").parent / "kept"


def _tell_missing_adapters(run, training):
    """Say whose adapters cannot be kept, as their tasks were finished without the option.

    training: {finished task: what its training took}, None of a task that was not trained.
    """
    if not (run.config.keep_adapters and run.config.ttt == "per-task" and run.worker.first):
        return
    trained = [name for name, took in training.items() if took]
    gone = [name for name in trained if not (adapter_folder(run, name) / IDENTITY_FILE).exists()]
    if gone:
        names = ", ".join(gone[:5]) + (", ..." if gone[5:] else "")
        tqdm.write(f"--keep-adapters: {len(gone)} finished tasks ({names}) have no adapter any more, it went after "
                   "their search; with another --output-path they are trained again")


def _finished(run, queue, name):
    """Note that a task is finished; its own adapter has done its work, unless a start was told to keep adapters."""
    queue.finished(name)
    folder = adapter_folder(run, name)
    if run.config.ttt == "per-task" and not _kept_file(run).exists():
        (folder / IDENTITY_FILE).unlink(missing_ok=True)  # first, so that no part of it is taken for an adapter
        shutil.rmtree(folder, ignore_errors=True)


def _pick_solver(run, model_tok, fits):
    """Return the function that solves the tasks of a queue."""
    if run.config.ttt != "per-task":
        return _solve_many
    if not can_train_together(run, model_tok[0]):
        return _solve_one_by_one
    return functools.partial(_solve_in_groups, tokens=_most_training_tokens(run, fits))


def _most_training_tokens(run, fits):
    """Return {task: tokens that its training texts do not exceed}.

    A prompt has all demonstration pairs and a query, so it is longer than a training text, unless the token limit has
    touched it. All views of a test input are about equally long.
    """
    most = {}
    for query, fit in fits.items():
        name, limit = ArcDataset.get_base_key(query), run.fmt_opts(training=True)["max_tokens"] + 1  # the start token
        tokens = limit if fit.cut or fit.left_out else min(limit, fit.longest)
        most[name] = max(most.get(name, 0), tokens)
    return most


def _solve_many(run, model_tok, tasks_views, queue, results, cache):  # noqa: PLR0913
    """Search and score the tasks of a queue, as many at once as it gives and as fit in memory."""
    results.start_clock()
    _search(run, model_tok, tasks_views[1], results.process, cache, queue)


def _solve_one_by_one(run, model_tok, tasks_views, queue, results, cache):  # noqa: PLR0913
    """Train an adapter of its own for each task of a queue, search with it and score."""
    tasks, views = tasks_views
    for name in filter(None, queue):
        reset_lora(model_tok[0], training_seed(run))
        share = run.worker.count / max(1, len(queue.names) - len(queue.done))
        results.training[name] = train_or_load(run, model_tok, only_tasks(tasks, [name]), adapter_folder(run, name),
                                               seconds=training_seconds(run, share))
        results.start_clock()
        _search(run, model_tok, views, results.process, cache, [name])


def _solve_in_groups(run, model_tok, tasks_views, queue, results, cache, tokens):  # noqa: PLR0913
    """Train the adapters of groups of tasks at once, then search with those of several groups and score.

    The search is faster the more tasks it has: it waits for as many as may stand side by side, with a time limit for
    one group.
    """
    tasks, views = tasks_views
    adapters, waiting = TaskAdapters(run, model_tok, tasks, tokens), {}  # {task: its adapter}

    def search_and_score(names):
        adapters.wait_for_saving()  # what is finished is deleted again
        states = {name: waiting.pop(name) for name in names}
        results.start_clock()
        if len(names) == 1:
            adapters.use(states[names[0]])
            _search(run, model_tok, views, results.process, cache, names)
            return
        with memory_advice(f"putting {len(names)} adapters side by side", "lower --tasks-at-once"):
            rows = adapters.side_by_side(states)
        states.clear()  # they are copied
        with rows:
            _search(run, model_tok, views, results.process, cache, names, rows)

    with contextlib.closing(adapters):
        for group in itertools.chain(adapters.groups(queue), [[]]):
            share = len(group) * run.worker.count / max(1, len(queue.names) - len(queue.done) - len(waiting))
            trained = adapters.train(group, training_seconds(run, share))
            for name in group:
                waiting[name], results.training[name] = trained.pop(name)
            most = adapters.side_by_side_at_most
            while len(waiting) >= most or (waiting and (not group or run.config.time_limit is not None)):
                search_and_score(list(waiting)[:most])
                for name, state in waiting.items():  # apart from the others of its group, which share their memory
                    waiting[name] = state and {key: tensor.clone() for key, tensor in state.items()}


def _identity(run, tasks, fits, name):
    """Return all that decides the results of a task, to compare with what was saved.

    The token limit belongs to it where it touches a searched view. Where it touches none, it touches no scoring view
    either (all symmetries are searched, so they are equally long) and no text of a training on this task (shorter).
    """
    config = run.config
    own = [fit for query, fit in fits.items() if ArcDataset.get_base_key(query) == name]
    limited = any(fit.cut or fit.left_out for fit in own)
    max_tokens = run.fmt_opts()["max_tokens"] if limited else None
    if config.ttt == "joint":
        training = run.adapter.get("identity")  # none if no demonstration pair fits
    else:
        limit = run.fmt_opts(training=True)["max_tokens"]
        limited = limited or any(fit.longest > limit for fit in own)
        training = training_identity(run, only_tasks(tasks, [name]), limit if limited else None)
    identity = {
        "model": run.record.values["model"]["identity"], "training": training,
        "fmt_opts": run.fmt_opts() | {"max_tokens": max_tokens}, "views": [fit.keys for fit in own],
        "seed": config.seed, "min_prob": config.min_prob, "search": config.search,
        "scoring_views": config.scoring_views, "task": digest(tasks.challenge[name])}
    return json.loads(json.dumps(identity))


def _write_engine_line(line):  # what it says of its memory; `_report` and `RankedResults` say the rest better
    if line.startswith("engine:"):
        tqdm.write(line)


def _search(run, model_tok, views, callback, cache, names, adapters=None):  # noqa: PLR0913
    """Run the search and the scoring of the views of some tasks, through the cache; adapters: `AdapterRows`."""
    advice = ("start again with a lower --max-tokens. Long prompts then lose whole demonstration pairs; an adapter and "
              "finished tasks are taken over unless their own texts lose some. (A lower --bits is another model: "
              "everything is made anew.)")
    with memory_advice("the search", advice):
        inference_run(dataset=views, fmt_opts=run.fmt_opts(model_tok[1]), model_tok=model_tok,
                      min_prob=run.config.min_prob, aug_score_opts=VIEW_OPTIONS | {"seed": VIEW_SEED + run.config.seed},
                      scoring_views=run.config.scoring_views, search=run.config.search, engine=run.config.engine,
                      callback=callback, print_func=_write_engine_line, progress=False, cache=cache,
                      engine_stats=run.engine_stats, order=names, adapters=adapters)


def finish_run(run):
    """Draw a solved task and the score, write the report, and say where everything is."""
    if not run.worker.first:
        return
    finished = sorted(set(run.record.values["tasks"]) - set(run.record.values["unfinished"]))
    picture = draw_run(run.output, finished)
    nothing = "none: no task was solved" if run.record.values.get("scores") else "none: no solutions given"
    config, n_tasks = run.config, len(run.record.values["tasks"])
    way, seed = "_per-task" * (config.ttt == "per-task"), f"_seed{config.seed}" * bool(config.seed)
    run.record.save(results_name=f"{config.script}{way}_{n_tasks}_{run.device}{seed}", finished=True)
    print("\n== written")
    print(f"submission {run.output / 'submission.json'}")
    for file in run.record.files:
        print(f"record     {file}")
    if config.keep_adapters and config.ttt == "per-task":
        print(f"adapters   {_kept_file(run).parent}")
    print(f"picture    {picture or nothing}")
    for curve in (draw_score_curve(run.output, finished), run.output / "training_loss.png"):
        if curve is not None and curve.exists():
            print(f"curve      {curve}")
    try:
        print(f"report     {write_report(run.output)}")
    except (ValueError, OSError) as error:  # the results are there, and do not depend on it
        print(f"no report: {error}")
