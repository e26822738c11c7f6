"""Train Mini, the model that ships with this project, from nothing.

Reproduces pretrained_models/Mini. Data: RE-ARC (250 examples per task), the ARC-AGI-1 training tasks, ConceptARC,
and the ARC-AGI-2 training tasks that are not in ARC-AGI-1. No evaluation task is used, its demonstrations neither.

    python training_code/arc_downloader.py all --examples 250
    python training_code/run_finetuning_Mini.py --output-path pretrained_models/Mini-new

(Without --output-path it finds the shipped model finished.) Hardware and time: pretrained_models/Mini/README.md. A
stopped run goes on from its last checkpoint. Smallest run, on a CPU:

    python training_code/run_finetuning_Mini.py --device cpu --output-path /tmp/Mini --layers 2 --heads 2
        --hidden-size 64 --intermediate-size 128 --max-steps 9 --batch-size 1
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from mini_documents import DocumentStream, load_sources
from mini_model import MiniSize, make_model
from mini_pretraining import Pretrainer, PretrainingSettings, is_trained, save_mini
from run_tools import REPOSITORY, RunRecord, pick_device


@tyro.conf.configure(tyro.conf.OmitArgPrefixes, tyro.conf.SuppressFixed)
@dataclass(frozen=True)
class Config:
    """Everything that decides the result."""

    size: MiniSize = MiniSize()
    settings: PretrainingSettings = PretrainingSettings()
    input_path: Path = REPOSITORY / "input"  # where arc_downloader.py has put the data
    output_path: Path = REPOSITORY / "pretrained_models/Mini"  # relative: from the current folder; -training beside it
    device: Literal["cpu", "cuda"] | None = None  # where to run; None: a GPU if there is one
    stop_after_minutes: float | None = None  # save a checkpoint and end; the next start goes on
    record: bool = False  # also write the finished run's record to results/<script>.json


CONFIG = Config()


def main(config):
    """Load the data, train, store the weights in 4 bits; a finished training is not repeated."""
    if is_trained(config.output_path):
        return
    folder = config.output_path.with_name(config.output_path.name + "-training")
    record = RunRecord(config, Path(__file__).stem, folder, config.record)
    documents = DocumentStream(load_sources(config.input_path), config.settings)
    model = make_model(config.size, config.settings.seed).to(pick_device(config.device))
    trainer = Pretrainer(model, documents, folder)
    if finished := trainer.run(config.stop_after_minutes):
        save_mini(config.output_path, trainer, record.values)
    record.save_training("pre-training", trainer.summary(), finished=finished)


if __name__ == "__main__":
    main(tyro.cli(Config, default=CONFIG))
