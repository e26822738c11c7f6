"""Tests of model_tools: the identity of models, and positions."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

import model_tools
from small_models import logits_of, small_mini


def test_identity_changes_with_every_weight(tiny_llama):
    model, _ = tiny_llama
    identity = model_tools.model_identity(model)
    assert identity == model_tools.model_identity(model)
    generator = np.random.default_rng(0)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        place = int(generator.integers(flat.numel()))
        old = flat[place].clone()
        flat[place] = torch.nextafter(old, torch.tensor(torch.inf))
        assert model_tools.model_identity(model) != identity
        flat[place] = old
        swapped = flat[[place, place - 1]].clone()
        if swapped[0] != swapped[1]:
            flat[[place - 1, place]] = swapped
            assert model_tools.model_identity(model) != identity
            flat[[place, place - 1]] = swapped
    assert model_tools.model_identity(model) == identity
    assert model_tools.model_identity(model.to(torch.bfloat16)) != identity


def test_identity_covers_the_fields_of_the_configuration_that_decide_answers(tiny_llama, tmp_path):
    model, tokenizer = tiny_llama
    identity = model_tools.model_identity(model)
    config = copy.deepcopy(model.config)
    config.rope_parameters["rope_theta"] = 12345.0
    other = type(model)(config)
    other.load_state_dict(model.state_dict())
    assert not torch.allclose(logits_of(other, [5, 6, 7]), logits_of(model, [5, 6, 7]), atol=1e-3)
    changed = model_tools.model_identity(other)
    assert changed != identity
    model_tools.save_model_and_tokenizer(tmp_path, other, tokenizer)
    assert model_tools.model_identity(model_tools.load_model(tmp_path, bits=32, device="cpu")[0]) == changed
    for name, value in [("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("sliding_window", 7)]:
        fields = copy.deepcopy(model.config)
        setattr(fields, name, value)
        model.config, kept = fields, model.config
        assert model_tools.model_identity(model) != identity, name
        model.config = kept
    model.config.update({"use_cache": False, "eos_token_id": 3, "bos_token_id": None, "name_or_path": "elsewhere",
                         "transformers_version": "4.44.2", "dtype": "float32", "architectures": ["X"],
                         "unsloth_version": "1", "tie_word_embeddings": True})  # fmt: skip
    assert model_tools.model_identity(model) == identity


def test_identity_of_mini_covers_the_tokens_that_its_positions_count():
    model, _ = small_mini()
    identities = {model_tools.model_identity(model)}
    for name, value in [("bos_token_id", 5), ("marker_token_ids", [14, 13]), ("rotary_bases", [1000.0, 100.0, 99.0])]:
        kept = getattr(model.config, name)
        setattr(model.config, name, value)
        identities.add(model_tools.model_identity(model))
        setattr(model.config, name, kept)
    assert len(identities) == 4 and model_tools.model_identity(model) in identities


def test_identity_covers_four_bit_weights_and_adapters(folders):
    model, _ = model_tools.load_model(folders / "nf4", bits=4, device="cpu")
    identity = model_tools.model_identity(model)
    logits_of(model, [1, 2, 3])
    assert model_tools.model_identity(model) == identity  # answering changes nothing
    state = model.model.layers[1].mlp.up_proj.weight.quant_state
    for tensor in (state.absmax, state.state2.absmax, state.code, model.model.layers[0].mlp.up_proj.weight.data):
        old = tensor.view(-1)[-1].clone()
        tensor.view(-1)[-1] = old + 1
        assert model_tools.model_identity(model) != identity
        tensor.view(-1)[-1] = old
    assert model_tools.model_identity(model) == identity
    identities = {identity}
    for alpha in (4, 8):
        model, _ = model_tools.load_model(folders / "nf4", bits=4, device="cpu")
        identities.add(model_tools.model_identity(model_tools.create_lora(model, r=4, alpha=alpha)))
    assert len(identities) == 3


def test_identity_is_the_same_in_another_process(folders):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\nimport model_tools\n"
        "for name in ('nf4', 'tied'):\n"
        "    print(model_tools.model_identity(model_tools.load_model(f'{sys.argv[2]}/{name}', 4, device='cpu')[0]))"
    )
    folder = str(Path(model_tools.__file__).parent)
    out = subprocess.run([sys.executable, "-c", code, folder, str(folders)], capture_output=True, text=True, check=True)
    expected = [
        model_tools.model_identity(model_tools.load_model(folders / name, bits=4, device="cpu")[0])
        for name in ("nf4", "tied")
    ]
    assert out.stdout.split() == expected


def test_identity_of_long_tensors(monkeypatch):
    model = torch.nn.Linear(64, 65)
    whole = model_tools.model_identity(model)
    monkeypatch.setattr(model_tools, "_CHUNK", 1024)
    identity = model_tools.model_identity(model)
    assert identity != whole  # several chunks
    first, last = model.weight.data.view(-1)[:1024].clone(), model.weight.data.view(-1)[1024:2048].clone()
    model.weight.data.view(-1)[:1024], model.weight.data.view(-1)[1024:2048] = last, first
    assert model_tools.model_identity(model) != identity


def test_positions_count_tokens(tiny_llama):
    ids = torch.zeros(2, 5, dtype=torch.long)
    assert model_tools.position_ids(tiny_llama[0], ids).tolist() == [[0, 1, 2, 3, 4]] * 2
