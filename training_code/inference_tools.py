"""Inference: from the views of a task to its candidates with their scores, for one task or a whole dataset.

It owns the order of the steps: search every view, gather distinct grids, score them in scoring views. Who searches and
scores is the business of ``inference_requests``.

Terms: *candidate* = a distinct output grid, upright, with ``scores_inf`` {search view: NLL} of the views whose search
found it and ``scores_aug`` {scoring view: NLL}; *reply* = the text after a prompt, end token included.

Source: "The LLM ARChitect" (2024) and arXiv 2505.07859, sections on candidate generation and scoring.
"""

import functools
import hashlib
import itertools
import math

import numpy as np
from tqdm import tqdm

from arc_loader import TaskTooLongError
from arc_views import fmt_output, key_operations
from inference_requests import (Answering, FindReplies, ScoreReplies, find_candidates, run_jobs,
                                score_replies)
from plain_search import SearchStats, dfs, is_unsloth_model, logits_to_score
from prompt_inference import calc_score, infer_single
from result_cache import ResultCache

__all__ = [
    "ResultCache", "SearchStats", "calc_score", "dfs", "draw_scoring_views", "find_candidates", "infer_single",
    "infer_task", "inference_run", "is_unsloth_model", "logits_to_score", "score_replies",
]  # fmt: skip


# --- one test input --------------------------------------------------------------------------------------------------


def _md5_number(text):
    return int(hashlib.md5(text.encode()).hexdigest()[:6], 16)


_NO_SEED = "aug_score_opts has no seed, from which the scoring views are drawn: add one, for example seed=10000"


def draw_scoring_views(dataset, key, grid=None, *, seed=None, **augment):
    """Return the keys of the scoring views of one test input, drawn as published.

    Args:
        key: any key of the test input; its own view does not matter.
        grid: the candidate; None = one set of views for all candidates (the 2025 version).
        seed, augment: options of ``ArcDataset.augment``; hashes of test input and grid are added to the seed.

    Raises:
        ValueError: without a seed.
    """
    if seed is None:
        raise ValueError(_NO_SEED)
    name = key.split(".")[0]
    seed += _md5_number(name)
    if grid is not None:
        seed += _md5_number(str(_hashable(grid)))
    return list(dataset.change_keys([name]).augment(seed=seed, **augment).keys)


def _hashable(grid):
    return tuple(tuple(int(cell) for cell in row) for row in grid)


class _TestInput:
    """The views of one test input as they are searched, and the candidates that replies stand for."""

    def __init__(self, keys, dataset, fmt_opts, print_func, on_dropped):  # noqa: PLR0913
        self.dataset, self.print_func = dataset, print_func
        self.on_dropped = on_dropped or (lambda key, error: None)
        self.fmt_opts = {**fmt_opts, "len_name": "input"}
        self.views = dict(self.format_views(keys))  # {key as shown: prompt}
        self.keys = list(self.views)
        self.decode = functools.cache(lambda key, text: dataset.decode(text, fmt_opts["lines_sep"], key))

    def say(self, line):
        """Print a line, if lines are wanted."""
        if self.print_func is not None:
            self.print_func(line)

    def format_views(self, keys, reply=None):
        """Return [(key with the pairs that fit, prompt or (prompt, text of ``reply``))]; report what does not fit."""
        views = []
        for key in keys:
            try:
                key, fmt = self.dataset.get_task(key, reply=reply, **self.fmt_opts)
            except TaskTooLongError as error:
                self.say(f" ! {key}: left out. {error}")
                self.on_dropped(key, error)
                continue
            views.append((key, fmt["input"] if reply is None else (fmt["input"], fmt["reply"])))
        return views

    def candidates(self, found):
        """Return the candidates that ``found`` {index of a view: replies} holds, in order of first appearance."""
        candidates = {}
        for key, replies in ((key, found.get(i, ())) for i, key in enumerate(self.views)):
            for text, nll in replies:
                grid, correct, _ = self.decode(key, text)
                if grid is None:
                    continue
                fresh = {"output": grid, "correct": correct, "scores_inf": {}}
                scores = candidates.setdefault(_hashable(grid), fresh)["scores_inf"]
                scores[key] = min(nll, scores.get(key, math.inf))  # texts that differ can stand for one grid
        return list(candidates.values())

    def guess(self, i, found):
        """Return the best candidate so far as the reply in view i. Source: published ``infer_task``."""
        best = min(self.candidates(found), key=lambda candidate: min(candidate["scores_inf"].values()), default=None)
        return None if best is None else self.reply(self.keys[i], best["output"])

    def reply(self, key, grid):
        """Return the text that stands for an upright grid in a view."""
        return fmt_output(grid, self.fmt_opts["reply_end"], self.fmt_opts["lines_sep"], key_operations(key))

    def searched(self, grid):
        """Return [(key, (prompt, text of ``grid``))] of the searched views."""
        return [(key, (prompt, self.reply(key, grid))) for key, prompt in self.views.items()]

    def report(self, found):
        """Print a line per reply."""
        if self.print_func is None:
            return
        for i, key in enumerate(self.views):
            for j, (text, nll) in enumerate(found[i]):
                grid, _, info = self.decode(key, text)
                shape = "--x--" if grid is None else "{:>2}x{:<2}".format(*np.shape(grid))
                lengths = f"in:{self.dataset.count_tokens(self.views[key]):>5} out:{self.dataset.count_tokens(text):>4}"
                self.print_func(f" {lengths} {shape} p={math.exp(-nll):7.2%} {info} [{key}.out{j}]")


def infer_task(  # noqa: PLR0913
    keys, dataset, fmt_opts, aug_score_opts=None, pass_guess=True, print_func=print, *, model_tok,
    scoring_views="per_candidate", cache=None, model_id=None, on_dropped=None, search="tree", engine=None, **options,
):  # fmt: skip
    """Return the candidates of one test input, in order of first appearance.

    Args:
        keys: the views to search, all of one test input. A key that does not fit ``max_tokens`` even with one pair is
            reported and left out. Keys in results are those shown: with the pairs that fit.
        dataset: ``ArcDataset``. fmt_opts: prompt format; its ``max_tokens`` applies to the prompt.
        aug_score_opts: options of ``augment`` with a seed, for the scoring views; None = no scoring.
        pass_guess: whether the best candidate so far is the guess for the other views; speed only.
        print_func: takes a line per reply; None prints nothing.
        scoring_views: 'per_candidate' = drawn anew for each candidate (2024), 'shared' = drawn once per test input
            (2025), 'search' = the searched views (``aug_score_opts`` is not needed then).
        on_dropped: called as (key, error) for each view, searched or scoring, that does not fit and is left out.
        search: 'tree' = the engine (``search.py``), 'plain' = one prompt after the other (which is also how
            ``model.generate`` replies unless greedily); speed only, up to rounding.
        engine: ``search.EngineSettings``. model_tok, cache, model_id, options: as of ``infer_single``.

    Returns:
        list of {'output': grid, 'correct': True/False/None, 'scores_inf': {key: NLL}, 'scores_aug': {key: NLL}}, the
        last one only with scoring. Replies that stand for no grid are dropped.

    Raises:
        ValueError: for another ``scoring_views`` or ``search``, or scoring views to draw without a seed.

    Source: published function of this name. differs: a reply that the search has already weighed in a scoring view is
    not scored again; views that are the same once their pairs are cut are searched once; views that do not fit are
    left out. Where scoring views are, all candidates are scored in the same number of views, the first of each, since
    the published rules add scores up. What remains: a candidate none of whose views fits has no scores, and equal
    views of one candidate count once, as published.
    """
    job = _task_job(keys, dataset, fmt_opts, aug_score_opts, pass_guess, print_func, scoring_views, on_dropped)
    answering = Answering(model_tok, cache, model_id, search, options, engine, print_func, share=0.25)
    [(_, candidates)] = run_jobs([job], answering)
    return candidates


def _task_job(keys, dataset, fmt_opts, aug_score_opts, pass_guess, print_func, scoring_views, on_dropped,  # noqa: PLR0913
              adapter=None):  # fmt: skip
    """Return the job of one test input, a generator whose value are the candidates; arguments as of ``infer_task``.

    adapter: name of the adapter to use, of several.
    """
    if scoring_views not in ("per_candidate", "shared", "search"):
        raise ValueError(f"scoring_views is 'per_candidate', 'shared' or 'search', not {scoring_views!r}")
    if scoring_views != "search" and aug_score_opts and aug_score_opts.get("seed") is None:
        raise ValueError(_NO_SEED)  # before the search

    def views_of(candidate):
        grid = candidate["output"] if scoring_views == "per_candidate" else None
        return draw_scoring_views(dataset, keys[0], grid, **aug_score_opts)

    def steps():
        test_input = _TestInput(keys, dataset, fmt_opts, print_func, on_dropped)
        prompts = list(test_input.views.values())
        found = yield FindReplies(prompts, test_input.guess if pass_guess else None, adapter)
        found = dict(enumerate(found))
        test_input.report(found)
        candidates = test_input.candidates(found)
        known = {}
        for i, replies in found.items():
            for text, nll in replies:
                known.setdefault((prompts[i], text), nll)  # the best, where several tokens stand for one text
        if scoring_views == "search":
            formatted = [test_input.searched(candidate["output"]) for candidate in candidates]
            yield from _score(candidates, formatted, known, adapter)
        elif aug_score_opts:
            formatted = [test_input.format_views(views_of(c), reply=c["output"]) for c in candidates]
            yield from _score(candidates, _equally_many(test_input, formatted), known, adapter)
        return candidates

    return steps()


def _equally_many(test_input, formatted):
    """Return the views of all candidates, cut to as many as the candidate with the fewest has."""
    fewest = min((len(views) for views in formatted if views), default=0)
    if any(len(views) > fewest for views in formatted):
        test_input.say(f" ! scored in {fewest} views per candidate, as not all scoring views fit")
    return [views[:fewest] for views in formatted]


def _score(candidates, formatted, known, adapter):
    """Add ``scores_aug`` to the candidates, in one request for all of them.

    A view for which memory did not suffice is left out, and then as many of all candidates.

    Args:
        formatted: per candidate [(key of a scoring view, (prompt, reply))].
        known: {(prompt, reply): NLL} that the search has already worked out. adapter: as of ``_task_job``.
    """
    views = [dict(pairs) for pairs in formatted]
    missing = list(dict.fromkeys(pair for pairs in views for pair in pairs.values() if pair not in known))
    nlls = yield ScoreReplies(missing, adapter)
    known = {**known, **dict(zip(missing, nlls, strict=True))}
    if failed := {key for pairs in views for key, pair in pairs.items() if known[pair] == math.inf}:
        views = [{key: pair for key, pair in pairs.items() if key not in failed} for pairs in views]
        fewest = min((len(pairs) for pairs in views if pairs), default=0)
        views = [dict(itertools.islice(pairs.items(), fewest)) for pairs in views]
    for candidate, pairs in zip(candidates, views, strict=True):
        candidate["scores_aug"] = {key: known[pair] for key, pair in pairs.items()}


# --- a whole dataset -------------------------------------------------------------------------------------------------


def inference_run(  # noqa: PLR0913
    dataset, fmt_opts, model_tok, min_prob=None, aug_score_opts=None, callback=None, cache=None, max_new_tokens=None,
    print_func=tqdm.write, progress=True, model_id=None, search="tree", engine=None, engine_stats=None, pass_guess=True,
    scoring_views="per_candidate", on_dropped=None, order=None, adapters=None, **options,
):  # fmt: skip
    """Search and score every test input of a dataset.

    Args:
        dataset: ``ArcDataset`` whose keys are the views to search.
        fmt_opts: prompt format; its ``max_tokens`` holds for prompt and reply together.
        model_tok: as of ``infer_single``. min_prob: threshold of the search; None = the most probable reply of each
            view, the greedy one of ``model.generate``, or what further ``options`` of it ask for.
        aug_score_opts: as of ``infer_task``.
        callback: called as (candidates, name='<task>_<i>', value=1 / number of test inputs, print_func=...) after each
            test input; how it sorts the candidates in place decides the attempts.
        cache: a ``ResultCache`` or published-style decorator; None = nothing is kept.
        max_new_tokens: most tokens of a reply; None = what a 30 x 30 grid needs in this format.
        print_func: takes the lines to print; None prints nothing.
        progress: whether to show a bar over the test inputs with the time left.
        search, engine: as of ``infer_task``; the engine serves as many test inputs at once as fit in memory, so
            callbacks come in the order in which these are finished. engine_stats: a dict to add its counters to.
        model_id: identity of the model; None = worked out once, which loads the model, if there is a cache.
        order: iterable of names of tasks, asked for the next when there is room: only these are answered. None among
            them says that there is none now, but will be when a task under way has been given to the callback.
        adapters: ``adapter_rows.AdapterRows`` of the model, entered: each task uses the one of its name.
        pass_guess, scoring_views, on_dropped: as of ``infer_task``. options: others of ``infer_single``.

    Returns:
        {task: [candidates per test input]}, [] where nothing was found or nothing fits.

    Raises:
        ValueError: when ``max_tokens`` leaves no room for a prompt; as of ``infer_task``.

    Source: published function of this name. differs: with a cache, a function ``model_tok`` is called for the model's
    identity even if all results are kept (give ``model_id`` to avoid that; without ``min_prob`` it is called anyway).
    """
    if max_new_tokens is None:
        max_new_tokens = dataset.max_new_tokens(**fmt_opts)
    if fmt_opts.get("max_tokens") is not None:
        room = fmt_opts["max_tokens"] - max_new_tokens
        if room <= 0:
            raise ValueError(f"max_tokens={fmt_opts['max_tokens']} is for prompt and reply together and must be more "
                             f"than max_new_tokens={max_new_tokens}, the room that the reply needs")  # fmt: skip
        fmt_opts = {**fmt_opts, "max_tokens": room}
    options.update(min_prob=min_prob, max_new_tokens=max_new_tokens)
    queries = dataset.grouped_keys()
    n_inputs = sum(map(len, queries.values()))
    engine_stats = {} if engine_stats is None else engine_stats
    answering = Answering(model_tok, cache, model_id, search, options, engine, print_func,
                          min(1.0, (1 + n_inputs) / 8), engine_stats, adapters)  # fmt: skip
    results, inputs = {}, []

    def jobs():
        for task in queries if order is None else order:
            if task is None:
                yield None
                continue
            results[task] = [None] * len(queries[task])
            for i, keys in enumerate(queries[task]):
                inputs.append((task, i))
                yield _task_job(keys, dataset, fmt_opts, aug_score_opts, pass_guess, print_func, scoring_views,
                                on_dropped, task if adapters is not None else None)  # fmt: skip

    with tqdm(total=n_inputs, desc="inference", disable=not progress) as bar:
        for index, candidates in run_jobs(jobs(), answering):
            task, i = inputs[index]
            results[task][i] = candidates
            if callback is not None:
                say = print_func or (lambda line: None)
                callback(candidates, name=f"{task}_{i}", value=1 / len(queries[task]), print_func=say)
            bar.update()
    return results
