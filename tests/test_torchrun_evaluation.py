"""Evaluations by several workers of torchrun: the submission of one, also when workers die."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from script_runs import CHALLENGES, PAIRS, TRAINING_CODE, read_submission, run, write_small_files

TASKS = {f"task{i}": {"train": PAIRS[i : i + 3], "test": [{"input": PAIRS[i]["input"]}] * (1 + i % 2)}
         for i in range(3)} | {name: CHALLENGES[name] for name in ("last", "other")}
N_INPUTS = {name: len(task["test"]) for name, task in TASKS.items()}
# the task that a worker has begun when it dies: the first one of worker 1 in the first start, when another worker has
# finished one, and "task1" always
DIES = """
import os, runpy, sys, time
from task_queue import TaskQueue
from torchrun_tools import this_worker
begin = TaskQueue._begin
def begin_and_die(self, name, number):
    begin(self, name, number)
    worker, candidates = this_worker(), self.output / "candidates"
    if (candidates / f"{name}.json").exists():
        (self.output / f"{name}.again").touch()
    first_of_worker_1 = (worker.rank, worker.start) == (1, 0)
    while first_of_worker_1 and not list(candidates.glob("*.json")):
        time.sleep(0.05)
    if first_of_worker_1 or name == "task1" and os.environ["KILLER"] == "task1":
        os.kill(os.getpid(), 9)
TaskQueue._begin = begin_and_die
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with challenges.json, Mini/ (tiny), dies.py and what one process gives: joint/ and per-task/."""
    folder = write_small_files(tmp_path_factory.mktemp("files"))
    (folder / "challenges.json").write_text(json.dumps(TASKS))
    (folder / "dies.py").write_text(DIES)
    for ttt in ("joint", "per-task"):
        run("run_evaluation_Mini_without_ttt", *options(folder, folder / ttt, ttt))
    return folder


def options(files, output, ttt):
    """Return the options of an evaluation."""
    training = [("repeats", 2), ("lora-rank", 4), ("batch-size", 2), ("gradient-accumulation", 1)]
    return ["--model", files / "Mini", "--challenges", files / "challenges.json", "--device", "cpu", "--min-prob", 0.02,
            "--output-path", output, "--ttt", ttt, f"--{ttt}.no-all-symmetries",
            *(part for name, value in training for part in (f"--{ttt}.{name}", value))]  # fmt: skip


def torchrun(files, output, n_workers, ttt, killer=""):
    """Run an evaluation by so many workers, of which one dies in the first start; return the finished torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n_workers,
               "--max-restarts", 3, files / "dies.py", TRAINING_CODE / "run_evaluation_Mini_without_ttt.py",
               *options(files, output, ttt)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TRAINING_CODE), "KILLER": killer}
    process = subprocess.run(list(map(str, command)), env=environment, cwd="/", capture_output=True, text=True,
                             timeout=120, check=False)  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return process


def test_workers_with_one_killed_give_the_submission_of_one_process(files, tmp_path):
    shutil.copytree(files / "joint" / "finetuned_model", tmp_path / "output" / "finetuned_model")
    printed = torchrun(files, tmp_path / "output", 4, "joint").stdout
    submission = read_submission(tmp_path / "output", N_INPUTS)
    assert submission == read_submission(files / "joint", N_INPUTS)
    assert any(answer["attempt_1"] != [[0]] for answers in submission.values() for answer in answers)
    assert not list((tmp_path / "output" / "tries").iterdir())
    record = json.loads((tmp_path / "output" / "record.json").read_text())
    assert record["unfinished"] == record["set_aside"] == []
    assert not list((tmp_path / "output").glob("*.again")), "what was finished before is not begun again"
    for name in N_INPUTS:  # reported by the first worker of the second start, and perhaps before
        assert 1 <= printed.count(f"\n{name}_0 ") <= 2, name


def test_a_task_that_kills_its_worker_twice_is_set_aside(files, tmp_path):
    printed = torchrun(files, tmp_path / "output", 2, "per-task", killer="task1").stdout
    submission, expected = read_submission(tmp_path / "output", N_INPUTS), read_submission(files / "per-task", N_INPUTS)
    assert submission.pop("task1") == [{"attempt_1": [[0]], "attempt_2": [[0]]}] * 2
    expected.pop("task1")
    assert submission == expected
    record = json.loads((tmp_path / "output" / "record.json").read_text())
    assert record["unfinished"] == record["set_aside"] == ["task1"]
    assert "set aside after taking their worker down twice: task1" in printed
