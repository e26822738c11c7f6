"""Training by unsloth: handed to a process of its own, same data and losses as the default, errors that say what to do.

Without a GPU unsloth cannot even be imported; there a stand-in takes its place, which is transformers behind unsloth's
names, so both backends have to give the same adapter bit by bit.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import unsloth_backend
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora, load_model, save_base, save_model_and_tokenizer, model_identity
from test_training_tools import make_texts, trainable_weights
from training_tools import TrainingSettings, train_lora
from unsloth_training import train_by_unsloth

SETTINGS = TrainingSettings(batch_size=2, gradient_accumulation=2, learning_rate=1e-3, embedding_learning_rate=1e-4,
                            mask_first_n_examples=1, gradient_checkpointing=False, packing=False, warmup_ratio=0.1)
needs_unsloth = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU and unsloth")
STAND_IN = '''
import sys

if "transformers" in sys.modules:
    raise ImportError("unsloth comes first")
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, max_seq_length, dtype, load_in_4bit, local_files_only):
        print("noise")
        model = AutoModelForCausalLM.from_pretrained(model_name)
        model.add_model_tags(["unsloth"])
        model.max_seq_length = max_seq_length
        return model, None

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, ensure_weight_tying, **options):
        assert not ensure_weight_tying
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


class UnslothTrainingArguments(TrainingArguments):
    def __init__(self, dataset_kwargs, packing, max_length, loss_type, **options):
        assert dataset_kwargs == {"skip_prepare_dataset": True} and packing is False and max_length is None
        super().__init__(**options)


class UnslothTrainer(Trainer):
    def __init__(self, model, **options):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()  # as trl does with a 4-bit base
        super().__init__(model, **options)

    def compute_loss(self, *args, **kwargs):
        raise AssertionError("trl's loss needs logits")
'''


def make_pair(hidden_size=32, bits=32, device="cpu", folder=None, window=4096):
    """Return (tiny random Llama, tokenizer), by way of a folder where it has to be NF4."""
    tokenizer = make_tokenizer()
    config = LlamaConfig(vocab_size=len(tokenizer), hidden_size=hidden_size, intermediate_size=2 * hidden_size,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
                         bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
                         max_position_embeddings=window, tie_word_embeddings=True)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval()
    if folder is None:
        return model, tokenizer
    save_model_and_tokenizer(folder, model, tokenizer)
    return load_model(folder, bits=bits, device=device)


def lora_pair(**options):
    model, tokenizer = make_pair(**options)
    return create_lora(model, r=8, alpha=8, seed=3), tokenizer


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Put a stand-in for unsloth where the other process finds it."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "unsloth.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(unsloth_backend, "version_conflicts", lambda: [])
    return tmp_path / "packages" / "unsloth.py"


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "training_loss.json").read_text())]


def test_the_other_process_trains_the_same_adapter(stand_in, tmp_path, capfd):
    texts = make_texts(n=6)
    here, there = lora_pair(), lora_pair()
    expected = train_lora(*here, texts, MINI_FORMAT, SETTINGS, tmp_path / "here")
    begin = trainable_weights(there[0])
    stats = train_by_unsloth(*there, texts, MINI_FORMAT, SETTINGS, tmp_path / "there")
    assert not all(torch.equal(value, begin[name]) for name, value in trainable_weights(there[0]).items())
    for name, value in trainable_weights(here[0]).items():
        assert torch.equal(value, trainable_weights(there[0])[name]), name
    timed = {"seconds": 0, "tokens_per_second": 0}
    assert {**stats, **timed} == {**expected, **timed}
    assert losses(tmp_path / "here") == losses(tmp_path / "there")
    assert (tmp_path / "there" / "training_loss.png").exists()
    assert not (tmp_path / "there" / "unsloth_job").exists()
    assert not there[0].training and "noise" not in capfd.readouterr().out


def test_the_other_process_keeps_to_the_time_limit(stand_in, tmp_path, capsys):
    pair = lora_pair()
    begin = trainable_weights(pair[0])
    stats = train_by_unsloth(*pair, make_texts(n=2), MINI_FORMAT, SETTINGS, tmp_path / "out", seconds=0.0)
    assert (stats["steps"], stats["steps_planned"], stats["loss"]) == (0, 1, None)
    assert all(torch.equal(value, begin[name]) for name, value in trainable_weights(pair[0]).items())
    assert "shortened the training from 1 to 0 steps" in capsys.readouterr().out


def test_what_goes_wrong_there_is_said_here(stand_in, tmp_path):
    pair, texts = lora_pair(), make_texts(n=2)
    with pytest.raises(RuntimeError, match=r"unsloth failed: .*over the limit of 5"):
        train_by_unsloth(*pair, texts, {**MINI_FORMAT, "max_tokens": 5}, SETTINGS, tmp_path / "out")
    with pytest.raises(RuntimeError, match="loss is (nan|inf).*--joint.learning-rate"):
        train_by_unsloth(*pair, texts, MINI_FORMAT, replace(SETTINGS, learning_rate=1e30, epochs=9), tmp_path / "out",
                         "--joint.")  # fmt: skip
    with pytest.raises(RuntimeError, match="of which unsloth would keep 20"):
        train_by_unsloth(*lora_pair(window=20), texts, MINI_FORMAT, SETTINGS, tmp_path / "out")
    stand_in.write_text("raise RuntimeError('no GPU, no unsloth')")
    with pytest.raises(RuntimeError, match="exit status 1"):
        train_by_unsloth(*pair, texts, MINI_FORMAT, SETTINGS, tmp_path / "out")


def test_mini_is_refused(tmp_path):
    pair = create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4), make_tokenizer()
    with pytest.raises(ValueError, match="architecture of Mini: use --backend transformers"):
        train_by_unsloth(*pair, make_texts(), MINI_FORMAT, SETTINGS, tmp_path)


def test_a_training_that_was_killed_there_goes_on(stand_in, tmp_path):
    settings, texts = replace(SETTINGS, save_every=2, epochs=2), make_texts(n=8)  # 16 texts, 8 steps
    whole, resumed = lora_pair(), lora_pair()
    train_lora(*whole, texts, MINI_FORMAT, settings, tmp_path / "whole")
    real = stand_in.read_text()
    stand_in.write_text(real + KILL)
    with pytest.raises(RuntimeError, match="exit status 9"):
        train_by_unsloth(*lora_pair(), texts, MINI_FORMAT, settings, tmp_path / "killed")
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    stand_in.write_text(real)
    train_by_unsloth(*resumed, texts, MINI_FORMAT, settings, tmp_path / "killed")
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    for name, value in trainable_weights(whole[0]).items():
        assert torch.equal(value, trainable_weights(resumed[0])[name]), name


KILL = '''

import os

steps = []
training_step = UnslothTrainer.training_step


def killed(self, *args, **kwargs):
    steps.append(1)
    if len(steps) == 7:  # in step 4
        os._exit(9)
    return training_step(self, *args, **kwargs)


UnslothTrainer.training_step = killed
'''


@pytest.mark.parametrize("bits", [32, 4])
def test_the_base_under_an_adapter_is_saved_as_it_was(tmp_path, bits):
    model, tokenizer = make_pair(bits=bits, folder=tmp_path / "source")
    model.eval()
    lora = create_lora(model, r=8, alpha=8)
    with torch.no_grad():
        for parameter in (value for value in lora.parameters() if value.requires_grad):
            parameter.add_(1.0)
    save_base(tmp_path / "base", lora)
    tokenizer.save_pretrained(tmp_path / "base")
    again = load_model(tmp_path / "base", bits=bits, device="cpu")[0]
    expected = make_pair(bits=bits, folder=tmp_path / "source")[0]
    create_lora(expected, r=8, alpha=8).unload()  # unties the head, as the adapter has done
    assert model_identity(again) == model_identity(expected)


def test_an_unusable_backend_is_said_before_anything_begins(stand_in):
    with pytest.raises(ValueError, match="--bits 4 or 16, not --device cpu"):
        unsloth_backend.check_unsloth("cpu", 4)
    with pytest.raises(ValueError, match="--bits 32"):
        unsloth_backend.check_unsloth("cuda", 32)
    unsloth_backend.check_unsloth("cuda", 4)
    stand_in.write_text("raise NotImplementedError('no accelerator\\nfound')")
    with pytest.raises(ImportError, match=r"^unsloth cannot be imported \(no accelerator\): install.*transformers"):
        unsloth_backend.check_unsloth("cuda", 4)


def test_the_entrance_imports_nothing_before_unsloth(stand_in):
    script = Path(unsloth_backend.__file__)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False, env=os.environ)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_unsloth
@pytest.mark.gpu
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("bits", "checkpointing"), [(4, True), (16, False)])
def test_losses_agree_between_the_backends(tmp_path, bits, checkpointing, packing):
    """packing: of the default backend, unsloth pads."""
    pytest.importorskip("trl")
    texts = make_texts(n=40)[:80]
    settings = replace(SETTINGS, gradient_checkpointing=checkpointing, save_every=10)
    results = {}
    for name, train in {"transformers": train_lora, "unsloth": train_by_unsloth}.items():
        pair = lora_pair(hidden_size=128, bits=bits, device="cuda", folder=tmp_path / "model")
        own = replace(settings, packing=packing) if name == "transformers" else settings
        stats = train(*pair, texts, MINI_FORMAT, own, tmp_path / name)
        results[name] = (losses(tmp_path / name), stats)
        assert stats["steps"] == 20 and stats["peak_gib"] > 0
    (expected, stats), (found, stats_there) = results["transformers"], results["unsloth"]
    assert all(stats[name] == stats_there[name] for name in ("texts", "tokens", "loss_tokens"))
    assert found == pytest.approx(expected, rel=0.02)
    assert expected[-1] < 0.9 * expected[0]
