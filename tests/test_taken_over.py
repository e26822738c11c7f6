"""What a start takes over of earlier ones in its output folder, and what it leaves to them."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

import evaluation_tools
from evaluation_results import as_made, serves
from run_tools import lock_folder
from script_runs import CHALLENGES, PAIRS, TRAINING_CODE, read_submission, run_here, write_small_files
from test_task_adapters import TTT
from training_callbacks import TimeLimit, Totals

N_INPUTS = {"last": 2, "other": 1}
IDENTITY = {"model": "a", "seed": 0, "time_limit": 2.0}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Configuration of an evaluation on a tiny model."""
    files = write_small_files(tmp_path_factory.mktemp("files"))
    return {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "min_prob": 0.02,
            "solutions": files / "solutions.json", "tasks": "last,other", "joint": TTT, "per_task": TTT}  # fmt: skip


@pytest.fixture
def evaluate(settings, tmp_path, capsys):
    """A function (options) -> (tasks searched anew, what was printed): an evaluation in one folder."""
    def run(**options):
        files = {name: tmp_path / "candidates" / f"{name}.json" for name in N_INPUTS}
        before = {name: json.loads(file.read_text())["seconds"] for name, file in files.items() if file.exists()}
        run_here("run_evaluation_Mini_with_ttt", **settings | {"output_path": tmp_path} | options)
        new = [name for name, file in files.items()
               if file.exists() and json.loads(file.read_text())["seconds"] != before.get(name)]  # fmt: skip
        return new, capsys.readouterr().out

    return run


def test_whether_a_time_limit_shortened_decides_whom_a_training_serves():
    whole, shortened = as_made(IDENTITY, {"steps": 4}), as_made(IDENTITY, {"steps": 4, "steps_planned": 5})
    assert whole["time_limit"] is None and shortened["time_limit"] == as_made(IDENTITY, None)["time_limit"] == 2.0
    for limit, suits in ((None, False), (1.0, True), (2.0, True), (2.1, False)):
        wanted = IDENTITY | {"time_limit": limit}
        assert serves(whole, wanted) and serves(shortened, wanted) == suits
        assert not serves(whole | {"seed": 1}, wanted) and not serves(None, wanted) and not serves({}, wanted)
    assert serves(None, None) and not serves(whole, None) and as_made(None, None) is None


@pytest.mark.parametrize("ttt", ["joint", "per-task"])
def test_another_time_limit_takes_over_what_none_shortened(evaluate, tmp_path, ttt):
    assert evaluate(ttt=ttt, time_limit=5.0)[0] == ["last", "other"]
    for limit in (4.0, 6.0, None):
        new, printed = evaluate(ttt=ttt, time_limit=limit)
        assert not new and ("adapter loaded" in printed) == (ttt == "joint"), limit
    assert not list(tmp_path.glob("finetuned_model_[0-9]*"))


@pytest.mark.parametrize(("shortened", "limit", "goes_on"),
                         [(False, 50.0, True), (True, 30.0, True), (True, 50.0, False)])
def test_an_unfinished_training_depends_on_a_limit_that_shortened_it(  # noqa: PLR0913
    evaluate, monkeypatch, shortened, limit, goes_on
):
    save, begin = Totals.on_save, TimeLimit.on_train_begin

    def killed_after_two(totals, args, state, control, **others):
        save(totals, args, state, control, **others)
        if state.global_step == 2:
            raise KeyboardInterrupt

    def shorten(time_limit, args, state, control, lr_scheduler=None, **others):
        begin(time_limit, args, state, control, lr_scheduler=lr_scheduler, **others)
        time_limit._shorten(state.max_steps - 1, args, state, lr_scheduler)

    options = {"ttt": "joint", "joint": replace(TTT, save_every=1)}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Totals, "on_save", killed_after_two)
        if shortened:
            patch.setattr(TimeLimit, "on_train_begin", shorten)
        evaluate(**options, time_limit=40.0)
    new, printed = evaluate(**options, time_limit=limit)
    assert new == ["last", "other"] and ("(other time_limit): kept as" in printed) != goes_on


def test_candidates_belong_to_the_adapter_that_found_them_wherever_it_is_now(evaluate, tmp_path, monkeypatch):
    search = evaluation_tools._search

    def moved(*arguments):
        (tmp_path / "finetuned_model").rename(tmp_path / "elsewhere")
        search(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation_tools, "_search", moved)
        evaluate(ttt="joint")
    assert evaluate(ttt="none")[0] == ["last", "other"], "none of them is of the model without training"


def test_an_adapter_that_was_set_aside_comes_back(evaluate, tmp_path):
    evaluate(ttt="joint")
    trained = (tmp_path / "finetuned_model" / "adapter_model.safetensors").read_bytes()
    assert "kept as" in evaluate(ttt="joint", joint=replace(TTT, learning_rate=2e-2))[1]
    new, printed = evaluate(ttt="joint")
    assert new == ["last", "other"] and "back as" in printed and "adapter loaded" in printed
    assert (tmp_path / "finetuned_model" / "adapter_model.safetensors").read_bytes() == trained


def test_rules_and_solutions_need_no_new_search(evaluate, tmp_path, settings):
    evaluate(ttt="per-task", solutions=None)
    scores = []
    for options in ({}, {"score_rule": "max_gen_prob"}, {"solutions": None}):
        assert not evaluate(ttt="per-task", **options)[0]
        saved = json.loads((tmp_path / "candidates" / "other.json").read_text())
        assert saved["score_rule"] == options.get("score_rule", "product_of_experts")
        known = "solutions" not in options
        solution = saved["solutions"] and saved["solutions"][0]
        assert known == (solution is not None) and all(
            candidate["correct"] == ((candidate["output"] == solution) if known else None)
            for candidate in saved["candidates"][0])  # fmt: skip
        scores.append(json.loads((tmp_path / "record.json").read_text())["scores"])
    assert scores[0]["per task"][1] == scores[1]["per task"][1] == 2 and scores[2] is None


def test_a_submission_for_other_tasks_is_kept(evaluate, tmp_path):
    evaluate(ttt="none")
    answered = read_submission(tmp_path, N_INPUTS)
    with pytest.raises(FileNotFoundError, match="there is no model"):
        evaluate(ttt="none", tasks="longer", model="pretrained_models/Mimi")
    assert read_submission(tmp_path, N_INPUTS) == answered, "nothing was written"
    assert "kept as" in evaluate(ttt="none", tasks="longer")[1]
    assert json.loads((tmp_path / "submission_1.json").read_text()) == answered
    read_submission(tmp_path, {"longer": 1})
    evaluate(ttt="none")
    (tmp_path / "STOP").touch()
    shutil.rmtree(tmp_path / "candidates")
    new, printed = evaluate(ttt="none")
    assert not new and f"remove {tmp_path / 'STOP'} and start again" in printed
    assert "answers more tasks: kept as" in printed, "now it has none"


def test_a_task_of_another_form_is_not_answered_by_an_old_submission(evaluate, tmp_path):
    evaluate(ttt="none", tasks="other", solutions=None)
    two = {"other": CHALLENGES["other"] | {"test": CHALLENGES["last"]["test"]}}
    (tmp_path / "two.json").write_text(json.dumps(two))
    (tmp_path / "STOP").touch()
    evaluate(ttt="none", tasks="", challenges=tmp_path / "two.json", solutions=None)
    read_submission(tmp_path, {"other": 2})


def test_a_task_that_asks_nothing_is_submitted_without_answers(evaluate, tmp_path):
    file = tmp_path / "mute.json"
    file.write_text(json.dumps({"other": CHALLENGES["other"], "mute": {"train": PAIRS[:2], "test": []}}))
    assert "no test input in mute" in evaluate(ttt="joint", tasks="", challenges=file, solutions=None)[1]
    submission = read_submission(tmp_path, {"other": 1, "mute": 0})
    assert submission["other"][0]["attempt_1"] != [[0]]
    with pytest.raises(ValueError, match="no test input in mute: name tasks to solve"):
        evaluate(ttt="none", tasks="other,mute", challenges=file, solutions=None)
    evaluate(ttt="none", tasks=" other, ", challenges=file, solutions=None)
    read_submission(tmp_path, {"other": 1})


def test_two_runs_do_not_write_into_one_folder(evaluate, tmp_path):
    hold = "import sys; sys.path.insert(0, sys.argv[1]); from run_tools import lock_folder; "
    hold += "file = lock_folder(sys.argv[2]); print('held', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", hold, str(TRAINING_CODE), str(tmp_path)], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        with pytest.raises(OSError, match="another run is writing to"):
            evaluate(ttt="none")
        assert [path.name for path in tmp_path.iterdir()] == ["lock"]
        other.communicate("\n")
    lock_folder(tmp_path).close()
    assert evaluate(ttt="none")[0] == ["last", "other"]


@pytest.mark.parametrize("limit", [math.inf, math.nan])
def test_a_time_limit_is_a_number_of_hours(evaluate, limit):
    with pytest.raises(ValueError, match="it must be more than 0 hours"):
        evaluate(ttt="none", time_limit=limit)
