"""Fine-tune Mistral-NeMo-Minitron-8B on RE-ARC, the public evaluation set and ConceptARC, as published.

Reproduces the model of the ARC Prize 2024 entry (53.5 on the hidden set). It has seen the public evaluation set with
its solutions, so its score on that set says nothing. Published cost: about 98 H100-hours (RE-ARC alone).

Needs ConceptARC and 4,508 examples of every RE-ARC task (644 texts of 6 pairs and a query): about 5 hours of one core,
shared by all cores, and 2.2 GB (extrapolated from 12 examples per task):

    python training_code/arc_downloader.py re_arc --examples 4508
    python training_code/arc_downloader.py concept_arc
    python training_code/run_finetuning_Nemo-full.py

Writes pretrained_models/Mistral-NeMo-Minitron-Full-{training,lora,merged}; a second start skips finished steps. The
smallest run on a CPU, with any small Llama or Mistral in place of the base model and 21 examples per task:

    python training_code/arc_downloader.py re_arc --examples 21
    python training_code/run_finetuning_Nemo-full.py --base-model SMALL_MODEL --bits 32 --device cpu
        --rearc-epochs 3 --mix-repeats 1 --max-steps 2 --output-path /tmp/Nemo
"""

from pathlib import Path

import tyro

from finetuning_tools import (FinetuningConfig, load_and_augment_data, load_and_shrink_base, merge_and_save, start_run,
                              train_and_save_lora)
from run_tools import REPOSITORY

CONFIG = FinetuningConfig(
    script=Path(__file__).stem,
    base_model="nvidia/Mistral-NeMo-Minitron-8B-Base",
    output_path=REPOSITORY / "pretrained_models" / "Mistral-NeMo-Minitron-Full",
    bits=4,
    max_tokens=8192,
    # data: RE-ARC, and the evaluation set and ConceptARC with all their pairs
    rearc_epochs=644, rearc_size=6, mix_repeats=128, augment_seed=0,
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
