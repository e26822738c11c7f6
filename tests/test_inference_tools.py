"""The seam, the result cache, and whole inference runs on a scripted model whose answers are known."""

import json
import math
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diskcache
import numpy as np
import pytest
import torch

import inference_tools
import inference_requests
import prompt_inference
from arc_loader import ArcDataset
from inference_tools import (ResultCache, SearchStats, calc_score, draw_scoring_views, find_candidates,
                             infer_single, infer_task, inference_run, score_replies)
from mini_model import MINI_FORMAT
from selection import EvalTool, mul_all_prob
from small_models import CopyModel, closing, serve_scripted_models, small_mini

DATA = Path(__file__).parent / "data"


@pytest.fixture(autouse=True)
def scripted_models_run_on_the_engine(monkeypatch):
    serve_scripted_models(monkeypatch)


@pytest.mark.parametrize("kind", ["tree", "plain"])
def test_find_candidates_serves_a_set_and_asks_for_guesses(kind, monkeypatch):
    monkeypatch.undo()  # a real model
    model_tok, asked = small_mini(), []
    prompts = ["I1\nO", "I2\nO", "I3\nO"]

    def guess_for(i, found):
        asked.append((i, sorted(found)))
        return found[min(found)][0][0] if found else None

    options = dict(min_prob=0.002, max_new_tokens=5)
    found = find_candidates(prompts, model_tok, guess_for, search=kind, **options)
    for replies, prompt in zip(found, prompts, strict=True):
        plain = infer_single(prompt, model_tok, **options)
        assert [text for text, _ in replies] == [text for text, _ in plain] != []
        assert [nll for _, nll in replies] == pytest.approx([nll for _, nll in plain], abs=1e-4)
    assert asked == ([(1, [0]), (2, [0])] if kind == "tree" else [(0, []), (1, [0]), (2, [0, 1])])


# --- cache -----------------------------------------------------------------------------------------------------------


def published_cache(path):
    return diskcache.Cache(str(path)).memoize(typed=True, ignore=set(["model_tok", "guess"]))  # as published scripts do


def used_up():
    raise AssertionError("the model is not needed when the result is kept")


@pytest.mark.parametrize("make_cache", [ResultCache, published_cache])
def test_cache_keeps_results_apart_by_model_and_options(make_cache, tmp_path):
    cache = make_cache(tmp_path / "cache")
    models = [small_mini(seed) for seed in (0, 1)]
    options = dict(min_prob=0.002, max_new_tokens=5)
    plain = [infer_single("I1\nO", model_tok, **options) for model_tok in models]
    scores = [calc_score("I1\nO", "2", model_tok) for model_tok in models]
    assert plain[0] != plain[1] and scores[0] != scores[1]
    for _ in range(2):
        assert [infer_single("I1\nO", model_tok, cache=cache, **options) for model_tok in models] == plain
        assert [calc_score("I1\nO", "2", model_tok, cache=cache) for model_tok in models] == scores
    other = infer_single("I1\nO", models[0], cache=cache, min_prob=0.3, max_new_tokens=5)
    assert len(other) < len(plain[0]) > 1

    kept = infer_single("I1\nO", models[0], cache=cache, model_id="known", guess="2", **options)
    assert [text for text, _ in kept] == [text for text, _ in plain[0]]
    again = infer_single("I1\nO", used_up, cache=cache, model_id="known", guess="3", **options)
    assert again == kept and all(isinstance(reply, tuple) for reply in again)
    with pytest.raises(AssertionError, match="not needed"):
        infer_single("I2\nO", used_up, cache=cache, model_id="known", **options)


def test_published_style_call_gives_equal_results_before_and_after(tmp_path):
    model_tok = small_mini()
    call = dict(prompt="I1\nO", guess=None, min_prob=0.002, max_new_tokens=5, model_id="m")
    plain = infer_single(model_tok=model_tok, **call)
    first, cache = ResultCache(tmp_path)(infer_single)(model_tok=model_tok, **call), ResultCache(tmp_path)
    assert first == cache(infer_single)(model_tok=used_up, **call) == plain != []
    assert len(cache) == 1
    cache.close()


def test_cache_keys_are_readable_text_and_values_json(tmp_path):
    cache = ResultCache(tmp_path)
    ignored = dict(guess="x", model_tok=1, cache=2, stats=3)
    key = cache.key(infer_single, dict(prompt="I1\nO", model_id="abc", min_prob=0.1, **ignored))
    assert key == 'infer_single {"min_prob": 0.1, "model_id": "abc", "prompt": "I1\\nO"}'
    with pytest.raises(TypeError, match="processor=.* cannot be part of a cache key"):
        cache.key(infer_single, dict(prompt="p", processor=object()))
    with pytest.raises(ValueError, match="exclude each other"):
        infer_single("p", None, cache=cache, stats=SearchStats(), min_prob=0.1)


def test_numpy_numbers_are_numbers_in_a_key_and_with_closes_the_cache(tmp_path):
    model_tok = small_mini()
    with ResultCache(tmp_path) as cache:
        keys = {cache.key(infer_single, dict(max_new_tokens=n, min_prob=p))
                for n, p in [(5, 0.25), (np.int64(5), np.float32(0.25)), (np.int32(5), np.float64(0.25))]}  # fmt: skip
        assert keys == {'infer_single {"max_new_tokens": 5, "min_prob": 0.25}'}
        options = dict(min_prob=np.float32(0.002), max_new_tokens=np.int64(5))
        kept = infer_single("I1\nO", model_tok, cache=cache, **options)
        assert kept == infer_single("I1\nO", model_tok, **options) != []
        closed = []
        cache._store.close = lambda: closed.append(True)
    assert closed


@pytest.mark.parametrize("make_cache", [ResultCache, published_cache])
def test_cache_keeps_end_tokens_and_recommended_generation_apart(make_cache, tmp_path):
    cache, (model, tokenizer), (_, other) = make_cache(tmp_path), closing(*small_mini(2), strength=1.0), small_mini()
    other.eos_token = "\n"
    for options in [dict(min_prob=0.01, max_new_tokens=4),
                    dict(max_new_tokens=12, num_beams=8, num_return_sequences=4)]:  # fmt: skip
        plain = [infer_single("I1\nO", (model, tok), **options) for tok in (tokenizer, other)]
        assert plain[0] != plain[1]
        for _ in range(2):
            kept = [infer_single("I1\nO", (model, tok), cache=cache, **options) for tok in (tokenizer, other)]
            assert kept == plain
    model.generation_config.suppress_tokens = [tokenizer.convert_tokens_to_ids("8")]
    changed = infer_single("I1\nO", (model, tokenizer), **options)
    assert changed != plain[0] and infer_single("I1\nO", (model, tokenizer), cache=cache, **options) == changed


@pytest.mark.parametrize("min_prob", [0.01, None])
def test_a_training_that_sets_token_ids_keeps_the_cache(min_prob, tmp_path):
    model, tokenizer = closing(*small_mini(), strength=1.0)
    options = dict(min_prob=min_prob, max_new_tokens=4)
    with ResultCache(tmp_path) as cache:
        infer_single("I1\nO", (model, tokenizer), cache=cache, **options)
        for part in (model.config, model.generation_config):
            part.eos_token_id = [tokenizer.eos_token_id]
        infer_single("I1\nO", (model, tokenizer), cache=cache, **options)
        assert len(cache) == 1


def test_identity_is_worked_out_once_for_a_set(dataset, tmp_path, monkeypatch):
    worked_out = []
    monkeypatch.setattr(prompt_inference, "model_identity", lambda model: worked_out.append(model) or "x")
    model = CopyModel()
    model_tok, search = (model, model.tokenizer), dict(min_prob=0.1, max_new_tokens=20, cache=ResultCache(tmp_path))
    calls = [
        lambda: infer_task(["aaaa0001_0", "aaaa0001_0.tp"], dataset, MINI_FORMAT, AUGMENT, model_tok=model_tok,
                           **QUIET, **search),
        lambda: find_candidates(["I1\nO", "I2\nO"], model_tok, **search),
        lambda: score_replies([("I1\nO", "2"), ("I1\nO", "3")], model_tok, cache=search["cache"]),
        lambda: inference_run(dataset, MINI_FORMAT, model_tok, aug_score_opts=AUGMENT, progress=False,
                              **QUIET, **search),
    ]  # fmt: skip
    for call in calls:
        worked_out.clear()
        call()
        assert len(worked_out) == 1


def test_cache_refuses_pickles(tmp_path):
    foreign = diskcache.Cache(str(tmp_path))
    foreign.set('infer_single {"prompt": "p"}', {"pickled": True})
    foreign.close()
    with pytest.raises(ValueError, match="pickled"):
        ResultCache(tmp_path)(infer_single)(prompt="p", model_tok=used_up)


def test_cache_survives_a_killed_process(tmp_path):
    code = """
import sys; sys.path.insert(0, sys.argv[2])
from inference_tools import ResultCache
def slow(i): return [["x" * 40000, float(i)]]
cache = ResultCache(sys.argv[1])(slow)
for i in range(10**6):
    cache(i=i)
    print(i, flush=True)
"""
    source = str(Path(inference_tools.__file__).parent)
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), source], stdout=subprocess.PIPE, text=True)
    done = [int(process.stdout.readline()) for _ in range(30)]
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()

    def slow(i):
        return [["x" * 40000, float(i)]]

    cache = ResultCache(tmp_path)
    assert len(cache) >= len(done)
    for i in range(len(cache) + 3):  # kept ones and new ones
        assert cache(slow)(i=i) == [("x" * 40000, float(i))]


# --- a task and a dataset --------------------------------------------------------------------------------------------


def pair(*rows):
    return {"input": [list(row) for row in rows], "output": [list(row) for row in rows]}


TASKS = {
    "aaaa0001": {
        "train": [pair([1, 2, 3]), pair([4, 5], [6, 7]), pair([2, 0])],
        "test": [{"input": [[1, 2, 3], [4, 5, 6]]}],
    },
    "bbbb0002": {"train": [pair([8, 8]), pair([9])], "test": [{"input": [[3, 1]]}, {"input": [[7, 8, 8]]}]},
}
SOLUTIONS = {
    "aaaa0001": [[[1, 2, 3], [4, 5, 6]]],
    "bbbb0002": [[[1, 3]], [[7, 8, 8]]],
}
AUGMENT = dict(tp="all", rt="all", perm=True, shfl_ex=True, seed=10000)
QUIET = dict(print_func=lambda line: None)


@pytest.fixture
def dataset():
    return ArcDataset(TASKS, SOLUTIONS, is_orig=True)


def grids(candidates):
    return [np.asarray(candidate["output"]).tolist() for candidate in candidates]


def test_infer_task_merges_views_into_candidates_with_their_scores(dataset):
    keys = [key for key in dataset.augment(**AUGMENT).keys if key.startswith("aaaa0001")]
    assert len(keys) == 8
    model = CopyModel()
    model_tok, search = (model, model.tokenizer), dict(min_prob=0.1, max_new_tokens=20)
    options = dict(model_tok=model_tok, aug_score_opts=AUGMENT, **QUIET, **search)
    right, turned = infer_task(keys, dataset, MINI_FORMAT, **options)
    assert grids([right, turned]) == [[[1, 2, 3], [4, 5, 6]], [[6, 5, 4], [3, 2, 1]]]
    assert (right["correct"], turned["correct"]) == (True, False)
    for candidate, share in [(right, 0.6), (turned, 0.25)]:
        assert list(candidate["scores_inf"]) == keys
        assert list(candidate["scores_aug"]) == draw_scoring_views(dataset, keys[0], candidate["output"], **AUGMENT)
        for nll in [*candidate["scores_inf"].values(), *candidate["scores_aug"].values()]:
            assert nll == pytest.approx(-math.log(share), abs=1e-3)

    calls = {}
    for kind, pass_guess in [("tree", False), ("plain", True), ("plain", False)]:
        model.calls = 0
        found = infer_task(keys, dataset, MINI_FORMAT, pass_guess=pass_guess, search=kind, **options)
        assert grids(found) == grids([right, turned])
        calls[kind, pass_guess] = model.calls
    assert calls["plain", False] - calls["plain", True] >= 7 * 7  # seven views, replies of eight tokens and more
    assert calls["tree", False] < calls["plain", True] / 4


def test_scores_are_absent_without_scoring(dataset):
    model = CopyModel()
    found = infer_task(["bbbb0002_1"], dataset, MINI_FORMAT, model_tok=(model, model.tokenizer), min_prob=0.2,
                       max_new_tokens=20, **QUIET)  # fmt: skip
    assert all("scores_aug" not in candidate for candidate in found)
    assert grids(found) == [[[7, 8, 8]], [[8, 8, 7]]]


def test_shared_scoring_views_and_search_views(dataset):
    keys = [key for key in dataset.augment(**AUGMENT).keys if key.startswith("bbbb0002_1")]
    model = CopyModel()
    options = dict(model_tok=(model, model.tokenizer), min_prob=0.1, max_new_tokens=20, aug_score_opts=AUGMENT, **QUIET)
    shared = infer_task(keys, dataset, MINI_FORMAT, scoring_views="shared", **options)
    assert [list(c["scores_aug"]) for c in shared] == [draw_scoring_views(dataset, keys[0], **AUGMENT)] * 2
    model.calls = 0
    infer_task(keys, dataset, MINI_FORMAT, **{**options, "aug_score_opts": None})
    searched, model.calls = model.calls, 0
    reused = infer_task(keys, dataset, MINI_FORMAT, scoring_views="search", **{**options, "aug_score_opts": None})
    assert model.calls == searched  # every candidate was weighed by the search in every view
    assert all(c["scores_aug"] == c["scores_inf"] and list(c["scores_aug"]) == keys for c in reused)
    with pytest.raises(ValueError, match="scoring_views"):
        infer_task(keys, dataset, MINI_FORMAT, scoring_views="none", **options)


@pytest.mark.parametrize("case", json.loads((DATA / "scoring_views_golden.json").read_text()))
def test_scoring_views_equal_the_published_ones(case):
    some = pair([1])
    tasks = {
        "00576224": {"train": [some] * 2, "test": [{"input": [[1]]}]},
        "12997ef3": {"train": [some] * 4, "test": [{"input": [[1]]}] * 2},
    }
    data = ArcDataset(tasks, is_orig=True)
    grid = np.array(case["candidate"])
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assert draw_scoring_views(data, case["key"], grid, seed=case["seed"], **case["options"]) == case["views"]
    assert np.random.get_state()[1].tolist() == before  # noqa: NPY002 - nobody's random numbers are touched
    shared = draw_scoring_views(data, case["key"], seed=case["seed"], **case["options"])
    assert shared != case["views"] and len(shared) == 8


def test_inference_run_end_to_end(dataset, tmp_path):
    model, calls = CopyModel(), []
    tool = EvalTool(2)

    def callback(res, name, value, print_func):
        calls.append((name, value))
        tool.process_result(res, name=name, value=value, print_func=print_func)

    views, lines, cache = dataset.augment(**AUGMENT), [], ResultCache(tmp_path)
    options = dict(dataset=views, fmt_opts=MINI_FORMAT, min_prob=0.1, aug_score_opts=AUGMENT, cache=cache,
                   callback=callback, print_func=lines.append, progress=False)  # fmt: skip
    results = inference_run(model_tok=lambda: (model, model.tokenizer), **options)
    assert sorted(calls) == [("aaaa0001_0", 1), ("bbbb0002_0", 0.5), ("bbbb0002_1", 0.5)]
    assert {task: len(inputs) for task, inputs in results.items()} == {"aaaa0001": 1, "bbbb0002": 2}
    assert tool.n_acc == [2] * 6 and tool.count == 2
    assert results["bbbb0002"][0][1]["correct"]  # the half turn is right there, and second
    assert sum("[aaaa0001_0.tp" in line for line in lines) >= 4
    submission = dataset.get_submission(results)
    assert dataset.validate_submission(submission) == 2
    assert np.asarray(submission["bbbb0002"][0]["attempt_2"]).tolist() == [[1, 3]]

    n_calls, kept = model.calls, len(cache)
    again = inference_run(model_tok=(model, model.tokenizer), **options)
    assert (model.calls, len(cache)) == (n_calls, kept) and kept > 0
    assert [[c["scores_aug"] for c in res] for res in again["bbbb0002"]] == [
        [c["scores_aug"] for c in res] for res in results["bbbb0002"]
    ]


def test_published_way_to_call_inference_run(dataset, tmp_path):
    model = CopyModel()
    eval_tool, loaded = EvalTool(n_guesses=2), []
    call = dict(fmt_opts=MINI_FORMAT, dataset=dataset.augment(**AUGMENT), min_prob=0.1, aug_score_opts=AUGMENT,
                callback=eval_tool.process_result)  # fmt: skip

    def load():
        loaded.append(True)
        return model, model.tokenizer

    results = inference_run(model_tok=(model, model.tokenizer), cache=published_cache(tmp_path / "a"), **call)
    assert dataset.validate_submission(dataset.get_submission(results)) == 2
    guess = results["aaaa0001"][0][0]
    assert guess["scores_alg"][eval_tool.sorting_algo] == mul_all_prob(guess)
    first = inference_run(model_tok=load, cache=published_cache(tmp_path / "b"), **call)
    n_calls, _ = model.calls, loaded.clear()
    again = inference_run(model_tok=load, cache=published_cache(tmp_path / "b"), **call)
    assert model.calls == n_calls and len(loaded) == 1  # called for the identity, the rest is kept
    for task in results:
        assert [[c["scores_alg"] for c in res] for res in again[task]] == [
            [c["scores_alg"] for c in res] for res in first[task]
        ] == [[c["scores_alg"] for c in res] for res in results[task]]


@pytest.mark.parametrize("generate", [{}, {"num_beams": 6, "num_return_sequences": 6}], ids=["greedy", "beams"])
@pytest.mark.parametrize("cached", [False, True])
def test_inference_run_by_generate(dataset, tmp_path, generate, cached, monkeypatch):
    monkeypatch.undo()  # a real model
    model_tok = closing(*small_mini(3), strength=1.0)
    views = dataset.augment(**AUGMENT)
    options = dict(max_new_tokens=12, **generate)
    results = inference_run(views, MINI_FORMAT, model_tok, aug_score_opts=AUGMENT, progress=False, print_func=None,
                            cache=ResultCache(tmp_path) if cached else None, **options)  # fmt: skip
    found = {}
    for key in views.keys:
        prompt = views.get_task(key, **MINI_FORMAT, len_name="input")[1]["input"]
        for text, nll in infer_single(prompt, model_tok, **options):
            grid, _, _ = dataset.decode(text, MINI_FORMAT["lines_sep"], key)
            if grid is not None:
                scores = found.setdefault((key.split(".")[0], str(grid.tolist())), {})
                scores[key] = min(nll, scores.get(key, math.inf))
    candidates = {(f"{task}_{i}", str(np.asarray(c["output"]).tolist())): c
                  for task, inputs in results.items() for i, res in enumerate(inputs) for c in res}  # fmt: skip
    assert len(found) >= 2 and found == {
        key: pytest.approx(candidate["scores_inf"], abs=1e-4) for key, candidate in candidates.items()}
    assert all(len(c["scores_aug"]) == 8 for c in candidates.values())


def test_a_whole_run_leaves_the_global_random_states_alone(dataset, tmp_path):
    model = CopyModel()

    def states():
        legacy = np.random.get_state()  # noqa: NPY002
        return random.getstate(), legacy[1].tolist(), legacy[2:], torch.get_rng_state().tolist()

    before = states()
    inference_run(dataset.augment(**AUGMENT), MINI_FORMAT, (model, model.tokenizer), 0.1, AUGMENT, progress=False,
                  callback=EvalTool(2).process_result, cache=ResultCache(tmp_path), print_func=None)  # fmt: skip
    assert states() == before


def test_options_that_cannot_work_are_refused_at_once(dataset):
    model = CopyModel()
    options = dict(dataset=dataset, model_tok=(model, model.tokenizer), min_prob=0.1, progress=False, print_func=None)
    for aug_score_opts in [{"tp": "all"}, {"tp": "all", "seed": None}]:
        with pytest.raises(ValueError, match="aug_score_opts has no seed"):
            inference_run(fmt_opts=MINI_FORMAT, aug_score_opts=aug_score_opts, max_new_tokens=20, **options)
    with pytest.raises(ValueError, match="aug_score_opts has no seed"):
        draw_scoring_views(dataset, "aaaa0001_0", tp="all")
    with pytest.raises(ValueError, match="max_tokens=20 .* more than max_new_tokens=20"):
        inference_run(fmt_opts={**MINI_FORMAT, "max_tokens": 20}, max_new_tokens=20, **options)
    assert model.calls == 0


def test_keys_that_do_not_fit_are_reported_and_the_others_go_on():
    wide = {"input": [[1] * 30] * 30, "output": [[2]]}
    tasks = {
        "aaaa0001": TASKS["aaaa0001"],
        "big00001": {"train": [wide], "test": [{"input": [[1, 2]]}, {"input": [[3]]}]},
        "mixed001": {"train": [wide, pair([1, 2])], "test": [{"input": [[5, 6]]}]},
    }
    data, model, lines, calls, dropped = ArcDataset(tasks, is_orig=True), CopyModel(), [], [], []
    keys = ["aaaa0001_0", "big00001_0", "big00001_1.tp", "mixed001_0.ex0-1", "mixed001_0.ex1-0"]
    results = inference_run(
        data.change_keys(keys), {**MINI_FORMAT, "max_tokens": 300}, (model, model.tokenizer), 0.2, AUGMENT,
        callback=lambda res, name, value, print_func: calls.append((name, value, len(res))),
        max_new_tokens=40, print_func=lines.append, progress=False, on_dropped=lambda *what: dropped.append(what),
    )  # fmt: skip
    assert results["big00001"] == [[], []]
    assert grids(results["mixed001"][0])[0] == [[5, 6]]
    assert list(results["mixed001"][0][0]["scores_inf"]) == ["mixed001_0.ex1"]  # the key as shown
    assert grids(results["aaaa0001"][0])[0] == [[1, 2, 3], [4, 5, 6]]
    assert sorted(calls) == [("aaaa0001_0", 1, 2), ("big00001_0", 0.5, 0), ("big00001_1", 0.5, 0), ("mixed001_0", 1, 2)]
    reported = [line for line in lines if "left out" in line]
    assert any("big00001_0" in line for line in reported) and any("mixed001_0.ex0-1:" in line for line in reported)
    assert all(candidate["scores_aug"] for candidate in results["mixed001"][0])
    assert [f" ! {key}: left out. {error}" for key, error in dropped] == reported
    assert {"big00001_0", "big00001_1.tp", "mixed001_0.ex0-1"} < {key for key, _ in dropped}  # scoring views too


def test_candidates_are_scored_in_equally_many_views_where_some_do_not_fit():
    wide = {"input": [[1] * 30] * 30, "output": [[2]]}
    tasks = {"mixed001": {"train": [wide, pair([1, 2]), pair([3, 4])], "test": [{"input": [[5, 6]]}]}}
    data, model = ArcDataset(tasks, is_orig=True), CopyModel((0.5, 0.3, 0.2))
    options = dict(model_tok=(model, model.tokenizer), min_prob=0.2, max_new_tokens=20)
    uneven = 0
    for seed in range(6):
        scoring, lines, fits = {**AUGMENT, "seed": seed}, [], []
        found = infer_task(["mixed001_0.ex1-2-0"], data, {**MINI_FORMAT, "max_tokens": 300}, scoring,
                           print_func=lines.append, **options)  # fmt: skip
        assert len(found) == 2
        for c in found:
            drawn = draw_scoring_views(data, "mixed001_0", c["output"], **scoring)
            fits.append([key for key in drawn if ".ex0" not in key])
        fewest = min(map(len, fits))
        for c, keys in zip(found, fits, strict=True):
            views = [key.split(".ex")[0] for key in c["scores_aug"]]
            assert views == [key.split(".ex")[0] for key in keys[:fewest]] and len(views) > 0
        differ = len(fits[0]) != len(fits[1])
        uneven += differ
        assert any(f"scored in {fewest} views per candidate" in line for line in lines) == differ
    assert uneven


def test_the_limit_is_for_prompt_and_reply_together():
    data, model = ArcDataset({"aaaa0001": {**TASKS["aaaa0001"], "train": [pair([1, 2, 3])]}}, is_orig=True), CopyModel()
    length = data.count_tokens(data.get_task("aaaa0001_0", **{**MINI_FORMAT, "max_tokens": None})[1]["input"])
    for room, n_found in [(20, 2), (19, 0)]:
        fmt_opts = {**MINI_FORMAT, "max_tokens": length + room}
        results = inference_run(data, fmt_opts, (model, model.tokenizer), 0.2, max_new_tokens=20, print_func=None)
        assert len(results["aaaa0001"][0]) == n_found


def test_errors_that_are_not_about_length_are_not_swallowed(dataset):
    model = CopyModel()
    with pytest.raises((ValueError, KeyError, IndexError)):
        infer_task(["aaaa0001_7"], dataset, MINI_FORMAT, model_tok=(model, model.tokenizer), min_prob=0.2,
                   max_new_tokens=20, **QUIET)  # fmt: skip


def test_the_solution_never_reaches_the_search(dataset):
    seen = []

    class Watching(CopyModel):
        def replies(self, prompt):
            seen.append(prompt)
            return super().replies(prompt)

    wrong = {**SOLUTIONS, "aaaa0001": [[[9, 9, 9, 9, 9]]]}
    model, keys = Watching(), ["aaaa0001_0", "aaaa0001_0.tp"]
    data = ArcDataset(TASKS, wrong, is_orig=True)
    stats = SearchStats()
    found = infer_task(keys, data, MINI_FORMAT, model_tok=(model, model.tokenizer), min_prob=0.2, max_new_tokens=20,
                       stats=stats, **QUIET)  # fmt: skip
    assert [c["correct"] for c in found] == [False, False]
    assert seen and not any("99999" in prompt for prompt in seen)
    assert stats.accepted_tokens > 0


def test_a_model_loaded_by_unsloth_is_left_to_the_plain_search(monkeypatch):
    """Its layers have an attention of their own; also when a function returns it."""
    model = CopyModel()
    model.model_tags, asked = ["unsloth"], []
    fast = SimpleNamespace(FastLanguageModel=SimpleNamespace(for_inference=lambda model: model))
    monkeypatch.setitem(sys.modules, "unsloth", fast)
    answer = [(np.array([3, 2]), 0.5)]
    monkeypatch.setattr(inference_requests, "dfs", lambda *prompt, **options: asked.append(prompt) or answer)
    found = find_candidates(["I1\nO", "I2\nO"], lambda: (model, model.tokenizer), min_prob=0.1, max_new_tokens=9)
    assert found == [[("0</s>", 0.5)]] * 2 and len(asked) == 2
