"""Tests of model_tools: loading, 4 bits, adapters and merging."""

import builtins
import importlib.metadata
import json
import shutil

import huggingface_hub
import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import adapter_tools
import mini_model
import model_tools
import unsloth_backend
from small_models import FORMAT_TEXT, ids_of, logits_of


# ------------------------------------------------------------------------------------------------ loading


def test_bits(folders):
    plain, tokenizer = model_tools.load_model(folders / "untied", bits=32, device="cpu")
    half, _ = model_tools.load_model(folders / "untied", bits=16, device="cpu")
    four, _ = model_tools.load_model(folders / "untied", bits=4, device="cpu")
    assert plain.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert not plain.training and tokenizer.padding_side == "right"
    assert len(model_tools.four_bit_layers(four)) == 14 and four.lm_head.weight.dtype == torch.float32

    stored_as_four, _ = model_tools.load_model(folders / "nf4", bits=4, device="cpu")
    unpacked, _ = model_tools.load_model(folders / "nf4", bits=32, device="cpu")
    unpacked_half, _ = model_tools.load_model(folders / "nf4", bits=16, device="cpu")
    ids = ids_of(tokenizer)
    torch.testing.assert_close(logits_of(stored_as_four, ids), logits_of(four, ids), atol=0, rtol=0)
    torch.testing.assert_close(logits_of(unpacked, ids), logits_of(four, ids), atol=1e-4, rtol=1e-4)
    for name, parameter in unpacked.named_parameters():
        assert torch.equal(unpacked_half.get_parameter(name), parameter.bfloat16())
    assert not torch.allclose(logits_of(four, ids), logits_of(plain, ids), atol=1e-2)
    assert model_tools.four_bit_layers(unpacked) == {} and not hasattr(unpacked.config, "quantization_config")


def test_unpacked_model_can_be_saved(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "nf4", bits=32, device="cpu")
    model_tools.save_model_and_tokenizer(tmp_path / "unpacked", model, tokenizer)
    again, _ = model_tools.load_model(tmp_path / "unpacked", bits=32, device="cpu")
    assert model_tools.model_identity(again) == model_tools.model_identity(model)


def make_quirky(folder, source):
    """Write the files of ``source`` the way the published checkpoints have them."""
    model, tokenizer = model_tools.load_model(source, bits=4, device="cpu")
    model_tools.save_model_and_tokenizer(folder, model, tokenizer)
    eos = [None, None, tokenizer.eos_token_id]
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config.update(
        eos_token_id=eos, torch_dtype="float32", transformers_version="4.44.2", unsloth_version="2024.10.3",
        rope_theta=rope["rope_theta"], pretraining_tp=1, _name_or_path="working/model_merged", tie_word_embeddings=True,
        rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                      "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    )  # fmt: skip
    config.pop("dtype")
    config["quantization_config"]["llm_int8_skip_modules"] = None
    config["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    generation = {"bos_token_id": tokenizer.bos_token_id, "do_sample": True, "eos_token_id": eos, "temperature": 0.6,
                  "max_length": 131072, "pad_token_id": tokenizer.pad_token_id, "top_p": 0.9}  # fmt: skip
    (folder / "generation_config.json").write_text(json.dumps(generation))
    names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token, "pad_token": tokenizer.pad_token}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {t: {"content": t, **flags, "special": True} for t in names.values()}
    decoder = {str(tokenizer.convert_tokens_to_ids(t)): entry for t, entry in added.items()}
    settings = {**names, "added_tokens_decoder": decoder, "clean_up_tokenization_spaces": True, "padding_side": "left",
                "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    special = {role: {"content": t, **flags} for role, t in names.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))


@pytest.mark.parametrize("bits", [4, 16, 32])
def test_published_quirks_load(folders, tmp_path, bits):
    make_quirky(tmp_path / "quirky", folders / "tied")
    before = {file: file.read_bytes() for file in (tmp_path / "quirky").iterdir()}
    model, tokenizer = model_tools.load_model(tmp_path / "quirky", bits=bits, device="cpu")
    assert model.config.vocab_size == len(tokenizer) == 77
    assert model.config.eos_token_id == model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert tokenizer.padding_side == "right"
    assert tokenizer.decode(ids_of(tokenizer), skip_special_tokens=True) == FORMAT_TEXT
    assert torch.isfinite(logits_of(model, ids_of(tokenizer))).all()
    model_tools.save_model_and_tokenizer(tmp_path / "again", model, tokenizer)
    assert "null" not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text())["eos_token_id"])
    again, _ = model_tools.load_model(tmp_path / "again", bits=bits, device="cpu")
    assert model_tools.model_identity(again) == model_tools.model_identity(model)
    assert before == {file: file.read_bytes() for file in (tmp_path / "quirky").iterdir()}


def test_head_stored_in_spite_of_a_tied_configuration(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "untied", bits=32, device="cpu")
    model_tools.save_model_and_tokenizer(tmp_path / "m", model, tokenizer)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": True}))
    loaded, _ = model_tools.load_model(tmp_path / "m", bits=32, device="cpu")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight) and not loaded.config.tie_word_embeddings


def test_padding_token_is_always_defined(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "untied", bits=32, device="cpu")
    cases = (("by config", tokenizer.eos_token, tokenizer.eos_token_id), ("by name", tokenizer.pad_token, None))
    for name, pad, role in cases:
        tokenizer.pad_token = None
        tokenizer.init_kwargs.pop("pad_token", None)
        model.config.pad_token_id = role
        model_tools.save_model_and_tokenizer(tmp_path / name, model, tokenizer)
        loaded, loaded_tokenizer = model_tools.load_model(tmp_path / name, bits=32, device="cpu")
        assert loaded_tokenizer.pad_token == pad
        assert loaded.config.pad_token_id == loaded_tokenizer.pad_token_id


def test_an_end_token_that_pads_is_trained_too(folders, tmp_path):
    shutil.copytree(folders / "untied", tmp_path / "model")
    end = model_tools.load_tokenizer(tmp_path / "model").eos_token_id
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"pad_token_id": end}))
    model, tokenizer = model_tools.load_model(tmp_path / "model", bits=32, device="cpu")
    model_tools.keep_single_char_tokens(model, tokenizer)
    lora = model_tools.create_lora(model, r=2, alpha=2)
    ids = torch.tensor([[tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.eos_token_id]])
    lora(input_ids=ids, labels=ids).loss.backward()
    [gradient] = [parameter.grad for name, parameter in lora.named_parameters()
                  if "embed_tokens" in name and parameter.requires_grad]  # fmt: skip
    assert gradient[tokenizer.eos_token_id].abs().max() > 0


def test_errors_of_loading(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="pretrained_models/Mistral-NeMo-Minitron-8B-Base"):
        model_tools.load_model("nvidia/Mistral-NeMo-Minitron-8B-Base")
    with pytest.raises(FileNotFoundError, match="not a folder"):
        model_tools.load_model(tmp_path / "missing" / "model")
    with pytest.raises(FileNotFoundError, match="no config.json"):
        model_tools.load_model(tmp_path)
    with pytest.raises(ValueError, match="bits=8"):
        model_tools.load_model(folders / "untied", bits=8)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}')
    with pytest.raises(ValueError, match="gptq"):
        model_tools.load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ValueError, match="nothing"):
        model_tools.load_model(tmp_path)


def test_without_unsloth(folders, monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "unsloth":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="requirements-unsloth.txt"):
        model_tools.load_unsloth_4bit(folders / "untied")
    with pytest.raises(ValueError, match="in 4 or 16 bits"):
        model_tools.load_model(folders / "untied", bits=32, backend="unsloth")


def test_versions_that_unsloth_does_not_support_are_named_before_anything_is_loaded(folders, monkeypatch):
    versions = {"unsloth": "2026.10.7", "unsloth_zoo": "2026.10.9", "transformers": "5.17.0", "trl": "1.14.2"}
    needs = {"unsloth": ["transformers!=5.0.0,<=5.17.0", "trl<=1.15.0", "torchao>=1", "packaging<1",
                         'datasets<1; extra == "old"'],
             "unsloth_zoo": None}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(unsloth_backend.importlib.metadata, "version", version)
    monkeypatch.setattr(unsloth_backend.importlib.metadata, "requires", needs.get)
    assert unsloth_backend.version_conflicts() == []
    versions |= {"transformers": "5.18.1", "trl": "1.16.0"}
    with pytest.raises(ImportError) as caught:
        model_tools.load_model(folders / "untied", bits=4, backend="unsloth")
    message = str(caught.value)
    assert "unsloth 2026.10.7 supports transformers !=5.0.0,<=5.17.0, but 5.18.1 is installed" in message
    assert "trl <=1.15.0, but 1.16.0" in message and "requirements-unsloth.txt" in message and "\n" not in message
    del versions["unsloth"], versions["unsloth_zoo"]
    assert unsloth_backend.version_conflicts() == []


def test_sentencepiece_file_is_removed(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "untied", bits=32, device="cpu")
    (tmp_path / "tokenizer.model").write_text("old")
    model_tools.save_model_and_tokenizer(tmp_path, model, tokenizer)
    assert not (tmp_path / "tokenizer.model").exists()


# ------------------------------------------------------------------------------------------------ adapters


def train(model, ids, steps=3, device="cpu"):
    """Change all trainable weights by a few optimiser steps on one text."""
    ids = torch.tensor(ids, device=device)[None]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def assert_same_answers(logits, expected, bits):
    """Compare logits (T, V): to fp32's rounding, or, for bf16, to a few per cent of their spread."""
    if bits == 16:
        assert (logits - expected).square().mean().sqrt() < 0.03 * expected.std()
    else:
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bits", [32, 16, 4])
@pytest.mark.parametrize("kind", ["untied", "tied", "nf4"])
def test_train_save_reload_merge(folders, tmp_path, kind, bits):
    model, tokenizer = model_tools.load_model(folders / kind, bits=bits, device="cpu")
    ids = ids_of(tokenizer)
    before = logits_of(model, ids)
    model = model_tools.create_lora(model, r=8, alpha=8)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == {
        "base_model.model.model.embed_tokens.modules_to_save.default.weight",
        "base_model.model.lm_head.modules_to_save.default.weight",
    }
    assert_same_answers(logits_of(model, ids), before, bits)  # nothing trained yet
    trained = logits_of(train(model, ids), ids)
    assert not torch.allclose(trained, before, atol=0.5)
    with model.disable_adapter():
        assert_same_answers(logits_of(model, ids), before, bits)
    model_tools.save_model_and_tokenizer(tmp_path / "lora", model, tokenizer)

    again, _ = model_tools.load_model(folders / kind, bits=bits, device="cpu")
    again = model_tools.create_lora(again, r=8, alpha=8, seed=1)
    model_tools.load_peft_state(again, tmp_path / "lora")
    assert model_tools.model_identity(again) == model_tools.model_identity(model)
    torch.testing.assert_close(logits_of(again, ids), trained, atol=0, rtol=0)

    layer = again.get_base_model().model.layers[1].mlp.up_proj
    added = layer.get_delta_weight("default")
    sum_of_both = None if bits == 4 else layer.get_base_layer().weight.float() + added
    merged = model_tools.merge_peft_into_base(again)
    if bits != 4:
        assert added.abs().max() > 0.01
        torch.testing.assert_close(merged.model.layers[1].mlp.up_proj.weight, sum_of_both.to(merged.dtype))
    assert not model_tools.is_peft_model(merged) and not model_tools.four_bit_layers(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16 if bits == 16 else torch.float32}
    assert not merged.config.tie_word_embeddings and not any("lora" in n for n, _ in merged.named_modules())
    assert_same_answers(logits_of(merged, ids), trained, bits)
    model_tools.save_model_and_tokenizer(tmp_path / "merged", merged, tokenizer)
    loaded, _ = model_tools.load_model(tmp_path / "merged", bits=16 if bits == 16 else 32, device="cpu")
    assert not torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
    assert model_tools.model_identity(loaded) == model_tools.model_identity(merged)


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")])])  # fmt: skip
def test_unpacked_copies_answer_as_the_packed_weights(folders, adapter, device):
    model, tokenizer = model_tools.load_model(folders / "nf4", bits=4, device=device)
    ids = torch.tensor(ids_of(tokenizer), device=device)
    if adapter:
        model = train(model_tools.create_lora(model, r=8, alpha=8), ids.tolist(), device=device).eval()
    packed, expected = model_tools.four_bit_layers(model), logits_of(model, ids)
    with pytest.raises(KeyError), adapter_tools.plain_weights(model):
        assert not model_tools.four_bit_layers(model)
        assert_same_answers(logits_of(model, ids), expected, bits=32 if device == "cpu" else 16)
        raise KeyError("errors bring the packed weights back too")
    assert model_tools.four_bit_layers(model) == packed
    torch.testing.assert_close(logits_of(model, ids), expected, atol=0, rtol=0)


def test_merge_into_four_bits_equals_merge_into_the_unpacked_model(folders, tmp_path):
    merged = {}
    for bits in (4, 32):
        model, tokenizer = model_tools.load_model(folders / "nf4", bits=bits, device="cpu")
        model = model_tools.create_lora(model, r=8, alpha=8)
        if bits == 4:
            model_tools.save_model_and_tokenizer(tmp_path / "lora", train(model, ids_of(tokenizer)), tokenizer)
        else:
            model_tools.load_peft_state(model, tmp_path / "lora")
        merged[bits] = model_tools.merge_peft_into_base(model)
    for name, parameter in merged[32].named_parameters():
        torch.testing.assert_close(merged[4].get_parameter(name), parameter, atol=1e-6, rtol=1e-5)


def test_tied_model_stays_tied_without_trained_embeddings(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "tied", bits=32, device="cpu")
    model = model_tools.create_lora(model, r=4, alpha=4, train_embeddings=False)
    train(model, ids_of(tokenizer))
    expected = logits_of(model, ids_of(tokenizer))
    merged = model_tools.merge_peft_into_base(model)
    model_tools.save_model_and_tokenizer(tmp_path, merged, tokenizer)
    loaded, _ = model_tools.load_model(tmp_path, bits=32, device="cpu")
    assert loaded.config.tie_word_embeddings and loaded.lm_head.weight is loaded.model.embed_tokens.weight
    torch.testing.assert_close(logits_of(loaded, ids_of(tokenizer)), expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_from_elsewhere_is_saved_as_peft_saves_that_of_a_model(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "tied", bits=32, device="cpu")
    model = train(model_tools.create_lora(model, r=4, alpha=4), ids_of(tokenizer))
    state = {name: tensor.clone() for name, tensor in
             get_peft_model_state_dict(model, save_embedding_layers=False).items()}  # fmt: skip
    model_tools.save_model_and_tokenizer(tmp_path / "expected", model, tokenizer)
    (tmp_path / "found").mkdir()
    model_tools.reset_lora(model, 0)
    adapter_tools.save_adapter(tmp_path / "found", model, state)
    expected, found = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("expected", "found"))
    assert expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("expected", "found")]
    assert configs[0] == configs[1] and not model.active_peft_config.inference_mode


def test_saved_adapter_loads_with_plain_peft(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "tied", bits=32, device="cpu")
    model = train(model_tools.create_lora(model, r=4, alpha=4), ids_of(tokenizer))
    model_tools.save_model_and_tokenizer(tmp_path, model, tokenizer)
    other = PeftModel.from_pretrained(model_tools.load_model(folders / "tied", bits=32, device="cpu")[0], tmp_path)
    ids = ids_of(tokenizer)
    torch.testing.assert_close(logits_of(other.eval(), ids), logits_of(model, ids), atol=1e-5, rtol=1e-5)


def test_embeddings_among_target_modules_are_trained_in_full(tiny_llama):
    names = [*model_tools.LORA_LAYERS, "embed_tokens", "lm_head"]
    model = model_tools.create_lora(tiny_llama[0], r=4, alpha=4, target_modules=names, train_embeddings=False)
    trained = {n.split(".")[-4] for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {"embed_tokens", "lm_head"}
    with pytest.raises(ValueError, match="already"):
        model_tools.create_lora(model, r=4, alpha=4)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_reset_lora(folders, bits):
    model, tokenizer = model_tools.load_model(folders / "tied", bits=bits, device="cpu")
    model = model_tools.create_lora(model, r=4, alpha=4, seed=7)
    start = {name: value.clone() for name, value in model.named_parameters()}
    identity = model_tools.model_identity(model)
    train(model, ids_of(tokenizer))
    assert model_tools.model_identity(model) != identity
    torch.manual_seed(123)
    model_tools.reset_lora(model, seed=7)
    assert model_tools.model_identity(model) == identity
    assert all(torch.equal(value, start[name]) for name, value in model.named_parameters())
    model_tools.reset_lora(model, seed=8)
    assert model_tools.model_identity(model) != identity


def test_create_lora_leaves_the_random_state_alone(tiny_llama):
    state = torch.get_rng_state()
    model_tools.create_lora(tiny_llama[0], r=4, alpha=4)
    assert torch.equal(torch.get_rng_state(), state)


def test_older_names_of_adapter_weights(folders, tmp_path):
    model, tokenizer = model_tools.load_model(folders / "untied", bits=32, device="cpu")
    model = train(model_tools.create_lora(model, r=4, alpha=4), ids_of(tokenizer))
    model_tools.save_model_and_tokenizer(tmp_path, model, tokenizer)
    file = tmp_path / "adapter_model.safetensors"
    plain = load_file(file)
    older = {}
    for name, value in plain.items():
        if "lora" in name:
            older[name.replace(".weight", ".default.weight")] = value
        else:
            older[name.replace(".weight", ".original_module.weight")] = torch.zeros_like(value)
            older[name.replace(".weight", ".modules_to_save.default.weight")] = value
    for extra in ({}, {name: value for name, value in plain.items() if "lora" not in name}):
        save_file({**{k: v.clone() for k, v in older.items()}, **{k: v.clone() for k, v in extra.items()}}, file)
        fixed = model_tools.get_and_fix_peft_weights(tmp_path)
        assert fixed.keys() == plain.keys()
        assert all(torch.equal(fixed[name], plain[name]) for name in plain)
    model_tools.reset_lora(model)
    model_tools.set_peft_weights(model, fixed)
    assert torch.equal(model.get_base_model().lm_head.weight, plain["base_model.model.lm_head.weight"])


def test_unfit_adapter_weights_are_named(tiny_llama):
    model = model_tools.create_lora(tiny_llama[0], r=4, alpha=4)
    weights = get_peft_model_state_dict(model)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    with pytest.raises(KeyError, match="1 missing: base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"):
        model_tools.set_peft_weights(model, {k: v for k, v in weights.items() if k != name})
    with pytest.raises(KeyError, match="1 unexpected: surplus"):
        model_tools.set_peft_weights(model, {**weights, "surplus": weights[name]})
    with pytest.raises(KeyError, match="of another shape.*up_proj"):
        model_tools.set_peft_weights(model, {**weights, name: weights[name][:2]})


def test_fix_dtypes(folders):
    model, _ = model_tools.load_model(folders / "untied", bits=16, device="cpu")
    model.model.embed_tokens.float()
    assert {p.dtype for p in model_tools.fix_dtypes(model).parameters()} == {torch.bfloat16}
    model, _ = model_tools.load_model(folders / "nf4", bits=4, device="cpu")
    layer = next(iter(model_tools.four_bit_layers(model).values()))
    layer.weight.quant_state.dtype = torch.float16
    model_tools.fix_dtypes(model)
    assert layer.weight.quant_state.dtype == torch.float32


def test_mini_is_a_model_like_others(tmp_path):
    tokenizer = mini_model.make_tokenizer()
    config = mini_model.MiniConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    model = mini_model.MiniForCausalLM(config)
    model_tools.save_model_and_tokenizer(tmp_path / "mini", model, tokenizer)
    ids = tokenizer("I12\n34\nO56\n</s>")["input_ids"]
    for bits in (4, 32):
        loaded, loaded_tokenizer = model_tools.load_model(tmp_path / "mini", bits=bits, device="cpu")
        assert isinstance(loaded, mini_model.MiniForCausalLM) and loaded_tokenizer.get_vocab() == tokenizer.get_vocab()
        lora = train(model_tools.create_lora(loaded, r=4, alpha=4), ids)
        places = model_tools.position_ids(lora, torch.tensor([ids]))
        assert torch.equal(places, model.get_position_ids(torch.tensor([ids])))
        expected = logits_of(lora, ids)
        merged = model_tools.merge_peft_into_base(lora)
        torch.testing.assert_close(logits_of(merged, ids), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bits", [32, 16, 4])
def test_on_a_gpu(folders, bits):
    model, tokenizer = model_tools.load_model(folders / "nf4", bits=bits, device="cuda")
    assert model.dtype == (torch.float32 if bits == 32 else torch.bfloat16)
    ids = torch.tensor(ids_of(tokenizer), device="cuda")
    if bits != 4:
        on_cpu, _ = model_tools.load_model(folders / "nf4", bits=bits, device="cpu")
        on_gpu = on_cpu.to("cuda")
        identity = model_tools.model_identity(on_gpu)
        assert identity == model_tools.model_identity(on_gpu.to("cpu"))
    lora = model_tools.create_lora(model, r=8, alpha=8)
    start = model_tools.model_identity(lora)
    trained = logits_of(train(lora, ids.tolist(), device="cuda"), ids)
    merged = model_tools.merge_peft_into_base(lora)
    assert_same_answers(logits_of(merged, ids), trained, bits=32 if bits == 32 else 16)
    again = model_tools.create_lora(model_tools.load_model(folders / "nf4", bits=bits, device="cuda")[0], r=8, alpha=8)
    assert model_tools.model_identity(again) == start
