"""Write the report of an evaluation run: one HTML file that opens in any browser, without a network.

It is made from what the run left in its output folder (record.json, candidates/, submission.json and, with test-time
training, its loss), so it can be made anew at any time, of an unfinished run too:

    python training_code/report.py output_evaluation_Mini_with_ttt

The page is `report.html.jinja`, which shows the summary, with `report.js` in it, which draws the list of tasks and
whatever is opened there. All that comes from files is escaped by jinja2 or set as text; the page's policy allows no
other script and no request.
"""

import argparse
import base64
import hashlib
import inspect
import json
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np

from arc_files import write_atomically
from draw_tools import ARC_COLOURS, BRIGHT
from report_tasks import OUTCOMES, RULES, LossEntry, Record, RunFiles, page_data, read_run
from results_table import TRAINING_WORDS, duration, hardware

FOLDER = Path(__file__).resolve().parent
SCORE_RULES = {"per task": "the ARC Prize's: mean over tasks of solved / all test inputs",
               "per test input": "solved / all test inputs",
               "all-or-nothing": "tasks with every test input solved / all tasks"}
SIGNS = dict(zip(OUTCOMES, "✓▲✗∅?…", strict=True))  # so that no outcome is told by its colour alone
SCORING_VIEWS = {"search": "the searched views", "shared": "one set of their own",
                 "per_candidate": "drawn for each candidate"}
LOSS_POINTS, LOSS_WIDTH, LOSS_HEIGHT = 400, 600, 260  # most points of the curve; size of its picture


def write_report(output_folder: str | Path) -> Path:
    """Write `report.html` into the output folder of an evaluation run and return its path.

    Raises:
        FileNotFoundError: the folder holds no record.
        ValueError: a file in it is broken.
    """
    run = read_run(output_folder)
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    data = {"tasks": page_data(run), "outcomes": SIGNS, "colours": ARC_COLOURS, "bright": sorted(BRIGHT),
            "min_prob": run.record["config"].get("min_prob")}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    html = environment.get_template("report.html.jinja").render(
        summary(run), data=data, script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode())
    path = Path(output_folder) / "report.html"
    write_atomically(path, html.encode())
    return path


# ---- summary ----

def summary(run: RunFiles) -> dict:
    """Return what the page shows above the list of tasks."""
    record = run.record
    seconds, settings = record["seconds"], record["config"] | {"versions": record["versions"]}
    outcomes = [one.outcome for inputs in run.inputs.values() for one in inputs]
    counts = {f"{SIGNS[outcome]} {outcome}": outcomes.count(outcome) for outcome in OUTCOMES}
    return {
        "script_name": record["script"], "scores": score_cards(run), "facts": facts(record),
        "state": "finished" if record.get("finished") and not record.get("unfinished") else
                 f"{len(run.saved)} of {len(record['tasks'])} tasks finished",
        "n_tasks": len(record["tasks"]), "n_inputs": len(outcomes),
        "stages": bars([(name, value, duration(value)) for name, value in seconds.items()]),
        "total": duration(sum(seconds.values())),
        "outcome_bars": bars([(name, count, str(count)) for name, count in counts.items() if count]),
        "tokens": [(name, f"{count:,}") for name, count in record["tokens"].items()],
        "rules": rule_rows(run), "loss": loss_chart(run.loss),
        "loss_is_mean": record["config"].get("ttt") == "per-task", "config": json.dumps(settings, indent=2)}


def bars(rows: list[tuple[str, float, str]]) -> list[tuple[str, float, str]]:
    """Return (name, length 0..100, text) of bars: each value's share of all."""
    total = sum(value for _, value, _ in rows) or 1
    return [(name, round(100 * value / total, 1), text) for name, value, text in rows]


def score_cards(run: RunFiles) -> list[tuple[str, str, str, str]]:
    """Return (name, share, solved of all, explanation) of the three score rules and of the coverage.

    Empty for a run without solutions, or one that has not been scored yet.
    """
    scores = run.record.get("scores")
    if not scores:
        return []
    shown = {name: (*scores[name], text) for name, text in SCORE_RULES.items() if name in scores}
    if "found" in run.record:
        shown["coverage"] = (run.record["found"], n_scored(run),
                             "solution among the candidates: the score per task of a perfect selection")
    return [(name, f"{solved / total:.1%}" if total else "-", f"{solved:g} of {total}", text)
            for name, (solved, total, text) in shown.items()]


def n_scored(run: RunFiles) -> int:
    """Return the number of tasks that the score counts, where there is one yet, else of the finished ones."""
    return (run.record.get("scores") or {}).get("per task", (0, len(run.saved)))[1]


def rule_rows(run: RunFiles) -> list[tuple[str, str, float, str, bool]]:
    """Return (rule, what it ranks by, length of its bar 0..100, solved, whether it decided) of every selection rule."""
    solved, rows = run.record.get("solved_by_rule", {}), []
    for name, value in solved.items():
        about = inspect.getdoc(RULES[name]).splitlines()[0].split(" Source:")[0] if name in RULES else ""
        about = about.removeprefix("Rank ").removesuffix(".").replace("`", "")
        share = 100 * value / (n_scored(run) or 1)
        rows.append((name, about, round(share, 1), f"{value:g}",
                     name == run.record.get("score_rule")))
    return rows


def facts(record: Record) -> list[tuple[str, str]]:
    """Return the configuration in brief, and what it ran on, as (name, text)."""
    config, model, memory = record["config"], record.get("model"), record.get("peak_memory_gb") or {}
    size = f", {model['parameters'] / 1e6:,.1f} million parameters" if model and "parameters" in model else ""
    rows = {
        "model": f"{config.get('model')}{size}, {config.get('bits')} bits",
        "test-time training": training_words(config),
        "search": search_words(config),
        "scoring views": SCORING_VIEWS.get(config.get("scoring_views"), ""),
        "selection rule": record.get("score_rule") or config.get("score_rule") or "",
        "seed": str(config.get("seed", "")),
        "hardware": hardware(record),
        "peak memory": ", ".join(f"{name} {value:g} GB" for name, value in memory.items()),
        "last start": " to ".join(record[time].replace("T", " ").replace("+00:00", " UTC")
                                  for time in ("started", "ended") if time in record),
        "commit": record["commit"],
    }
    return [(name, text) for name, text in rows.items() if text]


def training_words(config: dict) -> str:
    """Say how the demonstration pairs were trained on."""
    kind = config.get("ttt")
    settings = config.get({"joint": "joint", "per-task": "per_task"}.get(kind))
    words = [TRAINING_WORDS.get(kind, str(kind))]
    if settings:
        views = settings["repeats"] * (8 if settings.get("all_symmetries") else 1)
        words += [f"{views} views of each", f"LoRA rank {settings['lora_rank']}",
                  f"learning rate {settings['learning_rate']:g}", f"batches of {settings['batch_size']}"
                  + (f" x {settings['gradient_accumulation']}" if settings["gradient_accumulation"] > 1 else "")]
    return ", ".join(words)


def search_words(config: dict) -> str:
    """Say what was searched."""
    views = f"{8 * config['repeats']} views of each test input, " if "repeats" in config else ""
    if config.get("min_prob") is None:
        return f"{views}the most probable reply of each"
    return f"{views}all replies with more than {config['min_prob']:.3g} probability"


# ---- loss ----

def loss_chart(history: Sequence[LossEntry]) -> dict | None:
    """Return the curve of a training as points of an SVG, with its ticks; None where there is none to draw.

    A long training is drawn as the means of equally many steps; beside them runs the mean over a tenth of the curve.
    """
    if len(history) < 2:
        return None
    parts = np.array_split(np.arange(len(history)), min(len(history), LOSS_POINTS))
    steps = np.array([np.mean([history[i]["step"] for i in part]) for part in parts])
    losses = np.array([np.mean([history[i]["loss"] for i in part]) for part in parts])
    window = max(len(losses) // 10, 1)
    # the mean of what the window holds, which is less at both ends
    counts = np.convolve(np.ones_like(losses), np.ones(window), mode="same")
    smooth = np.convolve(losses, np.ones(window), mode="same") / counts
    top = float(losses.max()) or 1.0
    tick = nice_tick(top)
    x = LOSS_WIDTH * (steps - steps[0]) / (steps[-1] - steps[0] or 1)

    def points(values: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, LOSS_HEIGHT * (1 - values / top), strict=True))

    last, tenth = history[-1], [entry["loss"] for entry in history[-len(history) // 10:]]
    return {"width": LOSS_WIDTH, "height": LOSS_HEIGHT, "points": points(losses),
            "smooth": points(smooth) if window > 1 else "",
            "ticks": [(round(LOSS_HEIGHT * (1 - i * tick / top), 1), f"{i * tick:g}")
                      for i in range(int(top / tick) + 1)],
            "first_step": history[0]["step"], "last_step": last["step"],
            "thin": "every step" if len(parts) == len(history) else f"means of {len(history) / len(parts):.0f} steps",
            "words": f"from {history[0]['loss']:.3f} to {last['loss']:.3f} in {len(history):,} steps, "
                     f"mean of the last tenth {np.mean(tenth):.3f}"}


def nice_tick(top: float) -> float:
    """Return the distance of three to six ticks from 0 to `top`."""
    power = 10.0 ** np.floor(np.log10(top))
    return float(next(power * step for step in (0.2, 0.25, 0.5, 1, 2, 2.5, 5) if top / (power * step) <= 6))


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the report of the run whose output folder is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_folder", type=Path, help="output folder of an evaluation run")
    options = parser.parse_args(arguments)
    try:
        print(write_report(options.output_folder))
    except (FileNotFoundError, ValueError) as error:
        parser.exit(1, f"{error}\n")


if __name__ == "__main__":
    main()
