"""Measure how the engine's time grows with views, threshold, prompt length and tasks; draw it.

    python benchmarks/growth_benchmark.py --model trained/seed0 --output results/search_growth.json
    python benchmarks/growth_benchmark.py --draw results/search_growth.json docs/search_growth.png
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import tyro
from search_benchmark import Config as SearchConfig
from search_benchmark import choose_tasks, run_engine

from arc_files import write_json
from evaluation_tools import make_views, only_tasks
from mini_model import MINI_FORMAT
from model_tools import load_model
from run_tools import hardware, pick_device


@dataclass(frozen=True)
class Config:
    """What to measure; every series varies one thing and keeps the rest."""

    model: str = "pretrained_models/Mini"
    bits: int = 16
    tasks: int = 50  # drawn at random
    views: tuple[int, ...] = (1, 2, 4)  # times 8
    thresholds: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01, 0.005)
    counts: tuple[int, ...] = (10, 50, 150)
    length_groups: int = 4  # the tasks, sorted by prompt length, are cut into so many groups
    seed: int = 0
    output: Path | None = None
    draw: tuple[Path, Path] | None = None  # JSON file of an earlier run, picture to draw from it; nothing is measured


def measure(config, model_tok, series, x, **changes):
    """Run the engine once; return one point of a series."""
    tasks = changes.pop("chosen", None)
    settings = replace(SearchConfig(bits=config.bits, tasks=config.tasks, seed=config.seed), **changes)
    tasks = tasks or choose_tasks(settings)
    views = make_views(SimpleNamespace(config=settings), tasks)
    _, seconds, stats = run_engine(settings, views, model_tok)
    point = {"series": series, "x": x, "seconds": seconds, "tasks": len(tasks.challenge), "views": len(views.keys),
             **{name: stats[name] for name in ("passes", "rows", "prompt_rows", "nodes", "scored")}}  # fmt: skip
    print(json.dumps(point), flush=True)
    return point


def run(config):
    """Measure all series and write them."""
    model_tok = load_model(config.model, bits=config.bits, device=pick_device(None))
    measure(config, model_tok, "warm-up", 0, tasks=2)
    points = [measure(config, model_tok, "views", 8 * n, repeats=n) for n in config.views]
    points += [measure(config, model_tok, "threshold", p, min_prob=p) for p in config.thresholds]
    points += [measure(config, model_tok, "tasks", n, tasks=n) for n in config.counts]
    tasks = choose_tasks(SearchConfig(tasks=config.tasks, seed=config.seed))
    length = {}
    for key in tasks.keys:
        name = tasks.get_base_key(key)
        length[name] = max(length.get(name, 0), tasks.get_length(key, "input", **MINI_FORMAT))
    ordered = sorted(length, key=length.get)
    size = -(-len(ordered) // config.length_groups)
    for names in (ordered[i : i + size] for i in range(0, len(ordered), size)):
        mean = sum(length[name] for name in names) / len(names)
        points.append(measure(config, model_tok, "prompt tokens", mean, chosen=only_tasks(tasks, sorted(names))))
    if config.output:
        settings = {**asdict(config), "output": None}
        write_json(config.output, json.loads(json.dumps(
            {"config": settings, "hardware": hardware(), "points": points}, default=str)), indent=1)  # fmt: skip


def draw(source, target):
    """Draw one panel per series: milliseconds per view (per task for the number of views)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    data = json.loads(Path(source).read_text())
    names = ["views", "threshold", "prompt tokens", "tasks"]
    titles = ["views per test input", "threshold", "mean prompt tokens", "tasks at once"]
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for axis, name, title in zip(axes, names, titles, strict=True):
        points = sorted((p for p in data["points"] if p["series"] == name), key=lambda p: p["x"])
        axis.plot([p["x"] for p in points], [1000 * p["seconds"] / p["views"] for p in points], "o-", color="#1e6fb8")
        axis.set(xlabel=title, xscale="log", ylim=0)
        labels = [f"{p['x']:.3g}" if p["x"] < 1 else f"{p['x']:.0f}" for p in points]
        axis.set_xticks([p["x"] for p in points], labels, minor=False)
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("search + scoring, ms per view")
    device = data["hardware"]["gpu"] or data["hardware"]["cpu"]
    figure.suptitle(f"Mini, {device}, {data['config']['tasks']} random evaluation tasks, 16 views, 10 % unless varied")
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    config = tyro.cli(Config, description=__doc__)
    draw(*config.draw) if config.draw else run(config)
