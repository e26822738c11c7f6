"""Solve the tasks of a file as the ARC Prize 2024 entry does on Kaggle: the 8B model, training and search in 12 hours.

Published number: 53.5 on the hidden set (2 x T4). Training sees every task 4 times under each of the 8 symmetries, with
texts of up to 4224 tokens; a prompt with its reply has up to 8192. `--time-limit` counts hours from the start: training
and search are cut to it, and a valid submission.json is there from the first minute on.
kaggle_notebooks/arc-prize-2024_kaggle.ipynb runs this script:

    torchrun --standalone --nproc-per-node 2 training_code/run_evaluation_Nemo-full_on_kaggle.py --challenges tasks.json

torchrun starts one process for each GPU; with a single GPU, or on a CPU with 32 GB, the smallest run:

    python training_code/run_evaluation_Nemo-full_on_kaggle.py --limit 1 --device cpu --joint.repeats 1
"""

from pathlib import Path

import tyro

from evaluation_results import check_submission, write_submission
from evaluation_tools import (EvaluationConfig, TTTSettings, find_candidates, finish_run,
                              load_model_and_tokenizer, load_tasks, make_views, start_run, train_on_demonstrations)
from run_tools import PUBLISHED_FORMAT

CONFIG = EvaluationConfig(
    script=Path(__file__).stem,
    model="pretrained_models/Mistral-NeMo-Minitron-Full-merged",
    bits=4,
    fmt_opts=PUBLISHED_FORMAT,
    max_tokens=8192,
    time_limit=11.5,  # hours; Kaggle stops a notebook after 12
    # test-time training on all tasks at once
    ttt="joint",
    joint=TTTSettings(
        repeats=4, all_symmetries=True, max_tokens=4224, lora_rank=64, lora_alpha=16, batch_size=2,
        gradient_accumulation=2, epochs=1, learning_rate=1e-4, embedding_learning_rate=1e-5, warmup_steps=100,
        scheduler="cosine", weight_decay=0.01, mask_first_n_examples=0, save_every=500),
    # search, scoring, selection
    repeats=2, min_prob=0.17, scoring_views="search", score_rule=None, search="tree", seed=0,
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
