"""Measure search and scoring by the engine on ARC evaluation tasks, beside the plain search on a sample of their views.

    python benchmarks/search_benchmark.py --output results/search_Mini.json           # a GPU; all 400 tasks
    python benchmarks/search_benchmark.py --tasks 10 --shortest --bits 32             # a CPU

The plain search is given what it has in a real run: its cache, and the best candidate of the views before as guess.
Its whole time is extrapolated from the sample: seconds per view times views, seconds per scoring times scorings.
"""

import json
import math
import sys
import time
from functools import partial
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from arc_files import write_json  # noqa: E402
from evaluation_tools import make_views, only_tasks  # noqa: E402
from hardware_floor import floor_seconds, measure_rates  # noqa: E402
from inference_tools import inference_run  # noqa: E402
from kernel_profile import profile_kernels  # noqa: E402
from mini_model import MINI_FORMAT  # noqa: E402
from model_tools import load_model  # noqa: E402
from plain_search import SearchStats, dfs, reply_nll  # noqa: E402
from run_tools import hardware, load_evaluation_set  # noqa: E402
from search import EngineSettings  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What to measure."""

    model: str = "pretrained_models/Mini"  # folder of the model
    bits: int = 16  # precision: 32 or 16
    device: str | None = None  # cpu or cuda; None: a GPU if there is one
    tasks: int = 0  # how many tasks, drawn at random; 0: all
    shortest: bool = False  # the tasks with the shortest prompts instead of random ones
    repeats: int = 2  # times 8 symmetries = views
    seed: int = 0
    min_prob: float = 0.1
    plain_views: int = 0  # views of the sample for the plain search
    plain_scorings: int = 40  # scorings of the sample
    profile_tasks: int = 0  # tasks of a further run, under PyTorch's profiler
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: Path | None = None  # JSON file for the figures


def choose_tasks(config):
    """Return the evaluation tasks to measure."""
    tasks = load_evaluation_set()
    names = sorted(tasks.challenge)
    if config.shortest:
        length = {name: 0 for name in names}
        for key in tasks.keys:
            name = tasks.get_base_key(key)
            length[name] = max(length[name], tasks.get_length(key, "input", **MINI_FORMAT))
        names = sorted(names, key=lambda name: (length[name], name))[: config.tasks or None]
    elif config.tasks:
        names = np.random.default_rng(config.seed).choice(names, config.tasks, replace=False).tolist()
    return only_tasks(tasks, sorted(names))


def timed(function):
    """Return (value, seconds) of a call, with the GPU's work finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    value = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return value, time.perf_counter() - start


def run_engine(config, views, model_tok):
    """Search and score all views; return (results, seconds, counters)."""
    stats = {}
    results, seconds = timed(lambda: inference_run(
        views, MINI_FORMAT, model_tok, config.min_prob, scoring_views="search", engine=config.engine, progress=False,
        print_func=lambda line: print(line) if line.startswith("engine") else None, engine_stats=stats))  # fmt: skip
    return results, seconds, stats


def text_of(views, key, grid):
    """Return (prompt, reply) of a grid in a view."""
    fmt_opts = {name: value for name, value in MINI_FORMAT.items() if name != "max_tokens"}
    fmt = views.fmt_task(key, reply=grid, **fmt_opts)
    return fmt["input"], fmt.get("reply")


def plain_sample(config, views, results, model_tok):
    """Run the plain search on random views and plain scorings of random pairs; compare with the engine's results."""
    model, tokenizer = model_tok
    rng = np.random.default_rng(config.seed)
    queries = {f"{task}_{i}": keys for task, inputs in views.grouped_keys().items() for i, keys in enumerate(inputs)}
    names = rng.permutation(sorted(queries)).tolist()[: max(12, config.plain_views // 3)]
    sample = [(name, int(place)) for name in names
              for place in rng.choice(len(queries[name]), math.ceil(config.plain_views / len(names)), replace=False)]
    limit, stats = -math.log(config.min_prob), SearchStats()
    seconds, differing, distances, widest = 0.0, 0, [], 0.0
    for name, place in sample:
        task, i = views.get_base_key_and_reply_num(name)
        candidates, keys = results[task][i], queries[name]
        tokens = tokenizer(text_of(views, keys[place], None)[0])["input_ids"]
        before = {key: j for j, key in enumerate(keys[:place])}
        known = [(nll, j) for j, candidate in enumerate(candidates)
                 for key, nll in candidate["scores_inf"].items() if key in before]
        guess = text_of(views, keys[place], candidates[min(known)[1]]["output"])[1] if known else ""
        guess = tokenizer(guess, add_special_tokens=False)["input_ids"]
        search = partial(dfs, model, tokens + guess, tokenizer.eos_token_id, 932, config.min_prob, len(tokens))
        found, spent = timed(partial(search, stats=stats))
        seconds += spent
        plain = {}
        for reply, nll in found:
            grid = views.decode(tokenizer.decode(reply), MINI_FORMAT["lines_sep"], keys[place])[0]
            if grid is not None:
                plain[str(np.asarray(grid).tolist())] = nll
        engine = {str(np.asarray(candidate["output"]).tolist()): candidate["scores_inf"][keys[place]]
                  for candidate in candidates if keys[place] in candidate["scores_inf"]}
        for grid in set(plain) ^ set(engine):
            differing += 1
            distances.append(abs(limit - {**plain, **engine}[grid]))
        widest = max([widest, *(abs(plain[grid] - engine[grid]) for grid in set(plain) & set(engine))])
    return {"views": len(sample), "test_inputs": len(names), "seconds": seconds,
            "seconds_per_view": seconds / len(sample), "seconds_per_node": seconds / stats.nodes,
            "seconds_per_pass": seconds / stats.forward_passes, **asdict(stats), "replies_found_by_one_only": differing,
            "their_distance_from_the_threshold": distances, "largest_difference_of_nlls": widest}


def plain_scoring_sample(config, views, results, model_tok):
    """Score random (view, candidate) pairs by the plain way; return its figures."""
    model, tokenizer = model_tok
    rng = np.random.default_rng(config.seed)
    pairs = [(key, candidate) for inputs in results.values() for candidates in inputs for candidate in candidates
             for key in candidate["scores_aug"]]
    total = sum(1 for key, candidate in pairs if key not in candidate["scores_inf"])
    chosen = rng.permutation(len(pairs))[: config.plain_scorings]
    seconds, widest = 0.0, 0.0
    for key, candidate in (pairs[i] for i in chosen):
        prompt, reply = text_of(views, key, candidate["output"])
        prompt = tokenizer(prompt)["input_ids"]
        reply = tokenizer(reply, add_special_tokens=False)["input_ids"]
        nll, spent = timed(partial(reply_nll, model, prompt, reply))
        seconds += spent
        widest = max(widest, abs(nll - candidate["scores_aug"][key]))
    return {"sample": len(chosen), "seconds_each": seconds / max(1, len(chosen)), "needed": total,
            "largest_difference_of_nlls": widest}


def write(config, figures):
    """Write the figures so far."""
    if config.output:
        write_json(config.output, json.loads(json.dumps(figures, default=str)), indent=1)


def main(config):
    """Measure, print and write the figures."""
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # the plain search too is faster without its plans for every length
    model_tok = load_model(config.model, bits=config.bits, device=device)
    tasks = choose_tasks(config)
    views = make_views(SimpleNamespace(config=config), tasks)
    figures = {"config": {**asdict(config), "output": None}, "hardware": hardware(), "device": device,
               "tasks": len(tasks.challenge), "test_inputs": len(tasks.keys), "views": len(views.keys)}
    one = make_views(SimpleNamespace(config=config), only_tasks(tasks, sorted(tasks.challenge)[:1]))
    figures["warm_up_seconds"] = run_engine(config, one, model_tok)[1]
    results, seconds, stats = run_engine(config, views, model_tok)
    solved = sum(any(candidate["correct"] for candidate in candidates) / len(inputs)
                 for inputs in results.values() for candidates in inputs)
    candidates = sum(len(candidates) for inputs in results.values() for candidates in inputs)
    figures |= {"seconds": seconds, "seconds_per_node": seconds / stats["nodes"], "engine": stats,
                "candidates": candidates, "solution_found": solved}
    rates = measure_rates(model_tok[0])
    floor = floor_seconds(model_tok[0], stats, rates)
    figures |= {"rates": rates, "floor_seconds": floor, "multiple_of_floor": seconds / floor}
    write(config, figures)
    if config.plain_views:
        plain = figures["plain"] = plain_sample(config, views, results, model_tok)
        scoring = figures["plain_scoring"] = plain_scoring_sample(config, views, results, model_tok)
        whole = plain["seconds_per_view"] * len(views.keys) + scoring["seconds_each"] * scoring["needed"]
        figures |= {"plain_seconds_extrapolated": whole, "times_faster": whole / seconds}
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    write(config, figures)
    if config.profile_tasks:
        some = only_tasks(tasks, sorted(tasks.challenge)[: config.profile_tasks])
        some = make_views(SimpleNamespace(config=config), some)
        figures["profile"] = profile_kernels(lambda: timed(lambda: run_engine(config, some, model_tok)), device)
        write(config, figures)
    print(json.dumps(figures, indent=1, default=str))
    return figures


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
