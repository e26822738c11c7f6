"""Evaluate the fine-tuned Llama-3.2-3B on the public ARC-AGI-1 evaluation set, without test-time training.

Published number: none. Shows what test-time training adds: compare run_evaluation_Llama-rearc_with_ttt.py (54.5 %).
Published cost of the search with training on one H100: 9 h 54 min, scoring 37 min.
Search and scoring are those of this project; as published: `--search plain --scoring-views per_candidate`.

    python training_code/run_evaluation_Llama-rearc_without_ttt.py

The model is that of run_finetuning_Llama-rearc.py, or the published one with
`--model da-fr/Llama-3.2-3B-ARChitects-ReArc-bnb-4bit`. The smallest run, on a CPU:

    python training_code/run_evaluation_Llama-rearc_without_ttt.py --limit 1 --device cpu
"""

from pathlib import Path

import tyro

from evaluation_results import check_submission, write_submission
from evaluation_tools import (EvaluationConfig, find_candidates, finish_run, load_model_and_tokenizer, load_tasks,
                              make_views, start_run, train_on_demonstrations)
from run_tools import PUBLISHED_FORMAT

CONFIG = EvaluationConfig(
    script=Path(__file__).stem,
    model="pretrained_models/Llama-3.2-3B-ReArc-merged",
    bits=4,
    fmt_opts=PUBLISHED_FORMAT,
    max_tokens=128000,
    ttt="none",
    # search, scoring, selection
    repeats=2, min_prob=0.1, scoring_views="search", score_rule=None, search="tree", seed=0,
)


def main(config):
    """Run the evaluation; what an earlier start has finished is taken over."""
    run = start_run(config)
    tasks = load_tasks(run)
    model_tok = load_model_and_tokenizer(run)
    model_tok = train_on_demonstrations(run, model_tok, tasks)  # nothing, unless --ttt asks for it
    views = make_views(run, tasks)
    candidates = find_candidates(run, model_tok, tasks, views)
    write_submission(run, tasks, candidates)
    check_submission(run, tasks)
    finish_run(run)


if __name__ == "__main__":
    main(tyro.cli(EvaluationConfig, default=CONFIG, description=__doc__))
