"""Make the README's results tables from the records in `results/`, and that of `results/test_time_training.md`.

A *record* is the JSON file that a run script leaves (option `--record`, see run_tools.py). Every record is one row; a
script without a record has a row that says "not run". The tables stand between two marker lines, and what stands there
is replaced. `test_time_training.md` compares runs of one model on all evaluation tasks that differ in their test-time
training: the records of such runs in `results/`, and those in `results/test_time_training/`.

    python training_code/results_table.py            # rewrite the tables
    python training_code/results_table.py --check    # only say whether they are up to date (exit status 1 if not)
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results -->", "<!-- /results -->"
NOT_RUN = "not run"

# Published results that the scripts reproduce: "The LLM ARChitect" (2024), 2 attempts.
PUBLISHED = {"run_evaluation_Llama-rearc_with_ttt": "54.5 %",
             "run_evaluation_Nemo-full_on_kaggle": "53.5 % (hidden set)",
             "run_evaluation_Nemo-full_with_ttt": "53.5 % (hidden set)"}

TRAINING_WORDS = {"joint": "one adapter for all tasks", "per-task": "an adapter for each task", "none": "none"}
EVALUATION_COLUMNS = ("script", "tasks", "seed", "test-time training", "per task (ARC Prize)", "per test input",
                      "all-or-nothing", "solution among candidates", "hardware", "time", "published")
COMPARED_SCRIPT, COMPARED_TASKS = "run_evaluation_Mini_with_ttt", 400
COMPARISON_COLUMNS = ("test-time training", "seed", "texts per task", "rank", "alpha", "learning rate",
                      "of embeddings", "tokens", "s of training", "s of search and scoring", "per task (ARC Prize)",
                      "per test input", "all-or-nothing", "solution among candidates", "hardware")
FINETUNING_COLUMNS = ("script", "steps", "tokens", "loss", "hardware", "time")


def load_records(folder: Path) -> dict[str, list[dict]]:
    """Return {script: its records}, in the order of their file names.

    Raises:
        ValueError: a file is not a record.
    """
    records: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records.setdefault(record["script"], []).append(record)
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the record of a run ({error!r}): remove it") from error
    return records


def duration(seconds: float) -> str:
    """Say a time in the unit that a reader would use."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.1f} h"


def hardware(record: dict) -> str:
    """Say what a run had to compute with: the GPU if it used one, else the CPU threads; of each of its workers."""
    machine = record["hardware"]
    on_gpu = machine["gpu"] and not str(record["config"].get("device") or "").startswith("cpu")
    device = machine["gpu"] if on_gpu else f"{machine['threads']} CPU threads ({machine['cpu']})"
    workers = record.get("workers", 1)
    return device if workers == 1 else f"{workers} x {device}"


def check_finished(script: str, record: dict) -> None:
    """Refuse the record of a run that did not come to its end, or to that of its tasks.

    Raises:
        ValueError: it is one.
    """
    if not record.get("finished"):
        raise ValueError(f"results/ holds a record of {script} that was not finished: run it to its end")
    if left := set(record.get("unfinished", ())) - set(record.get("set_aside", ())):
        raise ValueError(f"results/ holds a record of {script} with {len(left)} tasks that were not finished: start "
                         "it again, which goes on with them")


def evaluation_row(script: str, record: dict) -> list[str]:
    """Return the cells of an evaluation run; without solutions there is nothing to score.

    Raises:
        ValueError: the run did not come to its end.
    """
    check_finished(script, record)
    config = record["config"]
    return [f"`{script}`", str(len(record["tasks"])), str(config["seed"]), TRAINING_WORDS[config["ttt"]],
            *scores(record), hardware(record), duration(sum(record["seconds"].values())), PUBLISHED.get(script, "-")]


def scores(record: dict) -> list[str]:
    """Return the cells of the three scores and of the solutions among the candidates."""
    cells = []
    for rule in ("per task", "per test input", "all-or-nothing"):
        solved, total = (record["scores"] or {}).get(rule, (None, None))
        cells.append("-" if solved is None else f"{solved:g} of {total} ({solved / total:.1%})")
    return [*cells, f"{record['found']:g}" if record["scores"] else "-"]


def comparison_row(record: dict) -> list[str]:
    """Return the cells of a run in the comparison of ways to train at test time.

    Raises:
        ValueError: the run did not come to its end.
    """
    check_finished(record["script"], record)
    config, seconds = record["config"], record["seconds"]
    settings = config["per_task" if config["ttt"] == "per-task" else config["ttt"]]
    texts = settings["repeats"] * (8 if settings["all_symmetries"] else 1)
    return [TRAINING_WORDS[config["ttt"]], str(config["seed"]), str(texts), str(settings["lora_rank"]),
            f"{settings['lora_alpha']:g}", f"{settings['learning_rate']:g}", f"{settings['embedding_learning_rate']:g}",
            f"{record['tokens']['training']:,}", f"{seconds['test-time training']:.0f}",
            f"{seconds['find candidates']:.0f}", *scores(record), hardware(record)]


def make_comparison(records: Iterable[dict]) -> str:
    """Return the table of the compared runs: those with the fewest texts first, equal ones by their seed."""
    rows = [comparison_row(record) for record in records
            if record["script"] == COMPARED_SCRIPT and len(record["tasks"]) == COMPARED_TASKS
            and record["config"]["ttt"] != "none"]
    return table(COMPARISON_COLUMNS, sorted(rows, key=lambda row: (row[0], *map(float, (*row[2:7], row[1])))))


def finetuning_row(script: str, record: dict) -> list[str]:
    """Return the cells of a fine-tuning run.

    Raises:
        ValueError: the run did not come to its end, or only merged an adapter that was trained elsewhere.
    """
    check_finished(script, record)
    if "training" not in record:
        raise ValueError(f"results/ holds a record of {script} without any training: remove it")
    training = record["training"]
    return [f"`{script}`", f"{training['steps']:,}", f"{training['tokens']:,}", f"{training['loss']:.3f}",
            hardware(record), duration(sum(record["seconds"].values()))]


def table(columns: Sequence[str], rows: Iterable[list[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, ["---"] * len(columns), *rows])


def make_tables(scripts: Iterable[str], records: dict[str, list[dict]]) -> str:
    """Return both tables: the evaluation scripts, then the fine-tuning scripts.

    Raises:
        ValueError: a record belongs to no script.
    """
    scripts = sorted(scripts)
    if unknown := sorted(set(records) - set(scripts)):
        raise ValueError(f"results/ holds records of {', '.join(unknown)}, which is no script of training_code/")
    evaluations, finetunings = [], []  # of one script the runs with the fewest tasks first
    for script in scripts:
        found = records.get(script, [])
        if script.startswith("run_evaluation"):
            empty = [f"`{script}`", NOT_RUN, *["-"] * (len(EVALUATION_COLUMNS) - 3), PUBLISHED.get(script, "-")]
            found = sorted(found, key=lambda record: (len(record.get("tasks", ())), record["config"]["seed"]))
            evaluations += [evaluation_row(script, record) for record in found] or [empty]
        else:
            empty = [f"`{script}`", NOT_RUN, *["-"] * (len(FINETUNING_COLUMNS) - 2)]
            finetunings += [finetuning_row(script, record) for record in found] or [empty]
    return table(EVALUATION_COLUMNS, evaluations) + "\n\n" + table(FINETUNING_COLUMNS, finetunings)


def replace_tables(page: str, tables: str) -> str:
    """Return a page's text with the tables between its markers.

    Raises:
        ValueError: the markers are not there.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page needs one line {BEGIN} and one line {END}: the tables go between them")
    before, rest = page.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite or check the tables; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the tables are not up to date")
    check = parser.parse_args(arguments).check
    folder = REPOSITORY / "results"
    records, compared = load_records(folder), load_records(folder / "test_time_training")
    scripts = [path.stem for path in (REPOSITORY / "training_code").glob("run_*_*.py")]
    status = 0
    for page, tables in ((REPOSITORY / "README.md", make_tables(scripts, records)),
                         (folder / "test_time_training.md", make_comparison(
                             record for found in (records, compared) for record in found.get(COMPARED_SCRIPT, [])))):
        old = page.read_text(encoding="utf-8")
        new = replace_tables(old, tables)
        if old == new:
            print(f"{page.name}: the tables are up to date")
        elif check:
            print(f"{page.name}: the tables are old, run: python training_code/results_table.py")
            status = 1
        else:
            page.write_text(new, encoding="utf-8")
            print(f"{page.name}: the tables are rewritten")
    return status


if __name__ == "__main__":
    sys.exit(main())
