"""Greedy replies by the engine: those of ``model.generate``, for many prompts at once."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import inference_requests
import search_requests
from arc_loader import ArcDataset
from inference_tools import ResultCache, find_candidates, infer_single, inference_run
from mini_model import MINI_FORMAT
from plain_search import generate_replies, reply_nll
from prompt_inference import generates_greedily
from script_runs import CHALLENGES
from search import Engine, EngineSettings
from search_requests import Find, Score
from small_models import ScriptedModel, closing, serve_scripted_models, small_mini, small_model
from test_plain_search import as_dict, random_table
from test_search import END, find
from test_tree_attention import needs_gpu
from tree_attention import slot_bytes


def most_probable(table, prompt, max_new_tokens):
    """Return {the greedy reply: its NLL}, {} if it does not end in time; of equal logits the first counts."""
    reply, nll = (), 0.0
    while len(reply) < max_new_tokens:
        logp = torch.as_tensor(table((*prompt, *reply))).float().log_softmax(-1)
        reply, nll = (*reply, int(logp.argmax())), nll - float(logp.max())
        if reply[-1] == END:
            return {reply: nll}
    return {}


def coarse_table(seed, vocab):
    """Return logits of which many are equal."""
    table = random_table(seed, vocab, 1.5)
    return lambda prefix: np.round(table(prefix))


def assert_equal(found, expected, slack=1e-4):
    """Compare lists of replies as dicts {tokens: NLL}."""
    assert [list(replies) for replies in found] == [list(replies) for replies in expected]
    for replies, wanted in zip(found, expected, strict=True):
        assert list(replies.values()) == pytest.approx(list(wanted.values()), abs=slack)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), vocab=st.sampled_from([2, 3, 5, 600]), max_new_tokens=st.integers(1, 8),
       prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1, max_size=5),
       guess=st.none() | st.lists(st.integers(0, 4), max_size=8), draft_rows=st.integers(1, 4),
       rows=st.integers(1, 40), slots=st.integers(20, 400), overlap=st.booleans())  # fmt: skip
def test_greedy_is_the_chain_of_most_probable_tokens_with_any_draft_and_any_memory(  # noqa: PLR0913
    seed, vocab, max_new_tokens, prompts, guess, draft_rows, rows, slots, overlap
):
    table = coarse_table(seed, vocab)

    def replies_of(model, prompt, *_, max_new_tokens):
        return [(np.array(reply), nll) for reply, nll in most_probable(table, prompt, max_new_tokens).items()]

    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch, slots, rows)
        patch.setattr(search_requests, "generate_replies", replies_of)  # of trees that do not fit
        engine = Engine(ScriptedModel(table), EngineSettings(draft_rows=draft_rows))
        engine.overlap = overlap
        guess_for = None if guess is None else lambda i, found: guess and [token % vocab for token in guess]
        found = find(engine, prompts, None, max_new_tokens, guess_for)
        assert engine.store.free == engine.store.total
    assert_equal(found, [most_probable(table, prompt, max_new_tokens) for prompt in prompts], 1e-5)


def make(kind, seed):
    """Return (random model, its end tokens, prompts): most replies end within 24 tokens, some do not."""
    rng = np.random.default_rng(seed)
    if kind == "mini":
        model, tokenizer = closing(*small_mini(seed), strength=0.5)
        begin, ends, tokens, close = [1, 14], [tokenizer.eos_token_id], (3, 13), [13, 15]
    else:
        vocab, ends = {"llama": (6, [END]), "many tokens": (600, [*range(540, 600)])}[kind]
        model, begin, tokens, close = small_model(vocab, seed), [1], (1, 6), []
    return model, ends, [begin + rng.integers(*tokens, length).tolist() + close for length in rng.integers(3, 60, 12)]


def by_generate(model, ends, prompts):
    """Return the replies to prompts as dicts {tokens: NLL}."""
    return [as_dict(generate_replies(model, prompt, ends, ends[0], max_new_tokens=24)) for prompt in prompts]


def of_others(i, found):
    """Guess the reply to the first prompt that has one."""
    return next((replies[0][0] for replies in found.values()), None)


@pytest.mark.parametrize("kind", ["llama", "mini", "many tokens"])
def test_engine_equals_generate(kind):
    """With and without guesses and lookup, for replies that end and such that are cut off."""
    counts, accepted = Counter(), Counter()
    for seed in range(3):
        model, ends, prompts = make(kind, seed)
        expected = by_generate(model, ends, prompts)
        counts.update(map(len, expected))
        best = [next(iter(replies), None) for replies in expected]
        for name, guess_for in (("none", None), ("of others", of_others),
                                ("right", lambda i, found, best=best: best[i]), ("wrong", lambda i, found: [1] * 30)):
            for lookup in (False, True):
                engine = Engine(model, EngineSettings(memory_limit=2**22, draft_rows=4, lookup=lookup))
                assert_equal(find(engine, prompts, None, 24, guess_for, ends), expected)
                accepted[name, lookup] += engine.stats.accepted
    assert counts[0] and counts[1] > 12
    assert accepted["right", False] > accepted["of others", False] > accepted["none", False] == 0
    assert accepted["none", True]


@pytest.mark.parametrize("slots", [10**6, 300, 100])
def test_scoring_after_a_greedy_search_and_beside_a_threshold_search(slots):
    model, ends, prompts = make("llama", 1)
    engine = Engine(model, EngineSettings(memory_limit=slots * slot_bytes(model)))

    def job(min_prob):
        found = yield Find(prompts, min_prob, 24, frozenset(ends))
        replies = list(dict.fromkeys(tuple(tokens) for replies in found for tokens, _ in replies[:1]))
        return found, replies, (yield Score([(prompt, reply) for prompt in prompts for reply in replies]))

    results = dict(engine.serve([job(None), job(0.2), job(None)]))
    assert engine.stats.plain_views == 0 or slots < 10**6
    for index, min_prob in ((0, None), (1, 0.2), (2, None)):
        found, replies, nlls = results[index]
        wanted = find(Engine(model), prompts, min_prob, 24, ends=ends)
        assert_equal([{tuple(tokens): nll for tokens, nll in replies} for replies in found], wanted)
        wanted = [reply_nll(model, prompt, reply) for prompt in prompts for reply in replies]
        assert nlls == pytest.approx(wanted, abs=1e-4) and len(wanted) >= 24


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("kind", ["llama", "mini", "many tokens"])
@torch.no_grad()
def test_greedy_replies_on_the_gpu(kind, dtype, bound):
    """Every token is the most probable one of a plain forward pass, within rounding; graphs change nothing."""
    model, ends, prompts = make(kind, 0)
    model, ended = model.to("cuda", dtype), 0
    for graphs in (False, True):
        engine = Engine(model, EngineSettings(memory_limit=2**26, draft_rows=3, graphs=graphs))
        found = find(engine, prompts, None, 24, of_others, ends)
        assert (engine.stats.graph_passes > 0) == graphs
        for prompt, replies in zip(prompts, found, strict=True):
            for reply, nll in replies.items():
                logits = model(input_ids=torch.tensor([[*prompt, *reply]], device="cuda")).logits[0, len(prompt) - 1 :]
                logp = logits[:-1].float().log_softmax(-1)
                own = logp.gather(1, torch.tensor(reply, device="cuda")[:, None])[:, 0]
                assert (logp.amax(1) - own).max() < bound and nll == pytest.approx(-own.sum().item(), abs=10 * bound)
                ended += 1
        if dtype == torch.float32:
            assert_equal(found, by_generate(model, ends, prompts), bound)
    assert ended


# --- who answers -----------------------------------------------------------------------------------------------------


def refuse(*_, **__):
    raise AssertionError("asked the wrong one")


@pytest.mark.parametrize(("recommended", "options", "engine"), [
    ({}, {}, True),
    ({}, {"eos_token_id": [3, 5]}, True),
    ({"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}, {}, True),  # as Llama 3.2; not heeded
    ({"repetition_penalty": 1.0, "num_beams": 1, "max_length": 10}, {}, True),
    ({"repetition_penalty": 3.0}, {}, False),
    ({"suppress_tokens": [3, 4, 5]}, {}, False),
    ({"num_beams": 6}, {}, False),
    ({"min_new_tokens": 3}, {}, False),
    ({}, {"do_sample": False}, False),
    ({}, {"num_beams": 6, "num_return_sequences": 6}, False),
])  # fmt: skip
def test_the_engine_answers_where_generate_would_be_greedy(recommended, options, engine, monkeypatch):
    model_tok = closing(*small_mini(2), strength=1.0)
    plain = model_tok[0].generation_config
    for name, value in recommended.items():
        setattr(plain, name, value)
    prompts, options = [f"I{i}\nO" for i in range(10)], dict(max_new_tokens=8, **options)
    expected = [infer_single(prompt, model_tok, **options) for prompt in prompts]
    monkeypatch.setattr(inference_requests, "infer_single" if engine else "Engine", refuse)
    found = find_candidates(prompts, model_tok, **options)
    assert [[text for text, _ in replies] for replies in found] == [[text for text, _ in r] for r in expected]
    assert [nll for replies in found for _, nll in replies] == pytest.approx([nll for r in expected for _, nll in r],
                                                                             abs=1e-4)  # fmt: skip
    assert 0 < sum(map(len, found))
    assert generates_greedily(model_tok[0]) == (engine or not recommended)


@pytest.mark.parametrize("how", ["plain", "unsloth"])
def test_greedy_without_the_engine(how, monkeypatch):
    model, tokenizer = closing(*small_mini(2), strength=1.0)
    expected = find_candidates(["I1\nO", "I2\nO"], (model, tokenizer), max_new_tokens=8)
    if how == "unsloth":
        monkeypatch.setattr(inference_requests, "is_unsloth_model", lambda model: True)
    monkeypatch.setattr(inference_requests, "Engine", refuse)
    found = find_candidates(["I1\nO", "I2\nO"], (model, tokenizer), max_new_tokens=8,
                            search="plain" if how == "plain" else "tree")  # fmt: skip
    assert [[text for text, _ in replies] for replies in found] == [[text for text, _ in r] for r in expected]


def test_kept_replies_of_both_kinds_stay_apart(tmp_path, monkeypatch):
    model_tok, prompts = closing(*small_mini(2), strength=1.0), ["I1\nO", "I2\nO", "I3\nO"]
    with ResultCache(tmp_path) as cache:
        found = {min_prob: find_candidates(prompts, model_tok, min_prob=min_prob, max_new_tokens=8, cache=cache)
                 for min_prob in (None, 0.01, 0.5)}  # fmt: skip
        assert found[None] != found[0.01] != found[0.5]
        monkeypatch.setattr(inference_requests, "Engine", refuse)
        for min_prob, replies in found.items():
            assert find_candidates(prompts, model_tok, min_prob=min_prob, max_new_tokens=8, cache=cache) == replies


@pytest.mark.parametrize("scoring_views", ["search", "shared"])
def test_inference_run_is_the_same_by_the_engine_and_by_generate(scoring_views):
    model_tok = closing(*small_mini(3), strength=1.0)
    views = ArcDataset(CHALLENGES, is_orig=True).augment(tp="all", rt="all", perm=True, shfl_ex=True, seed=0)
    results, stats = {}, {}
    for search in ("tree", "plain"):
        results[search] = inference_run(
            views, MINI_FORMAT, model_tok, min_prob=None, max_new_tokens=12, search=search, progress=False,
            print_func=None, scoring_views=scoring_views, engine_stats=stats,
            aug_score_opts={"tp": "all", "rt": "all", "perm": True, "shfl_ex": True, "seed": 0})  # fmt: skip
    assert stats["replies"] and stats["scored"]
    n_candidates = 0
    for task, inputs in results["tree"].items():
        for found, expected in zip(inputs, results["plain"][task], strict=True):
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert np.array_equal(one["output"], other["output"])
                for part in ("scores_inf", "scores_aug"):
                    assert one[part] == pytest.approx(other[part], abs=1e-4)
                assert len(one["scores_aug"]) == 8
                n_candidates += 1
    assert n_candidates >= 3
