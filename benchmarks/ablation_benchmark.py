"""Measure what each part of the system adds: test-time training, many views, scoring, the threshold search.

    python benchmarks/ablation_benchmark.py --script run_evaluation_SmolLM2-rearc_with_ttt --output-path /tmp/ablation
        --output benchmarks/results/ablation_SmolLM2.json                            # a GPU; all 400 tasks

Every option of the run script can be given (`--help` of the script lists them). Three evaluations, each in a folder of
its own below the output path, where a stopped one goes on: without training and greedy, with training and greedy, and
as the script says; the last two share their adapters. The five rows come from their candidates:

- *baseline*: no training, the greedy reply of the first view is the one attempt;
- *training*: the same with test-time training;
- *views*: the greedy replies of all views; attempts are the two found in most of them, then the more probable ones;
- *scoring*: the same candidates, ranked by the script's score rule in the scoring views;
- *threshold search*: the candidates of the threshold search, ranked in the same way.

Source: arXiv 2505.07859, the table that adds these parts one after the other.
"""

import gc
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from arc_files import write_json  # noqa: E402
from evaluation_results import ATTEMPTS  # noqa: E402
from evaluation_tools import EvaluationConfig  # noqa: E402
from run_tools import REPOSITORY, folder_written_whole, hardware, pick_device, task_file, without_places  # noqa: E402
from selection import max_gen_prob  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What to measure; other options are those of the run script."""

    script: str  # name of a run script with test-time training, without .py
    output: Path | None = None  # JSON file for the figures


# ---- the rows ----

def of_first_view(candidates, views):
    """Return the candidate that the first view found, if it found one; views: their keys, None where none fits."""
    return [candidate for candidate in candidates if views and views[0] in candidate["scores_inf"]][:1]


def by_votes(candidates, views):
    """Return the candidates by the number of views that found them; of equal ones the more probable first."""
    return sorted(candidates, key=lambda candidate: (-len(candidate["scores_inf"]), max_gen_prob(candidate)))


def as_ranked(candidates, views):
    """Return the candidates as the score rule of their run has ranked them."""
    return candidates


@dataclass(frozen=True)
class Part:
    """A part of the system: the run that has it, and how that run's candidates become attempts.

    choose: function (candidates of a test input as ranked by its run, keys of its views) -> those that this part has,
    best first.
    """

    name: str
    run: str
    choose: Callable


PARTS = (Part("baseline", "greedy_without_training", of_first_view), Part("training", "greedy", of_first_view),
         Part("views", "greedy", by_votes), Part("scoring", "greedy", as_ranked),
         Part("threshold search", "threshold", as_ranked))  # fmt: skip


def load_tasks(output, names):
    """Return what `candidates/<task>.json` of a run's output folder holds for each of the tasks.

    Raises:
        ValueError: for a task without solutions.
    """
    tasks = [json.loads(task_file(output / "candidates", name, ".json").read_text()) for name in names]
    if unknown := [task["task"] for task in tasks if not task["solutions"]]:
        raise ValueError(f"no solutions of {', '.join(unknown)}: what a part adds cannot be told (--solutions)")
    return tasks


def score_part(part, tasks):
    """Return the figures of a part: its score in percent, and what it chose from.

    tasks: as of `load_tasks`. The score is the mean over tasks of solved test inputs / test inputs.
    """
    score, chosen = 0.0, []
    for task in tasks:
        views = {keys[0].split(".")[0]: keys for keys in task["identity"]["views"] if keys}
        own = [part.choose(candidates, views.get(f"{task['task']}_{i}"))
               for i, candidates in enumerate(task["candidates"])]  # fmt: skip
        score += sum(_has_solution(candidates[: len(ATTEMPTS)]) for candidates in own) / len(own)
        chosen += own
    return {"score": 100 * score / len(tasks), "test_inputs": len(chosen),
            "solution_among_candidates": sum(map(_has_solution, chosen)),
            "candidates": sum(map(len, chosen)) / len(chosen)}  # fmt: skip


def _has_solution(candidates):
    return any(candidate["correct"] for candidate in candidates)


def make_rows(output):
    """Return a row per part, from the finished runs below the output path.

    Seconds and tokens are those of the whole run that a row was taken from, with all its views and its scoring.
    """
    rows = []
    for part in PARTS:
        record = json.loads((output / part.run / "record.json").read_text())
        seconds, tokens = record["seconds"], record["tokens"]
        figures = score_part(part, load_tasks(output / part.run, record["tasks"]))
        rows.append({"part": part.name, "run": part.run, **figures, "search_seconds": seconds["find candidates"],
                     "training_seconds": seconds.get("test-time training", 0.0),
                     "training_tokens": tokens.get("training", 0)})  # fmt: skip
    return rows


# ---- the runs ----

def configurations(config, output):
    """Return {run: its configuration}, from that of the script.

    Raises:
        ValueError: for a configuration that has not all parts.
    """
    if config.ttt == "none" or config.min_prob is None:
        raise ValueError("the script must train at test time and search by a threshold: give --ttt and --min-prob")
    config = replace(config, record=False, keep_adapters=True)
    changes = {"greedy_without_training": {"ttt": "none", "min_prob": None}, "greedy": {"min_prob": None},
               "threshold": {}}  # fmt: skip
    return {name: replace(config, **values, output_path=output / name) for name, values in changes.items()}


def share_adapters(source, target):
    """Give a run's output folder the adapters of another one; their files are the same ones on the disk."""
    for name in ("finetuned_model", "finetuned_model_per_task"):
        if (source / name).exists():
            with folder_written_whole(target / name) as folder:
                shutil.copytree(source / name, folder, copy_function=os.link, dirs_exist_ok=True)


def main(config, evaluation, run_evaluation):
    """Run what is not there yet; print and write the figures.

    evaluation: configuration of the run script. run_evaluation: its `main`.
    """
    output = evaluation.output_path or REPOSITORY / f"output_ablation_{config.script.removeprefix('run_')}"
    runs = configurations(evaluation, output)
    for name, own in runs.items():
        print(f"\n==== {name}", flush=True)
        if name == "threshold":
            share_adapters(runs["greedy"].output_path, own.output_path)
        run_evaluation(own)
        gc.collect()  # the model of a run makes place for that of the next
    record = json.loads((runs["threshold"].output_path / "record.json").read_text())
    machine = hardware() if pick_device(evaluation.device) == "cuda" else hardware() | {"gpu": None}
    config_shown = without_places(record["config"] | {"output_path": None})
    figures = {"config": config_shown, "hardware": machine, "tasks": len(record["tasks"]),
               "parameters": record["model"]["parameters"], "ablation": make_rows(output)}  # fmt: skip
    print(json.dumps(figures["ablation"], indent=1))
    if config.output:
        write_json(config.output, figures, indent=1)


if __name__ == "__main__":
    options, others = tyro.cli(Config, description=__doc__, return_unknown_args=True)
    script = runpy.run_path(str(REPOSITORY / "training_code" / f"{options.script}.py"))
    main(options, tyro.cli(EvaluationConfig, default=script["CONFIG"], args=others), script["main"])
