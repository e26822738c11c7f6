"""Measure LoRA training: tokens per second and peak memory by precision, batch size, checkpointing and optimiser.

    python benchmarks/random_models.py --shape llama-3b --output /tmp/Llama-random
    python benchmarks/training_benchmark.py --base-model /tmp/Llama-random --output results/training_llama-3b.json

It is the path of the fine-tuning scripts: load the base, shrink its vocabulary, add the LoRA, and train it by
``training_tools.train_lora`` on ARC-AGI-1 training tasks as texts of up to ``--max-tokens``. Every row has steps of
its own that are not measured, then the measured ones; recording CUDA graphs, which every length of a batch needs once,
is told apart. The second figure for memory is that of a batch of the longest text. A row that does not fit says so.
"""

import gc
import itertools
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from unsloth_backend import create_unsloth_lora, import_unsloth  # noqa: E402

if "unsloth" in sys.argv:  # it has to be imported before transformers
    import_unsloth()

from arc_files import write_json  # noqa: E402
from arc_loader import ArcDataset  # noqa: E402
from run_tools import (PUBLISHED_FORMAT, current_commit, format_options, hardware, load_training_set,  # noqa: E402
                       model_location, pick_device)
from finetuning_tools import KEPT_CHARACTERS  # noqa: E402
from model_tools import LORA_LAYERS, create_lora, keep_single_char_tokens, load_model, reset_lora  # noqa: E402
from smaller_gpu import free_gib  # noqa: E402
from training_callbacks import HISTORY_FILES  # noqa: E402
from training_tools import TrainingSettings, fitting_texts, train_lora  # noqa: E402


@dataclass(frozen=True)
class Config:
    """What to measure: every combination."""

    base_model: str  # folder, with the full vocabulary
    backend: Literal["transformers", "unsloth"] = "transformers"
    bits: tuple[int, ...] = (4, 16)
    batch_sizes: tuple[int, ...] = (1, 2, 4)
    gradient_checkpointing: tuple[bool | None, ...] = (True, False)  # None: where memory demands it
    # False: padded batches on transformers' and peft's own layers; unsloth always pads
    packing: tuple[bool, ...] = (True,)
    cuda_graphs: tuple[bool, ...] = (True,)  # replay packed passes as CUDA graphs where that is faster
    optimizers: tuple[str, ...] = ("adamw_8bit",)
    lora_rank: int = 256
    lora_alpha: int = 24
    max_tokens: int = 8192  # longest text
    steps: int = 6  # measured
    warm_up: int = 2  # steps before
    device: str | None = None
    seed: int = 0
    output: Path | None = None


def load_with_lora(config, bits, checkpointing, device):
    """Return (model with an adapter, tokenizer, GiB of its base), as the backend makes them."""
    model, tokenizer = load_model(model_location(config.base_model), bits=bits, device=device, backend=config.backend)
    keep_single_char_tokens(model, tokenizer, keep=[*KEPT_CHARACTERS, *tokenizer.tokenize("\n")], remove_unk=True)
    weights_gib = sum(parameter.nbytes for parameter in model.parameters()) / 2**30
    if config.backend == "unsloth":
        model = create_unsloth_lora(model, config.lora_rank, config.lora_alpha, LORA_LAYERS,
                                    gradient_checkpointing=checkpointing is not False)  # fmt: skip
    else:
        model = create_lora(model, r=config.lora_rank, alpha=config.lora_alpha)
    return model, tokenizer, weights_gib


def make_texts(config, tokenizer):
    """Return (format options, texts in random order) of the training tasks, as long as the limit allows."""
    tasks = load_training_set().move_test_to_train()
    fmt_opts = format_options(PUBLISHED_FORMAT, tokenizer, config.max_tokens)
    views = tasks.augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=config.seed)
    texts, _ = fitting_texts(views, "text", fmt_opts)
    order = np.random.default_rng(config.seed).permutation(len(texts))
    return fmt_opts, [texts[i] for i in order]


def out_of_memory(error):
    """Tell whether an error is about memory."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


def measure(model_tok, fmt_opts, texts, settings):
    """Train for some steps; return what ``train_lora`` says of them and the peak memory in GiB, None without room."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        with tempfile.TemporaryDirectory() as folder:
            stats = train_lora(*model_tok, texts, fmt_opts, settings, folder)
            stats["losses"] = [step["loss"] for step in json.loads((Path(folder) / HISTORY_FILES[0]).read_text())]
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None
    return {"peak_gib": 0.0} | stats  # measured on a GPU only


def measure_row(config, model_tok, fmt_opts, texts, row):
    """Measure one combination; return its figures."""

    def settings(steps):
        return TrainingSettings(
            batch_size=row["batch_size"], gradient_accumulation=1, max_steps=steps, optimizer=row["optimizer"],
            packing=row["packing"], cuda_graphs=row["cuda_graphs"],
            gradient_checkpointing=row["gradient_checkpointing"], seed=config.seed)  # fmt: skip

    warm, timed = config.warm_up * row["batch_size"], config.steps * row["batch_size"]
    longest = max(texts, key=lambda text: ArcDataset.count_tokens(text["text"]))
    measure(model_tok, fmt_opts, texts[:warm], settings(config.warm_up))
    stats = measure(model_tok, fmt_opts, texts[warm : warm + timed], settings(config.steps))
    worst = measure(model_tok, fmt_opts, [longest] * row["batch_size"], settings(1))
    figures = {"longest_text_tokens": ArcDataset.count_tokens(longest["text"]),
               "longest_text_peak_gib": worst and worst["peak_gib"]}
    if stats is not None:
        figures |= {"tokens": stats["tokens"], "seconds": stats["seconds"], "peak_gib": stats["peak_gib"],
                    "tokens_per_second": stats["tokens_per_second"], "losses": stats["losses"],
                    "prepared_seconds": stats.get("prepared_seconds", 0.0),
                    "recomputed_above": stats.get("recomputed_above")}  # fmt: skip
    return row | figures


def main(config):
    """Measure all combinations; every row is printed and written when it is there."""
    device, rows, begin = pick_device(config.device), [], time.perf_counter()
    free = free_gib(device)
    for bits, checkpointing in itertools.product(config.bits, config.gradient_checkpointing):
        model, tokenizer, weights_gib = load_with_lora(config, bits, checkpointing, device)
        fmt_opts, texts = make_texts(config, tokenizer)
        print(f"{bits} bits ready after {time.perf_counter() - begin:.0f} s", flush=True)
        kinds = itertools.product(config.packing, config.cuda_graphs, config.batch_sizes, config.optimizers)
        for packing, cuda_graphs, batch_size, optimizer in kinds:
            reset_lora(model, config.seed)
            ours = config.backend == "transformers"
            row = {"backend": config.backend, "bits": bits, "batch_size": batch_size, "packing": packing and ours,
                   "cuda_graphs": cuda_graphs and packing and ours, "gradient_checkpointing": checkpointing,
                   "optimizer": optimizer, "weights_gib": weights_gib}  # fmt: skip
            rows.append(measure_row(config, (model, tokenizer), fmt_opts, texts, row))
            print(json.dumps(rows[-1]), flush=True)
            if config.output:
                settings = json.loads(json.dumps({**asdict(config), "output": None}, default=str))
                write_json(config.output, {"config": settings, "commit": current_commit(), "hardware": hardware(),
                                           "free_gib": free, "rows": rows}, indent=1)  # fmt: skip
        del model
        gc.collect()


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
