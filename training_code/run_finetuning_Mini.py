"""Train Mini, the model that ships with this project, from nothing.

Reproduces pretrained_models/Mini. Data: RE-ARC (250 examples per task), the ARC-AGI-1 training tasks, ConceptARC,
and the ARC-AGI-2 training tasks that are not in ARC-AGI-1. No evaluation task is used, its demonstrations neither.

    python training_code/arc_downloader.py re_arc --examples 250
    python training_code/arc_downloader.py concept_arc
    python training_code/run_finetuning_Mini.py

Hardware, time, scores: pretrained_models/Mini/README.md. A stopped run goes on from its last checkpoint. The smallest
run, on a CPU, in about a minute (its model solves nothing):

    python training_code/run_finetuning_Mini.py --device cpu --output-path /tmp/Mini --size.layers 2 --size.heads 2
        --size.hidden-size 64 --size.intermediate-size 128 --settings.steps 20 --settings.rows-per-step 1
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mini_documents import DocumentStream, load_sources
from mini_model import MiniSize, make_model
from mini_pretraining import Pretrainer, PretrainingSettings, model_card, save_mini
from run_tools import REPOSITORY, RunRecord, pick_device


@dataclass(frozen=True)
class Config:
    """Everything that decides the result."""

    size: MiniSize = MiniSize()
    settings: PretrainingSettings = PretrainingSettings()
    input_path: Path = Path("input")  # where arc_downloader.py has put the data
    output_path: Path = Path("pretrained_models/Mini")  # checkpoints go beside it, under <name>-training
    device: str | None = None  # cpu or cuda; None: a GPU if there is one
    stop_after_minutes: float = float("inf")  # save a checkpoint and end; the next start goes on
    record: bool = False  # also write the run's record to results/


CONFIG = Config()


def main(config):
    """Load the data, train, store the weights in 4 bits."""
    output = REPOSITORY / config.output_path
    if (output / "model.safetensors").exists():
        return print(f"{output} holds a trained model: nothing to do (delete the folder to train anew)")
    training = output.with_name(output.name + "-training")
    record = RunRecord(config, Path(__file__).stem, training, config.record)
    with record.stage("load data"):
        sources = load_sources(REPOSITORY / config.input_path)
        model = make_model(config.size, seed=config.settings.seed).to(pick_device(config.device))
        trainer = Pretrainer(model, DocumentStream(sources, config.settings), training)
    with record.stage("pre-training"):
        finished = trainer.run(config.stop_after_minutes)
    record.save(**trainer.summary())
    if not finished:
        return print(f"stopped after {trainer.step} of {config.settings.steps} steps: start again to go on")
    with record.stage("store"):
        card = model_card(trainer.summary(), config.settings, record.values["hardware"])
        save_mini(trainer.weights(), model.config, output, card)
    print(f"Mini is in {output}")


if __name__ == "__main__":
    main(tyro.cli(Config, default=CONFIG, description=__doc__))
