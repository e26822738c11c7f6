"""Fine-tune Llama-3.2-3B on RE-ARC, as published.

Reproduces the model behind the 54.5 % of the public ARC-AGI-1 evaluation set (ARC Prize 2024 entry, as scripted; see
run_evaluation_Llama-rearc_with_ttt.py). Published cost: about 15 H100-hours.

Needs 2,576 examples of every RE-ARC task (368 texts of 6 pairs and a query): about 3 hours of one core, shared by all
cores, and 1.3 GB (extrapolated from 12 examples per task):

    python training_code/arc_downloader.py re_arc --examples 2576
    python training_code/run_finetuning_Llama-rearc.py

Writes pretrained_models/Llama-3.2-3B-ReArc-{training,lora,merged}; a second start skips finished steps. The smallest
run on a CPU, with any small Llama in place of the base model and 21 examples per task:

    python training_code/arc_downloader.py re_arc --examples 21
    python training_code/run_finetuning_Llama-rearc.py --base-model SMALL_LLAMA --bits 32 --device cpu
        --rearc-epochs 3 --max-steps 2 --max-tokens 2000 --output-path /tmp/Llama
"""

from pathlib import Path

import tyro

from finetuning_tools import (FinetuningConfig, load_and_augment_data, load_and_shrink_base, merge_and_save, start_run,
                              train_and_save_lora)
from run_tools import REPOSITORY

CONFIG = FinetuningConfig(
    script=Path(__file__).stem,
    base_model="chuanli11/Llama-3.2-3B-Instruct-uncensored",
    output_path=REPOSITORY / "pretrained_models" / "Llama-3.2-3B-ReArc",
    bits=4,
    max_tokens=128000,
    # data: RE-ARC
    rearc_epochs=368, rearc_size=6, augment_seed=0,
    # LoRA
    lora_rank=256, lora_alpha=24,
    # training
    batch_size=4, gradient_accumulation=2, epochs=1, learning_rate=1e-4, embedding_learning_rate=1e-5,
    warmup_ratio=0.25, scheduler="cosine", weight_decay=0.0, mask_first_n_examples=1, save_every=500, seed=42,
)


def main(config):
    """Run the fine-tuning, skipping what an earlier start has finished."""
    run = start_run(config)
    if run.finished:
        return
    model_tok = load_and_shrink_base(run)
    texts = load_and_augment_data(run, model_tok[1])
    model_tok = train_and_save_lora(run, model_tok, texts)
    merge_and_save(run, model_tok)


if __name__ == "__main__":
    main(tyro.cli(FinetuningConfig, default=CONFIG))
