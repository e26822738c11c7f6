"""Results of an evaluation run: ranked candidates in files, the submission, and its score.

`candidates/<task>.json` holds what one finished task gave:

    {"task": name, "challenge": {...}, "solutions": [grid per test input] or null, "score_rule": name,
     "candidates": [per test input: [{"output": grid, "correct": true/false/null, "scores_inf": {view key: NLL},
                                      "scores_aug": {view key: NLL}}, ... best first]],
     "seconds": seconds of search and scoring, "prompt_tokens": tokens of all searched prompts,
     "training": what the training on this task alone took (as `train_lora` returns it) or null, "identity": {...}}

Three score rules: *per task* (ARC Prize: mean over tasks of solved test inputs / test inputs), *per test input* (solved
test inputs / test inputs), *all-or-nothing* (tasks with every test input solved / tasks).
"""

import json
import math
import time

import numpy as np
from tqdm import tqdm

from arc_files import write_json
from arc_loader import ArcDataset
from run_tools import set_aside, task_file
from selection import EvalTool, all_score_algos, more_score_algos
from task_queue import STOP_FILE

LOOK_EVERY, SAVE_EVERY = 5.0, 10.0  # seconds between looks for the results of other workers, between submissions
ATTEMPTS = ("attempt_1", "attempt_2")
SAVED_PARTS = ("output", "correct", "scores_inf", "scores_aug")  # of a candidate


def note_training(record, stats):
    """Add up in a run's record what test-time training took, also where an earlier start did it; None adds nothing."""
    if stats is not None:
        for kind, name, value in (("seconds", "test-time training", stats["seconds"]),
                                  ("tokens", "training", stats["tokens"])):
            record.values[kind][name] = record.values[kind].get(name, 0) + value


def as_made(identity, stats):
    """Return the identity of a training that took what ``stats`` say: with its time limit only if that shortened it.

    identity: as of `ttt_tools.training_identity`, or None; stats: None where nothing was trained, for want of texts or
    of time.
    """
    if identity is None or stats is None or "steps_planned" in stats:
        return identity
    return identity | {"time_limit": None}


def serves(saved, wanted):
    """Tell whether what was made with one training identity is what is wanted with another; None: without training.

    What a time limit shortened serves a run that has no more time than there was.
    """
    if saved is None or wanted is None:
        return saved is wanted
    then, now = saved.get("time_limit"), wanted["time_limit"]
    return saved | {"time_limit": now} == wanted and (then is None or (now is not None and now <= then))


class RankedResults:
    """Ranks the candidates of one test input after the other, reports them, and keeps finished tasks in files.

    Attributes:
        candidates: {task: [candidates per test input, best first]}; None for a test input not answered yet.
        training: {task: what the training on it alone took}, to be filled in before its results arrive.
    """

    def __init__(self, run, tasks, prompt_tokens, identity):
        """Prepare the results.

        run: the started run; tasks: `ArcDataset`; prompt_tokens: {test input: tokens of its searched prompts};
        identity: function task name -> dict of all that decides the task's results.
        """
        self.run, self.tasks, self.identity = run, tasks, identity
        self.folder = run.output / "candidates"
        self.eval_tool = EvalTool(len(ATTEMPTS), [*all_score_algos, *more_score_algos],
                                  sorting_algo=run.score_rule)
        self.candidates = {name: [None] * len(task["test"]) for name, task in tasks.challenge.items()}
        self.prompt_tokens = dict.fromkeys(tasks.challenge, 0)
        for name, tokens in prompt_tokens.items():
            self.prompt_tokens[ArcDataset.get_base_key(name)] += tokens
        self.seconds, self.training = {}, {}
        self.when_finished = lambda task: None  # called with the name of every finished task
        self.next_look = self.next_save = 0.0  # seconds of the clock

    def __enter__(self):
        self.bar = tqdm(total=len(self.tasks.keys), unit="query", desc="test inputs")
        return self

    def __exit__(self, *_):
        self.bar.close()

    def start_clock(self):
        """Count the seconds of the next task from now on."""
        self.clock = time.perf_counter()

    def process(self, res, name, value, print_func=None):
        """Rank the candidates of one test input in place and print its line; the callback of `inference_run`."""
        task = self._take(res, name, value)
        if None not in self.candidates[task]:
            now = time.perf_counter()
            self.seconds[task], self.clock = now - self.clock, now
            note_training(self.run.record, self.training.get(task))
            self._save(task)
            self.when_finished(task)
            if self.run.worker.count > 1 and self.run.worker.first and now > self.next_look:
                self.take_over_finished()
            if now > self.next_save:
                self.next_save = now + SAVE_EVERY
                keep_submission(self.run, self.answers())
                self.run.record.save()

    def take_over_finished(self):
        """Take over all tasks that an earlier start, or since then another worker, has finished."""
        for task, candidates in self.candidates.items():
            if all(answer is None for answer in candidates) and self.take_over(task):
                self.when_finished(task)
        self.next_look = time.perf_counter() + LOOK_EVERY

    def answers(self):
        """Return {task: [candidates per test input, best first]}, [] where there is no answer yet."""
        return {task: [answer or [] for answer in candidates] for task, candidates in self.candidates.items()}

    def take_over(self, task):
        """Take a task's results from its file, if an equal run wrote it; return whether it did."""
        file, wanted = task_file(self.folder, task, ".json"), self.identity(task)
        if not file.exists() or not (saved := json.loads(file.read_text())).get("identity"):
            return False
        training = wanted["training"]
        if saved["identity"] | {"training": training} != wanted or not serves(saved["identity"]["training"], training):
            return False
        self.seconds[task], self.training[task] = saved["seconds"], saved["training"]
        note_training(self.run.record, saved["training"])
        solutions = self.tasks.solutions.get(task)
        for i, candidates in enumerate(saved["candidates"]):
            for candidate in candidates:
                candidate["output"] = np.array(candidate["output"])
                candidate["correct"] = solutions and np.array_equal(candidate["output"], solutions[i])
            self._take(candidates, f"{task}_{i}", 1 / len(saved["candidates"]))
        changed = [saved["score_rule"], saved["solutions"]] != _plain([self.run.score_rule, solutions])
        if changed and self.run.worker.first:  # which belong to no identity: candidates do not depend on them
            self._save(task)
        return True

    def _take(self, res, name, value):
        """Rank and report the candidates of one test input; return the name of its task."""
        task, i = ArcDataset.get_base_key_and_reply_num(name)
        self.eval_tool.process_result(res, name, value, print_func=_write_warning)
        self.candidates[task][i] = res
        tqdm.write(self._line(name, res))
        self.bar.update()
        return task

    def note(self, set_aside=()):
        """Put seconds, tokens and the value that every selection rule would have solved into the run's record.

        set_aside: tasks that were left out after taking their worker down twice.
        """
        tool, record = self.eval_tool, self.run.record
        unfinished = [task for task, candidates in self.candidates.items() if None in candidates]
        if set_aside:
            print(f"set aside after taking their worker down twice: {', '.join(set_aside)}; to try them again, remove "
                  f"{self.run.output / 'tries'}")
        if unfinished:
            stop = self.run.output / STOP_FILE
            again = f"remove {stop} and start again to go on" if stop.exists() else "another start goes on with them"
            print(f"not finished: {len(unfinished)} of {len(self.candidates)} tasks; {again}")
        record.values.update(unfinished=unfinished, set_aside=list(set_aside))
        record.values["seconds"]["find candidates"] = sum(self.seconds.values())
        record.values["score_rule"] = self.run.score_rule
        record.values["tokens"]["prompts"] = sum(self.prompt_tokens.values())
        if self.tasks.solutions:
            solved = {rule.__name__: round(value, 4) for rule, value in zip(tool.score_algos, tool.n_acc, strict=True)}
            print(f"solution among the candidates: {tool.a_acc:.2f} of {tool.count:.2f} tasks; solved by each rule:")
            print("  " + ", ".join(f"{rule} {value:.2f}" for rule, value in solved.items()))
            record.values.update(found=round(tool.a_acc, 4), solved_by_rule=solved)
        record.save()

    def _line(self, name, res):
        """Return the line of one test input: tokens, best candidate, whether and where the solution was found."""
        tokens = self.tasks.get_length(name, "input", **self.run.fmt_opts())
        line = f"{name:12} {tokens:5} tokens  {len(res):3} candidates"
        if res:
            height, width = np.shape(res[0]["output"])
            probability = math.exp(-min(res[0]["scores_inf"].values(), default=math.inf))
            line += f"  best {height:2}x{width:<2} p={probability:6.1%}"
        ranks = [rank for rank, candidate in enumerate(res, 1) if candidate["correct"]]
        if not self.tasks.solutions:
            return line + "  solution unknown"
        if not ranks:
            return line + "  not found"
        return line + f"  found, rank {ranks[0]}" + ("" if ranks[0] <= len(ATTEMPTS) else " (not submitted)")

    def _save(self, task):
        solutions, identity = self.tasks.solutions.get(task), self.identity(task)
        if self.run.config.ttt == "per-task":
            identity["training"] = as_made(identity["training"], self.training.get(task))
        candidates = [[{part: candidate[part] for part in SAVED_PARTS if part in candidate} for candidate in res]
                      for res in self.candidates[task]]
        write_json(task_file(self.folder, task, ".json"), _plain({
            "task": task, "challenge": self.tasks.challenge[task], "solutions": solutions,
            "score_rule": self.run.score_rule, "candidates": candidates, "seconds": self.seconds[task],
            "prompt_tokens": self.prompt_tokens[task], "training": self.training.get(task),
            "identity": identity}))


def _write_warning(line):
    """Write a line of `EvalTool` if it is a warning; what else it says, the record and the line of `_line` hold."""
    if line.startswith(" !"):
        tqdm.write(line)


def _plain(value):
    """Return the value with arrays as lists and numpy numbers as Python's, ready for JSON."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


# ---- submission ----

def write_submission(run, tasks, candidates):
    """Write `submission.json`: two attempts for every test input, [[0]] where nothing was found.

    It is for the tasks to submit: these, and of a placeholder set, of which only some are solved, all.
    candidates: {task: [candidates per test input, best first]}.
    """
    if not run.worker.first:
        return
    file, submission = run.output / "submission.json", run.to_submit[0].get_submission(candidates)
    if _n_answered(file, run.to_submit[0].challenge) > sum(map(_is_answered, submission.values())):
        print(f"{file}, of an earlier run, answers more tasks: kept as {set_aside(file)}")
    write_json(file, submission)


def keep_submission(run, candidates):
    """Write the submission for what is known by now, unless the one that is there answers more tasks.

    So there is a valid one from the beginning of a run on, whatever ends it.
    """
    file, submission = run.output / "submission.json", run.to_submit[0].get_submission(candidates)
    if not run.worker.first:
        return
    there = _n_answered(file, run.to_submit[0].challenge)
    if there <= sum(map(_is_answered, submission.values())):
        if there < 0 and file.exists():
            tqdm.write(f"{file} is that of other tasks: kept as {set_aside(file)}")
        write_json(file, submission)


def _is_answered(answers):
    return any(answer[attempt] != [[0]] for answer in answers for attempt in ATTEMPTS)


def _n_answered(file, tasks):
    """Return how many tasks the submission in a file answers; -1 if it is none for {task: its pairs and queries}."""
    try:
        submission = json.loads(file.read_text())
        verify_submission(submission, {name: len(task["test"]) for name, task in tasks.items()})
        return sum(map(_is_answered, submission.values()))
    except (OSError, ValueError, TypeError, AttributeError, KeyError):  # no file, or something else
        return -1


def check_submission(run, tasks):
    """Read the written submission back, verify it and score it by all three rules.

    Raises ValueError if it is not a valid submission for exactly the tasks to submit.
    """
    if not run.worker.first:
        return None
    submission = json.loads((run.output / "submission.json").read_text())
    verify_submission(submission, {name: len(task["test"]) for name, task in run.to_submit[0].challenge.items()})
    n_inputs = sum(map(len, submission.values()))
    print(f"\n== check submission\nvalid: {len(submission)} tasks, {n_inputs} test inputs, 2 attempts each")
    scores = None
    if tasks.solutions:
        scores = score_submission(submission, tasks.solutions)
        for rule, (solved, total) in scores.items():
            print(f"{rule:15} {solved:6.2f} of {total:3} = {solved / total:6.1%}")
    run.record.save(scores=scores)
    return scores


def verify_submission(submission, n_test_inputs):
    """Verify a submission: exactly the tasks in {task: number of test inputs}, two grids for each test input.

    Raises ValueError naming what is wrong.
    """
    if different := sorted(set(submission) ^ set(n_test_inputs)):
        raise ValueError(f"submission: tasks missing or too many: {', '.join(different)}")
    for task, answers in submission.items():
        if len(answers) != n_test_inputs[task]:
            raise ValueError(f"submission: {task} has {len(answers)} answers for {n_test_inputs[task]} test inputs")
        for i, answer in enumerate(answers):
            if sorted(answer) != sorted(ATTEMPTS):
                raise ValueError(f"submission: {task}, test input {i}: has {sorted(answer)} instead of {ATTEMPTS}")
            for attempt, grid in answer.items():
                if not _is_grid(grid):
                    raise ValueError(f"submission: {task}, test input {i}, {attempt} is no grid: {str(grid)[:80]}")


def _is_grid(grid):
    """Tell whether a value is a list of 1..30 equally long rows of 1..30 colours."""
    return (isinstance(grid, list) and 1 <= len(grid) <= 30 and all(isinstance(row, list) for row in grid)
            and len({len(row) for row in grid}) == 1 and 1 <= len(grid[0]) <= 30
            and all(type(cell) is int and 0 <= cell <= 9 for row in grid for cell in row))


def score_submission(submission, solutions):
    """Score a submission against the solutions {task: [grid per test input]}; what is not answered is not solved.

    Returns {rule: (solved, total)} for the rules per task, per test input and all-or-nothing.
    """
    per_task = per_input = whole = 0
    for task, grids in solutions.items():
        answers = submission.get(task, [])
        solved = sum(any(np.array_equal(answer[attempt], grid) for attempt in ATTEMPTS)
                     for answer, grid in zip(answers, grids, strict=False))
        per_task += solved / len(grids)
        per_input += solved
        whole += solved == len(grids)
    n_tasks, n_inputs = len(solutions), sum(map(len, solutions.values()))
    totals = {"per task": n_tasks, "per test input": n_inputs, "all-or-nothing": n_tasks}
    return dict(zip(totals, zip((per_task, per_input, whole), totals.values(), strict=True), strict=True))
