"""Adapters of several tasks trained at once: those of separate runs, as ordinary PEFT adapters."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

import stack_training
from adapter_stack import ALIGNED, AdapterStack
from adapter_tools import set_peft_weights
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora, load_model, load_peft_state, save_model_and_tokenizer
from recomputation import Recomputation
from run_tools import PUBLISHED_FORMAT, format_options
from small_models import small_pair
from stack_training import (FULL_PASS, MOST_MEMBERS, SHORT_PASS, Room, _passes, group_is_full, make_member,
                            measure_room, train_stack)
from test_training_tools import SETTINGS, make_texts, trainable_weights
from trainers import Collator
from training_tools import tokens_of_texts, train_lora

TASKS = {"a": (4, 0), "b": (3, 3), "c": (2, 5)}  # task: (presentations of both small tasks, seed)
FEW = replace(SETTINGS, batch_size=1, gradient_accumulation=2, warmup_ratio=0.5, epochs=2, learning_rate=1e-2,
              embedding_learning_rate=5e-3)


def fresh(kind="Mini", device="cpu"):
    """Return (small model with an adapter, tokenizer, format options)."""
    if kind == "Mini":
        model, tokenizer, fmt_opts = make_model(MiniSize(2, 32, 2, 48), seed=1).eval(), make_tokenizer(), MINI_FORMAT
    else:
        model, tokenizer = small_pair()
        fmt_opts = format_options(PUBLISHED_FORMAT, tokenizer, 2000)
        if kind == "bf16":
            model = model.to(torch.bfloat16)
    return create_lora(model.to(device), r=8, alpha=4, seed=3), tokenizer, fmt_opts


def task_texts(fmt_opts, name):
    """Return the texts of one of the tasks."""
    if fmt_opts is MINI_FORMAT:
        return make_texts(*TASKS[name])[name == "a" :: 1 + (name == "a")]
    from test_training_tools import TASKS as both

    n, seed = TASKS[name]
    views = both.remove_test_data().repeat(n, seed=seed).augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=seed)
    return views.as_list(len_name="text", **fmt_opts)


def separate_run(name, settings, folder, kind="Mini", device="cpu"):
    """Return (statistics, trained weights, losses, learning rates) of a run of its own, padded, by the Trainer."""
    model, tokenizer, fmt_opts = fresh(kind, device)
    stats = train_lora(model, tokenizer, task_texts(fmt_opts, name), fmt_opts, replace(settings, packing=False), folder)
    history = json.loads((folder / "training_loss.json").read_text())
    return stats, trainable_weights(model), *([entry[key] for entry in history] for key in ("loss", "learning_rate"))


def members_of(names, settings, tokenizer, fmt_opts):
    collate = Collator(tokenizer, fmt_opts, settings.mask_first_n_examples, None)
    return [make_member(tokens_of_texts(tokenizer, task_texts(fmt_opts, name)), collate, settings) for name in names]


def room_for(most_tokens=FULL_PASS):
    """Return a `Room` with passes of so many tokens, and no want of memory."""
    return Room(most_tokens, math.inf, 0.0, 0.0)


def train_together(names, settings, most_tokens=FULL_PASS, kind="Mini", device="cpu", **options):  # noqa: PLR0913
    """Return (stack, members, statistics) of one training of all tasks."""
    model, tokenizer, fmt_opts = fresh(kind, device)
    members = members_of(names, settings, tokenizer, fmt_opts)
    stack = AdapterStack(model, len(members))
    return stack, members, train_stack(stack, members, settings, room_for(most_tokens), show=False, **options)


def weights_of(stack, i, kind="Mini"):
    """Return the trainable weights of a fresh model that is given the adapter of a member."""
    model = fresh(kind)[0]
    set_peft_weights(model, stack.adapter(i))
    return trainable_weights(model)


CASES = {
    "different numbers of steps": (FEW, FULL_PASS),
    "many passes per step": (FEW, 100),
    "clipped, weight decay": (replace(FEW, weight_decay=0.1, warmup_steps=2, embedding_learning_rate=0.1), 400),
    "a first reply masked, constant rate": (replace(FEW, mask_first_n_examples=1, scheduler="constant"), FULL_PASS),
    "a part of the steps": (replace(FEW, max_steps=5), FULL_PASS),
}


@pytest.mark.parametrize("case", CASES)
def test_everything_is_that_of_separate_runs(case, tmp_path):
    settings, most_tokens = CASES[case]
    stack, members, totals = train_together(TASKS, settings, most_tokens)
    expected_totals = {"tokens": 0, "loss_tokens": 0}
    for i, name in enumerate(TASKS):
        stats, weights, losses, rates = separate_run(name, settings, tmp_path / name)
        assert len(members[i].losses) == stats["steps"]
        assert members[i].losses == pytest.approx(losses, rel=1e-5, abs=1e-6)
        assert members[i].rates == pytest.approx(rates, rel=1e-9)
        found, start = weights_of(stack, i), trainable_weights(fresh()[0])
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
        assert max((weights[key] - start[key]).abs().max().item() for key in weights) > 0.01
        assert members[i].counts() == {key: stats[key] for key in ("texts", "tokens", "loss_tokens")}
        for key in expected_totals:
            expected_totals[key] += stats[key]
    assert totals["steps"] == max(len(member.losses) for member in members)
    assert {key: totals[key] for key in expected_totals} == expected_totals


def test_the_steps_differ_in_number():
    members = members_of(TASKS, FEW, *fresh()[1:])
    assert sorted({len(member.steps) for member in members}) == [4, 6]


def test_a_member_is_an_ordinary_adapter(tmp_path):
    stack, _, _ = train_together(["b", "c"], replace(FEW, max_steps=4))
    model, tokenizer, _ = fresh()
    set_peft_weights(model, stack.adapter(1))
    save_model_and_tokenizer(tmp_path, model, tokenizer)
    again = fresh()[0]
    load_peft_state(again, tmp_path)
    expected = weights_of(stack, 1)
    assert all(torch.equal(value, expected[key]) for key, value in trainable_weights(again).items())
    other = weights_of(stack, 0)
    assert not any(torch.equal(other[key], expected[key]) for key in expected)


def test_the_models_own_adapter_stays():
    model, tokenizer, fmt_opts = fresh()
    before = trainable_weights(model)
    members = members_of(["c"], FEW, tokenizer, fmt_opts)
    train_stack(AdapterStack(model, 1), members, FEW, room_for(), show=False)
    assert all(torch.equal(value, before[key]) for key, value in trainable_weights(model).items())
    assert not any(module.training or "forward" in vars(module) for module in model.modules())


def test_eight_bit_states_are_used_where_asked_for(monkeypatch):
    import stack_training

    used = []
    monkeypatch.setattr(stack_training.bnb.optim, "AdamW8bit",
                        lambda groups, **options: used.append(len(groups)) or torch.optim.AdamW(groups, **options))
    train_together(["b", "c"], replace(FEW, max_steps=1, optimizer="adamw_8bit"))
    assert used == [2 * 2]
    with pytest.raises(ValueError, match="lion"):
        train_together(["b"], replace(FEW, optimizer="lion_32bit"))


def test_a_loss_that_is_no_number_ends_the_training():
    model, tokenizer, fmt_opts = fresh()
    members = members_of(["b"], settings := replace(FEW, learning_rate=1e30, epochs=8), tokenizer, fmt_opts)
    with pytest.raises(FloatingPointError, match="--per-task.learning-rate"):
        train_stack(AdapterStack(model, 1), members, settings, room_for(), show=False)
    assert not any(module.training for module in model.modules())


def test_dropout_is_refused():
    model = create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4, dropout=0.1)
    with pytest.raises(ValueError, match="train one task at a time"):
        AdapterStack(model, 2)


def test_a_time_limit_shortens_all_alike_with_their_rates():
    settings = replace(FEW, epochs=400)  # up to 1200 steps
    _, members, stats = train_together(["b", "c"], settings, seconds=1.0)
    n_steps = {len(member.losses) for member in members}
    assert len(n_steps) == 1 and 4 <= stats["steps"] < 800
    for member in members:
        assert len(member.rates) == len(member.losses)
        assert member.rates[-1] < 0.2 * max(member.rates), "the cosine goes down to its end"


def test_a_time_that_is_over_ends_the_training_before_its_speed_is_known():
    _, members, stats = train_together(["b", "c"], FEW, seconds=0.0)
    assert stats["steps"] == 1 and [len(member.losses) for member in members] == [1, 1]


# ---- passes, groups, memory ----

def test_passes_hold_what_fits():
    texts = [(0, ([0] * 8, [])), (0, ([0] * 8, [])), (1, ([0] * 24, [])), (2, ([0] * 8, []))]
    sizes = [[len(text[0]) for _, text in own] for own in _passes(texts, 16)]
    assert sizes == [[8, 8], [24], [8]]
    assert len(_passes(texts, 48)) == 1


def test_groups_fill_a_pass_memory_or_have_most_members():
    room = Room(most_tokens=1000, free=1e6, per_token=100, per_member=1e5)
    assert not group_is_full([100, 100], 100, room)
    assert group_is_full([500, 400], 101, room), "the pass is full"
    assert group_is_full([10] * 9, 10, room), "memory for adapters is used up"
    assert group_is_full([1] * MOST_MEMBERS, 1, replace(room, per_member=1))
    assert group_is_full([1], 1, measure_room(fresh()[0], None, 50)), "on a CPU one task at a time"
    assert group_is_full([1], 1, None)


@pytest.mark.parametrize(("kept", "recomputed", "longest", "recomputes", "most_tokens"), [
    (100.0, 10.0, 300, False, 480), (100.0, 10.0, 500, True, 500), (1.0, 0.1, 500, False, 48000),
    (1000.0, 100.0, 500, True, 480), (0.1, 0.01, 500, False, FULL_PASS), (math.inf, 10.0, 300, True, 300),
    (4.0, 0.4, 50000, True, 12000), (20.0, 2.0, 50000, True, SHORT_PASS), (math.inf, math.inf, 300, True, 1),
    (0.1, 0.01, FULL_PASS + 8, False, FULL_PASS + 8),
])  # fmt: skip
def test_activations_are_recomputed_where_memory_demands_it(  # noqa: PLR0913
    monkeypatch, capsys, kept, recomputed, longest, recomputes, most_tokens
):
    """An adapter of 2,000 bytes in 50,000: the rest is for activations, of a text of `longest` tokens at least."""
    class GpuModel:
        layers = [GradientCheckpointingLayer() for _ in range(4)]

        def parameters(self):
            yield SimpleNamespace(requires_grad=True, device=torch.device("cuda"),
                                  numel=lambda: 2000 // stack_training.BYTES_OF_WEIGHT)  # fmt: skip

        def modules(self):
            return iter(self.layers)

    model = GpuModel()
    per_member = 2000 // stack_training.BYTES_OF_WEIGHT * stack_training.BYTES_OF_WEIGHT
    monkeypatch.setattr(stack_training, "autocast_dtype", lambda *_: None)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: ((48000 + per_member) / stack_training.USED_MEMORY, 0))
    monkeypatch.setattr(stack_training, "_measure",
                        lambda *_: recomputed if model.layers[-1].gradient_checkpointing else kept)
    room = measure_room(model, None, longest)
    assert (room.recomputation is not None) == recomputes
    assert recomputes == ("activations are recomputed where memory demands it" in capsys.readouterr().out)
    assert room.most_tokens == most_tokens and room.per_token == kept
    assert not any(layer.gradient_checkpointing for layer in model.layers)
    if recomputes:
        assert room.recomputation_of(3).free == pytest.approx(48000 - 2 * per_member)
        assert room.recomputation_of(3).layers_for(longest) > 0


def test_short_passes_may_recompute_for_more_tasks():
    room = Room(most_tokens=5000, free=1e6, per_token=400, per_member=1e5)
    scarce = replace(room, recomputation=Recomputation([], kept=400, recomputed=40, free=1e6))
    assert room.fits(2, 2000) and not room.fits(3, 2000)
    assert scarce.fits(9, 2000) and not scarce.fits(10, 2000)
    assert not scarce.fits(1, SHORT_PASS + 1), "longer passes are as fast with fewer tasks"


def test_recomputing_layers_change_nothing(monkeypatch):
    expected, members, _ = train_together(TASKS, FEW, 150)
    losses, adapters = [member.losses for member in members], expected.adapters()
    asked, wanted_layers = [], Recomputation.layers_for

    def layers_for(self, *passed):
        asked.append((passed, wanted_layers(self, *passed)))
        return asked[-1][1]

    model, tokenizer, fmt_opts = fresh()
    members = members_of(TASKS, FEW, tokenizer, fmt_opts)
    found = replace(Recomputation.measured(model, 1000, lambda: 10.0, lambda: 0.0), recomputed=1.0)
    stack = AdapterStack(model, len(TASKS))
    room = Room(150, free=1000.0 + 300.0, per_token=10.0, per_member=100.0, recomputation=found)
    monkeypatch.setattr(Recomputation, "layers_for", layers_for)
    monkeypatch.setattr(stack_training, "memory_share", lambda recorded: 0.75)
    train_stack(stack, members, FEW, room, show=False)
    n_layers, expected = len(found.layers), Recomputation(found.layers, 10.0, 1.0, 1000.0)  # beside three adapters
    assert all(layers == wanted_layers(expected, *passed) and passed[1] == 0.75 for passed, layers in asked)
    assert {layers for _, layers in asked} >= {1, n_layers} and n_layers == 2
    assert not any(layer.gradient_checkpointing for layer in found.layers)
    assert [member.losses for member in members] == losses
    for found, wanted in zip(stack.adapters(), adapters, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


# ---- on a GPU ----

@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["bf16", "NF4"])
def test_on_a_gpu_losses_are_those_of_separate_runs(kind, folders, tmp_path):
    """By the grouped matrix product of bf16; also with activations recomputed."""
    settings = replace(FEW, learning_rate=1e-3, embedding_learning_rate=1e-3)

    def start():
        if kind == "bf16":
            return fresh("bf16", "cuda")
        model, tokenizer = load_model(folders / "nf4", bits=4, device="cuda")
        return create_lora(model, r=8, alpha=4), tokenizer, format_options(PUBLISHED_FORMAT, tokenizer, 2000)

    expected = []
    for name in TASKS:
        model, tokenizer, fmt_opts = start()
        train_lora(model, tokenizer, task_texts(fmt_opts, name), fmt_opts, replace(settings, packing=False), tmp_path)
        expected.append([entry["loss"] for entry in json.loads((tmp_path / "training_loss.json").read_text())])
    for recompute in (False, True):
        model, tokenizer, fmt_opts = start()
        members = members_of(TASKS, settings, tokenizer, fmt_opts)
        room = measure_room(model, members[0], 10**9 if recompute else 300)
        assert room.most_tokens == FULL_PASS and room.per_token > 0 and room.free > 2**30
        if recompute:
            assert room.recomputation.recomputed < 0.8 * room.per_token
            free = 100 * room.per_token  # no pass keeps all
            room = replace(room, free=free, per_member=0.0, recomputation=replace(room.recomputation, free=free))
        train_stack(AdapterStack(model, 3), members, settings, room, show=False)
        for member, losses in zip(members, expected, strict=True):
            assert member.losses == pytest.approx(losses, rel=0.02)
            assert losses[-1] < losses[0]
    assert ALIGNED == 8
