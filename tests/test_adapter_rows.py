"""Adapters side by side: every job of an engine gets the answers of its own adapter, as if it were alone."""

import math
from contextlib import nullcontext

import pytest
import torch

import adapter_rows
from adapter_rows import AdapterRows, most_adapters
from adapter_stack import adapter_names
from adapter_tools import create_lora, set_peft_weights
from inference_requests import Answering, FindReplies, ScoreReplies, run_jobs
from mini_model import make_tokenizer
from model_tools import load_model
from search import Engine, EngineSettings
from search_requests import Find, Score
from test_plain_search import assert_same_replies
from test_tree_attention import needs_gpu, needs_interpreter
from test_tree_graphs import make, some_prompts
from tree_attention import make_store
from tree_graphs import GraphRunner

NAMES = ("first", "second", "third")


def with_adapters(model, seed=0, scale=0.3, rank=4):
    """Return (model with an adapter, {name: another adapter})."""
    model = create_lora(model, r=rank, alpha=2 * rank).eval()
    generator, states = torch.Generator().manual_seed(seed), {}
    names = adapter_names(model)
    for name in NAMES:
        states[name] = {names[id(p)]: p.detach().cpu() + scale * torch.randn(p.shape, generator=generator)
                        for p in model.parameters() if p.requires_grad}  # fmt: skip
    return model, states


def job(prompts, end, member=0):
    """Search prompts, then score replies to them: the same ones, whatever was found."""
    found = yield Find(prompts, 0.02, 6, frozenset([end]), None, member)
    replies = [[3, 4, 5, end], [3, 4, 1, end], [5, end]]
    nlls = yield Score([(prompt, reply) for prompt in prompts for reply in replies], member)
    return [{tuple(tokens): nll for tokens, nll in replies} for replies in found], nlls


def alone(model, states, prompts, end, settings=None):
    """Return {name: what a job finds with this adapter as the model's own}."""
    answers = {}
    for name, state in states.items():
        set_peft_weights(model, state)
        [(_, answers[name])] = Engine(model, settings).serve([job(prompts, end)])
    return answers


def together(rows, engine, prompts, end):
    jobs = [job(prompts, end, member) for member in rows.members.values()]
    return {NAMES[index]: answer for index, answer in engine.serve(jobs)}


def assert_same_answers(found, expected, bound=1e-4):
    assert found.keys() == expected.keys()
    for name, (replies, nlls) in expected.items():
        for one, other in zip(found[name][0], replies, strict=True):
            assert_same_replies(one, other, 0.02, bound)
        assert found[name][1] == pytest.approx(nlls, abs=bound)


def assert_different_answers(answers):
    scores = [tuple(nlls) for _, nlls in answers.values()]
    assert all(math.dist(one, other) > 0.1 for i, one in enumerate(scores) for other in scores[:i])


@pytest.mark.parametrize("kind", ["llama", "mini"])
@pytest.mark.parametrize("slots", [10**4, 100])
@pytest.mark.parametrize("by_groups", [False, True])
def test_each_job_has_its_own_adapter(kind, slots, by_groups):
    """Also where memory is so short that prompts are left to the plain search."""
    (base, end), prompts = make(kind), some_prompts(kind, 3)
    model, states = with_adapters(base)
    expected = alone(model, states, prompts, end)
    assert_different_answers(expected)
    with AdapterRows(model, states, by_groups) as rows:
        engine = Engine(model, EngineSettings(memory_limit=slots * Engine(model, adapters=rows).stats.slot_bytes),
                        adapters=rows)  # fmt: skip
        assert_same_answers(together(rows, engine, prompts, end), expected)
        assert (engine.stats.plain_views > 0) == (slots == 100)
    set_peft_weights(model, states["second"])
    assert_same_answers(alone(model, {"second": states["second"]}, prompts, end), {"second": expected["second"]})


@needs_interpreter
@pytest.mark.parametrize("kind", ["llama", "mini"])
@pytest.mark.parametrize("by_groups", [False, True])
def test_fixed_buffers_hold_the_adapter_of_each_row(kind, by_groups):
    (base, end), prompts = make(kind), some_prompts(kind, 2)
    model, states = with_adapters(base)
    expected = alone(model, states, prompts, end)
    with AdapterRows(model, states, by_groups) as rows:
        engine = Engine(model, EngineSettings(draft_rows=3), store=make_store(model, 4096, "paged"), adapters=rows)
        engine.graphs = GraphRunner(model, engine.store, adapters=rows)
        assert_same_answers(together(rows, engine, prompts, end), expected)
        assert 0 < engine.stats.graph_passes < engine.stats.passes


@pytest.mark.parametrize("search", ["tree", "plain"])
def test_answers_are_kept_by_adapter(search):
    model, states = with_adapters(make("mini")[0])
    prompts, kept = ["I12\nO", "I3\n4\nO"], {}

    def cache(function):
        def cached(model_tok=None, **keywords):
            key = function.__name__, str(sorted(keywords.items(), key=str))
            if key not in kept and function.__name__ in ("find_replies", "score_replies"):
                kept[key] = function(**keywords)  # refuses where nothing is known
            elif key not in kept:
                kept[key] = function(model_tok=model_tok, **keywords)
            return kept[key]

        return cached

    def steps(name):
        found = yield FindReplies(prompts, None, name)
        return found, (yield ScoreReplies([(prompts[0], "5\n</s>")], name))

    def answers(names, rows):
        answering = Answering((model, make_tokenizer()), cache, None, search, {"min_prob": 0.05, "max_new_tokens": 4},
                              adapters=rows)  # fmt: skip
        return {names[i]: answer for i, answer in run_jobs([steps(name) for name in names], answering)}

    with AdapterRows(model, states) as rows:
        first = answers(NAMES, rows)
    assert len({str(answer) for answer in first.values()}) == 3
    calls = len(kept)
    with AdapterRows(model, dict(reversed(states.items()))) as rows:  # other numbers, the same adapters
        assert answers(NAMES[::-1], rows) == first
    assert len(kept) == calls


@pytest.mark.parametrize("kind", ["llama", "mini", "NF4"])
@pytest.mark.parametrize("side_by_side", [False, True])
def test_the_engine_has_layers_of_its_own_while_it_runs(kind, side_by_side, folders):
    """Also after it was stopped half-way the model has all of its own again."""
    pair = load_model(folders / "nf4", bits=4, device="cpu") if kind == "NF4" else (make(kind)[0], make_tokenizer())
    model, states = with_adapters(pair[0])
    prompts, seen = [], []
    prompts = ["I12\n+/-=O", "I3\n+/-=O"] if kind == "NF4" else ["I12\nO", "I3\n4\nO"]
    if kind == "llama":
        pair, model, states = (model, make_tokenizer()), *with_adapters(make("mini")[0])
    norm = next(module for module in model.modules() if type(module).__name__.endswith("RMSNorm"))

    def steps(name):
        seen.append("forward" in vars(norm))
        yield FindReplies(prompts, None, name)
        seen.append("forward" in vars(norm))
        yield ScoreReplies([(prompts[0], "5\n</s>")], name)

    with AdapterRows(model, states) if side_by_side else nullcontext() as rows:
        answering = Answering((model, pair[1]), None, None, "tree", {"min_prob": 0.05, "max_new_tokens": 4},
                              adapters=rows)  # fmt: skip
        before = sum("forward" in vars(module) for module in model.modules())
        jobs = run_jobs([steps(name) for name in NAMES], answering)
        next(jobs)
        jobs.close()
        assert True in seen and sum("forward" in vars(module) for module in model.modules()) == before
    assert not any("forward" in vars(module) for module in model.modules())


def test_how_many_stand_side_by_side(monkeypatch):
    model, states = with_adapters(make("llama")[0])
    assert most_adapters(model) == adapter_rows.WIDTH // 4
    n_weights = sum(tensor.numel() for tensor in states["first"].values())
    for grouped in (False, True):
        monkeypatch.setattr(adapter_rows, "_has_grouped_products", lambda model, grouped=grouped: grouped)
        plenty = adapter_rows.GROUPS if grouped else 256
        for free, most in ((4 * 4 * n_weights * 70 + 10, 70), (0, 1), (10**12, plenty)):
            monkeypatch.setattr(adapter_rows, "free_bytes", lambda device, free=free: free)
            assert most_adapters(model) == most
            assert most_adapters(model, n_workers=10) == (7 if most == 70 else most)
    monkeypatch.setattr(adapter_rows, "HEAD_BYTES", model.base_model.model.lm_head.weight.nbytes - 1)
    assert most_adapters(model) == 0
    monkeypatch.setattr(adapter_rows, "HEAD_BYTES", 10**6)
    model.base_model.model.lm_head.modules_to_save["default"].bias = torch.nn.Parameter(torch.zeros(6))
    assert most_adapters(model) == 0
    assert most_adapters(create_lora(make("llama")[0], r=4, alpha=8, dropout=0.1)) == 0


@pytest.mark.parametrize("counts", [[3, 0, 17, 1], [0, 0, 5, 0], [16, 16, 16, 16], [1, 1, 1, 1], [40, 0, 0, 33]])
@pytest.mark.parametrize("large", [False, True])
def test_heads_multiply_blocks_of_rows(counts, large, monkeypatch):
    if large:
        monkeypatch.setattr(adapter_rows, "LARGE_PASS", 2)
        monkeypatch.setattr(adapter_rows, "LARGE_BLOCK", 7)
    generator = torch.Generator().manual_seed(0)
    member = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    x, weights = (torch.randn(size, generator=generator) for size in ((len(member), 5), (4, 3, 5)))
    expected = torch.stack([weights[i] @ row for i, row in zip(member, x, strict=True)])
    torch.testing.assert_close(adapter_rows._Blocks(member, 4).multiply(x, weights), expected)


# ---- on a GPU ----

@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["llama", "mini", "NF4"])
@pytest.mark.parametrize("graphs", [False, True])
def test_on_a_gpu(kind, graphs, folders):
    if kind == "NF4":
        base, tokenizer = load_model(folders / "nf4", bits=4, device="cuda")
        end, prompts = tokenizer.eos_token_id, some_prompts("llama", 3)
    else:
        (base, end), prompts = make(kind), some_prompts(kind, 3)
        base = base.cuda()
    # rounding to bf16 grows with the scale; grouped products need ranks in steps of 8
    model, states = with_adapters(base, scale=0.3 if kind != "NF4" else 0.1, rank=4 if kind != "NF4" else 8)
    settings = EngineSettings(memory_limit=2**26, draft_rows=3, graphs=graphs)
    expected = alone(model, states, prompts, end, settings)
    nlls = list(zip(*(nlls for _, nlls in expected.values()), strict=True))
    assert max(max(own) - min(own) for own in nlls) > 3
    with AdapterRows(model, states) as rows:
        assert rows.by_groups == (kind == "NF4" and torch.cuda.get_device_capability() >= (9, 0))
        engine = Engine(model, settings, adapters=rows)
        found = together(rows, engine, prompts, end)
        assert (engine.stats.graph_passes > 0) == (graphs and kind != "NF4")
    if kind != "NF4":  # in bf16 other replies may be within the threshold
        assert_same_answers(found, expected)
    for name, (_, nlls) in expected.items():
        assert found[name][1] == pytest.approx(nlls, abs=1e-3 if kind != "NF4" else 1.0)
