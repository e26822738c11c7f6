"""InputMaskingDataCollator: which tokens count in the loss."""


import pytest
import torch

import mini_model
import model_tools
from small_models import mistral_style, small_pair

@pytest.fixture(scope="module")
def small_tokenizer():
    return small_pair()[1]


def labelled(batch, tokenizer, row=0):
    """Return the label text of one row, runs of labels divided by ``|``."""
    labels = batch["labels"][row].tolist()
    text = "".join(tokenizer.decode([i]) if i != -100 else "|" for i in labels)
    return "|".join(part for part in text.split("|") if part)


def collate(tokenizer, texts, **options):
    collator = model_tools.InputMaskingDataCollator(
        instruction_template="I", response_template="\n+/-=O", mlm=False, tokenizer=tokenizer, **options
    )
    return collator([{"input_ids": tokenizer(text)["input_ids"], "attention_mask": None} for text in texts])


def document(tokenizer, *pairs):
    return "ABC" + "".join(f"I{query}\n+/-=O{reply}\n{tokenizer.eos_token}" for query, reply in pairs)


def test_collator_labels_replies(small_tokenizer):
    end = "\n" + small_tokenizer.eos_token
    texts = [document(small_tokenizer, ("1\n2", "3\n4"), ("55", "6")), document(small_tokenizer, ("7", "8"))]
    batch = collate(small_tokenizer, texts)
    assert labelled(batch, small_tokenizer, 0) == f"3\n4{end}|6{end}"
    assert labelled(batch, small_tokenizer, 1) == f"8{end}"
    lengths = [len(small_tokenizer(text)["input_ids"]) for text in texts]
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, text in enumerate(texts):
        ids = batch["input_ids"][row]
        assert ids[: lengths[row]].tolist() == small_tokenizer(text)["input_ids"]
        assert (ids[lengths[row] :] == small_tokenizer.pad_token_id).all()
        unmasked = batch["labels"][row] != -100
        assert torch.equal(ids[unmasked], batch["labels"][row][unmasked])


@pytest.mark.parametrize(("n", "expected"), [(0, "123"), (1, "23"), (2, "3"), (3, "3"), (9, "3")])
def test_collator_masks_first_replies_but_never_the_last(small_tokenizer, n, expected):
    end = "\n" + small_tokenizer.eos_token
    text = document(small_tokenizer, ("0", "1"), ("0", "2"), ("0", "3"))
    batch = collate(small_tokenizer, [text, document(small_tokenizer, ("0", "9"))], mask_first_n_examples=n)
    assert labelled(batch, small_tokenizer) == "|".join(digit + end for digit in expected)
    assert labelled(batch, small_tokenizer, 1) == "9" + end


def test_collator_keeps_the_end_token_that_is_padding_too(small_tokenizer):
    tokenizer = small_pair()[1]
    tokenizer.pad_token = tokenizer.eos_token
    texts = [document(tokenizer, ("1", "2")), document(tokenizer, ("1", "2"), ("3", "4"))]
    batch = collate(tokenizer, texts)
    short = len(tokenizer(texts[0])["input_ids"])
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert (batch["labels"][0, short:] == -100).all() and (batch["attention_mask"][0, short:] == 0).all()
    assert (batch["input_ids"][0, short:] == tokenizer.eos_token_id).all()


def test_collator_shortens_nothing(small_tokenizer):
    text = document(small_tokenizer, *[("0" * 900, "1" * 900)] * 20)
    ids = small_tokenizer(text)["input_ids"]
    batch = collate(small_tokenizer, [text])
    assert batch["input_ids"][0].tolist() == ids and (batch["labels"] == ids[-3]).sum() == 20 * 900


def test_collator_errors(small_tokenizer):
    with pytest.raises(ValueError, match="text 1 of the batch has no reply.*ABCI123"):
        collate(small_tokenizer, [document(small_tokenizer, ("1", "2")), "ABCI123\n"])
    with pytest.raises(ValueError, match="mlm"):
        model_tools.InputMaskingDataCollator("I", "O", small_tokenizer, mlm=True)
    tokenizer = mistral_style()
    with pytest.raises(ValueError, match="vocabulary"):
        model_tools.InputMaskingDataCollator("I", "", tokenizer)


def test_collator_with_a_tokenizer_that_puts_spaces_in_front():
    tokenizer = mistral_style()
    text = "AI1\n+/-=O23\n</s>I4\n+/-=O5\n</s>"
    ids = tokenizer(text)["input_ids"]
    collator = model_tools.InputMaskingDataCollator("I", "\n+/-=O", tokenizer)
    labels = collator([{"input_ids": ids}])["labels"][0]
    assert tokenizer.decode(labels[labels != -100]) == "23\n</s>5\n</s>"


def test_collator_with_mini():
    tokenizer = mini_model.make_tokenizer()
    form = mini_model.MINI_FORMAT
    collator = model_tools.InputMaskingDataCollator(form["query_beg"], form["reply_beg"], tokenizer)
    batch = collator([{"input_ids": tokenizer("I1\nO2\n</s>I33\nO4\n</s>")["input_ids"]}])
    assert labelled(batch, tokenizer) == "2\n</s>|4\n</s>"
