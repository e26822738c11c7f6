"""Measure the engine on the shape of a large published model, with random weights and the search trees of Mini.

Random weights have no search trees. So every forward pass runs both models on the same tokens: the large one for its
real compute and memory traffic, Mini for the probabilities that decide. Mini's own part is measured by a run without
the large model on the same tasks, and given. The tasks run in parts; what ``--output`` holds of an earlier start with
the same options is taken over.

    python benchmarks/shape_benchmark.py --shape llama-3b --mini trained/seed0 --tasks 50 --output results/shape.json
"""

import functools
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from hardware_floor import count_weights, floor_seconds, measure_rates
from kernel_profile import profile_kernels
from random_models import Shape, random_model
from search_benchmark import Config as SearchConfig
from search_benchmark import choose_tasks, run_engine

import inference_requests
from arc_files import write_json
from evaluation_tools import make_views, only_tasks
from lora_layers import inference_layers
from model_tools import create_lora, load_model
from run_tools import hardware, load_evaluation_set
from search import Engine, EngineSettings
from tree_attention import Chain, make_store, slot_bytes
from tree_graphs import make_runner
from tree_memory import choose_room, weights_for_the_engine


@dataclass(frozen=True)
class Config:
    """What to measure."""

    shape: Shape = "llama-3b"
    bits: int = 16  # 16: bf16, 4: NF4
    lora_rank: int = 0  # of an adapter beside the base, as after test-time training; 0: none
    mini: str = "pretrained_models/Mini"  # whose probabilities decide
    mini_bits: int = 16
    tasks: int = 50  # drawn at random
    shortest: bool = False  # the tasks with the shortest prompts instead
    part: int = 30  # tasks at once; every part is written when it is done
    profile_tasks: int = 0  # tasks of a further run, under PyTorch's profiler
    repeats: int = 2
    seed: int = 0
    min_prob: float = 0.1
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: Path | None = None


class ShapeEngine(Engine):
    """An engine on Mini that runs a large model beside it in every pass."""

    def __init__(self, large, model, settings, print_func, share, adapters=None):  # noqa: PLR0913
        both = slot_bytes(model) + slot_bytes(large)
        room = choose_room(large, both, settings.memory_limit, settings.max_rows)
        store = make_store(model, room.slots)
        super().__init__(model, replace(settings, max_rows=room.rows), print_func, store, share, adapters)
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


def read_parts(config):
    """Return the parts that an earlier start with the same options has written."""
    if config.output is None or not config.output.exists():
        return []
    before = json.loads(config.output.read_text())
    if before["config"] != plain_config(config):
        raise SystemExit(f"{config.output} is of other options: remove it, or choose another file")
    return before["parts"]


def plain_config(config):
    """Return the options as JSON."""
    return json.loads(json.dumps({**asdict(config), "output": None}, default=str))


def added_up(counters):
    """Return the sum of counters: a list of (nested) dictionaries of numbers; of the most slots, the greatest."""
    total = {}
    for name, value in ((name, value) for one in counters for name, value in one.items()):
        if isinstance(value, dict):
            total[name] = added_up([total.get(name, {}), value])
        else:
            before = total.get(name, 0)
            total[name] = max(before, value) if name in ("peak_slots", "slot_bytes") else before + value
    return total


def summary(config, parts, large):
    """Return the figures of all parts together."""
    views = sum(part["views"] for part in parts)
    everything = sum(map(len, load_evaluation_set().grouped_keys().values())) * 8 * config.repeats
    stats = added_up([part["engine"] for part in parts])
    seconds = sum(part["seconds"] for part in parts)
    rates = measure_rates(large)
    floor = floor_seconds(large, {**stats, "slot_bytes": slot_bytes(large)}, rates)
    return {
        "config": plain_config(config), "hardware": hardware(), "tasks": sum(len(part["tasks"]) for part in parts),
        "views": views, "mini_alone_seconds": sum(part["mini_alone_seconds"] for part in parts),
        "mini_alone": added_up([part["mini_alone"] for part in parts]), "seconds": seconds, "engine": stats,
        "rates": rates, "floor_seconds": floor, "multiple_of_floor": seconds / floor,
        "seconds_extrapolated_to_all_tasks": seconds * everything / views,
        "weights": count_weights(large)[0],
        "peak_gib": max(part["peak_gib"] for part in parts), "parts": parts,
    }  # fmt: skip


def main(config):
    """Measure the parts that are missing and write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mini = load_model(config.mini, bits=config.mini_bits, device=device)
    settings = SearchConfig(tasks=config.tasks, shortest=config.shortest, repeats=config.repeats, seed=config.seed,
                            min_prob=config.min_prob, engine=config.engine)  # fmt: skip
    tasks = choose_tasks(settings)
    names = np.random.default_rng(config.seed).permutation(sorted(tasks.challenge)).tolist()
    begin = time.perf_counter()
    large = random_model(config.shape, config.bits, device)
    if config.lora_rank:
        large = create_lora(large, r=config.lora_rank, alpha=16)
    print(f"{config.shape} in {config.bits} bits made in {time.perf_counter() - begin:.0f} s", flush=True)

    def run(chosen, alone=True):
        views = make_views(SimpleNamespace(config=settings), only_tasks(tasks, sorted(chosen)))
        part = {"tasks": chosen, "views": len(views.keys)}
        if alone:
            inference_requests.Engine = Engine
            _, part["mini_alone_seconds"], part["mini_alone"] = run_engine(settings, views, mini)
        inference_requests.Engine = functools.partial(ShapeEngine, large)
        with weights_for_the_engine(large, config.engine.unpack, print), inference_layers(large):
            _, part["seconds"], part["engine"] = run_engine(settings, views, mini)
        part["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        return part

    parts = read_parts(config)
    left = names[sum(len(part["tasks"]) for part in parts) :]
    if left and device == "cuda":
        run(names[:1])  # warms up
    while left:
        parts.append(run(left[: config.part]))
        left = left[config.part :]
        print(f"{len(left)} of {len(names)} tasks left; this part took {parts[-1]['seconds']:.1f} s", flush=True)
        if config.output:
            write_json(config.output, summary(config, parts, large), indent=1)
    figures = summary(config, parts, large)
    if config.profile_tasks:
        chosen = names[: config.profile_tasks]
        figures["profile"] = profile_kernels(lambda: run(chosen, alone=False), device)
    if config.output:
        write_json(config.output, figures, indent=1)
    print(json.dumps(figures | {"parts": len(parts)}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
