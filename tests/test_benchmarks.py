"""The benchmarks, in miniature: they run, their figures are complete, and engine and plain search agree in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evaluation_tools import EvaluationConfig
from script_runs import write_small_files

REPOSITORY = Path(__file__).parents[1]


def run(script, *options):
    """Run a benchmark as a user would; return what it printed."""
    command = [sys.executable, str(REPOSITORY / "benchmarks" / script), *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=300)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


def test_search_benchmark_compares_the_engine_with_the_plain_search(tmp_path):
    printed = run("search_benchmark.py", "--tasks", 1, "--shortest", "--bits", 32, "--repeats", 1, "--device", "cpu",
                  "--plain-views", 8, "--plain-scorings", 4, "--output", tmp_path / "a.json")  # fmt: skip
    assert "engine: " in printed and "slots" in printed  # it says what it chose
    figures = json.loads((tmp_path / "a.json").read_text())
    plain, engine = figures["plain"], figures["engine"]
    assert (figures["views"], plain["views"], plain["replies_found_by_one_only"]) == (8, 8, 0)
    assert plain["largest_difference_of_nlls"] < 1e-3 and figures["plain_scoring"]["largest_difference_of_nlls"] < 1e-3
    assert plain["nodes"] == engine["nodes"] > 0  # the same trees
    assert figures["times_faster"] == pytest.approx(figures["plain_seconds_extrapolated"] / figures["seconds"])
    assert figures["multiple_of_floor"] > 0.5 and engine["rows"] >= engine["prompt_rows"] + engine["nodes"]


def test_shape_benchmark_runs_a_large_model_beside_mini_and_resumes(tmp_path):
    options = ("--shape", "tiny", "--lora-rank", 4, "--mini-bits", 32, "--tasks", 2, "--shortest", "--repeats", 1,
               "--part", 1, "--min-prob", 0.6)
    run("shape_benchmark.py", *options, "--output", tmp_path / "a.json")
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["engine"]["nodes"] == figures["mini_alone"]["nodes"] > 0  # Mini decides
    assert figures["engine"]["rows"] == figures["mini_alone"]["rows"]
    first, second = figures["parts"]
    assert figures["seconds"] == first["seconds"] + second["seconds"]
    assert figures["engine"]["nodes"] == first["engine"]["nodes"] + second["engine"]["nodes"]
    figures["parts"] = [dict(first, seconds=77.0)]  # as if stopped after the first
    (tmp_path / "a.json").write_text(json.dumps(figures))
    run("shape_benchmark.py", *options, "--output", tmp_path / "a.json")
    resumed = json.loads((tmp_path / "a.json").read_text())["parts"]
    assert [part["tasks"] for part in resumed] == [first["tasks"], second["tasks"]] and resumed[0]["seconds"] == 77.0
    assert resumed[1]["engine"]["nodes"] == second["engine"]["nodes"]


def test_training_benchmark_takes_a_random_base_model_through_the_path_of_the_fine_tuning(tmp_path):
    run("random_models.py", "--shape", "tiny", "--output", tmp_path / "base")
    run("training_benchmark.py", "--base-model", tmp_path / "base", "--bits", 16, 4, "--batch-sizes", 2,
        "--gradient-checkpointing", "False", "--optimizers", "adamw_torch_fused", "--lora-rank", 4, "--steps", 2,
        "--max-tokens", 1500, "--warm-up", 1, "--device", "cpu", "--output", tmp_path / "a.json")  # fmt: skip
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [row["bits"] for row in rows] == [16, 4] and rows[0]["weights_gib"] > rows[1]["weights_gib"] > 0
    for row in rows:
        assert 1000 < row["longest_text_tokens"] <= 1500 and row["tokens"] <= 4 * 1501
        assert row["tokens_per_second"] > row["tokens"] / row["seconds"]  # without preparations
        assert len(row["losses"]) == 2 and row["losses"][-1] > 1


# --- what each part adds ---------------------------------------------------------------------------------------------


@pytest.fixture
def ablation(monkeypatch):
    """The module ablation_benchmark."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    import ablation_benchmark

    return ablation_benchmark


def candidate(number, correct, **scores_inf):
    """Return a candidate found in views of test input ``t_<last letter>`` with these NLLs."""
    scores_inf = {f"t_{view[-1]}.{view}": nll for view, nll in scores_inf.items()}
    return {"output": [[number]], "correct": correct, "scores_inf": scores_inf, "scores_aug": {}}


# two test inputs in the views a, b, c; the last letter of a view tells the test input; best first
BY_SCORES = [
    [candidate(1, False, b0=0.1), candidate(2, False, c0=0.2), candidate(3, True, a0=0.3)],
    [candidate(4, True, b1=0.05), candidate(5, False, a1=0.1, c1=0.3)],
]
SAVED = {"task": "t", "solutions": [[[3]], [[4]]], "candidates": BY_SCORES,
         "identity": {"views": [["t_0.a0", "t_0.b0", "t_0.c0"], ["t_1.a1", "t_1.b1", "t_1.c1"]]}}  # fmt: skip
NOT_FITTING = {"task": "u", "solutions": [[[1]]], "candidates": [[]], "identity": {"views": [[]]}}


def test_rows_of_the_ablation_follow_from_the_candidates(ablation):
    baseline, training, views, scoring, threshold = ablation.PARTS
    assert [part.run for part in ablation.PARTS] == ["greedy_without_training", *["greedy"] * 3, "threshold"]
    tasks = [SAVED, NOT_FITTING]
    for part in (baseline, training):  # the first view alone: right for the first test input, wrong for the other
        assert ablation.score_part(part, tasks) == {
            "score": 25, "test_inputs": 3, "solution_among_candidates": 1, "candidates": 2 / 3}
    # of three candidates with one view each, the two most probable are wrong; of two, both are attempts
    assert ablation.score_part(views, tasks) == {
        "score": 25, "test_inputs": 3, "solution_among_candidates": 2, "candidates": 5 / 3}
    assert ablation.by_votes(BY_SCORES[1], None)[0]["output"] == [[5]]
    for part in (scoring, threshold):
        assert ablation.score_part(part, tasks) == ablation.score_part(views, tasks)
        turned = SAVED | {"candidates": [BY_SCORES[0][::-1], BY_SCORES[1]]}
        assert ablation.score_part(part, [turned])["score"] == 100
    assert ablation.score_part(views, [turned])["score"] == 50, "the order in the file does not matter"


def test_ablation_needs_all_parts_and_solutions(ablation, tmp_path):
    config = EvaluationConfig(script="s", model="m", record=True)
    runs = ablation.configurations(config, tmp_path)
    assert [(run.ttt, run.min_prob, run.output_path.name, run.record) for run in runs.values()] == [
        ("none", None, "greedy_without_training", False), ("joint", None, "greedy", False),
        ("joint", 0.1, "threshold", False)]  # fmt: skip
    for values in ({"ttt": "none"}, {"min_prob": None}):
        with pytest.raises(ValueError, match="give --ttt and --min-prob"):
            ablation.configurations(EvaluationConfig(script="s", model="m", **values), tmp_path)
    (tmp_path / "candidates").mkdir()
    (tmp_path / "candidates" / "t.json").write_text(json.dumps(SAVED | {"solutions": None}))
    with pytest.raises(ValueError, match="no solutions of t"):
        ablation.load_tasks(tmp_path, ["t"])


@pytest.mark.parametrize("ttt", ["joint", "per-task"])
def test_ablation_benchmark_trains_once_and_goes_on(tmp_path, ttt):
    files = write_small_files(tmp_path)
    kind = f"--{ttt}."
    options = ("--script", "run_evaluation_Mini_with_ttt", "--output-path", tmp_path / "runs", "--output",
               tmp_path / "a.json", "--model", files / "Mini", "--challenges", files / "challenges.json", "--solutions",
               files / "solutions.json", "--limit", 2, "--device", "cpu", "--repeats", 1, "--min-prob", 0.02, "--ttt",
               ttt, kind + "repeats", 2, kind + "lora-rank", 4, kind + "learning-rate", 0.01)  # fmt: skip
    assert run("ablation_benchmark.py", *options).count("== test-time training") == (2 if ttt == "joint" else 0)
    figures = json.loads((tmp_path / "a.json").read_text())
    rows = {row["part"]: row for row in figures["ablation"]}
    assert list(rows) == ["baseline", "training", "views", "scoring", "threshold search"] and figures["tasks"] == 2
    assert figures["config"]["output_path"] is None and figures["hardware"]["gpu"] is None
    assert {row["test_inputs"] for row in rows.values()} == {3}
    assert rows["views"]["solution_among_candidates"] == rows["scoring"]["solution_among_candidates"]
    assert rows["threshold search"]["candidates"] > 1 >= rows["training"]["candidates"] > 0
    assert rows["baseline"]["training_tokens"] == 0 < rows["training"]["training_tokens"]
    assert rows["scoring"]["training_seconds"] == rows["threshold search"]["training_seconds"] > 0, "trained once"
    assert all(row["search_seconds"] > 0 and 0 <= row["score"] <= 100 for row in rows.values())
    for name, part in (("greedy", "scoring"), ("threshold", "threshold search")):
        record = json.loads((tmp_path / "runs" / name / "record.json").read_text())
        solved, total = record["scores"]["per task"]
        assert rows[part]["score"] == pytest.approx(100 * solved / total)
        assert record["config"]["min_prob"] == (0.02 if name == "threshold" else None)
    (tmp_path / "a.json").unlink()
    printed = run("ablation_benchmark.py", *options)
    assert json.loads((tmp_path / "a.json").read_text()) == figures, "all was taken over"
    assert printed.count("adapter loaded from") == (2 if ttt == "joint" else 0)


def test_table_of_what_each_part_adds(ablation, monkeypatch, tmp_path):
    import benchmark_table

    monkeypatch.setattr(benchmark_table, "FOLDER", tmp_path)
    assert "What each part adds" not in benchmark_table.tables()
    rows = [{"part": part.name, "score": 10.04 + i, "test_inputs": 419, "solution_among_candidates": 90,
             "candidates": 2.25, "search_seconds": 60.4, "training_seconds": 7.0, "training_tokens": 1234567}
            for i, part in enumerate(ablation.PARTS)]  # fmt: skip
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "ablation_Tiny.json").write_text(json.dumps({
        "config": {"model": "pretrained_models/Tiny", "bits": 4, "min_prob": 0.1}, "tasks": 400, "parameters": 1,
        "hardware": {"gpu": "Some GPU", "threads": 1}, "ablation": rows}))  # fmt: skip
    section = benchmark_table.tables().split("### What each part adds")[1]
    first = "| Tiny | Some GPU | NF4 | 400 | baseline | 10.0 % | 14.9 % | 90 of 419 | 2.2 | 60 | 7 | 1,234,567 |"
    assert first in section and "| + threshold search | 14.0 % | 61.4 % |" in section and section.count("Tiny") == 5


def test_tables_of_the_benchmarks_tell_what_is_in_the_results():
    run("benchmark_table.py", "--check")


def test_tables_tell_of_a_part_of_a_gpu_and_of_recomputed_activations(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    from benchmark_table import checkpointing, device

    gpu = {"hardware": {"gpu": "Some GPU", "threads": 2}}
    assert device(gpu) == device(gpu | {"free_gib": [78.0, 79.2]}) == device(gpu | {"free_gib": None}) == "Some GPU"
    assert device(gpu | {"free_gib": [23.9, 79.2]}) == "Some GPU, 24 GiB of it"
    assert list(map(checkpointing, (True, False, None))) == ["yes", "no", "by need"]
    assert checkpointing(None, 12345) == "by need: above 12,345 tokens"


def test_a_smaller_gpu_needs_a_gpu():
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "smaller_gpu.py"), "--gib", "24", "--", "true"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert finished.returncode == 2 and "PyTorch finds no GPU here" in finished.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_command_has_only_a_part_of_the_gpu():
    look = "import torch; print(torch.cuda.mem_get_info()[0]); raise SystemExit(3)"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "smaller_gpu.py"), "--gib", "5", "--"]
    finished = subprocess.run([*command, sys.executable, "-c", look], capture_output=True, text=True, timeout=60,
                              check=False)  # fmt: skip
    assert finished.returncode == 3, finished.stderr
    assert 4 * 2**30 < int(finished.stdout.split()[-1]) <= 5 * 2**30


def test_ttt_benchmark_compares_many_adapters_at_once_with_the_trainer(tmp_path):
    printed = run("ttt_benchmark.py", "--shape", "tiny", "--bits", 16, "--tasks", 3, "--steps", 2, "--trainer-tasks", 1,
                  "--trainer-steps", 2, "--max-tokens", 2000, "--lora-rank", 4, "--device", "cpu",
                  "--output", tmp_path / "a.json")  # fmt: skip
    trainer, together = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [json.loads(line)["way"] for line in printed.splitlines() if line.startswith('{"way')] == [
        trainer["way"], together["way"]]  # fmt: skip
    assert (trainer["tasks"], together["tasks"], together["most_at_once"]) == (1, 3, 1)
    assert together["tokens"] == sum(group["tokens"] for group in together["groups"])
    for row in (trainer, together):
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"])
        assert row["times_floor"] > 0.5
