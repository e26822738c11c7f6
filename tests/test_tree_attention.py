"""Trees of tokens on real models: every row's logits equal those of a plain forward pass over its own sequence."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import small_mini
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import tree_attention
from model_tools import create_lora, position_ids
from tree_attention import (
    PAGE,
    Chain,
    ContiguousStore,
    Shape,
    attend_causally,
    attention_window,
    grouped_heads_are_fast,
    heads_for,
    make_store,
    slot_bytes,
    tree_mode,
)
from tree_pages import PagedStore

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"  # the kernel then runs on the CPU
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="runs where Triton interprets kernels, see below")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available() or not HAS_TRITON, reason="needs a CUDA GPU and Triton")
KINDS = ["contiguous", pytest.param("paged", marks=needs_interpreter)]
VOCAB = 16


def random_model(kinds, **options):
    config = kinds[0](vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      initializer_range=0.2, **options)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kinds[1](config).eval()


def llama():
    return random_model((LlamaConfig, LlamaForCausalLM), num_attention_heads=4, num_key_value_heads=2)


def lora_model():
    model = create_lora(llama(), r=4, alpha=8, train_embeddings=True)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


MODELS = {
    "llama": llama,
    "mistral": lambda: random_model((MistralConfig, MistralForCausalLM), num_attention_heads=4, num_key_value_heads=1,
                                    sliding_window=4096),
    "qwen2": lambda: random_model((Qwen2Config, Qwen2ForCausalLM), num_attention_heads=4, num_key_value_heads=4),
    "qwen3": lambda: random_model((Qwen3Config, Qwen3ForCausalLM), num_attention_heads=6, num_key_value_heads=2,
                                  head_dim=12),
    "mini": lambda: small_mini()[0],
    "lora": lora_model,
}  # fmt: skip


class Tree:
    """One view, grown at random; it knows which row's parent is which, and keeps the logits that the passes gave."""

    def __init__(self, store, prompt, rng):
        self.store, self.prompt, self.rng = store, prompt, rng
        self.view = store.open(prompt, prompt + 1)
        self.tokens, self.parents, self.logits = [], [], {}

    def ancestors(self, slot):
        """Return the slots from the first token of the prompt to ``slot``."""
        slots = []
        while slot >= 0:
            slots.append(slot)
            slot = self.parents[slot]
        return slots[::-1]

    def add(self, length, parent=None):
        """Append a chain below slot ``parent`` (None = below the last slot)."""
        start = len(self.tokens)
        parent = start - 1 if parent is None else parent
        assert self.store.grow(self.view, start + length)
        self.parents += [parent, *range(start, start + length - 1)]
        self.tokens += self.rng.integers(3, VOCAB, length).tolist()
        path = [slot for slot in self.ancestors(parent) if slot >= self.prompt]
        return self, Chain(self.view, start, length, np.array(path, np.int32))

    def add_random(self):
        """Append some chains: branches of old slots, of the prompt's end, and of slots added just before."""
        length = 40 if self.rng.random() < 0.15 else int(self.rng.integers(1, 5))
        yield self.add(length, int(self.rng.integers(self.prompt - 1, len(self.tokens))))
        for _ in range(int(self.rng.integers(0, 3))):
            yield self.add(int(self.rng.integers(1, 3)), int(self.rng.integers(self.prompt - 1, len(self.tokens))))

    def sequence(self, slot):
        return torch.tensor([[self.tokens[i] for i in self.ancestors(slot)]])

    def largest_error(self, model):
        """Compare all logits with plain forward passes, one per leaf."""
        worst, seen = 0.0, set()
        for leaf in sorted(set(range(len(self.tokens))) - set(self.parents)):
            logits = model(input_ids=self.sequence(leaf).to(model.device), use_cache=False).logits[0]
            for row, slot in enumerate(self.ancestors(leaf)):
                worst = max(worst, (logits[row] - self.logits[slot]).abs().max().item())
                seen.add(slot)
        assert seen == set(range(len(self.tokens)))  # no row was left out
        return worst


def run_pass(model, store, chains):
    """Run the chains [(tree, chain)] in one pass and hand the trees their logits."""
    ids, positions = [], []
    for tree, chain in chains:
        whole = tree.sequence(chain.start + chain.length - 1).to(model.device)
        ids.append(whole[:, -chain.length :])
        positions.append(position_ids(model, whole)[:, -chain.length :])
    store.prepare([chain for _, chain in chains])
    logits = model(input_ids=torch.cat(ids, 1), position_ids=torch.cat(positions, 1), use_cache=False, tree_store=store)
    rows = iter(logits.logits[0])
    for tree, chain in chains:
        tree.logits |= {slot: next(rows) for slot in range(chain.start, chain.start + chain.length)}


def first_chains(trees):
    """Prompts alone, with a draft behind them and a branch of it in the same pass, and in two pieces."""
    yield [trees[0].add(trees[0].prompt)]
    piece = 30
    whole = [trees[1].add(trees[1].prompt + 5), trees[1].add(3, trees[1].prompt + 1)]
    yield [*whole, trees[2].add(piece)]
    yield [trees[2].add(trees[2].prompt - piece + 2), trees[2].add(2, trees[2].prompt - 1), trees[0].add(1)]


def poison(store, trees):
    """Fill all slots with NaN: whatever a store reads must have been written before."""
    stores = [tensor for pool in store._pools for tensor in pool] if isinstance(store, PagedStore) else []
    for tensor in stores or [tree.view.data for tree in trees]:
        tensor.fill_(float("nan"))


@torch.no_grad()
def largest_error(model, kind, passes):
    """Grow random trees on ``model``; return the largest difference to plain forward passes of any row's logits."""
    rng = np.random.default_rng(7)
    store = make_store(model, 1024, kind)
    trees = [Tree(store, prompt, rng) for prompt in (3, 70, 150)]
    poison(store, trees)
    with tree_mode(model):
        for chains in first_chains(trees):
            run_pass(model, store, chains)
        for _ in range(passes):
            growing = [tree for tree in trees if rng.random() < 0.8]
            run_pass(model, store, [chain for tree in growing for chain in tree.add_random()])
    return max(tree.largest_error(model) for tree in trees)  # outside tree mode: the model's own attention


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_rows_equal_plain_forward_passes(name, kind):
    assert largest_error(MODELS[name](), kind, passes=4 if kind == "paged" else 8) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_growing_keeps_contents_and_closing_gives_slots_back(kind):
    model, rng = llama(), np.random.default_rng(3)
    store = make_store(model, 5 * PAGE, kind)
    assert store.total == store.free == 5 * PAGE
    first, second = Tree(store, 10, rng), Tree(store, 60, rng)
    with tree_mode(model):
        run_pass(model, store, [first.add(10), second.add(60)])
        run_pass(model, store, [first.add(100), second.add(20, 59)])  # both grow beyond a page
        store.close(second.view)
        third = Tree(store, 90, rng)  # takes slots that the second one filled
        run_pass(model, store, [third.add(90), first.add(2)])
        run_pass(model, store, [first.add(2, 12), third.add(1)])
    assert max(first.largest_error(model), third.largest_error(model)) < 1e-5
    assert store.free == 5 * PAGE - first.view.capacity - third.view.capacity
    before = first.view.capacity
    assert not store.grow(first.view, 10 * PAGE) and first.view.capacity == before  # no room: nothing changes
    assert store.open(5, 10 * PAGE) is None
    for tree in (first, third):
        store.close(tree.view)
    assert store.free == store.total
    with pytest.raises(ValueError, match="closed"):
        store.grow(first.view, 5)
    with pytest.raises(ValueError, match="closed"):
        store.prepare([Chain(first.view, 0, 5)])


def random_tensors(shape, rows, generator):
    """Make query, key and value of one layer, laid out as models do it: (1, N, H, D), then transposed."""
    heads = (shape.heads * shape.group, shape.heads, shape.heads)
    made = [torch.randn(1, rows, h, shape.head_dim, generator=generator).transpose(1, 2) for h in heads]
    return [part.to(shape.device, shape.dtype) for part in made]


def largest_difference(shape, passes=5):
    """Run the same random trees on both stores; return the largest difference of what ``attend`` gives.

    Two passes more than asked for, of few and of many rows per tree: the kernel has tiles for either.
    """
    stores = [ContiguousStore(shape, 2048), PagedStore(shape, 2048)]
    generator, worst = torch.Generator().manual_seed(0), 0.0
    twins = [[Tree(store, prompt, np.random.default_rng(prompt)) for prompt in (3, 70, 150)] for store in stores]
    steps = [first_chains(trees) for trees in twins]
    tile_sizes = set()
    for number in range(5 + passes):
        chains = [next(s) if number < 3 else [tree.add(1 if number == 3 else 40) for tree in trees] if number < 5
                  else [c for tree in trees for c in tree.add_random()]
                  for s, trees in zip(steps, twins, strict=True)]  # fmt: skip
        for store, its_chains in zip(stores, chains, strict=True):
            store.prepare([chain for _, chain in its_chains])
        tile_sizes |= {stores[1]._per_tile} if number >= 3 else set()
        for layer in range(shape.layers):
            tensors = random_tensors(shape, stores[0].rows, generator)
            outputs = [store.attend(layer, *tensors, scaling=0.3).float() for store in stores]
            worst = max(worst, (outputs[0] - outputs[1]).abs().max().item())
    assert len(tile_sizes) == 2 or shape.group > 16  # so many heads fill a large tile each
    return worst


SHAPES = [(2, 1, 64), (1, 3, 16), (2, 4, 40), (1, 20, 128)]  # heads of keys, group, head dim


@needs_interpreter
@pytest.mark.parametrize("heads, group, head_dim", SHAPES)
def test_paged_store_agrees_with_the_contiguous_one(heads, group, head_dim):
    shape = Shape(1, heads, group, head_dim, torch.float32, torch.device("cpu"))
    assert largest_difference(shape, passes=2) < 1e-5

def test_key_heads_are_repeated_where_attention_would_be_slow(monkeypatch):
    query, key, value = torch.randn(1, 4, 6, 8), *torch.randn(2, 1, 2, 6, 8)
    assert heads_for(query, key, value)[0] is key
    outputs = torch.zeros(2, 1, 6, 4, 8)
    for output, fast in zip(outputs, (True, False), strict=True):
        monkeypatch.setattr(tree_attention, "grouped_heads_are_fast", lambda device, dtype, fast=fast: fast)
        attend_causally(query, key, value, [(0, 2, 3)], 0.5, output)
    assert heads_for(query, key, value)[1].shape == query.shape and heads_for(key, key, value)[1] is value
    torch.testing.assert_close(outputs[0], outputs[1])


@pytest.mark.parametrize(("device", "dtype", "capability", "fast"), [
    ("cpu", torch.float32, None, True), ("cuda", torch.bfloat16, (9, 0), True), ("cuda", torch.float16, (8, 0), True),
    ("cuda", torch.float16, (7, 5), False), ("cuda", torch.float32, (9, 0), False),
])  # fmt: skip
def test_which_gpus_attend_fast_with_fewer_key_heads(monkeypatch, device, dtype, capability, fast):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    assert grouped_heads_are_fast(torch.device(device), dtype) == fast



@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("heads, group, head_dim", [(2, 1, 64), (1, 3, 40)])  # few: each is compiled twice
def test_stores_agree_on_the_gpu(heads, group, head_dim, dtype, bound):
    assert largest_difference(Shape(1, heads, group, head_dim, dtype, torch.device("cuda")), passes=3) < bound


@needs_gpu
@pytest.mark.gpu
def test_rows_equal_plain_forward_passes_on_the_gpu():
    model = MODELS["qwen3"]().to("cuda")  # what is special about other models does not depend on the device
    assert isinstance(make_store(model, 1), PagedStore)
    assert largest_error(model, None, passes=5) < 1e-4


@pytest.mark.skipif(not HAS_TRITON or INTERPRETED, reason="needs Triton, which PyTorch for the CPU lacks")
def test_kernel_under_the_interpreter():
    """Run the tests of the paged store in a process of their own, for Triton decides on import."""
    files = [__file__, str(Path(__file__).with_name("test_tree_graphs.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "paged and not gpu", *files]
    environment, root = os.environ | {"TRITON_INTERPRET": "1"}, Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]


def test_sizes():
    model = llama()
    assert slot_bytes(model) == 2 * 2 * 2 * 8 * 4  # key and value, layers, heads, head dim, bytes of fp32
    assert slot_bytes(lora_model()) == slot_bytes(model)
    assert slot_bytes(llama().to(torch.bfloat16)) == slot_bytes(model) // 2
    assert isinstance(make_store(model, 1, "contiguous"), ContiguousStore)
    for wrong in ({"slots": 0}, {"slots": 5, "kind": "other"}):
        with pytest.raises(ValueError):
            make_store(model, **wrong)
    assert isinstance(make_store(model, 1), ContiguousStore)
    if not INTERPRETED:
        with pytest.raises(ValueError, match="GPU"):
            make_store(model, 1, "paged")


def test_windows():
    assert attention_window(llama()) is None
    assert attention_window(MODELS["mistral"]()) == 4096
    assert attention_window(MODELS["qwen2"]()) is None
    sliding = random_model((Qwen2Config, Qwen2ForCausalLM), num_attention_heads=4, num_key_value_heads=4,
                           use_sliding_window=True, sliding_window=8, max_window_layers=1)  # fmt: skip
    assert attention_window(sliding) == 8


def chunked_model():
    model = llama()
    model.config.layer_types = ["full_attention", "chunked_attention"]
    return model


@torch.no_grad()
def test_tree_mode_restores_the_models_attention():
    model = lora_model()
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="tree_store"), tree_mode(model):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert model.config._attn_implementation == before != "arc_tree"
    model(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_refused_passes():
    model = random_model((MistralConfig, MistralForCausalLM), num_attention_heads=4, num_key_value_heads=2,
                         sliding_window=8)  # fmt: skip
    store = make_store(model, 1024, "contiguous")
    view = store.open(8, 64)
    ids = torch.ones(1, 8, dtype=torch.long)
    with tree_mode(model):
        store.prepare([Chain(view, 0, 8)])
        with pytest.raises(ValueError, match="no_grad"):
            model(input_ids=ids, tree_store=store)
        with torch.no_grad():
            model(input_ids=ids, tree_store=store)  # as long as the window
            with pytest.raises(ValueError, match="8 rows were prepared"):
                model(input_ids=ids[:, :5], tree_store=store)
            store.prepare([Chain(view, 8, 1)])
            with pytest.raises(ValueError, match="last 8 tokens"):
                model(input_ids=ids[:, :1], position_ids=ids[:, :1] * 8, tree_store=store)
    model = llama()
    model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, options: (args, options | {"softcap": 30.0}), with_kwargs=True
    )
    store.prepare([Chain(view, 0, 8)])
    with tree_mode(model), torch.no_grad(), pytest.raises(NotImplementedError, match="LlamaAttention adds softcap"):
        model(input_ids=ids, tree_store=store)
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        make_store(chunked_model(), 64)


def test_refused_chains():
    store = make_store(llama(), 1024, "contiguous")
    view = store.open(8, 64)
    below_prompt, beyond = np.array([3], np.int32), np.array([64], np.int32)
    for chain in (Chain(view, 60, 5), Chain(view, -1, 2), Chain(view, 9, 0), Chain(view, 9, 1, below_prompt),
                  Chain(view, 9, 1, beyond), Chain(view, 0, 8, np.array([8], np.int32))):  # fmt: skip
        with pytest.raises(ValueError):
            store.prepare([chain])
    with pytest.raises(ValueError, match="no chains"):
        store.prepare([])
    for prompt, length in ((-1, 5), (6, 5), (0, 0)):
        with pytest.raises(ValueError, match="prompt"):
            store.open(prompt, length)
