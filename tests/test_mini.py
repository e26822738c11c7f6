"""Mini: positions, cached decoding, generation, packing, stored weights; pre-training in miniature."""

import numpy as np
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from mini_documents import DocumentStream
from mini_model import MINI_FORMAT, VOCABULARY, MiniSize, make_model, make_tokenizer
from mini_pretraining import FakeNF4, Pretrainer, PretrainingSettings, attention_mask, is_trained, save_mini

TINY = MiniSize(layers=2, hidden_size=64, heads=2, intermediate_size=128)
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


def test_longest_prompt_and_reply_fit():
    assert MINI_FORMAT["max_tokens"] >= 8452 + 931


def stream(**options):
    pairs = [(np.full((3, 2 + i), i, np.uint8), np.full((2, 2), i, np.uint8)) for i in range(5)]
    settings = PretrainingSettings(row_tokens=200, source_weights={"a": 1.0}, **options)
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


def test_pretraining_learns_and_goes_on_after_a_stop(tmp_path):
    pairs = [(np.full((2, 2), i, np.uint8), np.full((2, 2), i, np.uint8)) for i in range(5)]
    options = {"steps": 60, "rows_per_step": 2, "row_tokens": 200, "warmup_steps": 2, "checkpoint_steps": 20}
    documents = DocumentStream({"a": {"t": pairs}}, PretrainingSettings(source_weights={"a": 1.0}, **options))
    assert not Pretrainer(make_model(TINY), documents, tmp_path).run(stop_after_minutes=0)
    second = Pretrainer(make_model(TINY), documents, tmp_path)
    assert second.step == 1
    assert second.run()
    assert second.history[-1]["loss"] < 0.7 * second.history[0]["loss"]
    assert second.summary()["tokens"] == 60 * 2 * 200


def test_stored_model_is_the_trained_one_rounded_to_nf4(tmp_path):
    documents, model = stream(steps=0), make_model(TINY)
    save_mini(tmp_path / "Mini", Pretrainer(model, documents, tmp_path), {"gpu": None, "cpu": "a CPU"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "Mini").dequantize().float()
    for name, weight in model.named_parameters():
        stored = loaded.get_parameter(name)
        expected = FakeNF4("cpu")(weight) if "proj" in name else weight
        near = (stored - expected).abs() <= 0.02 * weight.abs().max()  # block scales are stored in 8 bits
        assert near.float().mean() > 0.99, name  # a weight between two levels can fall to either side
    assert "on one a CPU, seed 42" in (tmp_path / "Mini" / "README.md").read_text()
    assert is_trained(tmp_path / "Mini") and not is_trained(tmp_path)
