"""Train Mini, the model that ships with this project, from nothing.

Reproduces pretrained_models/Mini. Data: RE-ARC (250 examples per task), the ARC-AGI-1 training tasks, ConceptARC,
and the ARC-AGI-2 training tasks that are not in ARC-AGI-1. No evaluation task is used, its demonstrations neither.

    python training_code/arc_downloader.py all --examples 250
    python training_code/run_finetuning_Mini.py

Hardware and time: pretrained_models/Mini/README.md. A stopped run goes on from its last checkpoint. Smallest CPU run:

    python training_code/run_finetuning_Mini.py --device cpu --output-path /tmp/Mini --size.layers 2 --size.heads 2
        --size.hidden-size 64 --size.intermediate-size 128 --settings.steps 9 --settings.rows-per-step 1
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from mini_documents import DocumentStream, load_sources
from mini_model import MiniSize, make_model
from mini_pretraining import Pretrainer, PretrainingSettings, is_trained, save_mini
from run_tools import REPOSITORY, RunRecord, pick_device


@dataclass(frozen=True)
class Config:
    """Everything that decides the result."""

    size: MiniSize = MiniSize()
    settings: PretrainingSettings = PretrainingSettings()
    input_path: Path = REPOSITORY / "input"  # where arc_downloader.py has put the data
    output_path: Path = REPOSITORY / "pretrained_models/Mini"  # checkpoints go beside it, to <name>-training
    device: str | None = None  # cpu or cuda; None: a GPU if there is one
    stop_after_minutes: float | None = None  # save a checkpoint and end; the next start goes on
    record: bool = False  # also write the run's record to results/


CONFIG = Config()


def main(config):
    """Load the data, train, store the weights in 4 bits; a finished training is not repeated."""
    if is_trained(config.output_path):
        return
    training = config.output_path.with_name(config.output_path.name + "-training")
    record = RunRecord(config, Path(__file__).stem, training, config.record)
    with record.stage("load data"):
        documents = DocumentStream(load_sources(config.input_path), config.settings)
    model = make_model(config.size, config.settings.seed).to(pick_device(config.device))
    trainer = Pretrainer(model, documents, training)
    with record.stage("pre-training"):
        finished = trainer.run(config.stop_after_minutes)
    record.save(**trainer.summary())
    if finished:
        save_mini(config.output_path, trainer, record.values["hardware"])


if __name__ == "__main__":
    main(tyro.cli(Config, default=CONFIG))
