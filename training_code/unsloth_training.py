"""Training by unsloth for the run scripts, in a process of its own.

unsloth rewrites the model classes of transformers for the whole process, but the search engine runs on transformers'
own. So the run script's process hands base, adapter and texts over in a folder, frees the GPU and waits; the other one
trains by ``training_tools.train_lora`` on unsloth's model and trainer and writes the adapter back::

    unsloth_job/base  adapter  job.json   ->   trained  result.json

Base and first weights of the adapter are those of the run script, so both backends begin with the same model.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch

from adapter_tools import save_base, set_peft_weights
from arc_files import write_json
from mini_model import MiniConfig
from model_tools import (get_and_fix_peft_weights, load_model, load_peft_state, load_tokenizer,
                         save_model_and_tokenizer)  # fmt: skip
from training_tools import TrainingSettings, tell_shortened, train_lora
from unsloth_backend import create_unsloth_lora

EXPECTED_ERRORS = (ValueError, RuntimeError, FloatingPointError)  # of ``train_lora``: their sentences say it all


def train_by_unsloth(model, tokenizer, texts, fmt_opts, settings, output_path, option_prefix="--",  # noqa: PLR0913
                     seconds=None):  # fmt: skip
    """Train the adapter of a model on formatted tasks, in place, by unsloth in a process of its own.

    Arguments, files, resumption and result as of ``training_tools.train_lora``; the model has to be on a GPU, in 4 or
    16 bits, and is in main memory meanwhile.

    Raises:
        RuntimeError: with the words of whatever ``train_lora`` raised there. ValueError: Mini, which unsloth lacks.
    """
    if model.config.model_type == MiniConfig.model_type:
        raise ValueError("unsloth does not know the architecture of Mini: use --backend transformers")
    end = None if seconds is None else time.time() + seconds
    job = Path(output_path).absolute() / "unsloth_job"
    shutil.rmtree(job, ignore_errors=True)
    save_base(job / "base", model)
    tokenizer.save_pretrained(job / "base")
    save_model_and_tokenizer(job / "adapter", model, tokenizer)
    write_json(job / "job.json", {
        "texts": [{name: text[name] for name in ("key", "text")} for text in texts], "fmt_opts": fmt_opts,
        "settings": {entry.name: getattr(settings, entry.name) for entry in fields(TrainingSettings)},
        "output_path": str(Path(output_path).absolute()), "option_prefix": option_prefix, "end": end})  # fmt: skip
    device = model.device
    model.to("cpu")
    torch.cuda.empty_cache()
    try:
        _run(job)
    finally:
        model.to(device)
    load_peft_state(model, job / "trained")
    model.eval()
    stats = json.loads((job / "result.json").read_text())
    tell_shortened(stats)
    shutil.rmtree(job)
    return stats


def _run(job):
    """Let unsloth's process train what is in the folder of a job.

    Raises:
        RuntimeError: it failed, in its own words where it left any.
    """
    script = Path(__file__).with_name("unsloth_backend.py")
    quiet = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1"}  # all that is needed is in the folder
    run = subprocess.run([sys.executable, script, job], cwd=job, stdout=subprocess.PIPE, text=True, check=False,
                         env=os.environ | quiet)  # fmt: skip
    if run.returncode:
        print(run.stdout, file=sys.stderr)  # what unsloth says there matters only now
        file = job / "error.json"
        reason = json.loads(file.read_text()) if file.exists() else f"exit status {run.returncode}, see above"
        raise RuntimeError(f"training by unsloth failed: {reason}")


def train_here(job):
    """Train what is in the folder of a job, in this process, which has imported unsloth before anything else."""
    job = Path(job)
    task = json.loads((job / "job.json").read_text())
    settings = TrainingSettings(**task["settings"])
    quantised = "quantization_config" in json.loads((job / "base" / "config.json").read_text())
    model, _ = load_model(job / "base", bits=4 if quantised else 16, backend="unsloth")
    tokenizer = load_tokenizer(job / "base")  # unsloth's may have got tokens that the model lacks
    shape = json.loads((job / "adapter" / "adapter_config.json").read_text())
    model = create_unsloth_lora(
        model, r=shape["r"], alpha=shape["lora_alpha"], target_modules=sorted(shape["target_modules"]),
        train_embeddings=bool(shape["modules_to_save"]), rank_stabilised=shape["use_rslora"],
        gradient_checkpointing=settings.gradient_checkpointing is not False)  # fmt: skip
    set_peft_weights(model, get_and_fix_peft_weights(job / "adapter"))
    try:
        seconds = None if task["end"] is None else task["end"] - time.time()
        stats = train_lora(model, tokenizer, task["texts"], task["fmt_opts"], settings, task["output_path"],
                           task["option_prefix"], seconds)  # fmt: skip
    except EXPECTED_ERRORS as error:
        write_json(job / "error.json", str(error))
        raise
    save_model_and_tokenizer(job / "trained", model, tokenizer)
    write_json(job / "result.json", stats)


TRAINERS = {"transformers": train_lora, "unsloth": train_by_unsloth}  # by the name of the backend
