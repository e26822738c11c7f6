"""Measure the engine on the shape of a large published model, with random weights and the search trees of Mini.

Random weights have no search trees. So every forward pass runs both models on the same tokens: the large one for its
real compute and memory traffic, Mini for the probabilities that decide. Mini's own part is measured by a run without
the large model on the same tasks, and given.

    python benchmarks/shape_benchmark.py --shape llama-3b --mini trained/seed0 --tasks 50 --output results/shape.json
"""

import functools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import bitsandbytes
import numpy as np
import torch
import tyro
from hardware_floor import floor_seconds, measure_rates
from search_benchmark import Config as SearchConfig
from search_benchmark import choose_tasks, run_engine
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

import inference_requests
from arc_files import write_json
from evaluation_tools import make_views
from model_tools import load_model
from run_tools import hardware, load_evaluation_set
from search import Engine, EngineSettings
from tree_attention import Chain, make_store, slot_bytes
from tree_graphs import make_runner
from tree_memory import choose_room

VOCABULARY = 77  # of the published checkpoints, after shrinking
SHAPES = {
    "llama-3b": LlamaConfig(  # Llama-3.2-3B
        vocab_size=VOCABULARY, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=False),  # fmt: skip
    "nemo-8b": MistralConfig(  # Mistral-NeMo-Minitron-8B
        vocab_size=VOCABULARY, hidden_size=4096, intermediate_size=11520, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, sliding_window=None,
        tie_word_embeddings=False),  # fmt: skip
    "tiny": LlamaConfig(  # to try the script on a CPU
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, max_position_embeddings=131072),  # fmt: skip
}


@dataclass(frozen=True)
class Config:
    """What to measure."""

    shape: Literal["llama-3b", "nemo-8b", "tiny"] = "llama-3b"
    bits: int = 16  # 16: bf16, 4: NF4
    mini: str = "pretrained_models/Mini"  # whose probabilities decide
    mini_bits: int = 16
    tasks: int = 50  # drawn at random
    shortest: bool = False  # the tasks with the shortest prompts instead
    repeats: int = 2
    seed: int = 0
    min_prob: float = 0.1
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: Path | None = None


def random_model(config, device):
    """Make a large model with random weights."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(SHAPES[config.shape], dtype=torch.bfloat16).eval()
    if config.bits == 4:
        for parent in list(model.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(parent, name, in_four_bits(layer))
    return model


def in_four_bits(layer):
    """Return a linear layer in NF4 with double quantisation."""
    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                                     compute_dtype=torch.bfloat16, compress_statistics=True)  # fmt: skip
    weight = layer.weight.data
    new.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4",
                                            compress_statistics=True)  # fmt: skip
    return new.to(weight.device)


class ShapeEngine(Engine):
    """An engine on Mini that runs a large model beside it in every pass."""

    def __init__(self, large, model, settings, print_func, share):  # noqa: PLR0913
        both = slot_bytes(model) + slot_bytes(large)
        room = choose_room(large, both, settings.memory_limit, settings.max_rows)
        store = make_store(model, room.slots)
        super().__init__(model, replace(settings, max_rows=room.rows), print_func, store, share)
        print_func(f"engine: in fact {room.slots} slots of {both} bytes for both models, {room.rows} tokens per pass")
        self.large, self.large_store, self.large_views = large, make_store(large, room.slots), {}
        self.large_graphs = make_runner(large, self.large_store, print_func) if settings.graphs else None
        close = self.store.close
        self.store.close = lambda view: (self._close_large(view), close(view))

    def _close_large(self, view):
        if view in self.large_views:
            self.large_store.close(self.large_views.pop(view))

    def _mirrored(self, chain):
        view = self.large_views.get(chain.view)
        if view is None:
            view = self.large_views[chain.view] = self.large_store.open(chain.view.prompt, chain.view.capacity)
        elif not self.large_store.grow(view, chain.view.capacity):
            raise MemoryError("the store of the large model is full, though it has as many slots as Mini's")
        return Chain(view, chain.start, chain.length, chain.path)

    def logits(self, chains, tokens, positions, keep):
        """Run the large model, then Mini; return Mini's logits."""
        mirrored = [self._mirrored(chain) for chain in chains]
        positions_large = np.concatenate([np.arange(chain.length) + chain.visible + len(chain.path)
                                          for chain in mirrored])  # fmt: skip
        self.run_model(self.large, self.large_store, self.large_graphs, (mirrored, tokens, positions_large, keep))
        return super().logits(chains, tokens, positions, keep)

    def close(self):
        """Give all memory back."""
        super().close()
        self.large_store = self.large_graphs = None
        self.large_views.clear()


def main(config):
    """Measure and write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mini = load_model(config.mini, bits=config.mini_bits, device=device)
    settings = SearchConfig(tasks=config.tasks, shortest=config.shortest, repeats=config.repeats, seed=config.seed,
                            min_prob=config.min_prob, engine=config.engine)  # fmt: skip
    tasks = choose_tasks(settings)
    views = make_views(SimpleNamespace(config=settings), tasks)
    one = make_views(SimpleNamespace(config=settings), choose_tasks(replace(settings, tasks=1)))
    run_engine(settings, one, mini)  # warms up
    _, mini_seconds, mini_stats = run_engine(settings, views, mini)
    begin = time.perf_counter()
    large = random_model(config, device)
    print(f"{config.shape} in {config.bits} bits made in {time.perf_counter() - begin:.0f} s")
    inference_requests.Engine = functools.partial(ShapeEngine, large)
    _, warm_up, _ = run_engine(settings, one, mini)
    _, seconds, stats = run_engine(settings, views, mini)
    rates = measure_rates(large)
    floor = floor_seconds(large, {**stats, "slot_bytes": slot_bytes(large)}, rates)
    share = sum(map(len, load_evaluation_set().grouped_keys().values())) * 8 * config.repeats / len(views.keys)
    figures = {
        "config": {**asdict(config), "output": None}, "hardware": hardware(), "tasks": len(tasks.challenge),
        "views": len(views.keys), "mini_alone_seconds": mini_seconds, "mini_alone": mini_stats,
        "warm_up_seconds": warm_up, "seconds": seconds, "engine": stats, "rates": rates, "floor_seconds": floor,
        "multiple_of_floor": seconds / floor, "seconds_extrapolated_to_all_tasks": seconds * share,
        "parameters": sum(parameter.numel() for parameter in large.parameters()),
    }
    if device == "cuda":
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    print(json.dumps(figures, indent=1, default=str))
    if config.output:
        write_json(config.output, json.loads(json.dumps(figures, default=str)), indent=1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
