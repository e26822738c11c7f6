"""The score of an evaluation as a curve: what is solved among the tasks with the shortest prompts, and among all.

    python training_code/score_curve.py output_evaluation_Mini_with_ttt
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation_results import ATTEMPTS
from run_tools import task_file

LINES = {"solution among the candidates": ":", f"solved by {len(ATTEMPTS)} attempts": "-", "solved by the first": "--"}


def solved_shares(results):
    """Return for each line of the picture the share of a task's test inputs, one dict per line's name.

    results: what `candidates/<task>.json` holds.
    """
    ranks = [next((i for i, candidate in enumerate(candidates) if candidate["correct"]), None)
             for candidates in results["candidates"]]
    most = dict(zip(LINES, (float("inf"), len(ATTEMPTS), 1), strict=True))
    return {name: sum(rank is not None and rank < limit for rank in ranks) / len(ranks) for name, limit in most.items()}


def draw_score_curve(output, names=None):
    """Draw `score_curve.png` into the output folder of a run, of finished tasks with these names.

    names: None takes those of the record; the folder may hold tasks of other runs too.
    Returns its path; None, and the curve of an earlier run goes, if no solution is known.
    """
    output = Path(output)
    if names is None:
        record = json.loads((output / "record.json").read_text())
        names = set(record["tasks"]) - set(record.get("unfinished", ()))
    files = [task_file(output / "candidates", name, ".json") for name in sorted(names)]
    tasks = [json.loads(file.read_text()) for file in files if file.exists()]
    tasks = sorted((task for task in tasks if task["solutions"]), key=lambda task: task["prompt_tokens"])
    if not tasks:
        (output / "score_curve.png").unlink(missing_ok=True)
        return None
    counts = np.arange(1, len(tasks) + 1)
    figure = Figure(figsize=(6, 4))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = [solved_shares(task) for task in tasks]
    for name, style in LINES.items():
        axes.plot(counts, 100 * np.cumsum([share[name] for share in shares]) / counts, style, color="black", label=name)
    axes.set(xlabel="tasks, those with the shortest prompts first", ylabel="score (% of tasks)", ylim=(0, 102),
             title="Score of the tasks up to a length")  # fmt: skip
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(output / "score_curve.png", dpi=120)
    return output / "score_curve.png"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="output folder of a run")
    print(draw_score_curve(parser.parse_args().output) or "no solution is known")
