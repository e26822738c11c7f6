"""Train Mini on the demonstration pairs of all 400 evaluation tasks at once, all weights, packed: the model of the
other benchmarks, since only a trained model has search trees like those of a real run.

    python benchmarks/train_mini_on_demonstrations.py --output-path trained --seeds 0 1

Writes `<output-path>/seed<N>` (fp32), and with `--four-bits` also `<output-path>/seed<N>-nf4` (20 MB). No test pair is
used: the query of a document is one of the demonstration pairs.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from mini_documents import DocumentStream, demonstration_pairs  # noqa: E402
from mini_model import make_tokenizer  # noqa: E402
from mini_pretraining import Pretrainer, PretrainingSettings  # noqa: E402
from model_tools import load_model, save_model_and_tokenizer  # noqa: E402
from run_tools import load_evaluation_set, pick_device  # noqa: E402


@dataclass(frozen=True)
class Config:
    """How to train."""

    output_path: Path
    model: str = "pretrained_models/Mini"
    seeds: tuple[int, ...] = (0, 1)
    steps: int = 350
    batch_size: int = 16
    max_tokens: int = 8192
    tasks: int = 0  # only the first N tasks; 0: all
    four_bits: bool = False  # also store the models in NF4


def main(config):
    """Train once per seed and store the models."""
    device = pick_device(None)
    pairs = demonstration_pairs(load_evaluation_set())
    pairs = dict(list(pairs.items())[: config.tasks or None])
    model, _ = load_model(config.model, bits=32, device=device)
    start, compiled = {name: x.clone() for name, x in model.state_dict().items()}, None
    for seed in config.seeds:
        settings = PretrainingSettings(
            max_steps=config.steps, batch_size=config.batch_size, max_tokens=config.max_tokens, muon_learning_rate=0.01,
            adam_learning_rate=5e-4, decay_part=0.8, quantised_part=0, source_weights={"demonstrations": 1.0},
            warmup_steps=20, checkpoint_steps=config.steps + 1, seed=seed,
        )
        model.load_state_dict(start)
        begin = time.perf_counter()
        trainer = Pretrainer(model, DocumentStream({"demonstrations": pairs}, settings), config.output_path / "run")
        compiled = trainer._forward = compiled or trainer._forward  # compiled once for all seeds
        model.train()
        while trainer.step < settings.max_steps:
            loss = trainer._train_step()
            if trainer.step % 25 == 0:
                print(f"seed {seed} step {trainer.step} loss {loss.item():.4f} "
                      f"{time.perf_counter() - begin:.0f} s {trainer.tokens / 1e6:.0f} M tokens", flush=True)
        model.eval()
        del trainer
        model.config._attn_implementation = "sdpa"
        save_model_and_tokenizer(config.output_path / f"seed{seed}", model, make_tokenizer())
        if config.four_bits:
            small, tokenizer = load_model(config.output_path / f"seed{seed}", bits=4, device=device)
            save_model_and_tokenizer(config.output_path / f"seed{seed}-nf4", small, tokenizer)
        print(f"seed {seed}: {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main(tyro.cli(Config, description=__doc__))
