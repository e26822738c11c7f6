"""Evaluate Mini, the model that ships with this project, with test-time training: what `make evaluate` runs.

No published number; the results of this project are in the README. Without a GPU the 10 evaluation tasks with the
shortest prompts are run (about 2 minutes on 2 cores) with one adapter for all tasks, with a GPU the 40 shortest with
an adapter for each.

    python training_code/run_evaluation_Mini_with_ttt.py
    python training_code/run_evaluation_Mini_with_ttt.py --limit 0          # all 400 tasks

Mini has seen no evaluation task in training. The smallest run, on a CPU:

    python training_code/run_evaluation_Mini_with_ttt.py --limit 1 --device cpu --joint.repeats 8
"""

from pathlib import Path

import tyro

from evaluation_results import check_submission, write_submission
from evaluation_tools import (MINI_JOINT_TRAINING, MINI_PER_TASK_TRAINING, EvaluationConfig, find_candidates,
                              finish_run, load_model_and_tokenizer, load_tasks, make_views, start_run,
                              train_on_demonstrations)
from mini_model import MINI_FORMAT

CONFIG = EvaluationConfig(
    script=Path(__file__).stem,
    model="pretrained_models/Mini",
    bits=None,
    limit=None,
    fmt_opts=MINI_FORMAT,
    # test-time training: on a GPU an adapter for each task, else one for all
    ttt=None, joint=MINI_JOINT_TRAINING, per_task=MINI_PER_TASK_TRAINING,
    # search, scoring, selection
    repeats=2, min_prob=0.1, scoring_views="search", score_rule=None, search="tree", seed=0,
)


def main(config):
    """Run the evaluation; what an earlier start has finished is taken over."""
    run = start_run(config)
    tasks = load_tasks(run)
    model_tok = load_model_and_tokenizer(run)
    model_tok = train_on_demonstrations(run, model_tok, tasks)
    views = make_views(run, tasks)
    candidates = find_candidates(run, model_tok, tasks, views)
    write_submission(run, tasks, candidates)
    check_submission(run, tasks)
    finish_run(run)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, default=CONFIG, description=__doc__))
