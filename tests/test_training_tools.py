"""Training: every token reaches the model, two learning rates, resumption, clear errors, and it does learn."""

import contextlib
import json
import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import trainers
import training_tools
from arc_loader import ArcDataset
from inference_tools import infer_single
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora
from recomputation import Recomputation
from trainers import split_parameters
from training_passes import RECORDED_SHARE
from training_tools import TrainingSettings, tokenise_texts, train_lora

PAIRS = [{"input": [[a, b], [b, a]], "output": [[b, a, b]]} for a, b in ((1, 2), (3, 4), (5, 6))]
TASKS = ArcDataset({"swap": {"train": PAIRS[:2], "test": [{"input": PAIRS[2]["input"]}]},
                    "same": {"train": [{"input": [[7]], "output": [[7] * 9] * 3}], "test": [{"input": [[8]]}]}},
                   is_orig=True)
SETTINGS = TrainingSettings(batch_size=2, gradient_accumulation=2, learning_rate=1e-3, embedding_learning_rate=1e-4,
                            mask_first_n_examples=0, gradient_checkpointing=False)


@pytest.fixture
def lora():
    """A pair (Mini of a few thousand parameters with an adapter, tokenizer)."""
    model = make_model(MiniSize(1, 32, 2, 48), seed=1).eval()
    return create_lora(model, r=4, alpha=4, seed=3), make_tokenizer()


def make_texts(n=3, seed=0):
    """Return n presentations of both tasks' demonstration pairs."""
    views = TASKS.remove_test_data().repeat(n, seed=seed).augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=seed)
    return views.as_list(len_name="text", **MINI_FORMAT)


def trainable_weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("packing", [True, False])
def test_every_token_of_every_text_reaches_the_model(lora, tmp_path, packing):
    model, tokenizer = lora
    seen = []

    def look(_, args, batch):
        if packing:
            ids, borders = batch["input_ids"][0], batch["cu_seq_lens_q"].tolist()
            seen.extend((ids[a:b], torch.ones(b - a)) for a, b in zip(borders, borders[1:], strict=False))
        else:
            seen.extend(zip(batch["input_ids"], batch["attention_mask"], strict=True))

    model.register_forward_pre_hook(look, with_kwargs=True)
    texts = make_texts(n=5)  # 10 texts: neither the batches of 2 nor the steps of 4 come out even with 11
    texts.append(texts[0] | {"key": "once-more"})
    stats = train_lora(model, tokenizer, texts, MINI_FORMAT, replace(SETTINGS, packing=packing), tmp_path)
    shown = [tokenizer.decode(ids[mask.bool()]) for ids, mask in seen]
    assert sorted(shown) == sorted("<s>" + text["text"] for text in texts)
    assert shown != ["<s>" + text["text"] for text in texts], "the Trainer shuffles"
    assert stats["texts"] == 11
    assert stats["tokens"] == sum(ArcDataset.count_tokens(text["text"]) + 1 for text in texts)
    n_replies = sum(ArcDataset.count_tokens(reply) for text in texts for reply in replies(text["text"]))
    assert stats["loss_tokens"] == n_replies
    assert stats["steps"] == 3


def without_last_token(features):
    return [{"input_ids": feature["input_ids"][:-1]} for feature in features]


def the_first_one_again(features):
    return features[:1] * len(features)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("steps", [-1, 2, 5])
@pytest.mark.parametrize("damage", [without_last_token, the_first_one_again, lambda features: features[1:], None])
def test_a_training_that_loses_anything_is_refused(lora, tmp_path, monkeypatch, packing, steps, damage):  # noqa: PLR0913
    class Damaging(training_tools.Collator):
        def __call__(self, features):
            return super().__call__(damage(features))

    if damage:
        monkeypatch.setattr(training_tools, "Collator", Damaging)
    settings = replace(SETTINGS, packing=packing, max_steps=steps, epochs=2, save_every=0)
    with pytest.raises(RuntimeError, match="reached the model") if damage else contextlib.nullcontext():
        train_lora(*lora, make_texts(), MINI_FORMAT, settings, tmp_path)


def test_a_step_does_not_go_through_all_modules(lora, tmp_path, monkeypatch):
    """For a small model on a GPU that takes longer than the step itself."""
    walk, walks = torch.nn.Module.named_modules, []

    def counted(self, *args, **options):
        walks[-1] += 1
        return walk(self, *args, **options)

    monkeypatch.setattr(torch.nn.Module, "named_modules", counted)
    for n_steps in (1, 2, 9):
        walks.append(0)
        train_lora(*lora, make_texts(), MINI_FORMAT, replace(SETTINGS, max_steps=n_steps), tmp_path)
    assert walks[1] == walks[2] > 0  # the first training has more to prepare


@pytest.mark.parametrize("packing", [True, False])
def test_activations_are_recomputed_if_asked_for(tmp_path, packing):
    """Also for a new adapter, whose model says that it is in training while its base is not."""
    counts = []
    for recompute in (False, True):
        model, passes = create_lora(make_model(MiniSize(1, 32, 2, 48), seed=1).eval(), r=4, alpha=4), []
        model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_, seen=passes: seen.append(0))
        settings = replace(SETTINGS, packing=packing, gradient_checkpointing=recompute, max_steps=1)
        train_lora(model, make_tokenizer(), make_texts(), MINI_FORMAT, settings, tmp_path)
        counts.append(len(passes))
        assert not any(module.training for module in model.modules())
    assert counts[1] == 2 * counts[0] > 0


class Measured:
    """A trainer whose passes take 10 bytes a token, 1 where the model recomputes, and that trains 1,000 weights."""

    data_collator = staticmethod(lambda texts: texts)

    def __init__(self, model, optimizer, recorded):
        self.model, self.measured, self.recorded = model, [], recorded
        self.args, self.recomputation = SimpleNamespace(gradient_checkpointing=True, optim=optimizer), None
        self.gradients = SimpleNamespace(flat=torch.zeros(1000))

    def memory_of_pass(self, batches, dtype):
        self.measured.append([[len(text["input_ids"]) for text in batch] for batch in batches])
        recomputes = all(layer.gradient_checkpointing for layer in self.model.model.layers)
        return (1 if recomputes else 10) * sum(self.measured[-1][-1])


@pytest.fixture
def decide(monkeypatch):
    """A function (settings, free bytes, recorded passes) -> the trainer that `_decide_recomputation` has looked at."""
    lengths = [800, 100, 300, 800, 200]  # the largest pass has two texts of 800 tokens, padded
    dataset = [{"input_ids": [0] * length} for length in lengths]
    monkeypatch.setattr(training_tools, "_on_gpu", lambda _: True)
    monkeypatch.setattr(training_tools, "autocast_dtype", lambda *_: None)
    monkeypatch.setattr(training_tools, "MEASURED_TOKENS", 700)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)

    def run(settings, free, recorded=None):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (free / training_tools.USED_MEMORY, 0))
        trainer = Measured(model := make_model(MiniSize(4, 32, 2, 48)), settings.optimizer, recorded)
        training_tools._decide_recomputation(trainer, model, dataset, lengths, settings)
        return trainer

    return run


BY_NEED = replace(SETTINGS, gradient_accumulation=1, gradient_checkpointing=None)


@pytest.mark.parametrize(("optimizer", "free", "keeps_all"), [
    ("adamw_torch_fused", 25_000, None), ("adamw_torch_fused", 24_000, 1600), ("adamw_8bit", 19_000, None),
    ("adamw_8bit", 18_000, 1600), ("adamw_8bit", 1_000, 0),
])  # fmt: skip
def test_activations_are_recomputed_where_the_largest_pass_would_not_fit(  # noqa: PLR0913
    decide, monkeypatch, capsys, optimizer, free, keeps_all
):
    dropout = free == 18_000
    monkeypatch.setattr(training_tools, "_has_dropout", lambda model: dropout)
    trainer = decide(replace(BY_NEED, optimizer=optimizer), free)
    assert trainer.args.gradient_checkpointing is False, "the layers are told before every pass"
    assert not any(layer.gradient_checkpointing for layer in trainer.model.model.layers)
    told = f"would need 0.0 GiB, 0.0 GiB are free for it; one of up to {keeps_all} tokens keeps all"
    assert (told in capsys.readouterr().out) == (keeps_all is not None) == (trainer.recomputation is not None)
    assert trainer.measured == [[[100], [100, 200, 300]]] * (1 if keeps_all is None else 2)
    if keeps_all is not None:
        assert trainer.recomputation.keeps_all() == keeps_all and trainer.recomputation.recomputed == 1.0
        assert trainer.recomputation.layers_for(1664) == (1 if keeps_all else 4)
        layer = trainer.model.model.layers[0]
        assert layer._gradient_checkpointing_func.keywords["preserve_rng_state"] == dropout


def test_recordings_are_left_half_of_the_memory(decide, capsys):
    trainer = decide(replace(BY_NEED, optimizer="adamw_torch_fused"), 25_000, SimpleNamespace())
    assert trainer.recomputation.layers_for(1664, RECORDED_SHARE) == 3 and trainer.recomputation.layers_for(1664) == 0
    assert "one of up to 850 tokens keeps all" in capsys.readouterr().out
    assert decide(replace(BY_NEED, optimizer="adamw_torch_fused"), 42_000, SimpleNamespace()).recomputation is None


def test_where_not_even_a_short_pass_fits_all_is_recomputed(decide, monkeypatch):
    monkeypatch.setattr(Measured, "memory_of_pass", lambda *_: math.inf)
    trainer = decide(BY_NEED, 10**9)
    assert trainer.recomputation.layers_for(1) == 4 and trainer.recomputation.keeps_all() == 0


def test_what_is_asked_for_is_not_decided_by_memory(decide):
    for given in (True, False):
        trainer = decide(replace(BY_NEED, gradient_checkpointing=given), 0)
        assert trainer.recomputation is None and not trainer.measured
        assert trainer.args.gradient_checkpointing is True, "as the settings had made it"


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_part_of_the_layers_recomputes_in_long_passes_and_nothing_changes(tmp_path, monkeypatch, share):
    asked = []

    def layers_for(self, *passed, layers_for=Recomputation.layers_for):
        asked.append((passed, layers_for(self, *passed)))
        return asked[-1][1]

    def scarce(trainer, model, *_):
        found = Recomputation.measured(model, 10**6, lambda: 10.0, lambda: 500.0 / share)
        trainer.recomputation = replace(found, recomputed=1.0)
        asked.clear()

    results = []
    monkeypatch.setattr(Recomputation, "layers_for", layers_for)
    monkeypatch.setattr(trainers, "memory_share", lambda recorded: share)
    for decide_recomputation in (lambda *_: None, scarce):
        monkeypatch.setattr(training_tools, "_decide_recomputation", decide_recomputation)
        model = create_lora(make_model(MiniSize(3, 32, 2, 48), seed=1), r=4, alpha=4, seed=3)
        stats = train_lora(model, make_tokenizer(), make_texts(6), MINI_FORMAT, SETTINGS, tmp_path)
        results.append((trainable_weights(model), stats["loss"]))
        assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert {passed[1] for passed, _ in asked} == {share} and {1, 2} <= {layers for _, layers in asked}, asked
    assert results[0][1] == results[1][1]
    assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in results[0][0])


@pytest.mark.parametrize("packing", [True, False])
def test_a_training_leaves_its_memory_at_once(lora, tmp_path, monkeypatch, no_garbage_collection, packing):
    made = []

    def create_optimizer(self, *args):
        made.append(weakref.ref(optimizer := create(self, *args)))
        return optimizer

    create = trainers.TwoRates.create_optimizer
    monkeypatch.setattr(trainers.TwoRates, "create_optimizer", create_optimizer)
    train_lora(*lora, make_texts(), MINI_FORMAT, replace(SETTINGS, packing=packing), tmp_path)
    assert made and made[0]() is None, "the states of its optimiser take the memory of the search"


def test_measuring_leaves_nothing_behind(tmp_path, monkeypatch):
    weights, decide_recomputation = [], training_tools._decide_recomputation

    def measured_first(trainer, model, dataset, lengths, settings):
        batch = trainer.data_collator([dataset[0], dataset[1]])
        assert trainer.memory_of_pass([batch, batch], torch.bfloat16) == 5
        decide_recomputation(trainer, model, dataset, lengths, settings)

    monkeypatch.setattr(trainers, "memory_taken", lambda function: function() or 5)
    for decide in (decide_recomputation, measured_first):
        monkeypatch.setattr(training_tools, "_decide_recomputation", decide)
        model = create_lora(make_model(MiniSize(2, 32, 2, 48), seed=1), r=4, alpha=4, seed=3)
        stats = train_lora(model, make_tokenizer(), make_texts(), MINI_FORMAT, SETTINGS, tmp_path)
        weights.append((trainable_weights(model), stats["loss"], stats["tokens"]))
    assert all(torch.equal(weights[0][0][name], weights[1][0][name]) for name in weights[0][0])
    assert weights[0][1:] == weights[1][1:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("scarce", [False, True])
def test_memory_decides_on_a_gpu(tmp_path, monkeypatch, capsys, scarce):
    model = create_lora(make_model(MiniSize(2, 64, 2, 96), seed=1).to("cuda", torch.bfloat16), r=8, alpha=4, seed=3)
    if scarce:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1000, 0))
    stats = train_lora(model, make_tokenizer(), make_texts(20), MINI_FORMAT,
                       replace(SETTINGS, gradient_checkpointing=None, optimizer="adamw_8bit"), tmp_path)  # fmt: skip
    assert ("activations are recomputed" in capsys.readouterr().out) == scarce == (stats.get("recomputed_above") == 0)
    assert stats["texts"] == 40 and stats["optimizer"] == "adamw_8bit"


def test_every_training_of_a_model_has_its_autocast(lora, tmp_path, monkeypatch):
    model, dtypes = lora[0], []
    monkeypatch.setattr(training_tools, "autocast_dtype", lambda model, mixed_precision: torch.bfloat16)
    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: dtypes.append(torch.is_autocast_enabled("cpu")))
    settings = replace(SETTINGS, max_steps=1, mixed_precision="bf16")
    for _ in range(2):
        train_lora(*lora, make_texts(), MINI_FORMAT, settings, tmp_path)
    assert set(dtypes) == {True} and "forward" not in vars(model)


def replies(text):
    """Return the replies of a text, end tokens included."""
    return [part.split("\nO")[1] + "</s>" for part in text.split("</s>")[:-1]]


def test_first_replies_are_masked(lora, tmp_path):
    model, tokenizer = lora
    texts = [text for text in make_texts(n=1) if text["key"].startswith("swap")]
    stats = train_lora(model, tokenizer, texts, MINI_FORMAT, replace(SETTINGS, mask_first_n_examples=1), tmp_path)
    assert stats["loss_tokens"] == ArcDataset.count_tokens(replies(texts[0]["text"])[1])


@pytest.mark.parametrize(("rate", "embedding_rate"), [(1e-3, 0.0), (0.0, 1e-3)])
def test_adapters_and_embeddings_have_their_own_learning_rate(lora, tmp_path, rate, embedding_rate):
    model, tokenizer = lora
    before = trainable_weights(model)
    adapters, embeddings = split_parameters(model)
    assert {name.split(".")[-2] if "lora" in name else name.split(".")[-4] for name in embeddings} == {
        "embed_tokens", "lm_head"}
    assert len(adapters) == 2 * 7
    settings = replace(SETTINGS, learning_rate=rate, embedding_learning_rate=embedding_rate, warmup_ratio=0.0)
    train_lora(model, tokenizer, make_texts(n=6), MINI_FORMAT, settings, tmp_path)
    changed = {name for name, value in trainable_weights(model).items() if not torch.equal(value, before[name])}
    assert changed == set(adapters if rate else embeddings)


def test_same_seed_gives_the_same_adapter_and_leaves_the_caller_alone(tmp_path):
    results = []
    for seed in (42, 42, 43):
        model = create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4)
        np.random.seed(seed)  # noqa: NPY002
        torch.manual_seed(seed)
        expected = np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        settings = replace(SETTINGS, seed=42 if seed == 42 else 1)
        train_lora(model, make_tokenizer(), make_texts(), MINI_FORMAT, settings, tmp_path)
        assert np.random.get_state()[1].tolist() == expected[0]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), expected[1])
        assert model.config.use_cache
        assert not model.training
        results.append(trainable_weights(model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert not all(torch.equal(results[0][name], results[2][name]) for name in results[0])


@pytest.mark.parametrize("save_every", [2, 4, 0])
def test_a_killed_training_goes_on_from_its_checkpoint(tmp_path, save_every):
    settings = replace(SETTINGS, save_every=2, epochs=2)
    texts = make_texts(n=8)  # 16 texts, 8 steps

    def fresh():
        return create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4)

    whole = fresh()
    expected_stats = train_lora(whole, make_tokenizer(), texts, MINI_FORMAT, settings, tmp_path / "whole")

    killed, calls = fresh(), []

    def kill(*_):
        calls.append(1)
        if len(calls) == 7:  # in step 4
            raise KeyboardInterrupt

    killed.register_forward_pre_hook(kill)
    with pytest.raises(KeyboardInterrupt):
        train_lora(killed, make_tokenizer(), texts, MINI_FORMAT, settings, tmp_path / "killed")
    (tmp_path / "killed" / "checkpoints" / "checkpoint-4").mkdir()  # one that was not completed
    resumed = fresh()
    settings = replace(settings, save_every=save_every)
    progress = []
    resumed.register_forward_pre_hook(lambda *_: progress.append(1))
    stats = train_lora(resumed, make_tokenizer(), texts, MINI_FORMAT, settings, tmp_path / "killed")
    assert len(progress) == 12, "steps 3 to 8, 2 batches each"
    assert {name: stats[name] for name in ("texts", "tokens", "loss_tokens", "steps", "loss")} == {
        name: expected_stats[name] for name in ("texts", "tokens", "loss_tokens", "steps", "loss")}
    assert stats["texts"] == 32, "both starts together"
    expected, weights = trainable_weights(whole), trainable_weights(resumed)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    finished = fresh()  # a start after the last checkpoint: nothing to train, but the adapter is complete
    again = train_lora(finished, make_tokenizer(), texts, MINI_FORMAT, settings, tmp_path / "killed")
    assert again["texts"] == 32 and again["seconds"] > stats["seconds"] / 2
    assert all(torch.equal(trainable_weights(finished)[name], expected[name]) for name in expected)
    histories = [json.loads((tmp_path / name / "training_loss.json").read_text()) for name in ("whole", "killed")]
    assert histories[0] == histories[1]
    assert [entry["step"] for entry in histories[0]] == list(range(1, 9))


@pytest.mark.parametrize(("change", "message"), [
    ({"texts": make_texts(n=1)}, "other texts: choose"),
    ({"settings": replace(SETTINGS, save_every=1, learning_rate=1)}, "other learning_rate: choose"),
    ({"model": create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=8)}, "other model or adapter: choose"),
    ({"model": create_lora(make_model(MiniSize(1, 32, 2, 48), seed=1), r=4, alpha=4)}, "other model or adapter"),
])
def test_checkpoints_of_another_training_are_refused(tmp_path, change, message):
    training = {"model": create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4), "tokenizer": make_tokenizer(),
                "texts": make_texts(n=2), "fmt_opts": MINI_FORMAT, "settings": replace(SETTINGS, save_every=1),
                "output_path": tmp_path}
    train_lora(**training)
    with pytest.raises(ValueError, match=message):
        train_lora(**training | change)


def test_an_optimiser_that_was_picked_stays_on_another_gpu(tmp_path, monkeypatch):
    training = {"tokenizer": make_tokenizer(), "texts": make_texts(n=2), "fmt_opts": MINI_FORMAT,
                "settings": replace(SETTINGS, save_every=1), "output_path": tmp_path}  # fmt: skip
    for gpu, name in (("one", "sgd"), ("another", "adamw_torch")):
        monkeypatch.setattr(training_tools, "_pick_optimizer", lambda *_, name=name: name)
        model = create_lora(make_model(MiniSize(1, 32, 2, 48)), r=4, alpha=4)
        assert train_lora(model, **training)["optimizer"] == "sgd", gpu


@pytest.mark.parametrize(("warmup", "told"), [(3, "comes to 67% of its peak"), (2, None)])
def test_a_training_that_is_all_warm_up_is_told(lora, tmp_path, capsys, warmup, told):
    train_lora(*lora, make_texts(n=3), MINI_FORMAT, replace(SETTINGS, warmup_steps=warmup, max_steps=3), tmp_path)
    printed = capsys.readouterr().out
    assert told in printed if told else "warm-up" not in printed


def test_settings_may_be_changed_before_the_first_checkpoint(lora, tmp_path):
    def run_out(*_):
        raise torch.OutOfMemoryError("no more")

    settings = replace(SETTINGS, save_every=1)
    hook = lora[0].register_forward_pre_hook(run_out)
    with pytest.raises(RuntimeError, match="or --max-tokens; delete .*checkpoints"):
        train_lora(*lora, make_texts(), MINI_FORMAT, settings, tmp_path)
    hook.remove()
    assert train_lora(*lora, make_texts(), MINI_FORMAT, replace(settings, batch_size=1), tmp_path)["texts"] == 6


def test_a_tiny_model_learns_a_task_by_heart(tmp_path):
    model = make_model(MiniSize(2, 64, 4, 128), seed=0).eval()
    model, tokenizer = create_lora(model, r=16, alpha=16), make_tokenizer()
    task = ArcDataset({"swap": {"train": PAIRS, "test": []}})
    settings = replace(SETTINGS, batch_size=1, gradient_accumulation=1, learning_rate=1e-2,
                       embedding_learning_rate=1e-2, epochs=60)
    texts = task.as_list(len_name="text", **MINI_FORMAT)
    stats = train_lora(model, tokenizer, texts, MINI_FORMAT, settings, tmp_path)
    assert stats["loss"] < 0.05
    prompt, reply = texts[0]["text"].rsplit("\nO", 1)
    found = infer_single(prompt + "\nO", (model, tokenizer), min_prob=0.5, max_new_tokens=20)
    assert [text for text, _ in found] == [reply]
    assert (tmp_path / "training_loss.png").read_bytes()[:4] == b"\x89PNG"


def test_gradient_checkpointing_changes_nothing(tmp_path):
    weights = []
    for checkpointing in (False, True):
        model = create_lora(make_model(MiniSize(2, 32, 2, 48)), r=4, alpha=4)
        settings = replace(SETTINGS, gradient_checkpointing=checkpointing)
        train_lora(model, make_tokenizer(), make_texts(), MINI_FORMAT, settings, tmp_path)
        weights.append(trainable_weights(model))
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-6) for name in weights[0])


def test_texts_are_refused_by_name():
    texts = make_texts(n=1)
    longest = max(texts, key=lambda text: ArcDataset.count_tokens(text["text"]))
    n_tokens = ArcDataset.count_tokens(longest["text"])
    assert max(tokenise_texts(make_tokenizer(), texts, n_tokens)["n_tokens"]) == n_tokens + 1
    with pytest.raises(ValueError, match=f"{longest['key']}.* {n_tokens} .*limit of {n_tokens - 1}"):
        tokenise_texts(make_tokenizer(), texts, n_tokens - 1)
    with pytest.raises(ValueError, match="no text"):
        tokenise_texts(make_tokenizer(), [])


def test_a_tokenizer_that_joins_characters_is_refused(bpe_tokenizer):
    with pytest.raises(ValueError, match="task-a: the tokenizer makes"):
        tokenise_texts(bpe_tokenizer, [{"key": "task-a", "text": "the cat sat"}])


def test_lack_of_memory_says_what_to_lower(lora, tmp_path):
    def run_out(*_):
        raise torch.OutOfMemoryError("no more")

    lora[0].register_forward_pre_hook(run_out)
    with pytest.raises(RuntimeError, match="batch size 2.*--batch-size.*--max-tokens"):
        train_lora(*lora, make_texts(), MINI_FORMAT, SETTINGS, tmp_path)


def test_a_loss_that_is_no_number_stops_the_training(lora, tmp_path):
    with torch.no_grad():
        next(iter(split_parameters(lora[0])[1].values())).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step 1: lower the learning rate"):
        train_lora(*lora, make_texts(), MINI_FORMAT, SETTINGS, tmp_path)


@pytest.mark.parametrize(("gib", "chosen"), [(8, "adamw_torch_fused"), (7.9, "adamw_8bit")])
def test_small_optimizer_states_where_the_large_ones_would_take_over_an_eighth_of_a_gpu(monkeypatch, gib, chosen):
    model = torch.nn.Linear(2**17, 2**10, bias=False, device="meta")  # 1 GiB of states
    assert training_tools._pick_optimizer(model, "auto") == "adamw_torch_fused"
    monkeypatch.setattr(training_tools, "_on_gpu", lambda _: True)
    properties = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(training_tools.torch.cuda, "get_device_properties", lambda _: properties)
    assert training_tools._pick_optimizer(model, "auto") == chosen
    assert training_tools._pick_optimizer(model, "adafactor") == "adafactor"


def test_products_in_bf16_where_the_cpu_has_them(lora, tmp_path, monkeypatch):
    model, tokenizer = lora
    dtypes = []
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    for able, name, expected in ((True, "bf16", torch.bfloat16), (False, "bf16", torch.float32),
                                 (True, "auto", torch.float32), (True, "no", torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        dtypes.clear()
        train_lora(model, tokenizer, make_texts(), MINI_FORMAT, replace(SETTINGS, mixed_precision=name), tmp_path)
        assert set(dtypes) == {expected}
