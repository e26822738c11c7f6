"""The benchmarks, in miniature: they run, their figures are complete, and engine and plain search agree in them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
    options = ("--shape", "tiny", "--mini-bits", 32, "--tasks", 2, "--shortest", "--repeats", 1, "--part", 1)
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
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"]) and row["loss"] > 1


def test_tables_of_the_benchmarks_tell_what_is_in_the_results():
    run("benchmark_table.py", "--check")
