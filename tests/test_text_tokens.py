"""Tokens of texts by a table of characters: those of the tokenizer, whatever it is and whatever the text holds."""

import json
import random

import numpy as np
import pytest
from conftest import make_bpe_tokenizer, make_tiny_llama
from test_vocabulary_tools import STYLES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import text_tokens
from mini_model import make_tokenizer
from small_models import FORMAT_TEXT, shrink


def shrunk(make, **options):
    tokenizer = make()
    shrink(make_tiny_llama(tokenizer), tokenizer, **options)
    return tokenizer


def texts_for(tokenizer, n=30):
    """Texts of characters that the tokenizer may or may not know, with special tokens, whole and in part."""
    rng = random.Random(0)
    pieces = [*"0123456789\nIO ABab<>|_/é€\x80\x00", "<s", FORMAT_TEXT, *tokenizer.get_added_vocab()]
    return ["", "0", FORMAT_TEXT, *("".join(rng.choices(pieces, k=40)) for _ in range(n))]


def same_tokens(tokenizer, texts):
    """Compare with the tokenizer, which raises for a character that it can write in no way."""
    for special in (True, False):
        for text in texts:
            [ids] = text_tokens.token_ids(tokenizer, [text], add_special_tokens=special)
            assert ids.dtype == np.int32
            assert ids.tolist() == tokenizer(text, add_special_tokens=special)["input_ids"], (text, special)
        many = text_tokens.token_ids(tokenizer, texts, add_special_tokens=special)
        assert [ids.tolist() for ids in many] == tokenizer(texts, add_special_tokens=special)["input_ids"]


@pytest.mark.parametrize("make", STYLES, ids=lambda make: make.__name__)
def test_shrunk_tokenizers_have_a_table_that_gives_their_tokens(make):
    tokenizer = shrunk(make)
    same_tokens(tokenizer, texts_for(tokenizer))
    table = text_tokens._table_of(tokenizer)
    assert table is not None and table.ids_of(FORMAT_TEXT) is not None
    assert table.ids_of("é") is None is table.ids_of("\x80"), "left to the tokenizer"


def test_minis_tokenizer_has_one_too():
    tokenizer = make_tokenizer()
    same_tokens(tokenizer, texts_for(tokenizer))
    assert text_tokens._table_of(tokenizer).ids_of("I12\nO3</s>").tolist() == tokenizer("I12\nO3</s>")["input_ids"]


def with_prefix_space():
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(["<s>", *"0123456789Ġ"])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>")


def with_a_word():
    """A shrunk one that has kept a token of several characters, which is taken where a text's piece is just that."""
    tokenizer = make_bpe_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"], state["model"]["vocab"]["the"] = [], max(state["model"]["vocab"].values()) + 100
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)))


@pytest.mark.parametrize("make", [make_bpe_tokenizer, with_prefix_space, with_a_word])
def test_other_tokenizers_have_none(make):
    tokenizer = make()
    same_tokens(tokenizer, ["the cat sat", "0", "12 34"])
    assert text_tokens._table_of(tokenizer) is None


def test_a_tokenizer_that_is_changed_gets_another_table():
    tokenizer = make_tokenizer()
    assert text_tokens.token_ids(tokenizer, ["1<more>"])[0].tolist() == [1, 4]
    tokenizer.add_tokens(["<more>"])
    assert text_tokens.token_ids(tokenizer, ["1<more>"])[0].tolist() == [1, 4, 16]
    tokenizer = make_bpe_tokenizer()
    assert len(text_tokens.token_ids(tokenizer, ["the cat"])[0]) < 8
    shrink(make_tiny_llama(tokenizer), tokenizer)
    same_tokens(tokenizer, [FORMAT_TEXT])
    assert text_tokens._table_of(tokenizer) is not None


def test_many_texts_are_left_to_the_tokenizer_in_parts(monkeypatch):
    monkeypatch.setattr(text_tokens, "AT_ONCE", 3)
    tokenizer, texts = make_bpe_tokenizer(), [f"the cat {i}" for i in range(10)]
    assert [ids.tolist() for ids in text_tokens.token_ids(tokenizer, texts)] == tokenizer(texts)["input_ids"]
