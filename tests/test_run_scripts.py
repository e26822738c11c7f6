"""Every run script end to end with a tiny model, judged by what it wrote."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from arc_loader import ArcDataset
from conftest import make_bpe_tokenizer, make_tiny_llama
from evaluation_results import score_submission, verify_submission
from evaluation_tools import TTTSettings
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora, merge_peft_into_base, save_model_and_tokenizer
from training_tools import TrainingSettings, train_lora

REPOSITORY = Path(__file__).parents[1]
TRAINING_CODE = REPOSITORY / "training_code"
PAIRS = [{"input": [[a, b]], "output": [[b]]} for a, b in ((1, 2), (3, 4), (5, 6), (7, 8), (9, 0))]
CHALLENGES = {"last": {"train": PAIRS[:3], "test": [{"input": PAIRS[3]["input"]}, {"input": PAIRS[4]["input"]}]},
              "other": {"train": PAIRS[1:4], "test": [{"input": PAIRS[0]["input"]}]},
              "longer": {"train": [{"input": [[1] * 9] * 9, "output": [[1]]}] * 2, "test": [{"input": [[2] * 9] * 9}]}}
SOLUTIONS = {"last": [PAIRS[3]["output"], PAIRS[4]["output"]], "other": [PAIRS[0]["output"]], "longer": [[[2]]],
             "not asked for": [[[0]]]}
TTT = TTTSettings(repeats=4, lora_rank=4, batch_size=4, gradient_accumulation=1, learning_rate=1e-2,
                       embedding_learning_rate=1e-2, gradient_checkpointing=False)
TTT_OPTIONS = ("--joint.repeats", 4, "--joint.lora-rank", 4, "--joint.batch-size", 4, "--joint.learning-rate", 0.01,
               "--joint.gradient-accumulation", 1, "--joint.embedding-learning-rate", 0.01)
DIE_AFTER_ONE_TASK = """
import os, runpy, sys
from evaluation_results import RankedResults
save = RankedResults._save
def save_and_die(self, task):
    save(self, task)
    os._exit(9)
RankedResults._save = save_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with challenges.json and solutions.json, and Mini/: a tiny model that has learned the format."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "challenges.json").write_text(json.dumps(CHALLENGES))
    (folder / "solutions.json").write_text(json.dumps(SOLUTIONS))
    model, tokenizer = create_lora(make_model(MiniSize(1, 32, 2, 48)), r=8, alpha=8), make_tokenizer()
    views = ArcDataset(CHALLENGES, is_orig=True).remove_test_data().repeat(60).augment(perm=True, shfl_ex=True, seed=0)
    settings = TrainingSettings(batch_size=6, gradient_accumulation=1, learning_rate=1e-2, embedding_learning_rate=1e-2)
    train_lora(model, tokenizer, views.as_list(len_name="text", **MINI_FORMAT), MINI_FORMAT, settings, folder / "log")
    save_model_and_tokenizer(folder / "Mini", merge_peft_into_base(model), tokenizer)
    return folder


def start(script, *options, code=None):
    """Run a script as a process, from a folder that is not the repository's; return the finished process."""
    command = [sys.executable, *(["-c", code] if code else []), str(TRAINING_CODE / f"{script}.py"), *map(str, options)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAINING_CODE)}
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


def run(script, *options):
    """Run a script as a process that must succeed; return what it printed."""
    process = start(script, *options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def run_here(script, **values):
    """Run a script's main in this process with changed configuration (quicker than a process of its own)."""
    names = runpy.run_path(str(TRAINING_CODE / f"{script}.py"))
    names["main"](replace(names["CONFIG"], **values))


def read_submission(output, n_test_inputs):
    """Return the submission in an output folder, which must be valid for exactly these tasks."""
    submission = json.loads((output / "submission.json").read_text())
    verify_submission(submission, n_test_inputs)
    return submission


def test_mini_with_ttt(files, tmp_path, capsys):
    output = tmp_path / "output"
    options = ("--model", files / "Mini", "--challenges", files / "challenges.json", "--solutions",
               files / "solutions.json", "--limit", 2, "--device", "cpu", "--output-path", output, "--min-prob", 0.02)
    printed = run("run_evaluation_Mini_with_ttt", *options, *TTT_OPTIONS)
    submission = read_submission(output, {"last": 2, "other": 1})
    assert any(answer["attempt_2"] != [[0]] for answer in submission["last"]), "the search found something"
    scores = score_submission(submission, {name: SOLUTIONS[name] for name in ("last", "other")})
    record = json.loads((output / "record.json").read_text())
    assert record["script"] == "run_evaluation_Mini_with_ttt"
    assert record["scores"] == {rule: list(score) for rule, score in scores.items()}
    assert record["tasks"] == ["last", "other"]
    assert record["config"]["joint"]["lora_rank"] == 4
    assert set(record["seconds"]) == {"load model", "test-time training", "find candidates"}
    n_upright = 8 * (1 + 3 * ArcDataset.count_tokens("I12\nO2\n</s>"))  # 8 texts of 3 pairs, 3 more where transposed
    assert record["tokens"]["training"] in range(n_upright, n_upright + 8 * 3 + 1, 3)
    assert record["tokens"]["prompts"] > 0
    assert {"commit", "versions", "hardware", "peak_memory_gb", "solved_by_rule"} <= set(record)
    for name in ("last_0", "last_1", "other_0"):
        assert len([line for line in printed.splitlines() if line.startswith(name)]) == 1
    for rule in ("per task", "per test input", "all-or-nothing"):
        assert rule in printed
    assert str(output / "submission.json") in printed
    saved = json.loads((output / "candidates" / "last.json").read_text())
    assert [answer["attempt_1"] for answer in submission["last"]] == [
        candidates[0]["output"] if candidates else [[0]] for candidates in saved["candidates"]]
    assert (output / "finetuned_model" / "training_loss.png").exists()
    assert (output / "inference_cache").is_dir()

    before = (output / "finetuned_model" / "adapter_model.safetensors").stat().st_mtime_ns
    run_here("run_evaluation_Mini_with_ttt", model=str(files / "Mini"), challenges=files / "challenges.json",
             solutions=files / "solutions.json", limit=2, device="cpu", output_path=output, min_prob=0.02,
             joint=replace(TTT, mask_first_n_examples=0))
    assert "adapter loaded from" in capsys.readouterr().out
    assert (output / "finetuned_model" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert read_submission(output, {"last": 2, "other": 1}) == submission
    again = json.loads((output / "record.json").read_text())
    assert again["tokens"] == record["tokens"]
    for stage in ("test-time training", "find candidates"):
        assert again["seconds"][stage] == record["seconds"][stage], "what was taken over keeps its time"


def test_mini_without_ttt_on_a_hidden_set(files, tmp_path):
    output = tmp_path / "output"
    printed = run("run_evaluation_Mini_without_ttt", "--model", files / "Mini", "--device", "cpu", "--min-prob", 0.02,
                  "--challenges", files / "challenges.json", "--tasks", "other,longer", "--output-path", output)
    submission = read_submission(output, {"other": 1, "longer": 1})
    assert submission["other"][0]["attempt_1"] != [[0]]
    record = json.loads((output / "record.json").read_text())
    assert record["scores"] is None
    assert "training" not in record["tokens"]
    assert "solution unknown" in printed
    assert not (output / "finetuned_model").exists()
    assert json.loads((output / "candidates" / "other.json").read_text())["solutions"] is None


@pytest.mark.parametrize("ttt", ["joint", "per-task"])
def test_a_killed_evaluation_goes_on_to_the_same_submission(files, tmp_path, ttt):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "tasks": "last,other",
                "solutions": files / "solutions.json", "device": "cpu", "min_prob": 0.02, "joint": TTT, "per_task": TTT,
                "ttt": ttt}
    run_here("run_evaluation_Mini_with_ttt", **settings, output_path=tmp_path / "whole")
    expected = read_submission(tmp_path / "whole", {"last": 2, "other": 1})

    output = tmp_path / "killed"
    per_task = [str(option).replace("--joint", "--per-task") for option in TTT_OPTIONS]
    same = ("--per-task.no-all-symmetries", "--per-task.warmup-ratio", 0.25, "--joint.mask-first-n-examples", 1)
    killed = start("run_evaluation_Mini_with_ttt", "--model", files / "Mini", "--challenges", files / "challenges.json",
                   "--solutions", files / "solutions.json", "--tasks", "last,other", "--device", "cpu", "--min-prob",
                   0.02, "--output-path", output, "--ttt", ttt, *TTT_OPTIONS, *per_task, *same,
                   "--per-task.no-gradient-checkpointing", code=DIE_AFTER_ONE_TASK)
    assert killed.returncode == 9, killed.stderr
    assert [file.name for file in (output / "candidates").iterdir()] == ["last.json"]
    finished = (output / "candidates" / "last.json").stat().st_mtime_ns
    adapter = output / "finetuned_model" / ("" if ttt == "joint" else "last") / "adapter_model.safetensors"
    trained = adapter.stat().st_mtime_ns
    assert not (output / "submission.json").exists()
    run_here("run_evaluation_Mini_with_ttt", **settings, output_path=output)
    assert read_submission(output, {"last": 2, "other": 1}) == expected
    assert adapter.stat().st_mtime_ns == trained
    kept = [json.loads((folder / "candidates" / "last.json").read_text())["candidates"]
            for folder in (output, tmp_path / "whole")]
    assert kept[0] == kept[1]
    assert (output / "candidates" / "last.json").stat().st_mtime_ns == finished


def test_evaluation_retrains_for_other_tasks_and_keeps_the_old_adapter(files, tmp_path, capsys):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "joint": TTT,
                "output_path": tmp_path}
    run_here("run_evaluation_Mini_with_ttt", **settings, tasks="last")
    run_here("run_evaluation_Mini_with_ttt", **settings, tasks="last,other")
    assert "is of another run (other tasks)" in capsys.readouterr().out
    assert (tmp_path / "finetuned_model_1" / "adapter_model.safetensors").exists()
    read_submission(tmp_path, {"last": 2, "other": 1})


def test_tasks_that_fit_no_limit_are_named_and_answered(files, tmp_path, capsys):
    run_here("run_evaluation_Mini_with_ttt", model=str(files / "Mini"), challenges=files / "challenges.json",
             device="cpu", joint=TTT, output_path=tmp_path, min_prob=0.02, max_tokens=932 + 40)
    printed = capsys.readouterr().out
    assert "no view of longer fits" in printed
    submission = read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
    assert submission["longer"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]
    assert submission["other"][0]["attempt_1"] != [[0]]


@pytest.mark.parametrize(("values", "expected"), [
    ({"limit": 1}, ["last"]),  # as long as "other": the name decides
    ({"limit": 2}, ["last", "other"]),
    ({"limit": 0}, ["last", "longer", "other"]),
    ({"limit": None}, ["last", "longer", "other"]),
    ({"limit": 1, "tasks": "other,longer"}, ["other"]),
])
def test_limit_and_tasks(files, tmp_path, values, expected):
    names = runpy.run_path(str(TRAINING_CODE / "run_evaluation_Mini_without_ttt.py"))
    config = replace(names["CONFIG"], challenges=files / "challenges.json", output_path=tmp_path, **values)
    assert list(names["load_tasks"](names["start_run"](config)).challenge) == expected


def test_mini_takes_ten_tasks_of_the_evaluation_set_on_a_cpu(tmp_path):
    names = runpy.run_path(str(TRAINING_CODE / "run_evaluation_Mini_without_ttt.py"))
    tasks = names["load_tasks"](names["start_run"](replace(names["CONFIG"], output_path=tmp_path, device="cpu")))
    lengths = [tasks.get_length(key, "input", **MINI_FORMAT) for key in tasks.keys]
    assert len(tasks.challenge) == 10
    assert set(tasks.solutions) == set(tasks.challenge)
    assert (min(lengths), max(lengths)) == (109, 204)


def test_record_for_the_results_table(files, tmp_path, monkeypatch):
    monkeypatch.setattr("run_tools.REPOSITORY", tmp_path)
    run_here("run_evaluation_Mini_without_ttt", model=str(files / "Mini"), challenges=files / "challenges.json",
             tasks="other", device="cpu", output_path=tmp_path / "output", record=True)
    record = json.loads((tmp_path / "results" / "run_evaluation_Mini_without_ttt.json").read_text())
    assert record == json.loads((tmp_path / "output" / "record.json").read_text())
    assert record["config"]["output_path"] == "output", "no path of this machine"
    assert record["finished"]


@pytest.mark.parametrize(("values", "message"), [
    ({"tasks": "last,nowhere"}, "nowhere not in"),
    ({"challenges": None, "solutions": Path("solutions.json")}, "--solutions needs --challenges"),
    ({"model": "pretrained_models/none"}, "there is no model in .*none"),
    ({"score_rule": "luck"}, "luck"),
])
def test_wrong_options_are_explained(files, tmp_path, values, message):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu"} | values
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here("run_evaluation_Mini_without_ttt", **settings, output_path=tmp_path)


# ---- the published models' scripts, with a tiny Llama ----

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with Llama/ (random, byte-level BPE with merges), re_arc/ and ConceptARC/."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = make_bpe_tokenizer()
    save_model_and_tokenizer(folder / "Llama", make_tiny_llama(tokenizer, hidden_size=16), tokenizer)
    (folder / "re_arc" / "tasks").mkdir(parents=True)
    (folder / "re_arc" / "metadata.json").write_text(json.dumps({"aaa": {}, "bbb": {}}))
    for name in ("aaa", "bbb"):
        (folder / "re_arc" / "tasks" / f"{name}.json").write_text(json.dumps(PAIRS))
    (folder / "ConceptARC" / "data" / "Concept").mkdir(parents=True)
    concept = {"train": PAIRS[:2], "test": PAIRS[2:3]}
    (folder / "ConceptARC" / "data" / "Concept" / "One.json").write_text(json.dumps(concept))
    return folder


def check_finetuning(output, script, n_texts):
    """Check the folders of a fine-tuning of the tiny Llama that trained on n_texts texts."""
    record = json.loads(output.with_name(output.name + "-training").joinpath("record.json").read_text())
    assert record["script"] == script
    assert record["finished"]
    assert record["training"]["texts"] == n_texts
    assert record["tokens"]["training"] == record["training"]["tokens"] > 0
    assert list(record["seconds"]) == ["load base model and shrink its vocabulary", "load and augment data", "train",
                                       "merge"]
    assert not output.with_name(output.name + "-training").joinpath("checkpoints").exists()
    assert output.with_name(output.name + "-lora").joinpath("adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(output.with_name(output.name + "-merged"))
    assert 74 < merged.config.vocab_size < 90, "only the format's characters and the special tokens are left"


FINETUNING_OPTIONS = ("--bits", 32, "--device", "cpu", "--rearc-epochs", 2, "--rearc-size", 1, "--lora-rank", 4,
                      "--learning-rate", 0.01)


def test_llama_from_fine_tuning_to_submission(base, files, tmp_path):
    output = tmp_path / "Llama"
    options = ("--base-model", base / "Llama", "--rearc-path", base / "re_arc", "--output-path", output,
               *FINETUNING_OPTIONS)
    run("run_finetuning_Llama-rearc", *options)
    check_finetuning(output, "run_finetuning_Llama-rearc", n_texts=4)
    merged = tmp_path / "Llama-merged"
    for script in ("run_evaluation_Llama-rearc_with_ttt", "run_evaluation_Llama-rearc_without_ttt"):
        ttt = ("--joint.repeats", 2, "--joint.lora-rank", 4) if "with_ttt" in script else ()
        run(script, "--model", merged, "--bits", 32, "--device", "cpu", "--challenges", files / "challenges.json",
            "--solutions", files / "solutions.json", "--tasks", "other", "--output-path", tmp_path / script, *ttt)
        read_submission(tmp_path / script, {"other": 1})
        record = json.loads((tmp_path / script / "record.json").read_text())
        assert record["scores"]["per task"][1] == 1
        assert ("training" in record["tokens"]) == bool(ttt)


def test_second_start_of_a_fine_tuning_skips_what_is_there(base, tmp_path, capsys):
    settings = {"base_model": str(base / "Llama"), "rearc_path": base / "re_arc", "output_path": tmp_path / "Llama",
                "bits": 32, "device": "cpu", "rearc_epochs": 2, "rearc_size": 1, "lora_rank": 4}
    run_here("run_finetuning_Llama-rearc", **settings)
    weights = (tmp_path / "Llama-merged" / "model.safetensors").read_bytes()
    assert "adapter loaded" not in capsys.readouterr().out
    (tmp_path / "Llama-merged").rename(tmp_path / "elsewhere")
    run_here("run_finetuning_Llama-rearc", **settings)
    printed = capsys.readouterr().out
    assert "adapter loaded" in printed
    assert "== train" not in printed
    assert (tmp_path / "Llama-merged" / "model.safetensors").read_bytes() == weights
    run_here("run_finetuning_Llama-rearc", **settings)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings \\(max_steps\\)"):
        run_here("run_finetuning_Llama-rearc", **settings | {"max_steps": 1})


def test_nemo_from_fine_tuning_to_submission(base, files, tmp_path):
    output = tmp_path / "Nemo"
    run("run_finetuning_Nemo-full", "--base-model", base / "Llama", "--rearc-path", base / "re_arc", "--concept-path",
        base / "ConceptARC", "--mix-repeats", 1, "--max-tokens", 1500, "--max-steps", 1, "--output-path", output,
        *FINETUNING_OPTIONS)
    check_finetuning(output, "run_finetuning_Nemo-full", n_texts=8)
    result = tmp_path / "result"
    run("run_evaluation_Nemo-full_with_ttt", "--model", tmp_path / "Nemo-merged", "--bits", 32, "--device", "cpu",
        "--challenges", files / "challenges.json", "--tasks", "last", "--output-path", result, "--ttt", "per-task",
        "--per-task.repeats", 1, "--per-task.lora-rank", 4)
    read_submission(result, {"last": 2})
    assert (result / "finetuned_model" / "last" / "adapter_model.safetensors").exists()
    assert json.loads((result / "record.json").read_text())["scores"] is None
