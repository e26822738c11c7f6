"""Tests of vocabulary shrinking: same logits on the kept tokens, every character round-trips, token ids remapped."""


import pytest
import torch
from conftest import make_bpe_tokenizer, make_tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import model_tools
from small_models import FORMAT_TEXT, KEPT, ids_of, logits_of, mistral_style, shrink, smol_style

def nemo_style():
    """Byte-level BPE with its special tokens, pad and unknown among them, in front."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<SPECIAL_4>"]
    tokens = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġa", "12"]
    core = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, [("Ġ", "a"), ("1", "2")], unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_special_tokens(special)
    core.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<SPECIAL_4>"],
    )  # fmt: skip


def metaspace_style():
    """As ``mistral_style``, in the newer spelling with a pre-tokenizer instead of a normalizer."""
    tokenizer = mistral_style()
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


STYLES = [make_bpe_tokenizer, mistral_style, metaspace_style, nemo_style, smol_style]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("make_tokenizer", STYLES, ids=lambda make: make.__name__)
def test_shrinking_keeps_logits_and_text(make_tokenizer, tied, tmp_path):
    tokenizer = make_tokenizer()
    full, small = (make_tiny_llama(tokenizer, tied=tied) for _ in range(2))
    old_vocabulary = tokenizer.get_vocab()
    mapping = shrink(small, tokenizer)
    assert list(mapping.values()) == list(range(len(mapping))) == list(range(small.config.vocab_size))
    assert list(mapping) == sorted(mapping)
    assert tokenizer.get_vocab() == {t: mapping[i] for t, i in old_vocabulary.items() if i in mapping}
    back = {new: old for old, new in mapping.items()}

    model_tools.save_model_and_tokenizer(tmp_path / "small", small, tokenizer)
    loaded, loaded_tokenizer = model_tools.load_model(tmp_path / "small", bits=32, device="cpu")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied == loaded.config.tie_word_embeddings
    for tok in (tokenizer, loaded_tokenizer):
        assert len(tok) == len(mapping)
        for text in [*KEPT, "\n", FORMAT_TEXT, FORMAT_TEXT + tok.eos_token]:
            ids = tok(text, add_special_tokens=False)["input_ids"]
            assert len(ids) == (len(text) if tok.eos_token not in text else len(FORMAT_TEXT) + 1)
            assert tok.decode(ids) == text
    ids = ids_of(tokenizer)
    assert ids == ids_of(loaded_tokenizer)
    expected = logits_of(full, [back[i] for i in ids])[:, list(mapping)]
    for model in (small, loaded):
        torch.testing.assert_close(logits_of(model, ids), expected, atol=1e-5, rtol=1e-5)


def test_shrinking_maps_token_ids(tiny_llama):
    model, tokenizer = tiny_llama
    reserved, cat = tokenizer.convert_tokens_to_ids(["<|reserved|>", "Ġcat"])
    eos = tokenizer.eos_token_id
    model.config.eos_token_id = model.generation_config.eos_token_id = [reserved, cat, eos]
    model.config.cls_token_id = cat
    mapping = model_tools.keep_single_char_tokens(model, tokenizer, keep=list("ab"), keep_model_tok=False)
    assert set(mapping) == {tokenizer.backend_tokenizer.token_to_id("a") + min(mapping)} | set(mapping)
    assert tokenizer.get_vocab().keys() == {"a", "b", *tokenizer.all_special_tokens}
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == [tokenizer.eos_token_id]
        assert config.pad_token_id == tokenizer.pad_token_id and config.bos_token_id == tokenizer.bos_token_id
    assert model.config.cls_token_id is None
    assert model.model.embed_tokens.padding_idx == tokenizer.pad_token_id
    assert tokenizer("ab")["input_ids"] == [tokenizer.bos_token_id, 0, 1]  # the post-processor was renumbered


def test_shrinking_options(bpe_tokenizer):
    model = make_tiny_llama(bpe_tokenizer)
    reserved = bpe_tokenizer.convert_tokens_to_ids("<|reserved|>")
    model.config.eos_token_id = [reserved, bpe_tokenizer.eos_token_id]
    mapping = model_tools.keep_single_char_tokens(model, bpe_tokenizer)  # all single characters and the model's tokens
    assert reserved in mapping and len(mapping) == 256 + 4
    assert model.config.eos_token_id == [mapping[reserved], bpe_tokenizer.eos_token_id]

    tokenizer = make_bpe_tokenizer()
    model = make_tiny_llama(tokenizer)
    model_tools.keep_single_char_tokens(model, tokenizer, keep=list("ab"), keep_special=False, keep_model_tok=False)
    assert tokenizer.get_vocab() == {"a": 0, "b": 1} and tokenizer.eos_token is None
    assert tokenizer("ba")["input_ids"] == [1, 0]
    assert model.config.eos_token_id is None and model.config.bos_token_id is None

    with pytest.raises(ValueError, match="'long'"):
        model_tools.keep_single_char_tokens(model, tokenizer, keep=["a", "long"])


def test_unknown_token_stays_where_it_has_another_use():
    for make, kept in ((nemo_style, False), (smol_style, False)):
        tokenizer = make()
        shrink(make_tiny_llama(tokenizer), tokenizer)
        assert (tokenizer.unk_token is not None) == kept
    tokenizer = smol_style()
    tokenizer.bos_token = "<|endoftext|>"
    shrink(make_tiny_llama(tokenizer), tokenizer)
    assert tokenizer.bos_token in tokenizer.get_vocab()
