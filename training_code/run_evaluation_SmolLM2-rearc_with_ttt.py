"""Evaluate the fine-tuned SmolLM2-135M on the public ARC-AGI-1 evaluation set, with test-time training.

No published number; results of this project are in the README. It is the flow of the published 3B model with a small
pretrained one, which anybody can run from beginning to end.

    python training_code/run_evaluation_SmolLM2-rearc_with_ttt.py

The model is that of run_finetuning_SmolLM2-rearc.py. The smallest run, on a CPU:

    python training_code/run_evaluation_SmolLM2-rearc_with_ttt.py --limit 1 --device cpu --bits 32 --joint.repeats 2
"""

from pathlib import Path

import tyro

from evaluation_results import check_submission, write_submission
from evaluation_tools import (EvaluationConfig, TTTSettings, find_candidates, finish_run,
                              load_model_and_tokenizer, load_tasks, make_views, start_run, train_on_demonstrations)
from run_tools import PUBLISHED_FORMAT

CONFIG = EvaluationConfig(
    script=Path(__file__).stem,
    model="pretrained_models/SmolLM2-135M-ReArc-merged",
    bits=4,
    fmt_opts=PUBLISHED_FORMAT,
    max_tokens=8192,
    # test-time training on all tasks at once
    ttt="joint",
    joint=TTTSettings(
        repeats=48, lora_rank=64, lora_alpha=16, batch_size=2, gradient_accumulation=2, epochs=1, learning_rate=1e-4,
        embedding_learning_rate=1e-5, warmup_ratio=0.25, scheduler="cosine", weight_decay=0.0, mask_first_n_examples=0,
        save_every=500, gradient_checkpointing=False),
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
