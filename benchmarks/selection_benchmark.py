"""Compare the selection by scores on the searched views with that by separate scoring views as published.

    python benchmarks/selection_benchmark.py --model trained/seed0 --seed 0 --output results/selection_Mini_seed0.json

One search per test input; its candidates are scored twice: on the 16 searched views, and on 8 views drawn for each
candidate. Every rule of `selection.py` is applied to both.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from arc_files import write_json  # noqa: E402
from evaluation_tools import VIEW_OPTIONS, VIEW_SEED, make_views, only_tasks  # noqa: E402
from inference_tools import inference_run  # noqa: E402
from mini_model import MINI_FORMAT  # noqa: E402
from model_tools import load_model  # noqa: E402
from run_tools import hardware, load_evaluation_set  # noqa: E402
from search import EngineSettings  # noqa: E402
from selection import EvalTool, all_score_algos, more_score_algos  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What to compare."""

    model: str = "pretrained_models/Mini"
    bits: int = 16
    seed: int = 0  # of the views
    tasks: int = 0  # only the first N tasks; 0: all
    repeats: int = 2
    min_prob: float = 0.1
    engine: EngineSettings = field(default_factory=EngineSettings)
    output: Path | None = None


def ranked(results, scores):
    """Return {rule: tasks solved with 2 attempts}, and how many have the solution among their candidates."""
    tool = EvalTool(2, [*all_score_algos, *more_score_algos])
    for task, inputs in results.items():
        for i, candidates in enumerate(inputs):
            scored = [dict(candidate, scores_aug=scores[task][i][j]) for j, candidate in enumerate(candidates)]
            tool.process_result(scored, f"{task}_{i}", 1 / len(inputs), print_func=None)
    solved = {rule.__name__: round(value, 3) for rule, value in zip(tool.score_algos, tool.n_acc, strict=True)}
    return solved, tool.a_acc


def main(config):
    """Search, score twice, compare."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_tok = load_model(config.model, bits=config.bits, device=device)
    tasks = load_evaluation_set()
    if config.tasks:
        tasks = only_tasks(tasks, sorted(tasks.challenge)[: config.tasks])
    views = make_views(SimpleNamespace(config=config), tasks)
    figures = {"config": {**asdict(config), "output": None}, "hardware": hardware(), "tasks": len(tasks.challenge)}
    for kind in ("search", "per_candidate"):
        begin = time.perf_counter()
        results = inference_run(views, MINI_FORMAT, model_tok, config.min_prob, scoring_views=kind,
                                aug_score_opts=VIEW_OPTIONS | {"seed": VIEW_SEED + config.seed}, engine=config.engine,
                                print_func=None, progress=False)  # fmt: skip
        scores = {task: [[c["scores_aug"] for c in candidates] for candidates in inputs]
                  for task, inputs in results.items()}
        rules, found = ranked(results, scores)
        figures[kind] = {"seconds": time.perf_counter() - begin, "solved": rules, "found": found}
        print(kind, json.dumps(figures[kind]), flush=True)
    if config.output:
        write_json(config.output, json.loads(json.dumps(figures, default=str)), indent=1)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
