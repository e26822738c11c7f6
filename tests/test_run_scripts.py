"""Every evaluation script end to end with a tiny model, judged by what it wrote."""

import hashlib
import json
import runpy
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import arc_files
import evaluation_tools
import ttt_tools
from arc_loader import ArcDataset
from evaluation_results import RankedResults, keep_submission, score_submission, verify_submission
from evaluation_tools import TTTSettings, fit_views
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import is_peft_model, model_identity, save_model_and_tokenizer
from script_runs import (PAIRS, SOLUTIONS, TRAINING_CODE, read_submission, run, run_here, start,
                         write_small_files)

TTT = TTTSettings(repeats=4, lora_rank=4, batch_size=2, gradient_accumulation=1, learning_rate=1e-2,
                  embedding_learning_rate=1e-2, gradient_checkpointing=False)
TTT_OPTIONS = ("--joint.repeats", 4, "--joint.lora-rank", 4, "--joint.batch-size", 2, "--joint.learning-rate", 0.01,
               "--joint.gradient-accumulation", 1, "--joint.embedding-learning-rate", 0.01,
               "--joint.mixed-precision", "auto")
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


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError("no memory left")


def steps(script, **values):
    """Return the names that a script defines, and a run of it that is started with changed configuration."""
    names = runpy.run_path(str(TRAINING_CODE / f"{script}.py"))
    return names, names["start_run"](replace(names["CONFIG"], **values))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with challenges.json and solutions.json, and Mini/: a tiny model that has learned the format."""
    return write_small_files(tmp_path_factory.mktemp("files"))


def test_mini_with_ttt(files, tmp_path, capsys):
    output = tmp_path / "output"
    options = ("--model", files / "Mini", "--challenges", files / "challenges.json", "--solutions",
               files / "solutions.json", "--limit", 2, "--device", "cpu", "--output-path", output, "--min-prob", 0.02)
    printed = run("run_evaluation_Mini_with_ttt", *options, *TTT_OPTIONS)
    submission = read_submission(output, {"last": 2, "other": 1})
    assert any(answer["attempt_2"] != [[0]] for answer in submission["last"]), "the search found something"
    scores = score_submission(submission, {name: SOLUTIONS[name] for name in ("last", "other")})
    record = json.loads((output / "record.json").read_text())
    assert record["script"] == "run_evaluation_Mini_with_ttt" and record["started"] <= record["ended"]
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
    assert (output / "finetuned_model" / "training_loss.png").exists() and (output / "score_curve.png").exists()
    assert f"report     {output / 'report.html'}" in printed and "run_evaluation_Mini_with_ttt" in (
        output / "report.html").read_text()
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
    assert "none: no solutions given" in printed
    assert not (output / "finetuned_model").exists()
    assert json.loads((output / "candidates" / "other.json").read_text())["solutions"] is None


def test_min_prob_none_finds_the_most_probable_reply_of_each_view(files, tmp_path):
    settings = {"model": files / "Mini", "challenges": files / "challenges.json", "tasks": "other", "device": "cpu"}
    options = [part for name, value in settings.items() for part in (f"--{name}", value)]
    run("run_evaluation_Mini_without_ttt", *options, "--output-path", tmp_path / "tree", "--min-prob", "None")
    run_here("run_evaluation_Mini_without_ttt", **settings | {"model": str(files / "Mini")}, min_prob=None,
             output_path=tmp_path / "plain", search="plain")
    tree, plain = (json.loads((tmp_path / search / "candidates" / "other.json").read_text())
                   for search in ("tree", "plain"))
    assert tree["identity"] | {"search": "plain"} == plain["identity"] and plain["identity"]["min_prob"] is None
    [views], [found], [expected] = tree["identity"]["views"], tree["candidates"], plain["candidates"]
    assert [candidate["output"] for candidate in found] == [candidate["output"] for candidate in expected] != []
    for one, other in zip(found, expected, strict=True):
        assert one["scores_inf"] == pytest.approx(other["scores_inf"], abs=1e-3)
        assert one["scores_aug"] == pytest.approx(other["scores_aug"], abs=1e-3) and list(one["scores_aug"]) == views
    finders = [view for candidate in found for view in candidate["scores_inf"]]
    assert len(finders) == len(set(finders)), "one reply per view"
    assert json.loads((tmp_path / "tree" / "record.json").read_text())["engine"]["replies"] >= len(finders) > 0
    read_submission(tmp_path / "tree", {"other": 1})


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
                   "--per-task.gradient-checkpointing", False, code=DIE_AFTER_ONE_TASK)
    assert killed.returncode == 9, killed.stderr
    first, second = ("last", "other") if ttt == "joint" else ("other", "last")  # per task the shorter one is first
    assert [file.name for file in (output / "candidates").iterdir()] == [f"{first}.json"]
    finished = (output / "candidates" / f"{first}.json").stat().st_mtime_ns
    folder = output / ("finetuned_model" if ttt == "joint" else f"finetuned_model_per_task/{first}")
    trained = (folder / "adapter_model.safetensors").stat().st_mtime_ns
    nothing = {"attempt_1": [[0]], "attempt_2": [[0]]}
    submission = read_submission(output, {"last": 2, "other": 1})
    assert all(answer == nothing for answer in submission[second]), "valid from the beginning on"
    run_here("run_evaluation_Mini_with_ttt", **settings, output_path=output)
    assert read_submission(output, {"last": 2, "other": 1}) == expected
    if ttt == "joint":
        assert (folder / "adapter_model.safetensors").stat().st_mtime_ns == trained
    else:
        assert not folder.exists(), "an adapter goes with its task, though its own start was killed"
    records = [json.loads((place / "record.json").read_text()) for place in (output, tmp_path / "whole")]
    assert records[0]["tokens"] == records[1]["tokens"], "what the killed start did is counted"
    assert records[0]["seconds"]["test-time training"] > 0
    kept = [json.loads((folder / "candidates" / f"{first}.json").read_text())["candidates"]
            for folder in (output, tmp_path / "whole")]
    assert kept[0] == kept[1]
    assert (output / "candidates" / f"{first}.json").stat().st_mtime_ns == finished


def test_a_merged_adapter_is_the_same_after_a_restart(files, tmp_path):
    searched_with = []
    for _ in range(2):
        names, run = steps("run_evaluation_Mini_with_ttt", model=str(files / "Mini"), device="cpu", joint=TTT,
                           challenges=files / "challenges.json", output_path=tmp_path, tasks="other")
        tasks = names["load_tasks"](run)
        model, _ = names["train_on_demonstrations"](run, names["load_model_and_tokenizer"](run), tasks)
        assert not is_peft_model(model), "merged, as the base is fp32"
        searched_with.append(model_identity(model))
        assert searched_with[-1] != run.record.values["model"]["identity"], "trained"
    assert searched_with[0] == searched_with[1]


def test_kinds_of_training_stand_side_by_side_in_one_folder(files, tmp_path, capsys):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "joint": TTT,
                "per_task": TTT, "output_path": tmp_path, "tasks": "other", "min_prob": 0.5}
    (tmp_path / "finetuned_model").mkdir()
    (tmp_path / "finetuned_model" / "notes").touch()
    for ttt, loaded in (("joint", False), ("per-task", False), ("joint", True)):
        run_here("run_evaluation_Mini_without_ttt", **settings, ttt=ttt)
        assert ("adapter loaded" in capsys.readouterr().out) == loaded, ttt
        assert json.loads((tmp_path / "record.json").read_text())["tokens"]["training"] > 0
        assert not list(tmp_path.glob("finetuned_model_per_task/*")), "it goes when the candidates are there"
    assert (tmp_path / "finetuned_model_1" / "notes").exists(), "what was there before is kept"
    run_here("run_evaluation_Mini_without_ttt", **settings, ttt="per-task", keep_adapters=True)
    assert (tmp_path / "finetuned_model_per_task" / "other" / "adapter_model.safetensors").exists()


def test_checkpoints_stay_until_the_adapter_is_saved(files, tmp_path, monkeypatch):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu",
                "joint": replace(TTT, save_every=1), "output_path": tmp_path, "tasks": "other", "min_prob": 0.5}

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ttt_tools, "save_model_and_tokenizer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_here("run_evaluation_Mini_with_ttt", **settings)
    assert list((tmp_path / "finetuned_model.training" / "checkpoints").glob("checkpoint-*"))
    run_here("run_evaluation_Mini_with_ttt", **settings)
    assert (tmp_path / "finetuned_model" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "finetuned_model" / "checkpoints").exists()
    assert not (tmp_path / "finetuned_model.training").exists()


def test_at_the_time_limit_the_submission_holds_what_is_finished(files, tmp_path, monkeypatch, capsys):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "ttt": "none",
                "tasks": "last,other,longer", "output_path": tmp_path, "time_limit": 1.0, "search": "plain",
                "min_prob": 0.02}  # fmt: skip
    process = RankedResults.process

    def slow(self, res, name, *args, **kwargs):
        if name.startswith("l"):  # the longer tasks come last
            self.run.clock.seconds = 0.05 + time.time() - self.run.clock.begin
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            time.sleep(30)
        process(self, res, name, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RankedResults, "process", slow)
        run_here("run_evaluation_Mini_without_ttt", **settings)
    assert "time limit is reached" in (printed := capsys.readouterr().out) and "not finished: 2 of 3" in printed
    submission = read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
    assert submission["other"][0]["attempt_1"] != [[0]] == submission["last"][0]["attempt_1"]
    assert sorted(json.loads((tmp_path / "record.json").read_text())["unfinished"]) == ["last", "longer"]
    first = (tmp_path / "candidates" / "other.json").stat().st_mtime_ns
    run_here("run_evaluation_Mini_without_ttt", **settings)
    assert read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})["last"][0]["attempt_1"] != [[0]]
    assert (tmp_path / "candidates" / "other.json").stat().st_mtime_ns == first


def test_a_submission_is_replaced_only_by_one_that_answers_more(files, tmp_path):
    names, run = steps("run_evaluation_Mini_without_ttt", model=str(files / "Mini"), device="cpu", limit=0,
                       challenges=files / "challenges.json", output_path=tmp_path)
    tasks = names["load_tasks"](run)
    answer = [[{"output": [[5]]}]]
    for candidates, answered in (({"other": answer}, {"other"}), ({}, {"other"}), ({"longer": answer}, {"longer"}),
                                 ({"longer": answer, "other": answer}, {"longer", "other"})):
        keep_submission(run, candidates)
        submission = read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
        assert {name for name, answers in submission.items() if answers[0]["attempt_1"] == [[5]]} == answered
    (tmp_path / "submission.json").write_text('{"other": ')
    keep_submission(run, {})
    read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
    names["write_submission"](run, tasks, {"other": answer})
    assert read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})["other"][0]["attempt_1"] == [[5]]


def test_of_the_public_placeholder_only_some_tasks_are_solved(files, tmp_path, monkeypatch, capsys):
    file = files / "challenges.json"
    monkeypatch.setattr(arc_files, "PLACEHOLDER_MD5", hashlib.md5(file.read_bytes()).hexdigest())
    monkeypatch.setattr(evaluation_tools, "PLACEHOLDER_TASKS", 1)
    run_here("run_evaluation_Mini_without_ttt", model=str(files / "Mini"), challenges=file, device="cpu", limit=0,
             output_path=tmp_path, min_prob=0.02)
    assert "placeholder of a hidden test set: only 1 tasks are solved" in capsys.readouterr().out
    submission = read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
    assert [name for name, answers in submission.items() if answers[0]["attempt_1"] != [[0]]] == ["last"]


@pytest.mark.parametrize("ttt", ["joint", "per-task"])
def test_lack_of_memory_names_the_options_of_the_script(files, tmp_path, monkeypatch, ttt):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "joint": TTT,
                "per_task": TTT, "output_path": tmp_path, "tasks": "other", "ttt": ttt}
    train, option = {"joint": ("training_tools.TwoRateTrainer.train", "--joint.batch-size"),
                     "per-task": ("task_adapters.train_stack", "--per-task.lora-rank")}[ttt]
    monkeypatch.setattr(train, out_of_memory)
    with pytest.raises(RuntimeError, match=option):
        run_here("run_evaluation_Mini_with_ttt", **settings)
    monkeypatch.setattr(evaluation_tools, "inference_run", out_of_memory)
    with pytest.raises(RuntimeError, match="the search: start again with a lower --max-tokens"):
        run_here("run_evaluation_Mini_with_ttt", **settings | {"ttt": "none"})


def test_another_token_limit_keeps_what_fits_it(files, tmp_path, capsys):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "joint": TTT,
                "output_path": tmp_path, "tasks": "other", "min_prob": 0.5}
    written = []
    for max_tokens in (None, 932 + 40, 932 + 30):  # a prompt has 29 tokens, 33 transposed; a text 24 or 27
        run_here("run_evaluation_Mini_with_ttt", **settings, max_tokens=max_tokens)
        written.append((tmp_path / "candidates" / "other.json").stat().st_mtime_ns)
        assert ("adapter loaded" in capsys.readouterr().out) == (max_tokens is not None)
    assert written[0] == written[1] != written[2]


def test_results_of_another_model_are_not_taken_over(files, tmp_path, capsys):
    save_model_and_tokenizer(tmp_path / "Other", make_model(MiniSize(1, 32, 2, 48), seed=1), make_tokenizer())
    identities = []
    for model in (files / "Mini", tmp_path / "Other"):
        run_here("run_evaluation_Mini_with_ttt", model=str(model), challenges=files / "challenges.json", device="cpu",
                 joint=TTT, output_path=tmp_path / "output", tasks="other", min_prob=0.5)
        identities.append(json.loads((tmp_path / "output" / "candidates" / "other.json").read_text())["identity"])
    assert "is of another run (other model)" in capsys.readouterr().out
    assert identities[0]["model"] != identities[1]["model"]


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
    assert "no view of longer_0 fits" in printed
    submission = read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})
    assert submission["longer"] == [{"attempt_1": [[0]], "attempt_2": [[0]]}]
    assert submission["other"][0]["attempt_1"] != [[0]]


def test_how_the_views_of_each_test_input_fit(files, tmp_path, capsys):
    task = {"train": PAIRS[:3], "test": [{"input": [[7, 8]]}, {"input": [[7] * 9] * 9}, {"input": [[7, 8]] * 4}]}
    (tmp_path / "two.json").write_text(json.dumps({"two": task}))
    names, run = steps("run_evaluation_Mini_without_ttt", challenges=tmp_path / "two.json", output_path=tmp_path,
                       max_tokens=932 + 35, device="cpu", model=str(files / "Mini"), min_prob=0.02)
    views = names["make_views"](run, names["load_tasks"](run))
    first, second, third = fit_views(run, views).values()
    assert (len(first.keys), first.cut, first.left_out) == (16, 0, 0)
    assert first.tokens == 8 * 30 + 8 * 34  # start token counted
    assert (second.keys, second.cut, second.left_out, second.tokens) == ([], 0, 16, 0)
    assert "two" in second.reason
    assert (third.cut, third.left_out) == (16, 0)  # 24 or 27 tokens of pairs, 14 or 12 of the query
    assert all(key.split(".ex")[1].count("-") == 1 for key in third.keys), "two pairs are left"

    names["main"](run.config)
    printed = capsys.readouterr().out
    assert "no view of two_1 fits" in printed
    assert "two_2: views that lost demonstration pairs to fit 16, left out 0" in printed
    assert "two_0: views" not in printed
    assert read_submission(tmp_path, {"two": 3})["two"][1] == {"attempt_1": [[0]], "attempt_2": [[0]]}


def test_views_depend_on_the_seed_and_not_on_other_tasks(files, tmp_path):
    keys = {}
    for seed, asked in ((0, "last,other"), (0, "other"), (1, "other")):
        names, run = steps("run_evaluation_Mini_without_ttt", challenges=files / "challenges.json", seed=seed,
                           output_path=tmp_path, tasks=asked, device="cpu")
        views = names["make_views"](run, names["load_tasks"](run))
        keys[seed, asked] = [key for key in views.keys if key.startswith("other")]
    assert len(set(keys[0, "other"])) == 16
    assert keys[0, "other"] == keys[0, "last,other"]
    assert not set(keys[0, "other"]) & set(keys[1, "other"])


@pytest.mark.parametrize(("values", "expected"), [
    ({"limit": 1}, ["last"]),  # as long as "other": the name decides
    ({"limit": 2}, ["last", "other"]),
    ({"limit": 0}, ["last", "longer", "other"]),
    ({"limit": None}, ["last", "longer", "other"]),
    ({"limit": 1, "tasks": "other,longer"}, ["other"]),
])
def test_limit_and_tasks(files, tmp_path, values, expected):
    names, run = steps("run_evaluation_Mini_without_ttt", challenges=files / "challenges.json", output_path=tmp_path,
                       device="cpu", **values)
    assert list(names["load_tasks"](run).challenge) == expected


@pytest.mark.parametrize(("device", "n_tasks", "longest"), [("cpu", 10, 204), ("cuda", 40, 402)])
def test_mini_takes_the_shortest_tasks_of_the_evaluation_set(tmp_path, monkeypatch, device, n_tasks, longest):
    monkeypatch.setattr(evaluation_tools, "pick_device", lambda _: device)
    for has_bf16, bits in ((False, 32), (True, 16 if device == "cuda" else 32)):
        monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation, answer=has_bf16: answer)
        names, run = steps("run_evaluation_Mini_without_ttt", output_path=tmp_path)
        assert run.config.bits == run.record.values["config"]["bits"] == bits
    tasks = names["load_tasks"](run)
    lengths = [tasks.get_length(key, "input", **MINI_FORMAT) for key in tasks.keys]
    assert len(tasks.challenge) == n_tasks
    assert set(tasks.solutions) == set(tasks.challenge)
    assert (min(lengths), max(lengths)) == (109, longest)


@pytest.mark.parametrize(("values", "rule"), [
    ({}, "product_of_experts"), ({"scoring_views": "per_candidate"}, "mul_all_prob"),
    ({"scoring_views": "shared"}, "mul_all_prob"), ({"scoring_views": "search"}, "product_of_experts"),
    ({"scoring_views": "search", "score_rule": "nvarc"}, "nvarc")])
def test_default_score_rule_depends_on_the_scoring_views(tmp_path, values, rule):
    assert steps("run_evaluation_Mini_without_ttt", output_path=tmp_path, device="cpu", **values)[1].score_rule == rule


def test_both_mini_scripts_train_alike():
    configs = [runpy.run_path(str(TRAINING_CODE / f"run_evaluation_Mini_{how}_ttt.py"))["CONFIG"]
               for how in ("with", "without")]
    assert (configs[0].joint, configs[0].per_task) == (configs[1].joint, configs[1].per_task)
    for settings in (configs[0].joint, configs[0].per_task):
        assert settings.embedding_learning_rate == settings.learning_rate / 10 > 1e-5  # the published ratio, faster
        assert not settings.gradient_checkpointing
    assert (configs[0].joint.repeats, configs[0].per_task.all_symmetries) == (32, True)


@pytest.mark.parametrize("path", sorted(TRAINING_CODE.glob("run_evaluation_*.py")), ids=lambda path: path.stem)
def test_help_begins_with_what_the_script_says(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(path), run_name="__main__")
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert " ".join(path.read_text().removeprefix('"""').split()[:8]) in printed


def test_record_for_the_results_table(files, tmp_path, monkeypatch):
    monkeypatch.setattr("run_tools.REPOSITORY", tmp_path)
    run_here("run_evaluation_Mini_without_ttt", model=str(files / "Mini"), challenges=files / "challenges.json",
             tasks="other", device="cpu", output_path=tmp_path / "output", record=True)
    record = json.loads((tmp_path / "results" / "run_evaluation_Mini_without_ttt_1_cpu.json").read_text())
    own = json.loads((tmp_path / "output" / "record.json").read_text())
    shown = {"output_path": "output", "model": "Mini", "challenges": "challenges.json"}  # no path of this machine
    assert own["config"] | {"model": str(files / "Mini"), "challenges": str(files / "challenges.json")} == own["config"]
    assert record == own | {"config": own["config"] | shown, "model": own["model"] | {"location": "Mini"}}
    assert record["finished"]


@pytest.mark.parametrize(("values", "message"), [
    ({"tasks": "last,nowhere"}, "nowhere not in"),
    ({"challenges": None, "solutions": Path(__file__)}, "--solutions needs --challenges"),
    ({"model": "pretrained_models/none"}, "there is no model in .*none"),
    ({"score_rule": "luck"}, "--score-rule luck: there are max_gen_prob"),
    ({"min_prob": 0.0}, "--min-prob 0.0: it must be above 0"),
    ({"min_prob": 1.5}, "--min-prob 1.5: it must be above 0"),
    ({"limit": -1}, "--limit -1: it must be 0"),
    ({"seed": -1}, "--seed -1"),
    ({"max_tokens": 900}, "--max-tokens 900: the largest reply alone has 932"),
])
def test_wrong_options_are_explained(files, tmp_path, values, message):
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu"} | values
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here("run_evaluation_Mini_without_ttt", **settings, output_path=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(ValueError, match="--device cuda: PyTorch finds no GPU"):
        steps("run_evaluation_Mini_without_ttt", output_path=tmp_path / "output", device="cuda")
    assert not (tmp_path / "output").exists()


# ---- the submission ----

def answer(first, second=((0,),)):
    return {"attempt_1": [list(row) for row in first], "attempt_2": [list(row) for row in second]}


def test_submission_is_scored_by_three_rules():
    solutions = {"half": [[[1]], [[2]]], "whole": [[[3, 4]]], "wrong": [[[5]]], "not answered": [[[6]]]}
    submission = {"half": [answer([[9]], [[1]]), answer([[9]], [[9]])], "whole": [answer([[3, 4]])],
                  "wrong": [answer([[5, 5]], [[6]])]}
    assert score_submission({"half": submission["half"]}, {"half": solutions["half"]}) == {
        "per task": (0.5, 1), "per test input": (1, 2), "all-or-nothing": (0, 1)}
    assert score_submission(submission, solutions) == {
        "per task": (1.5, 4), "per test input": (2, 5), "all-or-nothing": (1, 4)}


@pytest.mark.parametrize(("submission", "message"), [
    ({}, "missing or too many: task"),
    ({"task": [answer([[1]])] * 2, "more": []}, "missing or too many: more"),
    ({"task": [answer([[1]])]}, "task has 1 answers for 2 test inputs"),
    ({"task": [answer([[1]]), {"attempt_1": [[1]]}]}, "task, test input 1: has .'attempt_1'. instead of"),
    ({"task": [answer([[1, 2], [3]]), answer([[1]])]}, "task, test input 0, attempt_1 is no grid"),
    ({"task": [answer([[1]]), answer([[1]], [[10]])]}, "task, test input 1, attempt_2 is no grid"),
    ({"task": [answer([[1]]), answer([[1]], [])]}, "task, test input 1, attempt_2 is no grid"),
])
def test_a_wrong_submission_is_refused(submission, message):
    verify_submission({"task": [answer([[1]])] * 2}, {"task": 2})
    with pytest.raises(ValueError, match=message):
        verify_submission(submission, {"task": 2})
