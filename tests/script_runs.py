"""What the tests of the run scripts share: tasks, and scripts run as processes or in this one."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from arc_loader import ArcDataset
from evaluation_results import verify_submission
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


def write_small_files(folder):
    """Write challenges.json, solutions.json and Mini/, a tiny model that has learned the format; return the folder."""
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
