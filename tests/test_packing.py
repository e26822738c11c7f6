"""Packed batches and fast layers: losses and gradients of the padded batches and of transformers' and peft's layers."""

import numpy as np
import pytest
import torch

import lora_layers
from lora_layers import Groups, fast_layers, inference_layers, is_plain_lora
from mini_model import MiniSize, make_model
from model_tools import create_lora, load_model
from packing import NO_LABEL, VARLEN, can_pack, pack, packed_attention, position_ids_of, varlen_possible
from small_models import small_pair

LENGTHS = (17, 33, 1, 9)


def make_lora(kind, folders=None):
    """Return a small model with an adapter that changes its answers."""
    if kind == "NF4":
        model = load_model(folders / "nf4", bits=4, device="cpu")[0]
    else:
        model = make_model(MiniSize(2, 64, 2, 96), seed=1) if kind == "Mini" else small_pair()[0]
    model = create_lora(model, r=4, alpha=8)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.train()


def make_texts(model, seed=0, beginning=1):
    """Return (tokens, labels) of random texts that begin with Mini's start token; a part of the tokens are labels."""
    rng, texts = np.random.default_rng(seed), []
    for length in LENGTHS:
        ids = rng.integers(3, model.config.vocab_size, length)
        ids[0] = beginning
        texts.append((ids, np.where(rng.random(length) < 0.5, ids, NO_LABEL)))
    return texts


def gradients(model):
    found = {name: parameter.grad.float().cpu().clone() for name, parameter in model.named_parameters()
             if parameter.grad is not None}  # fmt: skip
    model.zero_grad()
    return found


def one_by_one(model, texts):
    """Return (loss, gradients) of texts that go through a model alone, on its own layers."""
    n_labels, total = sum((labels[1:] != NO_LABEL).sum() for _, labels in texts), 0.0
    for ids, labels in texts:
        if len(ids) > 1:
            batch = {"input_ids": torch.from_numpy(ids)[None], "labels": torch.from_numpy(labels)[None]}
            loss = model(**{name: value.to(model.device) for name, value in batch.items()}, use_cache=False,
                         num_items_in_batch=torch.tensor(n_labels)).loss  # fmt: skip
            loss.backward()
            total += loss.item()
    return total, gradients(model)


def packed(model, texts, layers):
    """Return (loss, gradients) of the same texts in one packed batch, on fast layers or the model's own."""
    n_labels = sum((labels[1:] != NO_LABEL).sum() for _, labels in texts)
    batch = pack([(ids.copy(), labels.copy()) for ids, labels in texts], position_ids_of(model))
    batch = {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in batch.items()}
    with packed_attention(model), layers(model):
        loss = model(**batch, use_cache=False, num_items_in_batch=torch.tensor(n_labels)).loss
        loss.backward()
    return loss.item(), gradients(model)


class own_layers:  # noqa: N801
    def __init__(self, model):
        pass

    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


@pytest.mark.parametrize("layers", [own_layers, fast_layers])
@pytest.mark.parametrize("kind", ["Mini", "Llama", "NF4"])
def test_losses_and_gradients_are_those_of_single_texts(kind, layers, folders):
    model = make_lora(kind, folders).float()
    texts = make_texts(model)
    loss, expected = one_by_one(model, texts)
    packed_loss, found = packed(model, texts, layers)
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys() and len(found) >= 16
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=2e-5 * expected[name].abs().max().item())
    assert max(gradient.abs().max() for gradient in expected.values()) > 0.01


def logits_of(model, texts):
    with torch.no_grad():
        ids = [torch.from_numpy(ids)[None].to(model.device) for ids, _ in texts]
        return torch.cat([model(input_ids=own, use_cache=False).logits[0].float().cpu() for own in ids])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Mini", "Llama", "NF4"])
def test_inference_is_that_of_the_models_own_layers(kind, dtype, folders):
    model = make_lora(kind, folders).to(dtype).eval()
    texts = make_texts(model)
    expected = logits_of(model, texts)
    with model.disable_adapter():
        assert (logits_of(model, texts) - expected).abs().max() > 0.3
    with inference_layers(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 2 * (7 + 1 + 2) + 1
        found = logits_of(model, texts)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(logits_of(model, texts), expected), "its own layers again"


def test_inference_leaves_other_formulas_to_their_layers():
    model = make_lora("Llama").eval()
    layers = [module for module in model.modules() if is_plain_lora(module)]
    for layer in layers[::2]:
        layer.lora_B["default"].bias = torch.nn.Parameter(torch.ones(layer.out_features))
    mlp = next(module for module in model.modules() if hasattr(module, "gate_proj"))
    mlp.__class__ = type("FalconH1MLP", (type(mlp),), {})
    texts = make_texts(model)
    expected = logits_of(model, texts)
    with inference_layers(model):
        assert "forward" not in vars(mlp) and sum("forward" in vars(layer) for layer in layers) == len(layers) // 2
        torch.testing.assert_close(logits_of(model, texts), expected, rtol=0, atol=1e-5)


def test_inference_leaves_alone_what_computes_by_another_function_already():
    model = make_lora("Llama").eval()
    layer = next(module for module in model.modules() if hasattr(module, "gate_proj"))
    layer.forward = own = lambda x: x * 2
    with inference_layers(model):
        assert layer.forward is own
    assert layer.forward is own


def test_layers_are_the_models_own_afterwards():
    model = make_lora("Mini")
    before = [module.forward for module in model.modules()]
    attention = model.get_base_model().config._attn_implementation
    with pytest.raises(KeyError), packed_attention(model), fast_layers(model):
        assert sum("forward" in vars(module) for module in model.modules()) == 2 * (7 + 1 + 2) + 1
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert [module.forward for module in model.modules()] == before
    assert model.get_base_model().config._attn_implementation == attention


def test_a_packed_batch():
    texts = [(np.array([1, 5, 6]), np.array([1, NO_LABEL, 6])), (np.array([1, 7]), np.array([NO_LABEL, 7]))]
    batch = pack(texts, lambda ids: np.arange(len(ids)))
    assert batch["input_ids"].tolist() == [[1, 5, 6, 1, 7]]
    assert batch["labels"].tolist() == [[NO_LABEL, NO_LABEL, 6, NO_LABEL, 7]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5] and batch["max_length_q"] == 3


def test_what_cannot_be_packed():
    model, _ = small_pair()
    assert can_pack(model, 10**6)
    model.config.sliding_window = 50  # of a model whose layers all have it
    model.config.layer_types = ["sliding_attention"] * model.config.num_hidden_layers
    assert can_pack(model, 50) and not can_pack(model, 51)
    with pytest.raises(ValueError, match="borders"), packed_attention(model):
        model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    batch = pack([(np.array([1, 2, 3]), np.array([1, 2, 3]))], position_ids_of(model))
    with pytest.raises(ValueError, match="has 3 tokens, the longest should have 2"), packed_attention(model):
        model(**batch | {"max_length_q": 2}, use_cache=False)


@pytest.mark.parametrize("capability", [9, 10])
def test_an_adapter_without_rows_has_no_gradient(monkeypatch, capability):
    """GPUs after Hopper leave anything where a group has no rows."""
    x, y = torch.randn(16, 3), torch.randn(16, 5)
    groups = Groups(torch.tensor([0, 8, 8, 16], dtype=torch.int32))
    expected = groups.products(x, y)

    def grouped_mm(columns, rows, offs):
        products = Groups(offs).products(columns.T, rows)
        return torch.where(products == 0, torch.nan, products) if capability > 9 else products

    works = iter([True] + [False] * 10)
    monkeypatch.setattr(lora_layers, "grouped_product_works", lambda device, dtype: next(works))
    monkeypatch.setattr(lora_layers.F, "grouped_mm", grouped_mm)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (capability, 0))
    assert torch.equal(groups.products(x, y), expected) and not expected[[0, 2]].any() and expected[[1, 3]].all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(("kind", "dtype"), [("Mini", torch.float32), ("Llama", torch.bfloat16), ("NF4", None)])
def test_on_a_gpu(kind, dtype, folders):
    """fp32 as exactly as on the CPU; bf16 and NF4, by variable-length attention and the GPU's kernels, about so."""
    assert VARLEN is not None
    if kind == "NF4":
        model = create_lora(load_model(folders / "nf4", bits=4, device="cuda")[0], r=4, alpha=8).train()
    else:
        model = make_lora(kind).cuda()
        for name, parameter in model.named_parameters():
            if "lora_" not in name and "modules_to_save" not in name:
                parameter.data = parameter.data.to(dtype)
    exact, texts = dtype == torch.float32, make_texts(model)
    with torch.autocast("cuda", torch.bfloat16, enabled=not exact):
        loss, expected = one_by_one(model, texts)
        packed_loss, found = packed(model, texts, fast_layers)
    assert packed_loss == pytest.approx(loss, rel=1e-4 if exact else 1e-2)
    for name, gradient in expected.items():
        difference = (found[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert difference < (1e-3 if exact else 0.1), name


@pytest.mark.parametrize(("dtype", "capability", "expected"), [
    (torch.bfloat16, (9, 0), True), (torch.float16, (8, 0), True), (torch.float16, (7, 5), False),
    (torch.float32, (9, 0), False)])  # fmt: skip
def test_variable_length_attention_is_for_16_bits_from_ampere_on(monkeypatch, dtype, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("packing.VARLEN", (None, {}))
    assert varlen_possible(torch.device("cuda"), dtype) == expected
    assert not varlen_possible(torch.device("cpu"), dtype)
