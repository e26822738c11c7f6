"""Vocabulary shrinking: cut a pretrained model and its BPE tokenizer down to the few tokens that grids need.

Terms: *mapping* = {old token id: new token id} of the tokens that stay, new ids in the order of the old ones.
With one token per character and no merges every grid cell is one token, and the two vocabulary matrices of the model
shrink from hundreds of thousands of rows to fewer than a hundred ("The LLM ARChitect", 2024, section on tokenization).
``model_tools`` re-exports the public names.
"""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import nn

_TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def save_tokenizer(path, tokenizer):
    """Save a tokenizer into a folder, without a SentencePiece file: that would bring dropped tokens back."""
    tokenizer.save_pretrained(path)
    (Path(path) / "tokenizer.model").unlink(missing_ok=True)


def get_or_map_special_tokens(data, mapping=None):
    """Collect the token ids that a post-processor inserts and, given a mapping, renumber them in place.

    Args:
        data: the ``post_processor`` part of a ``tokenizer.json``, or any part of it.
        mapping: {old id: new id}; ids that are not in it are taken out.

    Returns:
        set of the (old) ids found.

    Source: published ``get_or_map_special_tokens``; differs: a dropped token leaves the templates too, which otherwise
    would no longer be readable.
    """
    if isinstance(data, list):
        return set().union(*(get_or_map_special_tokens(part, mapping) for part in data))
    if not isinstance(data, dict):
        return set()
    special = data.get("special_tokens")
    if special is None:
        return set().union(*(get_or_map_special_tokens(part, mapping) for part in data.values()))
    found = {i for entry in special.values() for i in entry["ids"]}
    if mapping is not None:
        kept = {name for name, entry in special.items() if all(i in mapping for i in entry["ids"])}
        data["special_tokens"] = {
            name: {**special[name], "ids": [mapping[i] for i in special[name]["ids"]]} for name in kept
        }
        for template in ("single", "pair"):
            pieces = data.get(template) or []
            data[template] = [p for p in pieces if "SpecialToken" not in p or p["SpecialToken"]["id"] in kept]
    return found


def _without_metaspace(pre_tokenizer):
    """Return a pre-tokenizer description without the steps that write spaces as ``▁`` and put one in front."""
    if pre_tokenizer is None or pre_tokenizer["type"] == "Metaspace":
        return None
    if pre_tokenizer["type"] == "Sequence":
        steps = [step for step in map(_without_metaspace, pre_tokenizer["pretokenizers"]) if step is not None]
        return {**pre_tokenizer, "pretokenizers": steps} if steps else None
    return pre_tokenizer


def _read_state(tokenizer):
    """Return the state of a fast tokenizer as a dict.

    Raises:
        TypeError: for a tokenizer that is not backed by the ``tokenizers`` library.
    """
    if not tokenizer.is_fast:
        raise TypeError(f"{type(tokenizer).__name__} is a slow tokenizer: load the tokenizer.json of the model instead")
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _write_state(tokenizer, state):
    """Replace the state of a fast tokenizer."""
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def remove_tokenizer_normalizer(tokenizer):
    """Take out, in place, the steps that rewrite a text before it is cut into tokens.

    Source: published ``remove_tokenizer_normalizer``; differs: a Metaspace pre-tokenizer, which newer files have in
    place of the normalizer, goes as well.
    """
    state = _read_state(tokenizer)
    rest = _without_metaspace(state.get("pre_tokenizer"))
    if state.get("normalizer") is not None or rest != state.get("pre_tokenizer"):
        state["normalizer"], state["pre_tokenizer"] = None, rest
        _write_state(tokenizer, state)


def _forget_missing_roles(tokenizer):
    """Unset the special tokens that are no longer in the vocabulary, so that loading does not append them again."""
    vocabulary = tokenizer.get_vocab()
    for role in _TOKEN_ROLES:
        token = getattr(tokenizer, role, None)
        if token is not None and token not in vocabulary:
            setattr(tokenizer, role, None)
            tokenizer.init_kwargs.pop(role, None)
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", None) or []]
    if any(token not in vocabulary for token in extra):
        tokenizer.extra_special_tokens = [token for token in extra if token in vocabulary]
        tokenizer.init_kwargs.pop("extra_special_tokens", None)
    tokenizer.init_kwargs.pop("added_tokens_decoder", None)


def shrink_tokenizer_vocab(tokenizer, keep_indices, keep_special=True, remove_unk=False):
    """Reduce a BPE tokenizer, in place, to some of its tokens and drop all merges.

    Args:
        tokenizer: fast tokenizer with a BPE model.
        keep_indices: ids of the tokens to keep.
        keep_special: also keep the special tokens in use and those that the post-processor inserts.
        remove_unk: drop the unknown token, unless it is the start, end or padding token too.

    Returns:
        {old id: new id}, new ids in the order of the old.

    Raises:
        ValueError: for a tokenizer without a BPE model.

    Source: published ``shrink_tokenizer_vocab``; differs: ``keep_indices`` is not changed, special tokens that are gone
    are unset, and an unknown token in another use stays.
    """
    state = _read_state(tokenizer)
    if state["model"]["type"] != "BPE":
        raise ValueError(f"only BPE vocabularies can be shrunk, this tokenizer has a {state['model']['type']} model")
    old_vocabulary = tokenizer.get_vocab()
    keep = set(keep_indices)
    if keep_special:
        keep |= set(tokenizer.all_special_ids) | get_or_map_special_tokens(state.get("post_processor"))
    if remove_unk and tokenizer.unk_token_id is not None:
        keep -= {tokenizer.unk_token_id} - {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    keep &= set(old_vocabulary.values())
    mapping = {old: new for new, old in enumerate(sorted(keep))}

    vocabulary = {token: mapping[old] for token, old in old_vocabulary.items() if old in mapping}
    model = state["model"]
    model["vocab"] = dict(sorted(vocabulary.items(), key=lambda entry: entry[1]))
    model["merges"] = []
    if model.get("unk_token") not in vocabulary:
        model["unk_token"] = None
    added = [{**token, "id": mapping[token["id"]]} for token in state["added_tokens"] if token["id"] in mapping]
    state["added_tokens"] = sorted(added, key=lambda token: token["id"])
    get_or_map_special_tokens(state.get("post_processor"), mapping)
    _write_state(tokenizer, state)
    _forget_missing_roles(tokenizer)
    if tokenizer.get_vocab() != vocabulary:
        raise RuntimeError("the shrunk tokenizer numbers its tokens differently than planned")
    return mapping


def _token_id_fields(config):
    """Yield (name, value) of all fields of a configuration that hold token ids."""
    for name, value in config.to_dict().items():
        if name.endswith(("token_id", "token_ids")) and value is not None:
            yield name, value


def _map_token_ids(config, mapping):
    """Renumber all token ids of a configuration in place; dropped ids become None and leave lists."""
    for name, value in _token_id_fields(config):
        if isinstance(value, list):
            value = [mapping[i] for i in value if i in mapping] or None
        else:
            value = mapping.get(value)
        setattr(config, name, value)


@torch.no_grad()
def shrink_model_embeddings(model, mapping):
    """Reduce the vocabulary rows of a model, in place, and renumber the token ids of its configurations.

    Args:
        model: causal language model; input and output embeddings may be tied, and stay so.
        mapping: {old id: new id} with new ids 0..n-1.

    Raises:
        ValueError: where the embeddings are quantised, or the mapping names a row that does not exist.

    Source: published ``shrink_model_embeddings``; differs: dropped ids leave lists of ids instead of standing there as
    null, which current libraries refuse to read.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    old_rows = torch.tensor(sorted(mapping, key=mapping.get), dtype=torch.long)
    for part in (embeddings, head):
        if not torch.is_floating_point(part.weight):
            raise ValueError("the embeddings are quantised: shrink the vocabulary before quantising them")
        if old_rows.max() >= part.weight.shape[0]:
            raise ValueError(f"token id {int(old_rows.max())} has no embedding: the model has {part.weight.shape[0]}")

    def rows(parameter):
        kept = parameter.detach().index_select(0, old_rows.to(parameter.device))
        return nn.Parameter(kept, requires_grad=parameter.requires_grad)

    tied = head.weight is embeddings.weight
    embeddings.weight = rows(embeddings.weight)
    head.weight = embeddings.weight if tied else rows(head.weight)
    if getattr(head, "bias", None) is not None:
        head.bias = rows(head.bias)
    embeddings.num_embeddings = head.out_features = len(mapping)
    for owner in (model.config, *model.modules()):  # decoder stacks remember the size and the padding row too
        if hasattr(owner, "vocab_size"):
            owner.vocab_size = len(mapping)
        if hasattr(owner, "padding_idx"):
            owner.padding_idx = mapping.get(owner.padding_idx)
    for config in (model.config, model.generation_config):
        _map_token_ids(config, mapping)


def keep_single_char_tokens(  # noqa: PLR0913
    model, tokenizer, keep=None, keep_norm=False, keep_model_tok=True, keep_special=True, remove_unk=False
):
    """Reduce the vocabulary of a model and its tokenizer, in place, to single characters.

    Args:
        model: causal language model without adapters.
        tokenizer: its fast BPE tokenizer.
        keep: tokens to keep in the tokenizer's own spelling (a line end is ``tokenizer.tokenize('\\n')``);
            None keeps all tokens of one character.
        keep_norm: keep the steps that rewrite a text before it is cut into tokens.
        keep_model_tok: keep the tokens that the model's configurations name.
        keep_special: keep the special tokens in use.
        remove_unk: drop the unknown token; characters without a token are then lost when a text is tokenized.

    Returns:
        {old id: new id}, new ids in the order of the old.

    Raises:
        ValueError: for tokens that the tokenizer does not have, or a model with an adapter.

    Source: published ``keep_single_char_tokens``.
    """
    if hasattr(model, "peft_type"):
        raise ValueError("shrink the vocabulary before adding a LoRA adapter")
    vocabulary = tokenizer.get_vocab()
    if keep is None:
        keep = [token for token in vocabulary if len(token) == 1]
    unknown = [token for token in keep if token not in vocabulary]
    if unknown:
        raise ValueError(f"not in the vocabulary: {unknown}; spell tokens as tokenizer.tokenize() does")
    if not keep_norm:
        remove_tokenizer_normalizer(tokenizer)
    indices = {vocabulary[token] for token in keep}
    if keep_model_tok:
        for config in (model.config, model.generation_config):
            for _, value in _token_id_fields(config):
                indices.update(value if isinstance(value, list) else [value])
    mapping = shrink_tokenizer_vocab(tokenizer, indices, keep_special=keep_special, remove_unk=remove_unk)
    shrink_model_embeddings(model, mapping)
    return mapping
