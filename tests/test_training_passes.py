"""Recorded passes: the adapter of ordinary ones, from few lengths; used where faster, given up where impossible."""

import json
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch

import stack_training
import training_passes
import training_tools
from adapter_stack import AdapterStack
from cuda_recorder import CudaRecorder
from model_tools import create_lora, load_model
from packing import NO_LABEL, pack, packed_attention
from recomputation import Recomputation
from run_tools import PUBLISHED_FORMAT, format_options
from stack_training import train_stack
from test_stack_training import FEW, TASKS, fresh, members_of, room_for, task_texts
from test_training_tools import SETTINGS, trainable_weights
from training_passes import (RECORDED_SHARE, Gradients, RecordedPasses, largest_pack, memory_share, pad_pack,
                             padded_length)
from training_tools import train_lora


class Recorder:
    """Stands in for a GPU's: replays by running the recorded function again, on the same tensors."""

    def __init__(self, device=None):
        self.recorded, self.fail_at, self.released = 0, None, 0

    def release(self):
        self.released += 1

    def wait(self):
        pass

    def warm_up(self, function):
        return function()

    def record(self, function):
        self.recorded += 1
        if self.recorded == self.fail_at:
            raise torch.OutOfMemoryError("no room for it")

        class Recording:
            replay = staticmethod(function)

        return Recording(), None


@pytest.fixture
def clock(monkeypatch):
    """A clock that says how long things take: set its list to the times of the next calls, after which it stands."""
    times = []
    monkeypatch.setattr(training_passes.time, "perf_counter", lambda: times.pop(0) if times else 0.0)
    return times


def measured(replay, launch=0.6, again=None):
    """Return the times of a measuring: an ordinary pass takes 1 s, one of hardly any tokens 2 s and then 0.5 s, its
    launch as long as it says, the ordinary one again `again`, if it is asked for, to record the largest and this one
    3 and 4 s, the first replay 2 s."""
    times, now = [], 0.0
    repeated = [] if again is None else [(again, again)]
    for launched, seconds in ((1, 1), (launch, 2), (launch, 0.5), *repeated, (None, 3), (None, 4), (2, 2),
                              (replay, replay)):  # fmt: skip
        times += [now, *([] if launched is None else [now + launched]), now + seconds]
        now += seconds
    return times


def make_batch(*lengths):
    batch = pack([(torch.arange(n).numpy(), torch.arange(n).numpy()) for n in lengths], lambda ids: ids)
    return batch | {"n_labels": torch.tensor(1.0)}


class Passes:
    """Passes whose loss is the sum of the learned labels times a weight, over n_labels."""

    def __init__(self, recorder):
        self.weight = torch.nn.Parameter(torch.tensor(2.0))
        self.gradients, self.said, self.shapes, self.prepared = Gradients([self.weight]), [], [], []
        self.shares = []  # of memory, that each pass may take
        self.passes = RecordedPasses(self.compute, lambda batch, length: pad_pack(batch, 3, 100, length), recorder, 256,
                                     self.said.append, self.prepared.append)

    def compute(self, batch):
        self.shapes.append(batch["input_ids"].shape[1])
        self.shares.append(memory_share(self.passes))
        assert 0 < batch["cu_seq_lens_q"].diff().min() <= batch["cu_seq_lens_q"].diff().max() <= batch["max_length_q"]
        labels = batch["labels"]
        self.gradients.add(self.weight * labels[labels != NO_LABEL].sum() / batch["n_labels"])
        return (self.weight * labels[labels != NO_LABEL].sum()).detach()

    def step(self, *lengths):
        self.gradients.start_step()
        loss = float(self.passes.run(make_batch(*lengths)))
        gradient, self.weight.grad = float(self.weight.grad), None
        assert loss == 2 * gradient == 2 * sum(n * (n - 1) // 2 for n in lengths)


def test_a_length_on_the_grid_is_little_more():
    lengths = {padded_length(n) for n in range(1, 40000)}
    assert all(n <= padded_length(n) <= max(n * 1.125, n + 64) for n in range(1, 40000))
    assert len(lengths) < 80 and all(n % 64 == 0 for n in lengths)


@pytest.mark.parametrize("longest", [5, 100, 5000])
def test_lengths_alone_decide_what_a_recording_has_fixed(longest):
    seen = {}
    for tokens in range(1, 3000, 7):
        padded = pad_pack(make_batch(tokens), 3, max(longest, tokens))
        limit = seen.setdefault((padded["input_ids"].shape[1], max(longest, tokens)), padded["max_length_q"])
        assert padded["max_length_q"] == limit >= padded["cu_seq_lens_q"].diff().max()


@pytest.mark.parametrize("most_texts", [1, 2, 6, 7, 8, 30])
@pytest.mark.parametrize("texts", [(1,), (40,), (3, 50, 2, 700), (8192, 8000, 7000, 100, 5, 5000, 8100, 8150, 8190)])
def test_what_stands_for_the_largest_batch_is_no_smaller_and_its_texts_are_no_longer(most_texts, texts):
    longest = max(texts)
    for most_at_once in (1, 2, 4):
        largest = largest_pack(texts, most_texts, most_at_once * longest)
        for chosen in (sorted(texts)[-most_texts:], sorted(texts)[:most_texts], [longest]):
            if sum(chosen) <= most_at_once * longest:
                assert pad_pack(make_batch(*chosen), most_texts, longest)["input_ids"].shape[1] <= largest
        for length in {largest, 64}:
            batch = pad_pack(make_batch(*texts[:most_texts]), most_texts, longest, length)
            borders = batch["cu_seq_lens_q"]
            assert len(borders) == most_texts + 2 and (borders[0], borders[-1]) == (0, length)
            assert borders.dtype == torch.int32 and 0 < borders.diff().min()
            assert borders.diff().max() <= batch["max_length_q"] == pad_pack(
                make_batch(*texts[:1]), most_texts, longest, length)["max_length_q"]  # fmt: skip
            assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, length)


@pytest.mark.parametrize("lengths", [(1,), (5, 3), (20, 40, 60), (61, 1, 1), (59, 1, 3)])
def test_a_padded_pack_has_a_text_more_than_any_and_none_is_empty(lengths):
    batch = make_batch(*lengths)
    padded = pad_pack(batch, 3, 100)
    borders = padded["cu_seq_lens_q"]
    assert len(borders) == 5 and (borders.diff() > 0).all() and padded["max_length_q"] >= borders.diff().max()
    assert padded["input_ids"].shape[1] == int(borders[-1]) == padded_length(int(borders[-1]))
    for name in ("input_ids", "labels", "position_ids"):
        assert padded[name][:, : sum(lengths)].equal(batch[name])
    assert (padded["labels"][:, sum(lengths) :] == NO_LABEL).all()
    assert {padded[name].shape for name in ("input_ids", "labels", "position_ids", "attention_mask")} == {
        padded["input_ids"].shape}  # fmt: skip


def test_recorded_passes_give_the_same_and_are_few(clock):
    recorder = Recorder()
    passes = Passes(recorder)
    passes.step(10, 20)  # warms up
    clock.extend(measured(replay=0.1))
    passes.step(10, 20)  # ordinary and measured: 64 tokens
    assert passes.passes.pays and passes.passes.seconds == pytest.approx((1.0, 0.1))
    assert "CUDA graphs are used" in passes.said[0]
    assert passes.prepared == pytest.approx([2.5, 3.0, 4.0, 2.1])
    for lengths in ((30,), (11, 20), (100, 100), (30, 1, 1), (70, 60), (100, 90), (10,), (50, 80)):
        passes.step(*lengths)
    assert passes.shapes[2:] == [64, 64] + [256, 64, 64, 64] + [64, 64, 256, 64] + [192, 192] + [192, 64, 192]
    assert recorder.recorded == 3 and passes.prepared[4:] == [0.0]  # that of 192
    assert passes.shares == [1.0] * 4 + [RECORDED_SHARE] * (len(passes.shares) - 4), "beside the recordings' memory"


@pytest.mark.parametrize("replay", [0.95, 2.0])
def test_passes_that_gain_little_stay_ordinary(clock, replay):
    passes = Passes(Recorder())
    clock.extend(measured(replay))
    for _ in range(4):
        passes.step(10, 20)
    assert passes.passes.pays is False and "not used" in passes.said[0]
    assert passes.shapes == [30, 30, 64, 64, 256, 64, 64, 64, 30, 30]
    assert passes.shares == [1.0] * 4 + [RECORDED_SHARE] * 4 + [1.0] * 2


@pytest.mark.parametrize("again", [0.9, 1.5])
def test_nothing_is_recorded_where_launching_takes_little(clock, again):
    recorder = Recorder()
    passes = Passes(recorder)
    clock.extend(measured(0.1, launch=0.4, again=again))
    for _ in range(4):
        passes.step(10, 20)
    assert passes.passes.pays is False and f"not used: a pass takes {min(1, again):.3f} s" in passes.said[0]
    assert set(passes.shares) == {memory_share(None)} == {1.0}
    assert passes.shapes == [30, 30, 64, 64, 30, 30, 30] and not recorder.recorded and recorder.released
    assert passes.prepared == pytest.approx([2.5, again])


def test_what_a_pass_does_once_is_not_taken_for_its_time(clock):
    passes = Passes(Recorder())
    passes.step(10, 20)
    clock.extend(measured(0.1, launch=0.4, again=0.7))
    passes.step(10, 20)
    assert passes.passes.pays and passes.passes.seconds == pytest.approx((0.7, 0.1))


@pytest.mark.parametrize("fail_at", [1, 2, 3])
def test_what_cannot_be_recorded_is_computed_in_the_ordinary_way(clock, fail_at):
    recorder = Recorder()
    recorder.fail_at = fail_at
    passes = Passes(recorder)
    clock.extend(measured(replay=0.1))
    for lengths in ((10, 20), (10, 20), (70, 60), (70, 60), (5,)):
        passes.step(*lengths)
    assert passes.passes.pays is False and "no room for it" in passes.said[-1] and recorder.recorded == fail_at


def test_gradients_lie_side_by_side_and_start_anew_when_used_up():
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    gradients = Gradients(parameters)
    for times in (1, 2):
        gradients.start_step()
        gradients.add((parameters[0] * 3).sum() + parameters[1].sum())
        assert gradients.flat.tolist() == [3.0 * times] * 6 + [1.0 * times] * 4
        assert parameters[0].grad.data_ptr() == gradients.flat.data_ptr()
    gradients.add(parameters[1].sum())  # does not depend on the other
    assert gradients.flat.tolist() == [6.0] * 6 + [3.0] * 4
    model, others = torch.nn.Module(), torch.nn.Parameter(torch.ones(2))
    model.own, model.other = torch.nn.ParameterList(parameters), others
    others.grad = torch.ones(2)
    with gradients.zeroed_alone(model):
        model.zero_grad()
    assert others.grad is not None
    gradients.start_step()
    assert not gradients.flat.any()
    model.zero_grad()
    assert others.grad is None


@pytest.mark.parametrize("size", [0.1, 10.0])
def test_gradients_are_clipped_as_by_pytorch(size):
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    gradients = Gradients(parameters)
    gradients.start_step()
    gradients.flat.copy_(size * torch.randn(10, generator=torch.Generator().manual_seed(0)))
    expected = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    for one, other in zip(expected, parameters, strict=True):
        one.grad = other.grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(expected, 1.0)
    torch.testing.assert_close(gradients.clip(1.0), norm)
    for one, other in zip(expected, parameters, strict=True):
        torch.testing.assert_close(other.grad, one.grad)


@pytest.mark.parametrize("kind", ["Mini", "Llama"])
def test_a_training_from_recorded_passes_is_that_of_ordinary_ones(kind, tmp_path, monkeypatch):
    def train(folder, **changes):
        model, tokenizer, fmt_opts = fresh(kind)
        texts = task_texts(fmt_opts, "a")
        stats = train_lora(model, tokenizer, texts, fmt_opts, replace(SETTINGS, epochs=2, **changes), folder)
        return stats, trainable_weights(model)

    expected, weights = train(tmp_path / "ordinary")
    recorder = Recorder()
    monkeypatch.setattr(training_tools, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(training_tools, "varlen_possible", lambda device, dtype: True)
    monkeypatch.setattr(training_passes, "LEAST_GAIN", float("inf"))
    monkeypatch.setattr(training_passes, "LEAST_LAUNCH", 0.0)
    stats, found = train(tmp_path / "recorded", cuda_graphs=True)
    assert recorder.recorded
    assert {name: stats[name] for name in ("texts", "tokens", "loss_tokens", "steps")} == {
        name: expected[name] for name in ("texts", "tokens", "loss_tokens", "steps")}  # fmt: skip
    assert stats["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for name, value in weights.items():
        assert torch.allclose(found[name], value, atol=2e-6), name


def test_a_stack_from_recorded_passes_is_that_of_ordinary_ones(monkeypatch, no_garbage_collection):
    settings = replace(FEW, optimizer="adamw_torch")

    def train(**changes):
        model, tokenizer, fmt_opts = fresh("Llama")
        members = members_of(TASKS, settings, tokenizer, fmt_opts)
        stack = AdapterStack(model, len(members))
        train_stack(stack, members, replace(settings, **changes), room_for(150), show=False)
        return members, stack.weights, weakref.ref(stack)

    expected, weights, _ = train()
    recorder = Recorder()
    monkeypatch.setattr(stack_training, "CudaRecorder", lambda device: recorder)
    monkeypatch.setattr(stack_training, "varlen_possible", lambda device, dtype: True)
    monkeypatch.setattr(stack_training, "grouped_product_works", lambda device, dtype: True)
    monkeypatch.setattr(training_passes, "LEAST_GAIN", float("inf"))
    monkeypatch.setattr(training_passes, "LEAST_LAUNCH", 0.0)
    found, same_weights, stack = train(cuda_graphs=True)
    assert recorder.recorded and stack() is None, "the next group of tasks has less memory"
    for member, other in zip(found, expected, strict=True):
        assert member.losses == pytest.approx(other.losses, rel=1e-5)
    assert torch.allclose(same_weights, weights, atol=1e-5)


def test_what_stands_for_other_lengths_adds_nothing_to_a_stack():
    model, tokenizer, fmt_opts = fresh("Llama")
    members = members_of(TASKS, FEW, tokenizer, fmt_opts)
    stack = AdapterStack(model, len(members))
    texts = [(i, stack_training._padded(text)) for i, member in enumerate(members) for text in member.steps[0]]
    batch = stack_training._make_batch(stack, texts, torch.full((3,), float("inf")), lambda ids: np.arange(len(ids)))
    lengths = [len(tokens) for _, (tokens, _) in texts]
    assert largest_pack(lengths, len(texts), 10**6) > sum(lengths) > 256
    with packed_attention(model), stack.in_place(), stack_training._in_training(model):
        for length in (64, 256, sum(lengths), largest_pack(lengths, len(texts), 10**6)):
            padded = stack_training._pad_batch(batch, len(texts), max(lengths), length)
            offsets = padded["offsets"].tolist()
            assert offsets == sorted(offsets) and offsets[-1] == length == padded["member_of_row"].shape[1]
            assert stack_training._compute(stack, None, padded).tolist() == [0.0] * 3
    assert not stack.gradients.any() and not any(module.training for module in model.modules())


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["Mini", "bf16", "NF4"])
@pytest.mark.parametrize("recompute", [False, True, None])
def test_on_a_gpu(kind, recompute, folders, tmp_path, monkeypatch):
    """Losses of recorded passes are those of ordinary ones, whatever is faster for a model as small as this.

    recompute: None: half of the layers, the second time.
    """
    if recompute is None:
        layers_for = Recomputation.layers_for
        monkeypatch.setattr(Recomputation, "layers_for", lambda self, *args: min(layers_for(self, *args), 1))
    monkeypatch.setattr(training_passes, "LEAST_GAIN", float("inf"))
    monkeypatch.setattr(training_passes, "LEAST_LAUNCH", 0.0)
    losses = []
    for cuda_graphs in (False, True):
        if kind == "NF4":
            model, tokenizer = load_model(folders / "nf4", bits=4, device="cuda")
            model, fmt_opts = create_lora(model, r=8, alpha=4), format_options(PUBLISHED_FORMAT, tokenizer, 2000)
        else:
            model, tokenizer, fmt_opts = fresh(kind, "cuda")
        settings = replace(SETTINGS, epochs=4, cuda_graphs=cuda_graphs, gradient_checkpointing=recompute,
                           mixed_precision="bf16" if kind == "Mini" else "auto")  # fmt: skip
        captured = []
        if recompute is None and cuda_graphs:
            monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1000, 0))
        monkeypatch.setattr(training_tools.tqdm, "write", captured.append)
        stats = train_lora(model, tokenizer, task_texts(fmt_opts, "a"), fmt_opts, settings, tmp_path)
        assert any("CUDA graphs are used" in line for line in captured) == cuda_graphs, captured
        assert ("recomputed_above" in stats) == (recompute is None and cuda_graphs)
        losses.append([entry["loss"] for entry in json.loads((tmp_path / "training_loss.json").read_text())])
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[0][-1] < losses[0][0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_cannot_be_recorded_on_a_gpu_is_computed_in_the_ordinary_way(tmp_path, monkeypatch):
    """A model that waits for the GPU, which CUDA refuses in a recording."""
    monkeypatch.setattr(training_passes, "LEAST_LAUNCH", 0.0)
    losses, captured = [], []
    monkeypatch.setattr(training_tools.tqdm, "write", captured.append)
    for waits in (False, True):
        model, tokenizer, fmt_opts = fresh("bf16", "cuda")
        if waits:
            model.register_forward_hook(lambda module, args, output: output.logits.sum().item() and None)
        settings = replace(SETTINGS, epochs=4, cuda_graphs=waits)
        train_lora(model, tokenizer, task_texts(fmt_opts, "a"), fmt_opts, settings, tmp_path)
        losses.append([entry["loss"] for entry in json.loads((tmp_path / "training_loss.json").read_text())])
        torch.cuda.empty_cache()  # which PyTorch refuses while it takes a recording to be under way
    assert any("cannot be recorded" in line for line in captured), captured
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["Mini", "bf16"])
def test_a_stack_on_a_gpu(kind, monkeypatch):
    monkeypatch.setattr(training_passes, "LEAST_GAIN", float("inf"))
    monkeypatch.setattr(training_passes, "LEAST_LAUNCH", 0.0)
    losses, recorded = [], []
    record = CudaRecorder.record
    monkeypatch.setattr(CudaRecorder, "record", lambda self, function: recorded.append(0) or record(self, function))
    for cuda_graphs in (False, True):
        model, tokenizer, fmt_opts = fresh(kind, "cuda")
        settings = replace(FEW, cuda_graphs=cuda_graphs, learning_rate=1e-3, embedding_learning_rate=1e-3,
                           mixed_precision="bf16")  # fmt: skip
        members = members_of(TASKS, settings, tokenizer, fmt_opts)
        train_stack(AdapterStack(model, 3), members, settings, room_for(10**6), show=False)
        losses.append([member.losses for member in members])
    assert recorded
    for found, expected in zip(losses[1], losses[0], strict=True):
        assert found == pytest.approx(expected, rel=0.02)


def test_memory_that_is_not_there_counts_as_infinite(monkeypatch):
    """A pass that does not fit says that activations have to be recomputed; it does not end the training."""
    used, emptied = [100], []
    for name, function in {"synchronize": lambda: None, "reset_peak_memory_stats": lambda: None,
                           "memory_allocated": lambda: 100, "max_memory_allocated": lambda: max(used),
                           "empty_cache": lambda: emptied.append(True)}.items():
        monkeypatch.setattr(torch.cuda, name, function)

    def too_much():
        raise torch.OutOfMemoryError

    assert training_passes.memory_taken(lambda: used.append(350)) == 250 and not emptied
    assert training_passes.memory_taken(too_much) == math.inf and emptied
    with pytest.raises(ValueError):
        training_passes.memory_taken(lambda: int("x"))
