"""Output folders of evaluation runs, made by hand for the tests of the report."""

import json

import numpy as np

RULE = "product_of_experts"
SOLUTION, NEAR, OTHER_SIZE, FAR = [[1, 2], [3, 4]], [[1, 2], [3, 5]], [[1, 2, 3]], [[9, 9], [9, 9]]
HARMFUL_NAME = "</script><img src=x onerror=alert(1)>"


def view_keys(task, i=0, count=16):
    return [f"{task}_{i}{turn}.perm{colours}.ex0-1" for colours in ("0123456789", "9876543210")
            for turn in ("", ".rt", ".rt.rt", ".rt.rt.rt", ".tp", ".tp.rt", ".tp.rt.rt", ".tp.rt.rt.rt")][:count]


def candidate(grid, solution, keys, found, nll):
    """Return a candidate that the first `found` views found, with the same NLL in each of the views."""
    return {"output": grid, "correct": None if solution is None else grid == solution,
            "scores_inf": dict.fromkeys(keys[:found], nll), "scores_aug": dict.fromkeys(keys, nll)}


def task_file(name, grids, *, solution=SOLUTION, **other):
    """Return a file of `candidates/` with one test input; grids: best first, (grid, views that found it, NLL)."""
    keys = view_keys(name)
    return {"task": name, "challenge": {"train": [{"input": [[1, 0]], "output": [[0, 1]]}] * 2,
                                        "test": [{"input": [[5, 6]]}]},
            "solutions": None if solution is None else [solution], "score_rule": RULE,
            "candidates": [[candidate(grid, solution, keys, found, nll) for grid, found, nll in grids]],
            "seconds": 1.5, "prompt_tokens": 320, "training": None, "identity": {"views": [keys]}, **other}


def outcome_tasks():
    """Return {task: file} with one task of every outcome whose solution is known."""
    files = [task_file("solved", [(SOLUTION, 12, 0.5), (NEAR, 3, 2.0)]),
             task_file("outranked", [(NEAR, 12, 0.5), (FAR, 3, 2.0), (SOLUTION, 2, 2.25)]),
             task_file("missed", [(NEAR, 12, 0.5), (OTHER_SIZE, 3, 2.0)]),
             task_file("empty", [])]
    return {file["task"]: file for file in files}


def record(tasks, **values):
    return {"script": "run_evaluation_test", "started": "2026-11-24T10:00:00+00:00", "commit": "0123abc",
            "config": {"model": "pretrained_models/Mini", "bits": 32, "device": None, "seed": 0, "ttt": "none",
                       "repeats": 2, "min_prob": 0.1, "scoring_views": "search"},
            "versions": {"python": "3.11"}, "hardware": {"gpu": None, "cpu": "Some CPU", "cores": 2, "threads": 2},
            "seconds": {"load model": 0.5, "find candidates": 120.0}, "tokens": {"prompts": 1280},
            "tasks": list(tasks), "score_rule": RULE, "peak_memory_gb": {"main": 1.5}} | values


def write_run(folder, files, submit=True, tasks=None, **values):
    """Write the output folder of a run with these finished tasks, {task: file}, and return it.

    submit: also submission and scores; tasks: all tasks of the run; values: of the record.
    """
    (folder / "candidates").mkdir(parents=True)
    for number, file in enumerate(files.values()):
        (folder / "candidates" / f"{number}.json").write_text(json.dumps(file))
    if submit:
        grids = {name: [([c["output"] for c in found] + [[[0]]] * 2)[:2] for found in file["candidates"]]
                 for name, file in files.items()}
        submission = {name: [{"attempt_1": one, "attempt_2": two} for one, two in best] for name, best in grids.items()}
        (folder / "submission.json").write_text(json.dumps(submission))
        values = {"scores": {"per task": [1, 4], "per test input": [1, 4], "all-or-nothing": [1, 4]}, "found": 2.0,
                  "solved_by_rule": {RULE: 1.0, "nvarc": 2.0}, "finished": True} | values
    (folder / "record.json").write_text(json.dumps(record(tasks or files, **values)))
    return folder


def large_run(folder, n_tasks=400, n_candidates=10, seed=0):
    """Write a run with grids of mixed sizes up to 30 x 30; the last task has the largest ones and is not solved."""
    rng = np.random.RandomState(seed)
    files = {}
    for number in range(n_tasks):
        side = 30 if number == n_tasks - 1 else int(rng.randint(3, 31))
        name, grids = f"task{number:03}", rng.randint(0, 10, (n_candidates + 1, side, side)).tolist()
        solution = grids[n_candidates if number % 2 else 0]
        file = task_file(name, [(grid, 16 - place, 0.5 + place) for place, grid in enumerate(grids[:-1])],
                         solution=solution)
        file["challenge"] = {"train": [{"input": grids[i], "output": grids[i + 1]} for i in range(3)],
                             "test": [{"input": grids[5]}]}
        file["seconds"] = float(number % 7)
        files[name] = file
    return write_run(folder, files)
