"""What an evaluation run left in its output folder: read, checked, and judged test input by test input.

The *outcome* of a test input says what became of its solution: it was submitted, it was a candidate that other
candidates outranked, the search did not find it, or there was no candidate at all. `explain` says why in a sentence,
from the numbers in the files. `page_data` is what `report.js` draws a task from.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import msgspec
import numpy as np

from arc_files import Grid
from draw_tools import same
from selection import EvalTool, all_score_algos, max_gen_prob, more_score_algos, product_of_experts

ATTEMPTS = ("attempt_1", "attempt_2")
NO_ANSWER = [[0]]  # what is submitted where there is no candidate
SEARCH_SETTINGS = ("seed", "min_prob", "search", "scoring_views")  # of a configuration and of a task's identity
RULES = {rule.__name__: rule for rule in (*all_score_algos, *more_score_algos)}

SOLVED, OUTRANKED, NOT_FOUND = "solved", "found but not submitted", "not found"
NO_CANDIDATES, UNKNOWN, UNFINISHED = "no candidates", "solution unknown", "not finished"
OUTCOMES = (SOLVED, OUTRANKED, NOT_FOUND, NO_CANDIDATES, UNKNOWN, UNFINISHED)


# ---- files ----

class Record(TypedDict):
    """The parts of record.json that the report shows; those that a later stage of the run adds may be missing."""

    script: str
    started: str
    config: dict[str, Any]
    commit: str
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: dict[str, float]
    tokens: dict[str, int]
    tasks: list[str]
    workers: NotRequired[int]
    model: NotRequired[dict[str, Any]]
    peak_memory_gb: NotRequired[dict[str, float]]
    score_rule: NotRequired[str]
    found: NotRequired[float]
    solved_by_rule: NotRequired[dict[str, float]]
    scores: NotRequired[dict[str, tuple[float, int]] | None]
    finished: NotRequired[bool]
    ended: NotRequired[str]
    unfinished: NotRequired[list[str]]
    set_aside: NotRequired[list[str]]


class Candidate(TypedDict):
    output: Grid
    correct: bool | None
    scores_inf: dict[str, float]
    scores_aug: NotRequired[dict[str, float]]


class Query(TypedDict):
    input: Grid


class Pair(TypedDict):
    input: Grid
    output: Grid


class Challenge(TypedDict):
    train: list[Pair]
    test: list[Query]


class SavedTask(TypedDict):
    """A file of `candidates/`, as evaluation_results.py describes it."""

    task: str
    challenge: Challenge
    solutions: list[Grid] | None
    score_rule: str
    candidates: list[list[Candidate]]
    seconds: float
    prompt_tokens: int
    training: dict[str, Any] | None
    identity: dict[str, Any]


class LossEntry(TypedDict):
    step: int
    loss: float


Submission = dict[str, list[dict[str, Grid]]]


def read_json(file: Path, kind: Any) -> Any:
    """Read a file that a run wrote and check that it holds what is expected of it.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON or holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: name the output folder of an evaluation run")
    try:
        return msgspec.convert(json.loads(file.read_bytes()), kind)
    except (ValueError, msgspec.ValidationError) as error:
        raise ValueError(f"{file} is broken ({error}): start the run again, which writes it anew") from None


def _check_task(saved: SavedTask, file: Path) -> None:
    """Check what the kinds of a task's fields do not say.

    Raises:
        ValueError: lists of different length, a ragged grid or a selection rule that there is not.
    """
    n_inputs = len(saved["challenge"]["test"])
    grids = [grid for pair in (*saved["challenge"]["train"], *saved["challenge"]["test"]) for grid in pair.values()]
    grids += [candidate["output"] for candidates in saved["candidates"] for candidate in candidates]
    grids += saved["solutions"] or []
    problems = {
        f"{len(saved['candidates'])} lists of candidates for {n_inputs} test inputs":
            len(saved["candidates"]) != n_inputs,
        f"{len(saved['solutions'] or [])} solutions for {n_inputs} test inputs":
            saved["solutions"] is not None and len(saved["solutions"]) != n_inputs,
        "a grid whose rows are not equally long": any(len(set(map(len, grid))) > 1 for grid in grids),
        f"no selection rule is called {saved['score_rule']!r}": saved["score_rule"] not in RULES,
    }
    if found := [problem for problem, is_there in problems.items() if is_there]:
        raise ValueError(f"{file} is broken ({'; '.join(found)}): start the run again, which writes it anew")


# ---- one test input ----

@dataclass(frozen=True)
class TestInput:
    """One test input of a finished task, and what the run made of it.

    Attributes:
        query, solution: grids; the solution is None where it is not known.
        candidates: best first, with `scores_alg`, their scores by all `RULES`.
        rule: the selection rule that ordered them.
        searched: keys of the views that were searched; None where the files do not say.
        min_prob: probability that a reply had to exceed; None: the most probable reply of each view.
        submitted_by: rules that would have submitted the solution.
    """

    __test__ = False  # no class of tests, whatever pytest makes of its name

    query: Grid
    solution: Grid | None
    candidates: list[Candidate]
    rule: str
    searched: list[str] | None
    min_prob: float | None
    submitted_by: list[str]

    @property
    def place(self) -> int | None:
        """Return the place (0 = best) of the solution among the candidates, None if it is not there."""
        return next((i for i, c in enumerate(self.candidates) if same(c["output"], self.solution)), None)

    @property
    def outcome(self) -> str:
        """Return which of `OUTCOMES` it is."""
        if not self.candidates:
            return NO_CANDIDATES
        if self.solution is None:
            return UNKNOWN
        if self.place is None:
            return NOT_FOUND
        return SOLVED if self.place < len(ATTEMPTS) else OUTRANKED

    @property
    def size(self) -> tuple[int, int] | None:
        """Return (rows, columns) of the output, of the best candidate where the solution is not known."""
        grids = [grid for grid in (self.solution, *(c["output"] for c in self.candidates)) if grid is not None]
        return np.shape(grids[0]) if grids else None

    def score(self, place: int) -> float:
        """Return a candidate's score under the rule of the run."""
        return self.candidates[place]["scores_alg"][list(RULES).index(self.rule)]


def _test_inputs(saved: SavedTask, min_prob: float | None) -> list[TestInput]:
    """Return the test inputs of a finished task."""
    solutions = saved["solutions"] or [None] * len(saved["candidates"])
    views = saved["identity"].get("views")
    inputs = []
    for i, (query, solution, candidates) in enumerate(
            zip(saved["challenge"]["test"], solutions, saved["candidates"], strict=True)):
        tool = EvalTool(len(ATTEMPTS), RULES.values(), sorting_algo=None)
        tool.process_result(candidates, saved["task"], 1, print_func=None)
        # as `EvalTool` sorts where no candidate was scored
        rule = saved["score_rule"] if any(c.get("scores_aug") for c in candidates) else max_gen_prob.__name__
        searched = None if views is None else [
            key for keys in views for key in keys if key.split(".")[0] == f"{saved['task']}_{i}"]
        submitted_by = [name for name, solved in zip(RULES, tool.n_acc, strict=True) if solved]
        inputs.append(TestInput(query["input"], solution, candidates, rule, searched, min_prob, submitted_by))
    return inputs


def _check_submitted(inputs: list[TestInput], answers: list[dict[str, Grid]] | None, where: str) -> None:
    """Check that the best candidates of a task were submitted.

    Raises:
        ValueError: the submission lacks the task or holds something else.
    """
    best = [[*(c["output"] for c in one.candidates[:2]), NO_ANSWER, NO_ANSWER][:2] for one in inputs]
    if answers is None or [[answer.get(attempt) for attempt in ATTEMPTS] for answer in answers] != best:
        raise ValueError(f"{where} does not hold the best two candidates that candidates/ has for it: the files are "
                         "of different runs; start the run again")


# ---- sentences ----

def explain(one: TestInput) -> str:
    """Say in a sentence or two what became of a test input, and if it was not solved, why."""
    return {SOLVED: _solved, OUTRANKED: _outranked, NOT_FOUND: _not_found, NO_CANDIDATES: _no_candidates,
            UNKNOWN: _unknown}[one.outcome](one)


def _views(one: TestInput, n: int) -> str:
    return f"{n} views" if one.searched is None else f"{n} of {len(one.searched)} views"


def _found(one: TestInput, place: int) -> str:
    n = len(one.candidates[place]["scores_inf"])
    return f"found in {_views(one, n)}" if n else "scored, but found in no view"


def number(nll: float) -> str:
    return f"{nll:.2f}" if math.isfinite(nll) else "no score"


def _best_prob(candidate: Candidate) -> str:
    return f"{math.exp(-max_gen_prob(candidate)):.1%}"


def _against(one: TestInput, place: int, *others: int) -> str:
    """Compare the score of a candidate with those of others."""
    rivals = [f"{number(one.score(other))} of {'attempt' if other < len(ATTEMPTS) else 'candidate'} {other + 1}"
              for other in others]
    return f"{one.rule} {number(one.score(place))} against {' and '.join(rivals)}"


def _solved(one: TestInput) -> str:
    place = one.place
    others = [other for other in (place - 1, place + 1) if 0 <= other < len(one.candidates)]
    compared = _against(one, place, *others) if others else "it is the only candidate"
    return f"Solved by attempt {place + 1}: {_found(one, place)}; {compared}."


def _outranked(one: TestInput) -> str:
    place, last = one.place, len(ATTEMPTS) - 1
    candidate, rival = one.candidates[place], one.candidates[last]
    reasons = [_against(one, place, last)]
    if one.rule != product_of_experts.__name__ and candidate.get("scores_aug") and rival.get("scores_aug"):
        reasons.append(f"mean NLL {product_of_experts(candidate):.2f} against {product_of_experts(rival):.2f}")
    reasons.append(f"best search probability {_best_prob(candidate)} against {_best_prob(rival)}")
    found = _found(one, place)
    others = (f"It would have been submitted by {', '.join(one.submitted_by)}." if one.submitted_by
              else "No other rule would have submitted it either.")
    return f"{found[0].upper()}{found[1:]}, rank {place + 1}: {'; '.join(reasons)}. {others}"


def _not_found(one: TestInput) -> str:
    reached = "in no view" if one.searched is None else f"in none of {len(one.searched)} views"
    height, width = np.shape(one.solution)
    wrong = {i: int((np.asarray(c["output"]) != np.asarray(one.solution)).sum())
             for i, c in enumerate(one.candidates) if np.shape(c["output"]) == (height, width)}
    if not wrong:
        nearest = f"no candidate has its size, {height}x{width}"
    else:
        place = min(wrong, key=wrong.get)
        name = f"attempt {place + 1}" if place < len(ATTEMPTS) else f"rank {place + 1}"
        nearest = f"the nearest candidate, {name}, differs from it in {wrong[place]} of {height * width} cells"
    return f"Not found: {reached} did the search reach the solution; {nearest}."


def _no_candidates(one: TestInput) -> str:
    if one.searched is not None and not one.searched:
        return "No candidate at all: no view fits the token limit, so nothing was searched."
    views = "no view" if one.searched is None else f"none of {len(one.searched)} views"
    reply = ("was the most probable reply a grid" if one.min_prob is None
             else f"did a reply that is a grid have more than {one.min_prob:.3g} probability")
    return f"No candidate at all: in {views} {reply}."


def _unknown(one: TestInput) -> str:
    compared = _against(one, 0, 1) if len(one.candidates) > 1 else "it is the only candidate"
    return f"The solution is not known. Attempt 1 was {_found(one, 0)}; {compared}."


# ---- all tasks ----

@dataclass(frozen=True)
class RunFiles:
    """What a run left: its record, its finished tasks in the order of the record, and its training's loss."""

    record: Record
    saved: dict[str, SavedTask]
    inputs: dict[str, list[TestInput]]
    loss: list[LossEntry]


def read_run(output_folder: str | Path) -> RunFiles:
    """Read the output folder of an evaluation run, finished or not.

    Files of other runs are left out: of tasks that this one did not ask for or calls unfinished, or of another model or
    other settings.

    Raises:
        FileNotFoundError: there is no record.
        ValueError: a file is broken, or the submission is not that of the candidates.
    """
    folder = Path(output_folder)
    record = read_json(folder / "record.json", Record)
    expected = set(record["tasks"]) - set(record.get("unfinished", ()))
    found = {}
    for file in sorted(folder.glob("candidates/*.json")):
        saved = read_json(file, SavedTask)
        if saved["task"] in expected and _is_of(saved["identity"], record):
            _check_task(saved, file)
            found[saved["task"]] = saved
    saved_tasks = {name: found[name] for name in record["tasks"] if name in found}
    min_prob = record["config"].get("min_prob")
    inputs = {name: _test_inputs(saved, min_prob) for name, saved in saved_tasks.items()}
    if "scores" in record:  # only then the submission is this run's, and whole
        submission = read_json(folder / "submission.json", Submission)
        for name in saved_tasks:
            _check_submitted(inputs[name], submission.get(name), f"{folder / 'submission.json'}, task {name},")
    place = {"joint": folder / "finetuned_model", "per-task": folder}.get(record["config"].get("ttt"))
    history = place and place / "training_loss.json"
    loss = read_json(history, list[LossEntry]) if history and history.exists() else []
    return RunFiles(record, saved_tasks, inputs, loss)


def _is_of(identity: dict[str, Any], record: Record) -> bool:
    """Tell whether a task's results were made with the model and the settings of a run, as far as both name them."""
    used = {name: record["config"][name] for name in SEARCH_SETTINGS if name in record["config"]}
    used["model"] = record.get("model", {}).get("identity")
    kind, untrained = record["config"].get("ttt"), identity.get("training", {}) is None
    if kind and "training" in identity and kind != ("none" if untrained else identity["training"]["ttt"]):
        if not (untrained and record.get("finished")):  # then no demonstration pair fitted
            return False
    return all(identity[name] == value for name, value in used.items() if name in identity and value is not None)


# ---- for the page ----

def page_data(run: RunFiles) -> list[dict]:
    """Return what `report.js` draws the tasks from, in plain values ready for JSON."""
    set_aside = run.record.get("set_aside", ())
    return [_task_data(run.saved[name], run.inputs[name]) if name in run.saved else
            {"name": name, "note": "set aside after taking its worker down twice" if name in set_aside else
             "not finished"}
            for name in run.record["tasks"]]


def _task_data(saved: SavedTask, inputs: list[TestInput]) -> dict:
    training = saved["training"]
    note = "" if training is None else (
        f"{training['steps']:,} training steps on this task alone, {training['tokens']:,} tokens, "
        f"last loss {training['loss']:.3f}, {training['seconds']:.0f} s")
    return {
        "name": saved["task"], "note": note, "seconds": round(saved["seconds"], 2), "tokens": saved["prompt_tokens"],
        "pairs": [[_rows(pair["input"]), _rows(pair["output"])] for pair in saved["challenge"]["train"]],
        "inputs": [_input_data(one) for one in inputs]}


def _input_data(one: TestInput) -> dict:
    """Return one test input; NLLs are {place in `views`: NLL}, of which the first `searched` were searched."""
    keys = [*(one.searched or ()), *(key for part in ("scores_inf", "scores_aug") for c in one.candidates
                                     for key in c.get(part, ()))]
    views = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    found_in = {key for c in one.candidates for key in c["scores_inf"]}

    def nlls(scores: dict[str, float]) -> list[list[float]]:
        return [[views[key], round(nll, 3)] for key, nll in scores.items() if math.isfinite(nll)]

    return {
        "query": _rows(one.query), "solution": None if one.solution is None else _rows(one.solution),
        "outcome": one.outcome, "why": explain(one), "rule": one.rule, "size": one.size,
        "searched": len(found_in) if one.searched is None else len(one.searched),
        "views": [key.partition(".")[2] or "as it is" for key in views],
        "candidates": [{"grid": _rows(c["output"]), "score": number(one.score(place)), "found": nlls(c["scores_inf"]),
                        "scored": nlls(c.get("scores_aug", {}))} for place, c in enumerate(one.candidates)]}


def _rows(grid: Grid) -> str:
    """Return a grid as rows of digits joined by `/`."""
    return "/".join("".join(map(str, row)) for row in grid)
