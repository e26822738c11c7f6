"""Write the tables of benchmarks/README.md from the JSON files in benchmarks/results.

    python benchmarks/benchmark_table.py            # writes
    python benchmarks/benchmark_table.py --check    # only compares
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from arc_files import write_atomically  # noqa: E402
from kernel_profile import KINDS, OTHER  # noqa: E402

FOLDER = Path(__file__).resolve().parent
MOST_OF_IT = 0.9  # of a GPU's memory: with less to itself, a run says so
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
# percent that the paper's Llama-3.2-3B reaches on the same 400 tasks with each part (arXiv 2505.07859)
PAPER_3B = {"baseline": 14.9, "training": 40.9, "views": 52.9, "scoring": 59.5, "threshold search": 61.4}


@dataclass(frozen=True)
class Config:
    """What to do."""

    check: bool = False  # compare with what is there instead of writing


def device(figures):
    """Return the hardware in words."""
    hardware, free = figures["hardware"], figures.get("free_gib")
    smaller = f", {free[0]:.0f} GiB of it" if free and free[0] < MOST_OF_IT * free[1] else ""
    return (hardware["gpu"] or f"CPU, {hardware['threads']} threads") + smaller


def checkpointing(asked, above=None):
    """Say whether a row's activations are recomputed.

    asked: for all, True or False; None: where memory demands it, above: which is in passes of more tokens than this.
    """
    if asked is None:
        return "by need" if above is None else f"by need: above {above:,} tokens"
    return "yes" if asked else "no"


def dtype(bits):
    """Return the name of a precision."""
    return {4: "NF4", 16: "bf16", 32: "fp32"}[bits]


def table(header, rows):
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def search_row(figures):
    """Return the row of a run of search_benchmark.py."""
    engine, config = figures["engine"], figures["config"]
    plain = figures.get("plain")
    times = f"{figures['times_faster']:.1f}" if plain else "not measured"
    sample = f"{plain['views']} views of {plain['test_inputs']} test inputs" if plain else "-"
    return [
        device(figures), dtype(config["bits"]), figures["tasks"], figures["views"], f"{config['min_prob']:.1%}",
        f"{figures['seconds']:.1f}", f"{1e6 * figures['seconds_per_node']:.0f}", times, sample,
        f"{figures['multiple_of_floor']:.1f}", engine["passes"], f"{engine['rows']:,}", f"{engine['nodes']:,}",
        f"{engine['drafted']:,}", f"{engine['accepted']:,}", f"{engine['scored']:,}",
    ]


def plain_row(figures):
    """Return what the plain search took in the same run, and how its results differ from the engine's."""
    plain, scoring = figures["plain"], figures["plain_scoring"]
    distances = plain["their_distance_from_the_threshold"]
    return [
        device(figures), dtype(figures["config"]["bits"]), f"{1000 * plain['seconds_per_node']:.1f}",
        f"{1000 * plain['seconds_per_pass']:.1f}", f"{plain['seconds_per_view']:.2f}",
        f"{1000 * scoring['seconds_each']:.0f}", f"{figures['plain_seconds_extrapolated']:,.0f}",
        plain["replies_found_by_one_only"], f"{max(distances):.3f}" if distances else "-",
        f"{plain['largest_difference_of_nlls']:.1g}", f"{scoring['largest_difference_of_nlls']:.1g}",
    ]


def shape_row(figures):
    """Return the row of a run of shape_benchmark.py."""
    config, engine = figures["config"], figures["engine"]
    return [
        config["shape"], dtype(config["bits"]) + ", packed" * (config["engine"].get("unpack") is False),
        config.get("lora_rank") or "-", device(figures), figures["tasks"], figures["views"],
        f"{figures['seconds']:.1f}", f"{figures['mini_alone_seconds']:.1f}",
        f"{figures['seconds_extrapolated_to_all_tasks'] / 60:.1f}", f"{figures['multiple_of_floor']:.1f}",
        engine["passes"], f"{engine['rows']:,}", f"{figures['peak_gib']:.0f}",
    ]


def stage_row(figures):
    """Return where the time of a run of search_benchmark.py went."""
    seconds, whole = figures["engine"]["seconds"], figures["seconds"]
    seconds = {**seconds, "launch": seconds["launch"] - seconds.get("capture", 0)}  # graphs are recorded in it
    stages = [seconds.get(name, 0) for name in ("choose", "prepare", "launch", "wait", "read", "capture")]
    rest = whole - sum(stages)
    return [device(figures), dtype(figures["config"]["bits"]), f"{figures['config']['min_prob']:.1%}", f"{whole:.1f}",
            *(f"{stage:.1f}" for stage in stages), f"{rest:.1f}"]  # fmt: skip


def profile_row(figures):
    """Return the shares of the kinds of kernels in the time that the device worked."""
    kinds = figures["profile"]["kinds"]
    whole, config = sum(kinds.values()), figures["config"]
    shares = [f"{kinds.get(kind, 0) / whole:.0%}" for kind in (*KINDS, OTHER)]
    return [config.get("shape", "Mini"), device(figures), dtype(config["bits"]), config["profile_tasks"],
            f"{whole:.2f}", *shares]  # fmt: skip


def training_rows(run):
    """Return the rows of a run of training_benchmark.py."""
    rows = []
    for row in run["rows"]:
        fits, worst = "tokens_per_second" in row, row["longest_text_peak_gib"]
        rows.append([
            Path(run["config"]["base_model"]).name, device(run), row["backend"], dtype(row["bits"]), row["batch_size"],
            checkpointing(row["gradient_checkpointing"], row.get("recomputed_above")),
            "packed" if row.get("packing") else "padded",
            run["config"]["lora_rank"], f"`{row['optimizer']}`",
            f"{_steady_speed(row):,.0f}" if fits else "out of memory",
            f"{row['tokens_per_second']:,.0f}" if row.get("prepared_seconds") else "-",
            f"{row['peak_gib']:.1f}" if fits else "-", "out of memory" if worst is None else f"{worst:.1f}"])
    return rows


def _steady_speed(row):
    """Return the tokens per second of a training without the time in which its CUDA graphs were recorded."""
    return row["tokens"] / (row["tokens"] / row["tokens_per_second"] - row.get("prepared_seconds", 0))


def ttt_rows(run):
    """Return the rows of a run of ttt_benchmark.py."""
    config, rows = run["config"], []
    trainers = [row for row in run["rows"] if row["way"].startswith("Trainer")]
    for row in run["rows"]:
        times = [f"{row['tokens_per_second'] / trainer['tokens_per_second']:.1f}" for trainer in trainers]
        times += [f"{trainer['seconds_per_task'] / row['seconds_per_task']:.1f}" for trainer in trainers]
        rows.append([
            config["shape"] or Path(config["model"]).name, device(run), dtype(config["bits"]), row["way"], row["tasks"],
            row["most_at_once"], row["steps"],
            checkpointing(None if row.get("recomputed_above") else row["checkpointing"]),
            "`adamw_8bit`" if row.get("optimizer") == "adamw_8bit" else "`adamw_torch_fused`",
            f"{row['tokens_per_second']:,.0f}", *(times or "--"), f"{row['seconds_per_task']:.2f}",
            f"{row['times_floor']:.1f}", "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}"])
    return rows


def script_row(record):
    """Return the row of the record of a fine-tuning or evaluation script."""
    config, seconds, tokens = record["config"], dict(record["seconds"]), record["tokens"]
    ttt = config.get("ttt")
    training = seconds.pop("test-time training" if ttt else "train")
    return [
        f"`{record['script']}`" + (f", {ttt}" if ttt else ""), device(record), dtype(config["bits"]),
        record["training"]["texts"] if "training" in record else "-", f"{tokens['training']:,}", f"{training:.1f}",
        f"{tokens['training'] / training:,.0f}",
        ", ".join(f"{stage} {time:.1f}" for stage, time in seconds.items()), f"{record['peak_memory_gb']['gpu']:.0f}",
    ]


def ablation_rows(run):
    """Return the rows of a run of ablation_benchmark.py, each part beside what it reached in the paper."""
    own = [Path(run["config"]["model"]).name, device(run), dtype(run["config"]["bits"]), run["tasks"]]
    return [
        [*own, row["part"] if row["part"] == "baseline" else f"+ {row['part']}", f"{row['score']:.1f} %",
         f"{PAPER_3B[row['part']]} %", f"{row['solution_among_candidates']} of {row['test_inputs']}",
         f"{row['candidates']:.1f}", f"{row['search_seconds']:.0f}", f"{row['training_seconds']:.0f}",
         f"{row['training_tokens']:,}"] for row in run["ablation"]]  # fmt: skip


def selection_rows(runs):
    """Return per rule of selection the tasks solved with shared and with separate scoring views, by seed and in all."""
    rows = []
    for rule in runs[0]["search"]["solved"] if runs else ():
        solved = [[run[kind]["solved"][rule] for run in runs] for kind in ("search", "per_candidate")]
        rows.append([f"`{rule}`", *(f"{value:g}" for values in solved for value in (*values, sum(values)))])
    return rows


def tables():
    """Return the text between the marks."""
    runs = [json.loads(path.read_text()) for path in sorted((FOLDER / "results").glob("*.json"))]
    return "\n\n".join([*search_tables(runs), *training_tables(runs)])


def search_tables(runs):
    """Return titles and tables of what was measured of the search."""
    searches = [run for run in runs if "min_prob" in run.get("config", {}) and "shape" not in run["config"]
                and "engine" in run and "script" not in run]  # fmt: skip
    plain = [run for run in searches if "plain" in run]
    shapes = [run for run in runs if "shape" in run.get("config", {}) and "rows" not in run]
    profiles = [run for run in runs if "profile" in run]
    selections = sorted((run for run in runs if "per_candidate" in run), key=lambda run: run["config"]["seed"])
    seeds = [f"seed {run['config']['seed']}" for run in selections]
    return [
        "### Search and scoring of Mini",
        table(["device", "dtype", "tasks", "views", "threshold", "seconds", "µs per node", "times the plain search",
               "sample for it", "multiple of the floor", "passes", "rows", "nodes", "drafted", "accepted", "scored"],
              map(search_row, searches)),
        "### The plain search in the same runs, and differences",
        table(["device", "dtype", "ms per node", "ms per pass", "s per view", "ms per scoring",
               "s in all, extrapolated", "replies found by one only", "farthest from the threshold (nats)",
               "largest difference of NLLs, search", "scoring"], map(plain_row, plain)),
        "### Shapes of the published models",
        table(["shape", "dtype", "LoRA rank", "device", "tasks", "views", "seconds", "of Mini alone",
               "minutes for all 400 tasks", "multiple of the floor", "passes", "rows", "peak GiB"],
              map(shape_row, shapes)),
        "### Where the time goes (seconds, as the host sees it)",
        table(["device", "dtype", "threshold", "whole", "choose", "prepare", "launch", "wait for the device",
               "read results", "record graphs", "texts, grids, scores"], map(stage_row, searches)),
        "### Where the device's time goes, by kind of kernel (of a run under PyTorch's profiler)",
        table(["model", "device", "dtype", "tasks", "seconds of the device", *KINDS, OTHER],
              map(profile_row, profiles)),
        "### Tasks solved by each rule of selection: candidates scored on the searched views, or on separate ones",
        table(["rule", *(f"{kind}, {seed}" for kind in ("searched views", "separate") for seed in [*seeds, "sum"])],
              selection_rows(selections)),
    ]  # fmt: skip


def training_tables(runs):
    """Return titles and tables of what was measured of training and of whole evaluations, where there is something."""
    trainings = [row for run in runs if "rows" in run and "way" not in run["rows"][0] for row in training_rows(run)]
    ttts = [row for run in runs if "rows" in run and "way" in run["rows"][0] for row in ttt_rows(run)]
    scripts = [script_row(run) for run in runs if "script" in run and "seconds" in run]
    ablations = [row for run in runs if "ablation" in run for row in ablation_rows(run)]
    kinds = {
        "### LoRA training":
            (["model", "device", "backend", "dtype", "batch", "checkpointing", "texts", "LoRA rank", "optimiser",
              "tokens/s", "with recording", "peak GiB", "peak GiB with the longest text"], trainings),
        "### Test-time training, an adapter for each task (LoRA r 32, batch 1, 64 steps)":
            (["model", "device", "dtype", "way", "tasks", "most at once", "steps measured", "checkpointing",
              "optimiser", "tokens/s", "times the Trainer: tokens/s", "and tasks/s", "seconds per task",
              "multiple of the floor", "peak GiB"], ttts),
        "### The published models' scripts on random weights of their shapes (see below)":
            (["script", "device", "dtype", "texts", "tokens of training", "s of training", "tokens/s",
              "s of the other stages", "peak GB"], scripts),
        "### What each part adds (per task, two attempts; the baseline and training alone have one)":
            (["model", "device", "dtype", "tasks", "part", "score", "paper, 3B", "solution among candidates",
              "candidates per test input", "s of search and scoring", "s of training", "tokens of training"],
             ablations),
    }
    return [part for title, (header, rows) in kinds.items() if rows for part in (title, table(header, rows))]


def main(config):
    """Write the tables, or compare."""
    file = FOLDER / "README.md"
    text = file.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    new = f"{before}{BEGIN}\n\n{tables()}\n\n{END}{after}"
    if config.check and new != text:
        raise SystemExit(f"{file} differs from the results: run python benchmarks/benchmark_table.py")
    if not config.check:
        write_atomically(file, new.encode())


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
