"""Passes from fixed buffers, replayed or not, give what passes from tables of their own give."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tree_graphs
from model_tools import position_ids
import search
from search import Engine, EngineSettings
from search_requests import Find, Score
from small_models import ScriptedModel, serve_scripted_models, small_mini, small_model
from test_plain_search import assert_same_replies, brute_force, random_table
from test_search import END, find
from test_tree_attention import MODELS, Tree, first_chains, needs_gpu, needs_interpreter, poison, run_pass
from tree_attention import PAGE, Chain, make_store, tree_mode
from tree_graphs import GraphRunner, make_runner


def run_fixed(runner, chains):
    """Run the chains [(tree, chain)] from fixed buffers and hand the trees their logits."""
    ids, positions = [], []
    for tree, chain in chains:
        whole = tree.sequence(chain.start + chain.length - 1)
        ids.append(whole[0, -chain.length :])
        positions.append(position_ids(runner.model, whole)[0, -chain.length :])
    logits = runner.run([chain for _, chain in chains], torch.cat(ids).numpy(), torch.cat(positions).numpy())
    assert len(logits) == runner._loaded[1].rows
    rows = iter(logits.clone())
    for tree, chain in chains:
        tree.logits |= {slot: next(rows) for slot in range(chain.start, chain.start + chain.length)}


@pytest.fixture
def uninitialized_is_nan():
    """Let memory that nobody has written hold NaN, as the outputs of padded rows."""
    torch.use_deterministic_algorithms(True)  # fills new tensors
    yield
    torch.use_deterministic_algorithms(False)


@needs_interpreter
@pytest.mark.parametrize("name", ["llama", "qwen3", "mini", "lora"])
@torch.no_grad()
def test_fixed_buffers_of_the_paged_store(name, uninitialized_is_nan):
    model, rng = MODELS[name](), np.random.default_rng(5)
    store = make_store(model, 1024, "paged")
    runner, trees = GraphRunner(model, store), [Tree(store, prompt, rng) for prompt in (3, 70, 150)]
    poison(store, trees)
    with tree_mode(model):
        for chains in first_chains(trees):
            run_pass(model, store, chains)
    buckets, sizes = set(), set()
    for number in range(5):
        if number % 2:  # many rows, then few again: nothing of the larger pass may stay
            run_fixed(runner, [*trees[1].add_random(), trees[0].add(70)])
        elif number:
            run_fixed(runner, [chain for tree in trees for chain in tree.add_random()])
        else:
            run_fixed(runner, [trees[0].add(1), trees[2].add(2)])
        buckets.add(store.rows)
        sizes.add(store._per_tile)
        assert not store._pools[0][0][0].isnan().any()  # slot 0, of the trash page: padded rows came by
        assert store._pools[1][0][0].isnan().any()  # in the second layer, with NaN
    assert len(buckets) > 1 and (len(sizes) > 1 or name == "lora")
    assert max(tree.largest_error(model) for tree in trees) < 3e-5  # of logits up to 8


@needs_interpreter
def test_what_fits_fixed_buffers_of_the_paged_store(monkeypatch):
    monkeypatch.setattr(tree_graphs, "_MASK_BYTES", 200)
    model = MODELS["llama"]()
    store = make_store(model, 4096, "paged")
    view = store.open(10, 4096)
    runner, one = GraphRunner(model, store), np.ones(1, np.int64)
    assert runner.fits(2048, [Chain(view, 10, 2048)]) and not runner.fits(2049, [Chain(view, 10, 2049)])
    assert not runner.fits(10, [Chain(view, 0, 10)])
    assert runner.load([Chain(view, 300, 1, np.arange(10, 210, dtype=np.int32))], one, one)
    assert not runner.load([Chain(view, 300, 1, np.arange(10, 211, dtype=np.int32))], one, one)  # too far a mask
    runner._window = 11
    assert runner.load([Chain(view, 10, 1)], one, one) and not runner.load([Chain(view, 10, 2)], np.ones(2, int), one)
    with pytest.raises(ValueError, match="grow it first"):
        runner.load([Chain(view, 64 * PAGE, 1)], one, one)
    assert make_runner(model, store) is None  # no GPU


class NoGraphs:
    """Stands in for a runner into whose buffers nothing fits."""

    def __init__(self, largest, limits):
        self.largest, self.limits, self.kinds = largest, limits, []

    def load(self, chains, tokens, positions):
        assert len(tokens) == len(positions) == sum(chain.length for chain in chains)
        prompts = {chain.start == 0 for chain in chains}
        assert len(prompts) == 1 and (
            prompts == {True} or len(chains) == 1 or not self.limits or len(tokens) <= self.largest)  # fmt: skip
        self.kinds.append(prompts.pop())
        return False


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=4), min_size=1,
       max_size=6), leaders=st.integers(1, 3), rows=st.integers(1, 40), largest=st.integers(1, 20),
       slots=st.integers(30, 400), limits=st.booleans())  # fmt: skip
def test_passes_with_graphs_have_prompts_or_none(  # noqa: PLR0913
    seed, prompts, leaders, rows, largest, slots, limits
):
    """limits: whether the largest graph is large enough for passes to be kept as short."""
    table = random_table(seed, 4, 3)
    with pytest.MonkeyPatch.context() as patch:
        serve_scripted_models(patch, slots, rows)
        assert Engine(ScriptedModel(table)).graphs is None
        patch.setattr(search, "_LEAST_GRAPH", largest + (not limits))
        graphs = NoGraphs(largest, limits)
        patch.setattr(search, "make_runner", lambda *_: graphs)  # whenever the engine takes its memory
        engine = Engine(ScriptedModel(table), EngineSettings(draft_rows=2, leaders=leaders))
        found = find(engine, prompts, 0.03, 6, lambda i, found: next((f[0][0] for f in found.values() if f), None))
        assert engine.store.free == engine.store.total and len(graphs.kinds) == engine.stats.passes
    for prompt, replies in zip(prompts, found, strict=True):
        assert_same_replies(replies, brute_force(table, prompt, {END}, 6, 4), 0.03)


def engine_results(engine, prompts, end):
    """Search prompts and score some replies: [{reply: NLL}], [NLL]."""

    def job():
        found = yield Find(prompts, 0.02, 6, frozenset([end]), lambda i, found: next(iter(found.values()))[0][0])
        return found, (yield Score([(prompt, tokens) for prompt in prompts for tokens, _ in found[0][:6]]))

    [(_, (found, nlls))] = engine.serve([job()])
    return [{tuple(tokens): nll for tokens, nll in replies} for replies in found], nlls


def some_prompts(kind, count=4):
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 200, count)
    if kind == "mini":
        return [[1, 14, *rng.integers(3, 13, length).tolist(), 13, 15] for length in lengths]
    return [[1, *rng.integers(1, 6, length).tolist()] for length in lengths]


def make(kind):
    return (small_mini()[0], 2) if kind == "mini" else (small_model(6), END)


@needs_interpreter
@pytest.mark.parametrize("kind", ["llama", "mini"])
def test_engine_with_fixed_buffers_of_the_paged_store(kind):
    (model, end), prompts = make(kind), some_prompts(kind, 2)
    expected, nlls = engine_results(Engine(model), prompts, end)
    engine = Engine(model, EngineSettings(draft_rows=3), store=make_store(model, 1024, "paged"))
    engine.graphs = GraphRunner(model, engine.store)
    found, again = engine_results(engine, prompts, end)
    assert 0 < engine.stats.graph_passes < engine.stats.passes and engine.stats.seconds["capture"] == 0
    for replies, wanted in zip(found, expected, strict=True):
        assert_same_replies(replies, wanted, 0.02, 1e-4)
    assert again == pytest.approx(nlls, abs=1e-4)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
@pytest.mark.parametrize("kind", ["llama", "mini"])
def test_graphs_change_no_result_on_the_gpu(kind, dtype, bound):
    (model, end), prompts, lines = make(kind), some_prompts(kind), []
    model = model.to("cuda", dtype)
    results = {}
    for graphs in (False, True):
        engine = Engine(model, EngineSettings(memory_limit=2**26, draft_rows=3, graphs=graphs), lines.append)
        results[graphs] = engine_results(engine, prompts, end)
        assert engine.stats.graph_passes == 0 or graphs
    assert engine.stats.graph_passes > 0, lines
    assert engine.graphs.captured and engine.stats.seconds["capture"] == pytest.approx(engine.graphs.capture_seconds)
    for replies, wanted in zip(results[True][0], results[False][0], strict=True):
        assert_same_replies(replies, wanted, 0.02, bound)
    if dtype == torch.float32:  # else the replies to score, the best ones, may be others
        assert results[True][1] == pytest.approx(results[False][1], abs=bound)


@needs_gpu
@pytest.mark.gpu
@torch.no_grad()
def test_replays_equal_plain_forward_passes_on_the_gpu():
    model, rng = small_mini()[0].to("cuda"), np.random.default_rng(5)
    store = make_store(model, 2048)
    runner, trees = make_runner(model, store), [Tree(store, prompt, rng) for prompt in (3, 70, 150)]
    poison(store, trees)
    with tree_mode(model):
        for chains in first_chains(trees):
            run_pass(model, store, chains)
    for _ in range(12):
        run_fixed(runner, [c for tree in trees for c in tree.add_random()])
    assert 0 < runner.captured < 12 and runner.largest
    assert max(tree.largest_error(model) for tree in trees) < 1e-4
