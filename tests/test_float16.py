"""float16 in place of bf16, on GPUs that have only that (T4, V100)."""

import json
import math

import pytest
import torch

import model_tools
from arc_loader import ArcDataset
from inference_tools import score_replies
from run_tools import PUBLISHED_FORMAT
from training_tools import TrainingSettings, train_lora


@pytest.mark.parametrize(("kind", "bf16", "expected"), [
    ("cpu", False, torch.bfloat16), ("cuda", True, torch.bfloat16), ("cuda", False, torch.float16)])  # fmt: skip
def test_the_16_bits_are_those_that_the_device_computes_in(monkeypatch, kind, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16)
    assert model_tools._half_dtype(torch.device(kind)) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("bits", [16, 4])
def test_float16_on_a_gpu_without_bf16(folders, tmp_path, monkeypatch, bits):
    """Train and search as on a T4, in float16: the losses are finite, the scores those of fp32 within rounding."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    model, tokenizer = model_tools.load_model(folders / "nf4", bits=bits, device="cuda")
    assert model.dtype == torch.float16
    fmt_opts = {**PUBLISHED_FORMAT, "reply_end": "\n" + tokenizer.eos_token, "max_tokens": None}
    pairs = [{"input": [[a, b]], "output": [[b]]} for a, b in ((1, 2), (3, 4), (5, 6))]
    tasks = ArcDataset({"last": {"train": pairs, "test": [{"input": [[7, 8]]}]}}, is_orig=True)
    texts = tasks.remove_test_data().repeat(20).augment(perm=True, seed=0).as_list(len_name="text", **fmt_opts)
    lora = model_tools.create_lora(model, r=8, alpha=8)
    settings = TrainingSettings(batch_size=4, gradient_accumulation=1, learning_rate=1e-3, embedding_learning_rate=1e-3,
                                mask_first_n_examples=0, gradient_checkpointing=bits == 4)  # fmt: skip
    train_lora(lora, tokenizer, texts, fmt_opts, settings, tmp_path)
    losses = [entry["loss"] for entry in json.loads((tmp_path / "training_loss.json").read_text())]
    assert losses[-1] < losses[0] and all(map(math.isfinite, losses))
    prompt, replies = tasks.as_list(len_name="input", **fmt_opts)[0]["input"], ["8\n" + tokenizer.eos_token]
    [half] = score_replies([(prompt, reply) for reply in replies], (lora.eval(), tokenizer))
    exact = model_tools.merge_peft_into_base(lora).float()
    [full] = score_replies([(prompt, reply) for reply in replies], (exact, tokenizer))
    assert half == pytest.approx(full, abs=0.1)
