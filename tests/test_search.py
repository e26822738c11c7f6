"""The engine against brute force on scripted models, and against the plain search on random ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MistralConfig, MistralForCausalLM

import search_requests
from plain_search import dfs, reply_nll
from search import Engine, EngineSettings
from search_requests import Find, Score
from small_models import ScriptedModel, serve_scripted_models, small_mini, small_model
from test_plain_search import as_dict, assert_same_replies, brute_force, random_table
from tree_attention import slot_bytes

END = 0


def find(engine, prompts, min_prob=0.05, max_new_tokens=6, guess_for=None, ends=(END,)):  # noqa: PLR0913
    """Return the replies to prompts as dicts {tokens: NLL}, in one job."""

    def job():
        return (yield Find(prompts, min_prob, max_new_tokens, frozenset(ends), guess_for))

    [(index, found)] = engine.serve([job()])
    assert index == 0 and all(sorted(nll for _, nll in replies) == [nll for _, nll in replies] for replies in found)
    return [{tuple(tokens): nll for tokens, nll in replies} for replies in found]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.integers(2, 5), min_prob=st.sampled_from([0.3, 0.1, 0.03, 0.005]),
       prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=5),
       guess=st.none() | st.lists(st.integers(0, 4), max_size=8), draft_rows=st.integers(1, 4),
       rows=st.integers(1, 40), slots=st.integers(30, 400), overlap=st.booleans())  # fmt: skip
def test_engine_equals_brute_force_with_any_draft_and_any_memory(  # noqa: PLR0913
    seed, vocab, min_prob, prompts, guess, draft_rows, rows, slots, overlap
):
    table = random_table(seed, vocab, 3)
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch, slots, rows)
        engine = Engine(ScriptedModel(table), EngineSettings(draft_rows=draft_rows))
        engine.overlap = overlap
        guess_for = None if guess is None else lambda i, found: guess and [token % vocab for token in guess]
        found = find(engine, prompts, min_prob, 6, guess_for)
        assert engine.store.free == engine.store.total
    for prompt, replies in zip(prompts, found, strict=True):
        assert_same_replies(replies, brute_force(table, prompt, {END}, 6, vocab), min_prob)


def test_scores_of_explored_and_unexplored_replies_are_exact():
    table = random_table(3, 4, 2)
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch)
        engine = Engine(ScriptedModel(table))
        prompts, everything = [(1, 2), (2, 1, 3), (3,)], {}
        for prompt in prompts:
            everything[prompt] = brute_force(table, prompt, {END}, 4, 4)
        pairs = [(prompt, reply) for prompt in prompts for reply in everything[prompt]] + [((1, 1), (2, 3, END))]

        def job():
            found = yield Find(prompts[:2], 0.05, 4, frozenset([END]))
            before = engine.stats.rows
            nlls = yield Score(pairs)
            again = yield Score(pairs[:10])
            return found, nlls, again, engine.stats.rows - before

        [(_, (found, nlls, again, rows))] = engine.serve([job()])
    assert all(found) and again == nlls[:10]
    assert rows < sum(len(reply) for _, reply in pairs) * 0.6  # shared beginnings run once
    for (prompt, reply), nll in zip(pairs[:-1], nlls[:-1], strict=True):
        assert nll == pytest.approx(everything[prompt][reply], abs=1e-5)
    expected = [(1, 1), (1, 1, 2), (1, 1, 2, 3)]
    expected = [-torch.tensor(table(prefix)).float().log_softmax(-1)[token].item()
                for prefix, token in zip(expected, (2, 3, END), strict=True)]  # fmt: skip
    assert nlls[-1] == pytest.approx(sum(expected), abs=1e-5)


@pytest.mark.parametrize("slots", [10**6, 2048, 1024, 512])
@pytest.mark.parametrize("kind", ["llama", "mini"])
def test_real_models_give_the_plain_searchs_replies_and_scores_in_any_memory(kind, slots):
    rng = np.random.default_rng(0)
    if kind == "mini":
        model, end = small_mini()[0], 2
        prompts = [[1, 14, *rng.integers(3, 13, rng.integers(20, 260)).tolist(), 13, 15] for _ in range(5)]
    else:
        model, end = small_model(6), END
        prompts = [[1, *rng.integers(1, 6, rng.integers(20, 260)).tolist()] for _ in range(4)] + [[3]]
    lines = []
    engine = Engine(model, EngineSettings(memory_limit=slots * slot_bytes(model), draft_rows=3), lines.append)
    expected = [as_dict(dfs(model, prompt, end, 6, 0.01)) for prompt in prompts]

    def job(prompts):
        found = yield Find(prompts, 0.01, 6, frozenset([end]), lambda i, found: next(iter(found.values()))[0][0])
        replies = [tokens for tokens, _ in found[0][:4]]
        return found, (yield Score([(prompt, tokens) for prompt in prompts for tokens in replies])), replies

    results = dict(engine.serve([job(prompts), job(prompts[:2])]))
    assert set(results) == {0, 1} and engine.store.free == engine.store.total
    for index, several in ((0, prompts), (1, prompts[:2])):
        found, nlls, replies = results[index]
        for replies_found, wanted in zip(found, expected[: len(several)], strict=True):
            assert_same_replies({tuple(tokens): nll for tokens, nll in replies_found}, wanted, 0.01, 1e-4)
        wanted = [reply_nll(model, prompt, reply) for prompt in several for reply in replies]
        assert nlls == pytest.approx(wanted, abs=1e-4) and len(wanted) >= 2
    tight = engine.stats.dropped_views + engine.stats.restarted_views + engine.stats.plain_views
    assert tight == 0 if slots == 10**6 else tight > 0 or slots == 2048
    assert any(f"{engine.store.total} slots" in line for line in lines)
    if slots == 512:
        assert any("plain search" in line for line in lines) == (engine.stats.plain_views > 0)


def test_beyond_the_attention_window_the_plain_search_answers():
    model = small_model(6, kinds=(MistralConfig, MistralForCausalLM))
    model.config.sliding_window = 16
    prompts = [[1, 2, 3, 4], [1, *[2, 3] * 8]]
    engine = Engine(model)
    found = find(engine, prompts, 0.02, 5)
    assert engine.stats.plain_views == 1
    for prompt, replies in zip(prompts, found, strict=True):
        assert_same_replies(replies, as_dict(dfs(model, prompt, END, 5, 0.02)), 0.02, 1e-4)


@pytest.mark.parametrize("min_prob", [0.3, None])
def test_drafts_save_passes_and_change_nothing(min_prob):
    """A known answer runs in one pass; a reply that repeats itself is looked up."""
    answer = [1, 2, 3, 1, 2, 4] * 4 + [END]

    def table(prefix):
        done = len(prefix) - 2
        return [8.0 if token == answer[min(done, 24)] else 0.0 for token in range(5)]

    passes = {}
    for name, guess, lookup in (("none", None, False), ("lookup", None, True), ("answer", answer, False)):
        with pytest.MonkeyPatch.context() as patch:
            serve_scripted_models(patch)
            engine = Engine(ScriptedModel(table), EngineSettings(lookup=lookup, draft_rows=4))
            guess_for = (lambda i, found: answer) if guess else None
            found = find(engine, [[1, 1], [2, 2]], min_prob, 40, guess_for)
        assert [list(replies) for replies in found] == [[tuple(answer)]] * 2
        passes[name] = engine.stats.passes
        assert (engine.stats.accepted > 0) == (name != "none")
    assert passes["none"] == 25 and passes["lookup"] < 15 and passes["answer"] == 26  # 25 for the first, then one


def test_the_same_prompt_twice_and_several_jobs():
    table = random_table(5, 3, 2)
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch)
        engine = Engine(ScriptedModel(table))
        found = find(engine, [[1], [2], [1]], 0.1, 4)
        assert found[0] == found[2] and engine.stats.prompt_rows == 0
        assert find(engine, [], 0.1, 4) == []


def branching(prompt_length, reply_length, every):
    """Return a table: a long reply that may begin anew in another way after each so many tokens."""
    def table(prefix):
        depth = len(prefix) - prompt_length
        logits = [0.0] * 5
        logits[END if depth >= reply_length else 1 + depth * depth % 3] = 20.0
        if depth % every == every // 2 and depth < reply_length:
            logits[4] = 18.8
        return logits

    return table


def test_where_memory_is_short_few_searches_begin_anew():
    prompts, slots = [[1 + i % 4, 1 + i // 4, *[2] * 98] for i in range(24)], 2400  # of about 8,000
    results, rows = [], []
    for total in (10**6, slots):
        with pytest.MonkeyPatch.context() as patch:
            serve_scripted_models(patch, total, 256)
            engine = Engine(ScriptedModel(branching(100, 120, 40)), EngineSettings(draft_rows=4))
            jobs = (find_job(prompts[i : i + 4]) for i in range(0, 24, 4))
            results.append(dict(engine.serve(jobs)))
            rows.append(engine.stats.prompt_rows)
            assert engine.store.free == engine.store.total
    assert results[0] == results[1] and all(len(replies) > 1 for found in results[0].values() for replies in found)
    assert engine.stats.restarted_views > 0 and rows[0] == 24 * 99 and rows[1] < 3 * rows[0]


def find_job(prompts):
    return (yield Find(prompts, 0.05, 130, frozenset([END])))


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_queue_that_has_none_now_is_asked_again(at_once):
    under_way, done = set(), []

    def jobs():
        for i in range(5):
            while len(under_way) >= at_once:
                yield None
            under_way.add(i)
            yield find_job([[1, 2, 1 + i % 4]])

    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch)
        for i, _ in Engine(ScriptedModel(random_table(5, 3, 2))).serve(jobs()):
            under_way.remove(i)
            done.append(i)
    assert sorted(done) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("lengths", "plain"), [([60] * 32, 0), ([60] * 31 + [600], 1)])
def test_a_pass_without_memory_limits_others_by_its_own_size(lengths, plain):
    """Passes of up to 500 rows have memory: afterwards they have half of the rows of the last one that had not."""
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch, 10**6, 4096)
        engine = Engine(ScriptedModel(random_table(5, 3, 2)), EngineSettings(draft_rows=1))
        launch = engine._launch

        def scarce(works):
            if sum(len(work.pieces()[0]) for work in works) > 500:
                raise torch.OutOfMemoryError("no room")
            return launch(works)

        engine._launch = scarce
        find(engine, [[1 + i % 4, 1 + i // 4, *[2] * (n - 2)] for i, n in enumerate(lengths)], 0.3, 3)
    assert engine.stats.plain_views == plain and 240 <= engine.max_rows <= 500


def test_a_prompt_for_which_no_memory_suffices_ends_nothing(monkeypatch):
    def no_room(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(search_requests, "dfs", no_room)
    monkeypatch.setattr(search_requests, "reply_nll", no_room)
    finds, scores, lines = [], [], []

    def job(prompts):
        finds.append(Find(prompts, 0.05, 6, frozenset([END])))
        found = yield finds[-1]
        scores.append(Score([(prompt, [1, END]) for prompt in prompts]))
        return found, (yield scores[-1])

    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch, 64, 64)
        engine = Engine(ScriptedModel(random_table(5, 3, 2)), EngineSettings(draft_rows=1), lines.append)
        results = dict(engine.serve(map(job, ([[1, 2], [1] * 100], [[2, 1]]))))
    (found, nlls), (other, other_nlls) = results[0], results[1]
    assert found[0] and other[0] and math.isfinite(nlls[0]) and math.isfinite(other_nlls[0])
    assert found[1] == [] and nlls[1] == math.inf and engine.stats.failed_views == 2
    assert [request.complete for request in (*finds, *scores)] == [False, True, False, True]
    assert sum("left without an answer" in line for line in lines) == 2


def test_a_reply_is_scored_in_the_place_of_the_searchs_nodes():
    prompt, reply = [1, 2, *[3] * 98], [1 + i % 4 for i in range(60)]

    def job(nodes):
        yield Find([prompt], 0.02, 40, frozenset([END]))
        nodes.append(len(engine.jobs[0].trees[tuple(prompt)].tokens))
        return (yield Score([(prompt, reply)]))

    results, nodes = [], []
    for slots in (10**6, 200):
        with pytest.MonkeyPatch.context() as patch:
            serve_scripted_models(patch, slots, 64)
            engine = Engine(ScriptedModel(branching(100, 50, 20)), EngineSettings(draft_rows=4))
            results += [nlls for _, nlls in engine.serve([job(nodes)])]
            assert engine.stats.plain_views == 0
    assert results[0] == pytest.approx(results[1]) and min(nodes) > 200 - 100 - 60


def test_bad_requests_and_models_are_refused():
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch)
        engine = Engine(ScriptedModel(lambda prefix: [math.nan, 1.0]))
        with pytest.raises(FloatingPointError, match="NaN"):
            find(engine, [[1]])
        for options in ({"min_prob": 0}, {"min_prob": 1.5}, {"max_new_tokens": 0}):
            with pytest.raises(ValueError, match="min_prob"):
                find(engine, [[1]], **options)
        with pytest.raises(ValueError, match="empty"):
            find(engine, [[]])
        with pytest.raises(ValueError, match="empty"):
            list(engine.serve([iter_score()]))
    for name in ("memory_limit", "max_rows", "leaders", "draft_rows"):
        with pytest.raises(ValueError, match=name):
            EngineSettings(**{name: 0})


def iter_score():
    yield Score([([1], [])])
