"""An adapter for each task in an evaluation: trained in groups, one by one, or taken over; the candidates are equal."""

import json
import runpy
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import adapter_rows
import evaluation_tools
import task_adapters
from script_runs import TRAINING_CODE, read_submission, run_here, write_small_files
from stack_training import Room
from task_queue import TimeIsUp
from ttt_tools import TTTSettings

TTT = TTTSettings(repeats=4, lora_rank=4, batch_size=2, gradient_accumulation=1, learning_rate=1e-2,
                  embedding_learning_rate=1e-2, gradient_checkpointing=False)
NAMES = ("last", "longer", "other")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with challenges.json and solutions.json, and Mini/: a tiny model that has learned the format."""
    return write_small_files(tmp_path_factory.mktemp("files"))


def evaluate(files, output, names=NAMES, **changes):
    """Run an evaluation of all three tasks, or others; return {task: what its file holds}."""
    settings = {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu",
                "solutions": files / "solutions.json", "min_prob": 0.02, "ttt": "per-task", "per_task": TTT}
    run_here("run_evaluation_Mini_with_ttt", **settings | {"output_path": output} | changes)
    return {name: json.loads((output / "candidates" / f"{name}.json").read_text()) for name in names}


def same_candidates(task, other):
    """Tell whether two runs have found the same candidates of a task with the same NLLs."""
    found = [{(i, str(candidate["output"]), view): nll for i, candidates in enumerate(saved["candidates"])
              for candidate in candidates for view, nll in candidate["scores_inf"].items()}
             for saved in (task, other)]  # fmt: skip
    return found[0].keys() == found[1].keys() and found[0] == pytest.approx(found[1], abs=1e-3) and bool(found[0])


@pytest.fixture(scope="module")
def one_by_one(files, tmp_path_factory):
    """The tasks of a run whose adapters the Trainer has trained, one after the other."""
    return evaluate(files, tmp_path_factory.mktemp("one_by_one"), per_task=replace(TTT, packing=False))


def plenty_of_room(monkeypatch, members):
    """Let so many tasks be trained together, as on a GPU."""
    room = Room(most_tokens=10**6, free=members + 0.5, per_token=0.0, per_member=1.0)
    monkeypatch.setattr(task_adapters, "measure_room", lambda *_: room)


@pytest.mark.parametrize("members", [None, 2, 3])
def test_candidates_and_counts_are_those_of_single_trainings(files, tmp_path, monkeypatch, one_by_one, members):
    if members:
        plenty_of_room(monkeypatch, members)
    tasks = evaluate(files, tmp_path)
    sizes = sorted(task["training"]["trained_together"] for task in tasks.values())
    assert sizes == {None: [1, 1, 1], 2: [1, 2, 2], 3: [3, 3, 3]}[members]
    for name, task in tasks.items():
        expected = one_by_one[name]
        assert same_candidates(task, expected)
        for count in ("texts", "tokens", "loss_tokens", "steps"):
            assert task["training"][count] == expected["training"][count]
        assert task["training"]["loss"] == pytest.approx(expected["training"]["loss"], rel=1e-4)
    assert not list(tmp_path.glob("finetuned_model_per_task/*")), "they go when the candidates are there"


@pytest.mark.parametrize(("changes", "most", "searches"), [
    ({}, 256, [3]), ({}, 2, [2, 1]), ({"time_limit": 1.0, "tasks_at_once": 9}, 256, [2, 1]),
    ({"time_limit": 1.0}, 256, [1, 1, 1]), ({"tasks_at_once": 1}, 256, [1, 1, 1]),
])
def test_several_groups_are_searched_together(  # noqa: PLR0913
    files, tmp_path, monkeypatch, one_by_one, changes, most, searches
):
    """As many as may stand side by side; with a time limit each group, and what a worker has under way."""
    plenty_of_room(monkeypatch, 2)
    monkeypatch.setattr(task_adapters, "most_adapters", lambda *_: most)
    search, numbers = evaluation_tools.inference_run, []

    def counted(order, **options):
        numbers.append(len(order))
        return search(order=order, **options)

    monkeypatch.setattr(evaluation_tools, "inference_run", counted)
    tasks = evaluate(files, tmp_path, **changes)
    assert numbers == searches
    assert all(same_candidates(task, one_by_one[name]) for name, task in tasks.items())


@pytest.mark.parametrize("side_by_side", [True, False])
def test_the_adapters_of_a_killed_group_are_taken_over(  # noqa: PLR0913
    files, tmp_path, monkeypatch, capsys, one_by_one, side_by_side
):
    plenty_of_room(monkeypatch, 3)
    if not side_by_side:
        monkeypatch.setattr(adapter_rows, "WIDTH", TTT.lora_rank)
    search, calls = evaluation_tools.inference_run, []

    def killed_after_a_task(callback, **options):
        def called_once(candidates, name, **others):
            if calls:
                raise KeyboardInterrupt
            callback(candidates, name=name, **others)
            calls.extend([name] if name != "last_0" else [])

        return search(callback=called_once, **options)

    monkeypatch.setattr(evaluation_tools, "inference_run", killed_after_a_task)
    with pytest.raises(KeyboardInterrupt):
        evaluate(files, tmp_path)
    left = 3 - len(list((tmp_path / "candidates").iterdir()))
    assert 0 < left < 3
    monkeypatch.setattr(evaluation_tools, "inference_run", search)
    monkeypatch.setattr(task_adapters, "train_stack", None)  # nothing may be trained again
    capsys.readouterr()
    tasks = evaluate(files, tmp_path)
    assert capsys.readouterr().out.count("adapter loaded from") == left
    assert not list(tmp_path.glob("finetuned_model_per_task/*"))
    assert all(same_candidates(task, one_by_one[name]) for name, task in tasks.items())
    seconds = json.loads((tmp_path / "record.json").read_text())["seconds"]["test-time training"]
    assert seconds == pytest.approx(sum(task["training"]["seconds"] for task in tasks.values()), rel=1e-6)


def test_adapters_that_are_gone_are_told(files, tmp_path, monkeypatch, capsys):
    plenty_of_room(monkeypatch, 3)
    evaluate(files, tmp_path, names=["other"], tasks="other")
    assert "went after their search" not in capsys.readouterr().out
    evaluate(files, tmp_path, keep_adapters=True)
    assert "--keep-adapters: 1 finished tasks (other) have no adapter any more" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "finetuned_model_per_task").glob("l*")) == ["last", "longer"]


def test_kept_adapters_are_ordinary_ones(files, tmp_path, monkeypatch):
    plenty_of_room(monkeypatch, 3)
    evaluate(files, tmp_path, keep_adapters=True)
    for name in NAMES:
        folder = tmp_path / "finetuned_model_per_task" / name
        assert {"adapter_config.json", "adapter_model.safetensors", "identity.json", "training_loss.json",
                "tokenizer.json"} <= {file.name for file in folder.iterdir()}
        history = json.loads((folder / "training_loss.json").read_text())
        assert len(history) == json.loads((folder / "identity.json").read_text())["stats"]["steps"]
    before = sorted(tmp_path.glob("finetuned_model_per_task/*/*"))
    evaluate(files, tmp_path)
    assert sorted(tmp_path.glob("finetuned_model_per_task/*/*")) == before, "a later start takes over what is kept"
    losses = [json.loads((tmp_path / "finetuned_model_per_task" / name / "training_loss.json").read_text())
              for name in NAMES]  # fmt: skip
    means = json.loads((tmp_path / "training_loss.json").read_text())
    assert [entry["step"] for entry in means] == [entry["step"] for entry in max(losses, key=len)]
    for i, entry in enumerate(means):
        assert entry["loss"] == pytest.approx(np.mean([own[i]["loss"] for own in losses if i < len(own)]))
    assert (tmp_path / "training_loss.png").read_bytes()[:4] == b"\x89PNG"
    assert f"in {len(means)} steps, mean of the last tenth" in (report := (tmp_path / "report.html").read_text())
    assert "the mean over tasks" in report


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_trained_and_untrained_adapters_side_by_side_on_a_gpu(files, tmp_path, one_by_one):
    tasks = evaluate(files, tmp_path, device="cuda", bits=32, per_task=replace(TTT, max_tokens=40))
    assert [name for name, task in tasks.items() if task["training"] is None] == ["longer"]
    read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})


def full_disk(self, name, *_):
    raise OSError(28, f"no space left for {name}")


def test_an_adapter_that_cannot_be_saved_ends_the_run(files, tmp_path, monkeypatch):
    plenty_of_room(monkeypatch, 3)
    monkeypatch.setattr(task_adapters.TaskAdapters, "_save", full_disk)
    with pytest.raises(OSError, match="no space left for"):
        evaluate(files, tmp_path)
    assert not list((tmp_path / "candidates").glob("*"))


def test_when_the_time_is_up_nothing_more_is_saved_and_errors_are_told(files, tmp_path, monkeypatch, capsys):
    plenty_of_room(monkeypatch, 3)
    saved = []

    def one_fails(self, name, *_):
        self.run.clock.seconds = 0.0  # the time is up, and the next ones have not begun
        saved.append(name)
        time.sleep(0.3)
        full_disk(self, name)

    def time_is_up(*_, **__):
        raise TimeIsUp

    monkeypatch.setattr(task_adapters.TaskAdapters, "_save", one_fails)
    monkeypatch.setattr(task_adapters.TaskAdapters, "wait_for_saving", lambda self, only_done=False: None)
    monkeypatch.setattr(evaluation_tools, "inference_run", time_is_up)
    with pytest.raises(FileNotFoundError):  # no candidates
        evaluate(files, tmp_path, time_limit=1.0, tasks_at_once=9)
    assert len(saved) == 1 and "not finished: 3 of 3 tasks" in (printed := capsys.readouterr()).out
    assert f"an adapter could not be saved: [Errno 28] no space left for {saved[0]}" in printed.out + printed.err


def test_no_time_leaves_all_untrained(files, tmp_path, monkeypatch, one_by_one):
    monkeypatch.setattr(evaluation_tools, "training_seconds", lambda *_: 0.0)
    tasks = evaluate(files, tmp_path)
    assert all(task["training"] is None for task in tasks.values())
    assert not any(same_candidates(task, one_by_one[name]) for name, task in tasks.items())
    read_submission(tmp_path, {"last": 2, "other": 1, "longer": 1})


def test_little_time_shortens_a_group(files, tmp_path, monkeypatch, capsys):
    plenty_of_room(monkeypatch, 3)
    monkeypatch.setattr(evaluation_tools, "training_seconds", lambda *_: 0.5)
    tasks = evaluate(files, tmp_path, per_task=replace(TTT, repeats=400))
    steps = {task["training"]["steps"] for task in tasks.values()}
    assert len(steps) == 1 and steps.pop() < 200
    assert {task["training"]["steps_planned"] for task in tasks.values()} == {200}
    assert "the time limit shortened the training from 200" in capsys.readouterr().out


@pytest.mark.parametrize("ttt", ["joint", "per-task"])
def test_a_token_limit_of_the_training_alone(files, tmp_path, capsys, ttt):
    """A text has 24 or, transposed, 27 tokens; a prompt 29 or 33."""
    option, written = ttt.replace("-", "_"), []
    for limit in (None, 40, 26, 25):
        own = replace(TTT, max_tokens=limit)
        evaluate(files, tmp_path, names=["other"], tasks="other", ttt=ttt, keep_adapters=True, **{option: own})
        file = tmp_path / "candidates" / "other.json"
        written.append((file.stat().st_mtime_ns, json.loads(file.read_text())["identity"]["training"]["fmt_opts"]))
    assert written[0] == written[1] and written[1][0] < written[2][0] < written[3][0]
    assert [fmt_opts["max_tokens"] for _, fmt_opts in written] == [None, None, 26, 25]
    folder = tmp_path / "finetuned_model" if ttt == "joint" else tmp_path / "finetuned_model_per_task" / "other"
    stats = json.loads((folder / "identity.json").read_text())["stats"]
    assert stats["tokens"] < 25 * stats["texts"]
    with pytest.raises(ValueError, match="max-tokens must be 1 or more"):
        evaluate(files, tmp_path, names=[], ttt=ttt, **{option: replace(TTT, max_tokens=0)})


@pytest.mark.parametrize(("script", "options", "device", "expected"), [
    ("run_evaluation_Mini_with_ttt", {}, "cuda", "per-task"), ("run_evaluation_Mini_with_ttt", {}, "cpu", "joint"),
    ("run_evaluation_Mini_with_ttt", {"ttt": "joint"}, "cuda", "joint"),
    ("run_evaluation_Mini_with_ttt", {"backend": "unsloth"}, "cuda", "joint"),
    ("run_evaluation_Mini_without_ttt", {}, "cuda", "none"),
    ("run_evaluation_Llama-rearc_with_ttt", {}, "cuda", "joint"),
])  # fmt: skip
def test_mini_has_an_adapter_for_each_task_on_a_gpu(tmp_path, monkeypatch, script, options, device, expected):  # noqa: PLR0913
    monkeypatch.setattr(evaluation_tools, "pick_device", lambda _: device)
    monkeypatch.setattr(evaluation_tools, "check_unsloth", lambda *_: None)
    names = runpy.run_path(str(TRAINING_CODE / f"{script}.py"))
    settings = {"model": str(tmp_path), "output_path": tmp_path, "bits": 32}
    run = names["start_run"](replace(names["CONFIG"], **settings, **options))
    assert run.config.ttt == run.record.values["config"]["ttt"] == expected
