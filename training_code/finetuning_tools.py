"""The steps of a fine-tuning run: each `run_finetuning_*.py` of a published model is its configuration and these calls.

Load the base model and shrink its vocabulary, load and augment data, train a LoRA, save it, merge it into the base,
save that. With the output path `pretrained_models/NAME` a run writes

    NAME-training/   record, loss history and picture, checkpoints while it trains
    NAME-lora/       the trained adapter
    NAME-merged/     the merged model, for the evaluation scripts

Under torchrun all workers do these steps, each with the base model on a GPU of its own. They train together; all else
is written by the first, which then merges while the others have nothing left to do.

A step whose folder is there is skipped on a second start; a training that was killed goes on from its last checkpoint.
What belongs to a run is noted in `finetuning.json` beside the checkpoints and beside the adapter: its settings, the
identity of its base model, and what the training took. Results of another run are never continued.

Follows "The LLM ARChitect" (2024), section on training.
"""

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from arc_files import write_json
from arc_loader import ArcDataset
from run_tools import (PUBLISHED_FORMAT, REPOSITORY, RunRecord, folder_written_whole, format_options,
                       load_evaluation_set, lock_folder, memory_advice, model_location, pick_device)  # before peft
from model_tools import (create_lora, keep_single_char_tokens, load_model, load_peft_state, merge_peft_into_base,
                         model_identity, save_model_and_tokenizer)
from torchrun_tools import Worker, from_first, quiet_unless_first, this_worker
from training_tools import SPEED_ALONE, TrainingSettings, complete_checkpoints, fitting_texts, setting_problems
from unsloth_backend import check_unsloth
from unsloth_training import TRAINERS

KEPT_CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789!?.:,;*+/-="  # and the line end
SHOWN_REASONS = 5  # why tasks do not fit: as many are told one by one
WHERE_AND_HOW = ("script", "device", "output_path", "rearc_path", "concept_path", "record", "save_every", *SPEED_ALONE)


@tyro.conf.configure(tyro.conf.SuppressFixed)
@dataclass(frozen=True)
class FinetuningConfig(TrainingSettings):
    """Everything that decides the result of a fine-tuning run."""

    script: tyro.conf.Fixed[str] = ""  # name of the run script, without .py
    base_model: str = ""  # folder of the base model (relative: from the repository's root) or its name on the hub
    # start of the names of the folders written (relative: from the current folder)
    output_path: Path = REPOSITORY / "pretrained_models" / "model"
    bits: Literal[4, 16, 32] = 4  # precision of the base's weights while training: NF4, bf16, fp32
    device: Literal["cpu", "cuda"] | None = None  # where to run; None: a GPU if there is one
    backend: Literal["transformers", "unsloth"] = "transformers"  # what trains; unsloth: see requirements-unsloth.txt
    max_tokens: int = 128000  # longest training text; longer ones lose whole demonstration pairs
    rearc_path: Path = REPOSITORY / "input" / "re_arc"  # RE-ARC examples, see arc_downloader.py
    rearc_epochs: int = 368  # training texts per RE-ARC task, each with its own examples
    rearc_size: int = 6  # demonstration pairs of a RE-ARC text; one more example is its query
    mix_repeats: int = 0  # repetitions of the ARC-AGI-1 evaluation set and of ConceptARC; 0: RE-ARC alone
    concept_path: Path = REPOSITORY / "input" / "ConceptARC"  # ConceptARC, see arc_downloader.py
    augment_seed: int = 0  # views of the training texts
    lora_rank: int = 256  # rank of the adapter
    lora_alpha: int = 24  # scale of the adapter (rank-stabilised: alpha / sqrt(rank))
    record: bool = False  # also write the finished run's record to results/<script>.json


@dataclass(frozen=True)
class Run:
    """A started fine-tuning: its configuration, its three folders, and what was there when it started."""

    config: FinetuningConfig
    training: Path
    lora: Path
    merged: Path
    record: RunRecord
    worker: Worker  # this process among those of torchrun
    lock: object = None  # open as long as no other run may write to the folders
    trained: bool = False  # an earlier start has trained the adapter
    finished: bool = False  # this worker has nothing left to do

    @property
    def notes(self):
        """Return what finetuning.json holds of the results that are there; {} before anything is trained."""
        for folder in (self.lora, self.training):
            if (folder / "finetuning.json").exists():
                started = self.merged.exists() or self.lora.exists() or complete_checkpoints(self.training)
                return json.loads((folder / "finetuning.json").read_text()) if started else {}
        return {}

    def refuse(self, what):
        """Raise the error that says what to do about results of another run."""
        name = Path(self.config.output_path).name
        raise ValueError(f"{self.training.parent} holds the results of a run with other {what}: choose another "
                         f"--output-path or remove {name}-training, {name}-lora and {name}-merged")

    def fmt_opts(self, tokenizer):
        """Return the published prompt format with the end token of a tokenizer."""
        return format_options(PUBLISHED_FORMAT, tokenizer, self.config.max_tokens)


def start_run(config):
    """Open the folders of a run.

    Raises ValueError for an option that no step could work with, or if the folders hold results of other settings;
    FileNotFoundError without the data to train on; ImportError if the backend cannot be used here.
    """
    quiet_unless_first()
    _check_options(config)
    path = Path(config.output_path)
    training, lora, merged = (path.with_name(f"{path.name}-{part}") for part in ("training", "lora", "merged"))
    record = RunRecord(config, config.script, training, copy_to_results=config.record)
    worker = this_worker()
    lock = lock_folder(training) if worker.first else None
    run = Run(config, training, lora, merged, record, worker, lock)
    there = from_first("finished steps", lambda: _finished_steps(run))
    if there["merged"]:
        print(f"nothing to do, the merged model is there: {merged}")
    elif config.backend == "unsloth" and not there["lora"]:
        check_unsloth(pick_device(config.device), config.bits)
    if not (there["merged"] or there["lora"]):
        _check_data(config)
    finished = there["merged"] or (there["lora"] and not run.worker.first)
    return replace(run, trained=there["lora"], finished=finished)


def _check_options(config):
    problems = setting_problems(config)
    problems += [f"--{name.replace('_', '-')} {value}: it must be {least} or more"
                 for name, least in (("rearc_epochs", 1), ("rearc_size", 1), ("max_tokens", 1), ("mix_repeats", 0),
                                    ("augment_seed", 0))
                 if (value := getattr(config, name)) < least]  # fmt: skip
    if problems:
        raise ValueError("; ".join(problems))


def _check_data(config):
    """Look for the data before the base model is loaded, which takes long."""
    examples = config.rearc_epochs * (config.rearc_size + 1)
    if not (Path(config.rearc_path) / "metadata.json").is_file():
        raise FileNotFoundError(f"--rearc-path {config.rearc_path}: no RE-ARC is there, of which {examples} examples "
                                "per task are needed: make them with `python training_code/arc_downloader.py re_arc "
                                f"--examples {examples} --path {config.rearc_path}`")
    if config.mix_repeats and not Path(config.concept_path).is_dir():
        raise FileNotFoundError(f"--concept-path {config.concept_path}: no ConceptARC is there: `python "
                                "training_code/arc_downloader.py concept_arc` brings it")


def _finished_steps(run):
    """Return which folders an earlier start has left, whose settings have to be those of this run."""
    settings, saved = _settings(run.config), run.notes.get("settings")
    if saved and (different := [name for name in settings if saved.get(name) != settings[name]]):
        run.refuse(f"settings ({', '.join(different)})")
    return {"lora": run.lora.exists(), "merged": run.merged.exists()}


def _settings(config):
    return {name: value for name, value in asdict(config).items() if name not in WHERE_AND_HOW}


def load_and_shrink_base(run):
    """Load the base model and keep only the tokens that the prompt format uses; return the pair (model, tokenizer).

    Raises ValueError if it is not the model that an earlier start has trained. (Rounding differs from device to device,
    so the identity of the base is that on one kind of device; the name must be the same on all.)
    """
    config, device = run.config, pick_device(run.config.device)
    with run.record.stage("load base model and shrink its vocabulary"):
        with memory_advice("loading the base model", "lower --bits, or use --device cpu"):
            model, tokenizer = load_model(model_location(config.base_model), bits=config.bits, device=device)
        keep = [*KEPT_CHARACTERS, *tokenizer.tokenize("\n")]
        kept = keep_single_char_tokens(model, tokenizer, keep=keep, remove_unk=True)
        print(f"{len(kept)} tokens kept")
        if run.worker.first:
            _note_base(run, device, model_identity(model))
    return model, tokenizer


def _note_base(run, device, identity):
    """Note the settings of a run and the identity of its base model; refuse another one than an earlier start's."""
    known = run.notes.get("base", {})
    if known.get(device, identity) != identity:
        run.refuse(f"weights in the base model {run.config.base_model}")
    notes = {"settings": _settings(run.config), "base": known | {device: identity}}
    write_json(run.training / "finetuning.json", notes, indent=2)


def load_and_augment_data(run, tokenizer):
    """Return the formatted training texts, at most `max_tokens` long; None if the trained adapter is there already.

    Tasks of which not one pair fits are named and left out.

    Raises ValueError naming a RE-ARC task that has too few examples.
    """
    if run.trained:
        return None
    config = run.config
    with run.record.stage("load and augment data"):
        mixes = {}
        if config.mix_repeats:
            sources = {"arceval": load_evaluation_set(),
                       "concept": ArcDataset.load_from_neoneye(str(config.concept_path))}
            mixes = {name: source.move_test_to_train().repeat(config.mix_repeats) for name, source in sources.items()}
        data = ArcDataset.load_from_rearc(str(config.rearc_path), n=config.rearc_epochs, sizes=[config.rearc_size],
                                          seed=config.seed, mix_datasets=mixes)
        views = data.augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=config.augment_seed)
        texts, left_out = fitting_texts(views, "text", run.fmt_opts(tokenizer))
        for reason in list(left_out.values())[:SHOWN_REASONS]:
            print(f"left out: {reason}")
        if len(left_out) > SHOWN_REASONS:
            print(f"left out for the same kind of reason: {len(left_out) - SHOWN_REASONS} more tasks")
        print(f"{len(texts)} training texts of {len(views.keys)}")
    return texts


def train_and_save_lora(run, model_tok, texts):
    """Add a LoRA to the base, train and save it; with `texts=None` load the saved one. Return (model, tokenizer)."""
    config = run.config
    model, tokenizer = model_tok
    model = create_lora(model, r=config.lora_rank, alpha=config.lora_alpha, seed=config.seed)
    if texts is None:
        print(f"adapter loaded from {run.lora}")
        load_peft_state(model, run.lora)
    else:
        print("\n== train", flush=True)
        train = TRAINERS[config.backend]
        stats = train(model, tokenizer, texts, run.fmt_opts(tokenizer), config, run.training)
        if run.worker.first:
            with folder_written_whole(run.lora) as partial:
                save_model_and_tokenizer(partial, model, tokenizer)
                notes = json.loads((run.training / "finetuning.json").read_text())
                write_json(partial / "finetuning.json", notes | {"stats": stats}, indent=2)
    if run.worker.first and (stats := run.notes.get("stats")):  # an adapter from elsewhere has none
        run.record.save_training("train", stats)
    return model, tokenizer


def merge_and_save(run, model_tok):
    """Merge the trained LoRA into the base, save the result for the evaluation scripts, remove the checkpoints."""
    if not run.worker.first:
        return
    model, tokenizer = model_tok
    advice = "use --device cpu; the trained adapter is kept, so a second start only merges"
    with run.record.stage("merge"), memory_advice("merging", advice):
        with folder_written_whole(run.merged) as partial:
            save_model_and_tokenizer(partial, merge_peft_into_base(model), tokenizer)
        shutil.rmtree(run.training / "checkpoints", ignore_errors=True)
    run.record.save(finished=True)
    print(f"\n== written\nadapter      {run.lora}\nmerged model {run.merged}")
    for file in run.record.files:
        print(f"record       {file}")
