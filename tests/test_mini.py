"""Mini: positions, cached decoding, packing, stored weights, the shipped model; pre-training in miniature."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from arc_downloader import download_arc_data
from arc_loader import ArcDataset
from inference_tools import infer_single
from mini_documents import DocumentStream
from mini_model import MINI_FORMAT, VOCABULARY, MiniSize, make_model, make_tokenizer
from mini_pretraining import (FakeNF4, Pretrainer, PretrainingSettings, attention_mask, is_trained,
                              learning_rate_factor, model_card, save_mini)
from model_tools import load_model, position_ids, position_rule

REPOSITORY = Path(__file__).parents[1]
SHIPPED = REPOSITORY / "pretrained_models" / "Mini"
TINY = MiniSize(layers=2, hidden_size=64, heads=2, intermediate_size=128)
CARD_FACTS = {"hardware": {"gpu": None, "cpu": "a CPU"}, "versions": {"torch": "1.2.3", "transformers": "4.5.6"}}
TEXT = "I12\n34\nO5\n6\n</s>I1\nO222\n</s>"


@pytest.fixture(scope="module")
def mini():
    return make_model(TINY).eval()


@pytest.fixture(scope="module")
def ids():
    return make_tokenizer()(TEXT, return_tensors="pt").input_ids


def positions_by_hand(tokens):
    """Walk over the tokens one by one: (grid, row, column) of each."""
    grid, row, column, found = 0, 0, 0, []
    for token in tokens:
        if token in "IO":
            grid, row, column = grid + 1, 0, 0
        elif grid and row == 0:
            row, column = 1, 1
        elif grid:
            column += 1
        found.append((grid, row, min(column, 63)))
        if token == "\n" and grid:
            row, column = min(row + 1, 63), 0
    return found


@examples(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(1, 30), min_size=2, max_size=2), min_size=1, max_size=6), st.integers(0, 3))
def test_positions_count_grids_rows_and_columns(shapes, seed):
    rng = np.random.default_rng(seed)
    tokens = []
    for height, width in shapes:
        tokens += ["I" if rng.integers(2) else "O"]
        for _ in range(height):
            tokens += [*("0123456789"[i] for i in rng.integers(10, size=width)), "\n"]
    config_only = make_model(TINY)
    packed = config_only.get_position_ids(torch.tensor([[1, *map(VOCABULARY.index, tokens)]]))[0].tolist()
    assert packed[0] == 0
    assert [(p // 4096, p // 64 % 64, p % 64) for p in packed[1:]] == positions_by_hand(tokens)


@examples(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 7, 13, 13, 14, 15]), min_size=1, max_size=90), st.booleans())
def test_positions_by_steps_equal_those_of_whole_sequences(tokens, long):
    model = make_model(TINY)
    tokens = [1, 14, *([13] * 70 if long else []), *tokens, *([5] * 70 if long else []), 13, 2]
    positions = position_ids(model, torch.tensor([tokens]))[0].tolist()
    follow = position_rule(model)
    steps = [follow(*step) for step in zip(positions[:-1], tokens[:-1], tokens[1:], strict=True)]
    assert steps == positions[1:]


def test_positions_restart_with_every_sequence_of_a_pack(mini, ids):
    alone = mini.get_position_ids(ids)
    assert torch.equal(mini.get_position_ids(torch.cat([ids, ids], dim=1)), torch.cat([alone, alone], dim=1))


def test_cached_decoding_equals_one_pass(mini, ids):
    whole, positions = mini(ids).logits, mini.get_position_ids(ids)
    begin = mini(ids[:, :10], use_cache=True)
    rest = mini(ids[:, 10:], past_key_values=begin.past_key_values, position_ids=positions[:, 10:])
    assert torch.allclose(torch.cat([begin.logits, rest.logits], dim=1), whole, atol=1e-5)
    with pytest.raises(ValueError, match="position_ids"):
        mini(ids[:, 10:], past_key_values=begin.past_key_values)


def test_generate_equals_greedy_by_hand(mini, ids):
    generated = mini.generate(ids[:, :10], attention_mask=torch.ones(1, 10), max_new_tokens=8, do_sample=False)
    by_hand = ids[:, :10]
    for _ in range(generated.shape[1] - 10):
        by_hand = torch.cat([by_hand, mini(by_hand).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(generated, by_hand)


def test_padding_changes_nothing(mini, ids):
    batch = make_tokenizer()([TEXT, "I1\n"], padding=True, return_tensors="pt")
    logits = mini(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.allclose(logits[0], mini(ids).logits[0], atol=1e-5)
    assert torch.allclose(logits[1, :4], mini(batch.input_ids[1:, :4]).logits[0], atol=1e-5)


def test_saved_model_loads_through_the_auto_classes(mini, ids, tmp_path):
    mini.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert torch.equal(model(ids).logits, mini(ids).logits)
    assert tokenizer(TEXT).input_ids == ids[0].tolist()
    assert tokenizer.decode(ids[0]) == "<s>" + TEXT


def test_longest_prompt_and_reply_work(mini):
    assert MINI_FORMAT["max_tokens"] >= 8452 + 931
    rng = np.random.default_rng(0)

    def grid(mark):
        return mark + "".join("".join(map(str, rng.integers(10, size=30))) + "\n" for _ in range(30))

    text = "".join(grid("IO"[i % 2]) for i in range(11))[: 8451 + 931]  # an end in the middle of a reply
    ids = torch.tensor([[VOCABULARY.index("<s>"), *map(VOCABULARY.index, text)]])
    positions = mini.get_position_ids(ids)
    with torch.no_grad():
        whole = mini(ids).logits
        begin = mini(ids[:, :8452], use_cache=True)
        parts = [begin.logits]
        for start, end in ((8452, 8453), (8453, 9382), (9382, 9383)):  # token by token at both ends
            parts.append(mini(ids[:, start:end], past_key_values=begin.past_key_values,
                              position_ids=positions[:, start:end]).logits)
    assert whole.shape[1] == 8452 + 931
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-5)


def stream(**options):
    pairs = [(np.full((3, 2 + i), i, np.uint8), np.full((2, 2), i, np.uint8)) for i in range(5)]
    settings = PretrainingSettings(max_tokens=200, source_weights={"a": 1.0}, **options)
    return DocumentStream({"a": {"t": pairs}}, settings)


def test_packed_rows_hold_whole_documents_that_do_not_see_each_other(mini):
    row = next(iter(stream(seed=3)))
    text = make_tokenizer().decode(row["input_ids"][row["document_ids"] < 200])
    documents = text.split("<s>")[1:]
    assert len(documents) > 1 and all(document.endswith("\n</s>") for document in documents)
    ids, numbers = row["input_ids"][None], row["document_ids"][None]
    logits = mini(
        input_ids=ids, attention_mask=attention_mask(numbers, False), position_ids=mini.get_position_ids(ids)
    ).logits
    second = numbers[0] == 1
    assert torch.allclose(logits[0, second], mini(ids[:, second]).logits[0], atol=1e-5)


def test_labels_are_all_replies_but_the_first():
    row = next(iter(stream(seed=4)))
    first = row["document_ids"] == 0
    replies = make_tokenizer().decode(row["input_ids"][first]).split("O")[1:]
    expected = "".join(reply.split("I")[0] for reply in replies[1:])
    labels = row["labels"][first]
    assert make_tokenizer().decode(labels[labels >= 0]) == expected


def test_rounding_in_training_is_what_is_stored():
    weight = torch.randn(64, 128)
    stored = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4", compress_statistics=False))
    assert torch.equal(FakeNF4("cpu")(weight), stored)


def test_documents_that_fit_no_row_are_not_drawn():
    big, small = ([(np.full((size, size), 1, np.uint8),) * 2] * 4 for size in (9, 1))
    sources = {"a": {"big": big, "small": small}}
    settings = PretrainingSettings(max_tokens=60, source_weights={"a": 1.0})
    rows = iter(DocumentStream(sources, settings))
    assert all((next(rows)["document_ids"] < 60).float().mean() > 0.5 for _ in range(40)), "rows are filled"
    with pytest.raises(ValueError, match="no document .* fits into 10 tokens: raise --max-tokens"):
        next(iter(DocumentStream(sources, replace(settings, max_tokens=10))))


def small_pretraining(colour=0, **options):
    """Return the stream of a short run whose tasks copy squares."""
    pairs = [(np.full((2, 2), i + colour, np.uint8), np.full((2, 2), i + colour, np.uint8)) for i in range(5)]
    options = {"max_steps": 60, "batch_size": 2, "max_tokens": 200, "warmup_steps": 2, "checkpoint_steps": 20} | options
    return DocumentStream({"a": {"t": pairs}}, PretrainingSettings(source_weights={"a": 1.0}, **options))


def test_pretraining_learns_and_goes_on_after_a_stop(tmp_path):
    documents = small_pretraining()
    assert not Pretrainer(make_model(TINY), documents, tmp_path).run(stop_after_minutes=0)
    second = Pretrainer(make_model(TINY), documents, tmp_path)
    assert second.step == 1
    assert second.run()
    assert second.history[-1]["loss"] < 0.7 * second.history[0]["loss"]
    assert second.summary()["tokens"] == 60 * 2 * 200
    assert second.summary()["seconds"] > 0


def test_pretraining_needs_no_warm_up_and_no_checkpoint_before_the_end(tmp_path, monkeypatch):
    saved = []
    trainer = Pretrainer(make_model(TINY), small_pretraining(max_steps=3, warmup_steps=0, checkpoint_steps=0), tmp_path)
    monkeypatch.setattr(trainer, "save", lambda: saved.append(trainer.step))
    assert learning_rate_factor(0, trainer.settings) == 1.0
    assert trainer.run() and saved == [3]


@pytest.mark.parametrize(("documents", "size", "message"), [
    (small_pretraining(batch_size=1), TINY, r"other values \(batch_size\): start"),
    (small_pretraining(seed=1, max_pairs=3), TINY, r"\(max_pairs, seed\)"),
    (small_pretraining(), replace(TINY, heads=1, hidden_size=32), r"\(hidden_size, num_attention_heads\)"),
    (small_pretraining(colour=1), TINY, r"\(data\)"),
])
def test_pretraining_does_not_go_on_with_other_values(tmp_path, documents, size, message):
    Pretrainer(make_model(TINY), small_pretraining(), tmp_path).save()
    assert Pretrainer(make_model(TINY), small_pretraining(checkpoint_steps=7), tmp_path)
    with pytest.raises(ValueError, match=message):
        Pretrainer(make_model(size), documents, tmp_path)


def test_lack_of_memory_in_pretraining_says_what_to_lower(tmp_path):
    def run_out(*_):
        raise torch.OutOfMemoryError("no more")

    trainer = Pretrainer(make_model(TINY), small_pretraining(), tmp_path)
    trainer._train_step = run_out
    with pytest.raises(RuntimeError, match="out of memory in pre-training: lower --batch-size or --max-tokens"):
        trainer.run()


def test_stored_model_is_the_trained_one_rounded_to_nf4(tmp_path):
    documents, model = stream(max_steps=0), make_model(TINY)
    save_mini(tmp_path / "Mini", Pretrainer(model, documents, tmp_path), CARD_FACTS)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "Mini").dequantize().float()
    for name, weight in model.named_parameters():
        stored = loaded.get_parameter(name)
        expected = FakeNF4("cpu")(weight) if "proj" in name else weight
        near = (stored - expected).abs() <= 0.02 * weight.abs().max()  # block scales are stored in 8 bits
        assert near.float().mean() > 0.99, name  # a weight between two levels can fall to either side
    card = (tmp_path / "Mini" / "README.md").read_text()
    assert "on one a CPU, seed 42" in card and "torch 1.2.3, transformers 4.5.6" in " ".join(card.split())
    assert is_trained(tmp_path / "Mini") and not is_trained(tmp_path)


# ---- the shipped model ----

@pytest.fixture(scope="module")
def shipped():
    """The shipped Mini and its tokenizer, in 32 bits."""
    return load_model(SHIPPED, bits=32, device="cpu")


def test_shipped_model_is_small_and_loads(shipped, ids):
    model, tokenizer = shipped
    assert (SHIPPED / "model.safetensors").stat().st_size <= 24e6
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(VOCABULARY)}
    assert tokenizer(TEXT).input_ids == make_tokenizer()(TEXT).input_ids == ids[0].tolist()
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == "<s>" + TEXT
    assert torch.equal(position_ids(model, ids), make_model(TINY).get_position_ids(ids))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, model(ids, position_ids=position_ids(model, ids)).logits, atol=1e-4)


def test_shipped_model_knows_an_easy_training_task(shipped, tmp_path):
    download_arc_data(tmp_path)
    tasks = ArcDataset.load_from_json(str(tmp_path / "arc-agi_training_challenges.json"))
    tasks = tasks.load_solutions(str(tmp_path / "arc-agi_training_solutions.json"))
    key = "a416b8f3_0"  # the input twice, side by side
    task = tasks.get_task(key, len_name="text", **MINI_FORMAT)[1]
    found = infer_single(task["input"], shipped, min_prob=0.5, max_new_tokens=100)
    assert [(tasks.decode(text, "\n", key)[1], nll < 0.5) for text, nll in found] == [(True, True)]  # measured: 0.04


def test_model_card_tells_what_the_record_tells():
    record = json.loads((REPOSITORY / "results" / "run_finetuning_Mini.json").read_text())
    settings = PretrainingSettings(**record["config"]["settings"])
    assert (SHIPPED / "README.md").read_text() == model_card(record["training"], settings, record)
