"""Evaluations that end before any task, or all of them, are finished: they leave what a finished one leaves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from model_tools import save_model_and_tokenizer
from report import write_report
from script_runs import read_submission, run_here, write_small_files
from task_queue import STOP_FILE
from ttt_tools import MINI_JOINT_TRAINING

N_INPUTS = {"last": 2, "other": 1}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Configuration of an evaluation on a tiny model."""
    files = write_small_files(tmp_path_factory.mktemp("files"))
    return {"model": str(files / "Mini"), "challenges": files / "challenges.json", "device": "cpu", "min_prob": 0.02,
            "solutions": files / "solutions.json", "tasks": "last,other"}  # fmt: skip


@pytest.mark.parametrize("ttt", ["none", "per-task"])
def test_a_run_stopped_before_its_first_task_ends_well(settings, tmp_path, capsys, ttt):
    (tmp_path / STOP_FILE).touch()
    run_here("run_evaluation_Mini_with_ttt", **settings, ttt=ttt, output_path=tmp_path)
    assert "not finished: 2 of 2 tasks" in (printed := capsys.readouterr().out) and "report " in printed
    submission = read_submission(tmp_path, N_INPUTS)
    assert all(answer["attempt_1"] == [[0]] for answers in submission.values() for answer in answers)
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["finished"] and record["unfinished"] == ["last", "other"]
    assert "0 of 2 tasks finished" in (tmp_path / "report.html").read_text()
    assert not (tmp_path / "solved_task.png").exists() and not (tmp_path / "score_curve.png").exists()
    (tmp_path / STOP_FILE).unlink()
    run_here("run_evaluation_Mini_without_ttt", **settings, output_path=tmp_path)
    assert any(answer["attempt_1"] != [[0]] for answers in read_submission(tmp_path, N_INPUTS).values()
               for answer in answers)  # fmt: skip
    assert ", finished" in write_report(tmp_path).read_text() and (tmp_path / "score_curve.png").exists()
    (tmp_path / STOP_FILE).touch()
    run_here("run_evaluation_Mini_with_ttt", **settings, ttt=ttt, seed=1, output_path=tmp_path)
    assert not (tmp_path / "solved_task.png").exists() and not (tmp_path / "score_curve.png").exists(), "of another run"


@pytest.mark.parametrize(("option", "message"), [
    ({"time_limit": 0.0}, "--time-limit 0.0: it must be more than 0 hours"),
    ({"time_limit": -1.0}, "--time-limit -1.0: it must be more than 0 hours"),
    ({"tasks_at_once": 0}, "--tasks-at-once 0: it must be 1 or more"),
    ({"challenges": Path("absent.json")}, "--challenges absent.json: there is no such file"),
    ({"joint": replace(MINI_JOINT_TRAINING, lora_rank=0)}, "--joint.lora-rank 0: it must be 1 or more"),
    ({"per_task": replace(MINI_JOINT_TRAINING, optimizer="lion_32bit")}, "--per-task.optimizer lion_32bit: packed it"),
    ({"solutions": Path("absent.json")}, "--solutions absent.json: there is no such file"),
    ({"seed": 2**31 + 1}, "--seed 2147483649: it must be 0 to 2147483648"),
])  # fmt: skip
def test_options_that_leave_nothing_to_do_are_refused(settings, tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        run_here("run_evaluation_Mini_without_ttt", **settings | option, output_path=tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_a_model_that_reads_other_prompts_is_refused(settings, tmp_path, tiny_llama):
    save_model_and_tokenizer(tmp_path / "whole", *tiny_llama)
    with pytest.raises(ValueError, match="whole is not made for the prompts of this script .*: take the folder"):
        run_here("run_evaluation_Mini_without_ttt", **settings | {"model": str(tmp_path / "whole")},
                 output_path=tmp_path / "output")


def test_an_output_folder_that_cannot_be_made_is_named(settings, tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "output"):
        with pytest.raises(OSError, match=f"--output-path: the folder {path} cannot be made"):
            run_here("run_evaluation_Mini_without_ttt", **settings, output_path=path)
