"""Models of the published shapes with random weights, for benchmarks where no model hub can be reached.

    python benchmarks/random_models.py --shape llama-3b --output /tmp/Llama-random    # a base model for fine-tuning

Written as a folder it is what a fine-tuning script takes as ``--base-model``: full vocabulary, of which only the
single characters and the special tokens have a meaning, and weights in bf16.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import bitsandbytes
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "training_code"))

from run_tools import folder_written_whole  # noqa: E402

Shape = Literal["llama-3b", "nemo-8b", "tiny"]
VOCABULARY = 77  # of the published checkpoints, after shrinking
SHAPES = {
    "llama-3b": LlamaConfig(  # Llama-3.2-3B
        vocab_size=128256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, tie_word_embeddings=True,
        rms_norm_eps=1e-5, rope_parameters={
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}),  # fmt: skip
    "nemo-8b": MistralConfig(  # Mistral-NeMo-Minitron-8B
        vocab_size=131072, hidden_size=4096, intermediate_size=11520, num_hidden_layers=40, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=131072, sliding_window=None,
        tie_word_embeddings=False, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),  # fmt: skip
    "tiny": LlamaConfig(  # to try the scripts on a CPU
        vocab_size=512, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=131072),  # fmt: skip
}
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"]


@dataclass(frozen=True)
class Config:
    """What to write."""

    shape: Shape
    output: Path  # folder
    seed: int = 0


def random_model(shape, bits, device, vocabulary=VOCABULARY):
    """Make a model with random weights in evaluation mode, with a vocabulary that is shrunk already.

    Args:
        bits: 16 (bf16) or 4 (NF4).
    """
    config = SHAPES[shape].__class__(**{**SHAPES[shape].to_dict(), "vocab_size": vocabulary,
                                        "tie_word_embeddings": False})  # fmt: skip
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    if bits == 4:
        for parent in list(model.model.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, torch.nn.Linear):
                    setattr(parent, name, in_four_bits(layer))
    return model


def in_four_bits(layer):
    """Return a linear layer in NF4 with double quantisation."""
    new = bitsandbytes.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                                     compute_dtype=torch.bfloat16, compress_statistics=True)  # fmt: skip
    weight = layer.weight.data
    new.weight = bitsandbytes.nn.Params4bit(weight.cpu(), requires_grad=False, quant_type="nf4",
                                            compress_statistics=True)  # fmt: skip
    return new.to(weight.device)


def full_tokenizer(size):
    """Make a byte-level tokenizer with ``size`` tokens, most of which no text contains."""
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    begin = SPECIAL[0]
    core.post_processor = processors.TemplateProcessing(f"{begin} $A", special_tokens=[(begin, tokens.index(begin))])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=begin, eos_token=SPECIAL[1], pad_token=SPECIAL[2],
                                   clean_up_tokenization_spaces=False)  # fmt: skip


def write_base(config):
    """Write a base model with its full vocabulary."""
    shape, tokenizer = SHAPES[config.shape], full_tokenizer(SHAPES[config.shape].vocab_size)
    shape.bos_token_id, shape.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    torch.manual_seed(config.seed)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with folder_written_whole(config.output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


if __name__ == "__main__":
    write_base(tyro.cli(Config, description=__doc__))
