"""The plain search and the plain scoring: against brute force on scripted models and enumeration on tiny real ones."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from inference_tools import (SearchStats, calc_score, dfs, infer_single, is_unsloth_model, logits_to_score,
                             score_replies)
from mini_model import make_tokenizer
from plain_search import generate_replies, reply_nll
from small_models import ScriptedModel, closing, small_mini, small_model


def random_table(seed, vocab, sharpness):
    """Return logits that depend on the whole prefix."""
    return lambda prefix: np.random.RandomState([seed, *prefix]).randn(vocab) * sharpness


def brute_force(logits_of, prompt, ends, max_new_tokens, vocab):
    """Return {reply: NLL} of all complete replies, by enumeration."""
    replies, level = {}, {(): 0.0}
    for _ in range(max_new_tokens):
        grown = {}
        for reply, nll in level.items():
            logp = torch.as_tensor(logits_of((*prompt, *reply))).float().log_softmax(-1).tolist()
            grown |= {(*reply, token): nll - logp[token] for token in range(vocab)}
        replies |= {reply: nll for reply, nll in grown.items() if reply[-1] in ends}
        level = {reply: nll for reply, nll in grown.items() if reply[-1] not in ends}
    return replies


def as_dict(replies):
    assert all(isinstance(tokens, np.ndarray) for tokens, _ in replies)
    nlls = [nll for _, nll in replies]
    assert nlls == sorted(nlls)
    result = {tuple(tokens.tolist()): nll for tokens, nll in replies}
    assert len(result) == len(replies)
    return result


def assert_same_replies(found, expected, min_prob, slack=1e-5):
    """Compare with all replies below the threshold, except those within rounding of it."""
    limit = -math.log(min_prob)
    below = {reply for reply, nll in expected.items() if nll < limit - slack}
    assert below <= set(found) <= {reply for reply, nll in expected.items() if nll < limit + slack}
    assert all(nll < limit and nll == pytest.approx(expected[reply], abs=slack) for reply, nll in found.items())


# --- the threshold search --------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), vocab=st.integers(2, 4), sharpness=st.sampled_from([0.3, 1.0, 3.0]),
    max_new_tokens=st.integers(1, 5), min_prob=st.sampled_from([0.5, 0.1, 0.02, 0.004]), two_ends=st.booleans(),
    guess=st.none() | st.lists(st.integers(0, 3), max_size=7),
)  # fmt: skip
@example(seed=1, vocab=4, sharpness=1.0, max_new_tokens=4, min_prob=0.004, two_ends=True, guess=[3, 3, 3, 0, 1])
def test_search_equals_brute_force_with_any_guess(  # noqa: PLR0913
    seed, vocab, sharpness, max_new_tokens, min_prob, two_ends, guess
):
    table, prompt = random_table(seed, vocab, sharpness), (1, 0, 1)
    ends = [0, vocab - 1] if two_ends else 0
    tokens = [*prompt, *(token % vocab for token in guess or [])]
    stats, model = SearchStats(), ScriptedModel(table)
    pos = None if guess is None else len(prompt)
    found = as_dict(dfs(model, torch.tensor([tokens]), ends, max_new_tokens, min_prob, pos=pos, stats=stats))
    end_set = set(ends) if two_ends else {0}
    assert_same_replies(found, brute_force(table, prompt, end_set, max_new_tokens, vocab), min_prob)
    assert model.calls == stats.forward_passes == stats.nodes - stats.accepted_tokens
    assert stats.accepted_tokens <= stats.guessed_tokens <= max(0, max_new_tokens - 1)


def test_guesses_change_the_work_but_not_the_result():
    table, prompt, end, plain = random_table(6, 5, 3.0), [1, 2], 0, SearchStats()
    expected = dfs(ScriptedModel(table), prompt, end, 6, 0.01, stats=plain)
    assert len(expected) >= 3 and plain.nodes == plain.forward_passes
    longest = max((tokens.tolist() for tokens, _ in expected), key=len)
    wrong = [int(np.argmin(table((1, 2))[1:])) + 1] * 3
    guesses = {"right": longest, "not closed": longest[:-1], "partial": longest[:2], "only the end": [end],
               "wrong": wrong, "too long": longest[:-1] * 5, "goes on after its end": [*longest, 1, 1]}
    saved = {}
    for name, guess in guesses.items():
        stats = SearchStats()
        found = dfs(ScriptedModel(table), prompt + guess, end, 6, 0.01, pos=2, stats=stats)
        assert [(t.tolist(), nll) for t, nll in found] == [(t.tolist(), nll) for t, nll in expected], name
        assert stats.nodes == plain.nodes, name
        saved[name] = plain.forward_passes - stats.forward_passes
        assert stats.guessed_tokens <= (0 if name == "only the end" else 5), name  # no token is run in vain
    n = len(longest) - 1
    assert saved["right"] == saved["not closed"] == saved["goes on after its end"] == n > 2
    assert saved["partial"] == 2 and saved["wrong"] == saved["only the end"] == 0


def chain_table(length):
    """Return logits of a model that says token 1 for ``length`` tokens, then the end token 0, almost surely."""
    return lambda prefix: [9.0, 0.0] if len(prefix) > length else [0.0, 12.0]


@pytest.mark.parametrize("guessed", [False, True])
def test_replies_longer_than_any_recursion_limit(guessed):
    n, stats = 2500, SearchStats()
    model = ScriptedModel(chain_table(n))
    ((tokens, nll),) = dfs(model, [1] + [1] * n * guessed, 0, 3000, 0.5, pos=1, stats=stats)
    assert tokens.tolist() == [1] * n + [0] and nll < 0.1
    assert stats.nodes == n + 1 and model.calls == (1 if guessed else n + 1)


def test_limit_counts_the_end_token_and_threshold_is_strict():
    model = ScriptedModel(chain_table(4))
    assert len(dfs(model, [1], 0, 5, 0.5)) == 1
    assert dfs(model, [1], 0, 4, 0.5) == []
    even = ScriptedModel(lambda prefix: [0.0, 0.0])  # every reply of n tokens has probability 2^-n exactly
    assert as_dict(dfs(even, [1], 0, 8, 0.125)) == pytest.approx({(0,): math.log(2), (1, 0): math.log(4)})
    assert dfs(even, [1], 0, 8, 1.0) == []
    ((_, nll),) = dfs(even, [1], 0, 1, 0.1)
    min_prob = math.exp(-nll)
    assert -math.log(min_prob) == nll  # exactly on the threshold
    assert dfs(even, [1], 0, 1, min_prob) == [] != dfs(even, [1], 0, 1, math.nextafter(min_prob, 0))


def test_padding_is_left_out():
    table = random_table(3, 4, 2.0)
    plain = dfs(ScriptedModel(table), [1, 2, 3, 1], 0, 5, 0.01, pos=3)
    padded = dfs(ScriptedModel(table), [[0, 0, 1, 2, 3, 1]], 0, 5, 0.01, pos=5, attention_mask=[[0, 0, 1, 1, 1, 1]])
    assert [t.tolist() for t, _ in plain] == [t.tolist() for t, _ in padded] != []


def test_search_refuses_what_makes_no_sense():
    model = ScriptedModel(lambda prefix: [0.0, 0.0])
    for min_prob in [0, -1, 1.5]:
        with pytest.raises(ValueError, match="min_prob"):
            dfs(model, [1], 0, 5, min_prob)
    with pytest.raises(ValueError, match="max_new_tokens"):
        dfs(model, [1], 0, 0, 0.5)
    with pytest.raises(ValueError, match="end token"):
        dfs(model, [1], [None, None], 5, 0.5)
    with pytest.raises(ValueError, match="one prompt at a time"):
        dfs(model, [[1], [1]], 0, 5, 0.5)
    with pytest.raises(ValueError, match="pos"):
        dfs(model, [1, 1], 0, 5, 0.5, pos=3)
    with pytest.raises(FloatingPointError, match="NaN"):
        dfs(ScriptedModel(lambda prefix: [math.nan, 0.0]), [1], 0, 5, 0.5)


def test_end_tokens_may_come_with_gaps():
    model = ScriptedModel(chain_table(2))
    assert len(dfs(model, [1], [None, 0], 5, 0.5)) == 1


# --- tiny real models ------------------------------------------------------------------------------------------------


@torch.no_grad()
def enumerate_replies(model, prompt, end, max_new_tokens, vocab):
    """Return {reply: NLL} of all complete replies, every one in its own pass over the whole sequence."""
    replies, others = {}, [t for t in range(vocab) if t != end]
    for n in range(max_new_tokens):
        heads = list(itertools.product(others, repeat=n))
        ids = torch.tensor([[*prompt, *head, end] for head in heads])
        logp = model(input_ids=ids).logits.log_softmax(-1)[:, len(prompt) - 1 : -1]
        nlls = -logp.gather(-1, ids[:, len(prompt) :, None]).sum((1, 2))
        replies |= {(*head, end): nll for head, nll in zip(heads, nlls.tolist(), strict=True)}
    return replies


@pytest.mark.parametrize("seed", range(3))
def test_search_on_a_llama_equals_exhaustive_enumeration(seed):
    model, prompt = small_model(seed=seed), [1, 4, 2, 5, 3]
    expected = enumerate_replies(model, prompt, 0, 5, vocab=6)
    best = min(expected, key=expected.get)
    min_prob = math.exp(-sorted(expected.values())[20])
    for guess in [[], list(best), [1, 1, 1, 1, 1, 1]]:
        found = as_dict(dfs(model, prompt + guess, 0, 5, min_prob, pos=5))
        assert_same_replies(found, expected, min_prob, slack=1e-4)
        assert len(found) >= 19


def test_search_on_mini_equals_exhaustive_enumeration():
    model, tokenizer = small_mini()
    prompt = tokenizer("I12\n34\nO21\n43\n</s>I56\n78\nO")["input_ids"]
    expected = enumerate_replies(model, prompt, tokenizer.eos_token_id, 4, vocab=16)
    min_prob = math.exp(-sorted(expected.values())[30])
    for guess in ["", "12\n", "\n\n\n"]:
        tokens = prompt + tokenizer(guess, add_special_tokens=False)["input_ids"]
        found = as_dict(dfs(model, tokens, tokenizer.eos_token_id, 4, min_prob, pos=len(prompt)))
        assert_same_replies(found, expected, min_prob, slack=1e-4)


def test_search_through_an_adapter_computes_the_needed_logits_only(monkeypatch):
    model = small_model()
    expected = dfs(model, [1, 4, 2, 5], 0, 5, 0.001, pos=3)
    rows = []
    plain = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda x: rows.append(x.shape[1]) or plain(x))
    lora = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    found = dfs(lora, [1, 4, 2, 5], 0, 5, 0.001, pos=3)
    assert [t.tolist() for t, _ in found] == [t.tolist() for t, _ in expected] != []
    assert rows[0] == 2 and set(rows[1:]) == {1}  # prompt of 3 and guess of 1: the predictions after both


def test_every_cached_pass_asks_for_positions_of_the_whole_sequence():
    table, asked = random_table(7, 4, 2.0), []

    class Positioned(ScriptedModel):
        def get_position_ids(self, input_ids):
            asked.append(input_ids[0].tolist())
            return torch.arange(input_ids.shape[1])[None]

    model = Positioned(table)
    dfs(model, [1, 2, 3], 0, 4, 0.01)
    assert len(asked) == model.calls > 3 and all(ids[:3] == [1, 2, 3] for ids in asked)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_search_and_scoring_on_a_gpu_equal_those_on_the_cpu():
    model, tokenizer = small_mini()
    options = dict(min_prob=0.002, max_new_tokens=5, guess="12\n")
    plain = infer_single("I1\nO", (model, tokenizer), **options)
    on_gpu = infer_single("I1\nO", (model.cuda(), tokenizer), **options)
    assert dict(on_gpu) == pytest.approx(dict(plain), abs=1e-3)
    for text, nll in on_gpu:
        assert calc_score("I1\nO", text, (model, tokenizer)) == pytest.approx(nll, abs=1e-3)


# --- generate and scoring --------------------------------------------------------------------------------------------


def test_greedy_equals_generate_and_the_best_path_of_the_search(tiny_llama):
    model, tokenizer = closing(*tiny_llama)
    prompt = "IN 12\nOUT "
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    reply = reply[0, ids.shape[1] :]
    model.generation_config.update(do_sample=True, temperature=5.0)  # what a checkpoint recommends is not greedy
    ((text, nll),) = infer_single(prompt, (model, tokenizer), max_new_tokens=40)
    assert text == tokenizer.decode(reply) and text.endswith(tokenizer.eos_token)
    assert nll == pytest.approx(calc_score(prompt, text, (model, tokenizer)), abs=1e-4)
    with torch.no_grad():
        logp = model(torch.cat([ids, reply[None]], -1)).logits[0, ids.shape[1] - 1 : -1].log_softmax(-1)
    assert nll == pytest.approx(-logp.max(-1).values.sum().item(), abs=1e-4)
    search = dict(min_prob=math.exp(-nll) * 0.9, max_new_tokens=40)
    searched = infer_single(prompt, (model, tokenizer), **search)
    assert dict(searched)[text] == pytest.approx(nll, abs=1e-4)
    with_prompt = infer_single(prompt, (model, tokenizer), guess=prompt + text, **search)
    assert [t for t, _ in with_prompt] == [t for t, _ in searched]


@pytest.mark.parametrize("kind", ["llama", "mini"])
def test_sampling_and_beams_give_distinct_complete_replies_with_the_models_own_nll(kind):
    loaded = (small_model(16), make_tokenizer()) if kind == "llama" else small_mini()
    loaded = closing(*loaded, strength=1.5)
    prompt, model_tok = "I12\nO", lambda: loaded  # a function that loads, as scripts pass it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sampled = infer_single(prompt, model_tok, max_new_tokens=12, do_sample=True, temperature=3.0,
                               num_return_sequences=30)  # fmt: skip
    beams = infer_single(prompt, model_tok, max_new_tokens=6, num_beams=8, num_return_sequences=8, length_penalty=-2.0)
    for replies in [sampled, beams]:
        assert len(replies) >= 2 and len({text for text, _ in replies}) == len(replies)
        assert [nll for _, nll in replies] == sorted(nll for _, nll in replies)
        for text, nll in replies:
            assert text.endswith("</s>") and text.count("</s>") == 1
            assert nll == pytest.approx(calc_score(prompt, text, model_tok), abs=1e-4)


def test_generation_without_an_end_is_no_reply(tiny_llama):
    model, tokenizer = tiny_llama
    assert infer_single("IN 1", (model, tokenizer), max_new_tokens=1, eos_token_id=tokenizer.pad_token_id) == []
    with pytest.raises(ValueError, match="max_new_tokens is missing"):
        infer_single("IN 1", (model, tokenizer))
    with pytest.raises(ValueError, match="prompt is empty"):
        infer_single("", (model, tokenizer), max_new_tokens=1)


def test_generation_refuses_nan_and_beams_on_unsloth_models():
    model = small_model()
    options = dict(prompt=[1, 2], eos_token_id=0, pad_token_id=0, max_new_tokens=3)
    seen = []
    generate_replies(model, **options, logits_processor=[lambda ids, scores: seen.append(len(ids)) or scores])
    assert seen  # processors of the caller's own still work
    model.model_tags = ["unsloth"]
    generate_replies(model, **options, num_beams=1)
    with pytest.raises(ValueError, match="unsloth cannot search by beams"):
        generate_replies(model, **options, num_beams=2)
    model.model_tags = None
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    for num_beams in [1, 2]:
        with pytest.raises(FloatingPointError, match="NaN"):
            generate_replies(model, **options, num_beams=num_beams)
    with pytest.raises(FloatingPointError, match="NaN"):
        reply_nll(model, [1, 2], [4, 0])


def test_score_is_the_nll_of_the_reply_tokens_alone(tiny_llama):
    model, tokenizer = tiny_llama
    prompt, reply = "IN 12 34\nOUT ", "56 78\n" + tokenizer.eos_token
    ids = torch.tensor([tokenizer(prompt)["input_ids"] + tokenizer(reply, add_special_tokens=False)["input_ids"]])
    n = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
    expected = -sum(logp[i - 1, ids[0, i]].item() for i in range(n, ids.shape[1]))
    fmt = dict(key="k", train="", query="", input=prompt, reply=reply, text=prompt + reply)
    assert calc_score(**fmt, model_tok=(model, tokenizer)) == pytest.approx(expected, abs=1e-4)
    assert score_replies([(prompt, reply)] * 2, (model, tokenizer)) == pytest.approx([expected] * 2, abs=1e-4)


def test_logits_to_score_and_unsloth_tag():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    sequence = torch.tensor([3, 0, 6])
    expected = -logits.log_softmax(-1)[torch.arange(3), sequence].sum().item()
    assert logits_to_score(sequence, logits) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match=r"\(N,\) tokens"):
        logits_to_score(torch.zeros(6, dtype=torch.long), logits)
    assert is_unsloth_model(SimpleNamespace(model_tags=["unsloth"]))
    assert not is_unsloth_model(SimpleNamespace(model_tags=None)) and not is_unsloth_model(small_model())


def test_a_model_just_trained_with_checkpointing_is_put_into_inference_mode():
    model, tokenizer = small_mini()
    plain = infer_single("I1\nO", (model, tokenizer), min_prob=0.002, max_new_tokens=5)
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(RuntimeError, match=r"call model.eval\(\)"):
        dfs(model, tokenizer("I1\nO")["input_ids"], tokenizer.eos_token_id, 5, 0.002)
    assert infer_single("I1\nO", (model, tokenizer), min_prob=0.002, max_new_tokens=5) == plain
