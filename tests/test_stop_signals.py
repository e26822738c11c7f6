"""Ctrl-C and SIGTERM in a training: what was trained until then is in a checkpoint."""

import os
import signal
from dataclasses import replace

import pytest
import torch

import training_tools
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora
from test_training_tools import SETTINGS, make_texts, trainable_weights
from training_tools import train_lora


def fresh():
    """Return a new model with an adapter, always the same."""
    return create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4)


@pytest.mark.parametrize(("number", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
@pytest.mark.parametrize("save_every", [100, 0])
def test_a_signal_stops_a_training_after_a_checkpoint(tmp_path, number, ending, save_every):
    training = (make_tokenizer(), make_texts(n=8), MINI_FORMAT, replace(SETTINGS, save_every=save_every))
    expected, stopped, calls = fresh(), fresh(), []
    stats = train_lora(expected, *training, tmp_path / "whole")

    def send(*_):
        calls.append(1)
        if len(calls) == 3:  # in step 2 of 4, in its first of two batches
            os.kill(os.getpid(), number)

    def leave(*_):
        raise SystemExit

    stopped.register_forward_pre_hook(send)
    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(ending):
            train_lora(stopped, *training, tmp_path / "stopped")
        assert signal.getsignal(signal.SIGTERM) is leave, "as it was"
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(calls) == (4 if save_every else 3)
    found = [path.name for path in training_tools.complete_checkpoints(tmp_path / "stopped")]
    assert found == (["checkpoint-2"] if save_every else [])
    gone_on = fresh()
    assert train_lora(gone_on, *training, tmp_path / "stopped")["tokens"] == stats["tokens"]
    weights = trainable_weights(gone_on)
    assert all(torch.equal(weights[name], weight) for name, weight in trainable_weights(expected).items())


def test_a_second_signal_stops_a_training_at_once(tmp_path):
    model = fresh()
    model.register_forward_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train_lora(model, make_tokenizer(), make_texts(n=8), MINI_FORMAT, replace(SETTINGS, save_every=100), tmp_path)
    assert not training_tools.complete_checkpoints(tmp_path)
