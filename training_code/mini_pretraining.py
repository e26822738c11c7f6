"""Pre-training of Mini from nothing: the stream of training documents and the optimisation loop.

Terms: *document* = one task in one random view: some demonstration pairs and a query with its reply, as token ids;
*row* = several whole documents packed without padding, attention blocked per document; *source* = a set of tasks.
The loss is taken on replies only, the first reply of a document masked, as in the published fine-tuning.
"""

import math
import os
import tempfile
import textwrap
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import tyro
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import BitsAndBytesConfig

from arc_files import write_atomically, write_json
from mini_model import MiniForCausalLM, make_tokenizer
from run_tools import folder_written_whole, memory_advice

# RE-ARC is nearly endless but holds 400 tasks; the other sources hold few pairs of 800 more
SOURCE_WEIGHTS = {"re_arc": 0.55, "arc_training": 0.2, "arc2_training": 0.15, "concept_arc": 0.1}


@dataclass(frozen=True)
class PretrainingSettings:
    """Everything that decides the result of a pre-training run."""

    max_steps: int = 3400
    """optimiser steps"""
    batch_size: int = 16
    """packed rows in one step"""
    max_tokens: int = 8192
    """tokens of a packed row; also the longest document (pairs are left out until it fits)"""
    min_pairs: int = 2
    """fewest demonstration pairs of a document"""
    max_pairs: int = 6
    """most demonstration pairs of a document"""
    muon_learning_rate: float = 0.02
    """learning rate of the matrices inside the layers (Muon)"""
    adam_learning_rate: float = 1e-3
    """learning rate of embeddings, head and norms (AdamW)"""
    warmup_steps: int = 50
    """steps of linear warm-up"""
    decay_part: float = 0.4
    """part of the steps, at the end, with linearly falling learning rates"""
    quantised_part: float = 0.15
    """part of the steps, at the end, in which the forward pass sees the weights rounded to NF4 (as they are shipped)"""
    source_weights: tyro.conf.Fixed[dict] = field(default_factory=lambda: dict(SOURCE_WEIGHTS))
    """part of the documents from each source"""
    seed: int = 42
    """seed of the first weights and of the documents"""
    checkpoint_steps: int = 1000
    """steps between checkpoints; 0: only at the end"""


class FakeNF4(torch.nn.Module):
    """Round a weight to 4-bit NormalFloat blocks in the forward pass; gradients pass through unchanged.

    Source: QLoRA (arXiv 2305.14314), section 3, levels as in bitsandbytes; straight-through estimator.
    """

    def __init__(self, device, block=64):
        super().__init__()
        from bitsandbytes.functional import get_4bit_type

        self.levels = get_4bit_type("nf4", device=device).float()
        self.block = block

    def forward(self, weight):
        blocks = weight.detach().float().reshape(-1, self.block)
        scale = blocks.abs().amax(dim=1, keepdim=True).clamp(min=1e-12)
        middles = (self.levels[1:] + self.levels[:-1]) / 2
        rounded = self.levels[torch.bucketize(blocks / scale, middles)] * scale
        return weight + (rounded.view_as(weight) - weight).detach()


def matrices_of(model):
    """Return the linear layers of the decoder's layers, in order (what is stored in 4 bits)."""
    return [module for module in model.model.layers.modules() if isinstance(module, torch.nn.Linear)]


def make_optimizers(model, settings):
    """Make Muon for the matrices of the layers and AdamW for everything else."""
    matrices = [layer.weight for layer in matrices_of(model)]
    chosen = {id(weight) for weight in matrices}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=settings.muon_learning_rate),
        torch.optim.AdamW(rest, lr=settings.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(step, settings):
    """Return the factor on both learning rates: linear warm-up, flat, linear decay to zero."""
    decay = (settings.max_steps - step) / max(1, settings.max_steps * settings.decay_part)
    return min(1.0, (step + 1) / max(1, settings.warmup_steps), decay)


def attention_mask(document_ids, flexible):
    """Causal mask blocked per document: a BlockMask on the GPU, a boolean (B, 1, T, T) on the CPU."""
    if flexible:
        from torch.nn.attention.flex_attention import create_block_mask

        def visible(b, h, q, k):
            return (q >= k) & (document_ids[b, q] == document_ids[b, k])

        batch, size = document_ids.shape
        return create_block_mask(visible, batch, None, size, size, device=document_ids.device, _compile=True)
    same = document_ids[:, None, :, None] == document_ids[:, None, None, :]
    return same & torch.ones_like(same[0, 0]).tril()


class Pretrainer:
    """A pre-training run that can be stopped and started again.

    Args:
        model: a Mini in fp32 on its device; trained in place (bf16 autocast and compiled on a GPU).
        documents: a :class:`mini_documents.DocumentStream`, which also holds the settings.
        folder: where checkpoint.pt and history.json go.

    Raises:
        ValueError: the folder holds the checkpoint of another size, other settings or other data.
    """

    def __init__(self, model, documents, folder):
        self.model, self.settings, self.folder = model, documents.settings, Path(folder)
        self.on_gpu = model.device.type == "cuda"
        self.optimizers = make_optimizers(model, self.settings)
        self.step, self.tokens, self.seconds, self.history = 0, 0, 0.0, []
        self._identity = self._decides_the_result(documents)
        if self._checkpoint.exists():
            self._resume()
        workers = min(14, (os.cpu_count() or 2) - 1) if self.on_gpu else 0
        self.batches = iter(
            DataLoader(
                documents.starting_at(self.step), self.settings.batch_size, num_workers=workers,
                pin_memory=self.on_gpu,
            )
        )
        self._quantising = False
        model.set_attn_implementation("flex_attention" if self.on_gpu else "sdpa")
        self._forward = torch.compile(model.forward, dynamic=False) if self.on_gpu else model.forward

    @property
    def _checkpoint(self):
        return self.folder / "checkpoint.pt"

    def _decides_the_result(self, documents):
        """Return {name: value} of all that decides the weights: settings, size of the model, data."""
        size = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        identity = asdict(self.settings) | {name: getattr(self.model.config, name) for name in size}
        del identity["checkpoint_steps"]
        return identity | {"data": documents.digest()}

    def run(self, stop_after_minutes=None):
        """Train to the last step, or until the minutes of this start (None: no limit) are over; return whether done.

        Raises:
            RuntimeError: out of memory (says what to lower), or the loss is no number.
        """
        self.model.train()
        with memory_advice("pre-training", f"lower --batch-size or --max-tokens; delete {self.folder}, if there is a "
                           "checkpoint in it: it goes with the old values"):
            self._train(stop_after_minutes)
        return self.step >= self.settings.max_steps

    def _train(self, stop_after_minutes):
        begin = saved = time.monotonic()
        with tqdm(total=self.settings.max_steps, initial=self.step, desc="pre-training", mininterval=5) as bar:
            while self.step < self.settings.max_steps:
                loss = self._train_step()
                bar.update()
                if self.step % 20 == 0 or self.step == self.settings.max_steps:
                    value = loss.item()
                    if not math.isfinite(value):
                        raise RuntimeError(f"the loss is {value} at step {self.step}: lower the learning rates")
                    self.history.append({"step": self.step, "tokens": self.tokens, "loss": value})
                    bar.set_postfix(loss=f"{value:.4f}", tokens=f"{self.tokens / 1e6:.0f}M")
                late = stop_after_minutes is not None and time.monotonic() - begin > 60 * stop_after_minutes
                due = self.settings.checkpoint_steps and self.step % self.settings.checkpoint_steps == 0
                if late or due or self.step == self.settings.max_steps:
                    self.seconds += time.monotonic() - saved
                    saved = time.monotonic()
                    self.save()
                if late:
                    print(f"stopped after {self.step} of {self.settings.max_steps} steps: start again to go on")
                    break

    def _train_step(self):
        settings = self.settings
        if not self._quantising and self.step >= settings.max_steps * (1 - settings.quantised_part):
            for layer in matrices_of(self.model):
                torch.nn.utils.parametrize.register_parametrization(layer, "weight", FakeNF4(self.model.device))
            self._quantising = True
        batch = {name: x.to(self.model.device, non_blocking=True) for name, x in next(self.batches).items()}
        mask = attention_mask(batch["document_ids"], self.on_gpu)
        positions = self.model.get_position_ids(batch["input_ids"])
        with torch.autocast("cuda", torch.bfloat16, enabled=self.on_gpu):
            logits = self._forward(
                input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions, use_cache=False
            ).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), batch["labels"][:, 1:].flatten())
        loss.backward()
        factor = learning_rate_factor(self.step, settings)
        for optimizer, rate in zip(
            self.optimizers, (settings.muon_learning_rate, settings.adam_learning_rate), strict=True
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.tokens += batch["input_ids"].numel()
        return loss.detach()

    def weights(self):
        """Return the state dict under ordinary names (fp32, on the CPU), as the optimiser holds it."""
        state = {name: x.detach().cpu() for name, x in self.model.state_dict().items()}
        return {name.replace("parametrizations.weight.original", "weight"): x for name, x in state.items()}

    def save(self):
        """Write checkpoint.pt and history.json, each in one piece."""
        self.folder.mkdir(parents=True, exist_ok=True)
        state = {"weights": self.weights(), "optimizers": [x.state_dict() for x in self.optimizers]}
        state |= {"identity": self._identity}
        state |= {"step": self.step, "tokens": self.tokens, "seconds": self.seconds, "history": self.history}
        torch.save(state, self.folder / "checkpoint.tmp")
        os.replace(self.folder / "checkpoint.tmp", self._checkpoint)
        write_json(self.folder / "history.json", self.history)

    def summary(self):
        """Return what the record and the model card tell of the run, over all its starts."""
        losses = [entry["loss"] for entry in self.history[-10:]]
        return {
            "steps": self.step,
            "tokens": self.tokens,
            "loss": sum(losses) / max(1, len(losses)),
            "seconds": round(self.seconds, 1),
            "seed": self.settings.seed,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
        }

    def _resume(self):
        state = torch.load(self._checkpoint, map_location=self.model.device, weights_only=True)
        saved = state.get("identity", {})
        if different := [name for name in self._identity if saved.get(name) != self._identity[name]]:
            raise ValueError(f"{self._checkpoint} belongs to a run with other values ({', '.join(different)}): start "
                             "with the same ones, choose another --output-path, or delete the folder to start afresh")
        self.model.load_state_dict(state["weights"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.history = state["seconds"], state["history"]


def is_trained(path):
    """Tell whether a folder holds a stored model, and say so."""
    trained = (path / "model.safetensors").exists()
    if trained:
        print(f"{path} holds a trained model: nothing to do (delete the folder to train anew)")
    return trained


def save_mini(path, trainer, record):
    """Store trained weights as they are shipped: matrices of the layers in NF4, the rest in bf16; tokenizer; card.

    Args:
        path: folder to write, as a whole or not at all.
        trainer: the :class:`Pretrainer` that has finished.
        record: values of the run's record, for the card.
    """
    with tempfile.TemporaryDirectory() as folder:
        model = MiniForCausalLM(trainer.model.config)
        model.load_state_dict(trainer.weights())
        model.to(torch.bfloat16).save_pretrained(folder)
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"],
        )  # fmt: skip
        stored = MiniForCausalLM.from_pretrained(folder, quantization_config=quantisation, dtype=torch.bfloat16)
    with folder_written_whole(path) as folder:
        stored.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        write_atomically(folder / "README.md", model_card(trainer.summary(), trainer.settings, record).encode())
    print(f"Mini is in {path}")


def model_card(summary, settings, record):
    """Write the text of the model card.

    Args:
        summary: of :meth:`Pretrainer.summary`. record: values of the run's record (hardware and versions are read).
    """
    hardware, versions = record["hardware"], record["versions"]
    sources = ", ".join(f"{name} {part:.0%}" for name, part in settings.source_weights.items())
    facts = [
        f"Data: {sources} of the documents. No ARC-AGI-1 evaluation task was seen, its demonstration pairs neither, "
        "and of the ARC-AGI-2 training tasks only those that are not in ARC-AGI-1.",
        f"Training: {summary['tokens'] / 1e6:.0f} million tokens in {summary['steps']} steps, "
        f"{summary['seconds'] / 60:.1f} minutes on one {hardware['gpu'] or hardware['cpu']}, seed {settings.seed}; "
        f"mean loss of the last 200 steps {summary['loss']:.4f} nats per reply token. Muon and AdamW; torch "
        f"{versions['torch']}, transformers {versions['transformers']}.",
        f"Storage: the matrices of the layers in 4 bits (NF4; in the last {settings.quantised_part:.0%} of the steps "
        "the forward pass saw them so), the rest in bf16. On a CPU they are unpacked once to fp32.",
        "Prompt format: `mini_model.MINI_FORMAT`, 16 tokens; reply tokens map one to one to the published ones.",
        "Scores: in the tables of the project's README. Licence: Apache-2.0.",
    ]
    bullet = textwrap.TextWrapper(118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)
    lines = [bullet.fill(fact) for fact in facts]
    return f"""# Mini

A language model of {summary["parameters"] / 1e6:.1f} million parameters that solves ARC tasks, trained from nothing by
`training_code/run_finetuning_Mini.py`. Architecture: Llama with rotary positions that count grids, rows and columns
(`training_code/mini_model.py`). Load it with `AutoModelForCausalLM.from_pretrained` after `import mini_model`.

""" + "\n".join(lines) + "\n"
