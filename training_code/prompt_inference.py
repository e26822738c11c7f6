"""One prompt on the model: its replies and the NLL of a given reply, by the plain search, with the result cache.

Source: published ``infer_single`` and ``calc_score``.
"""

import hashlib
import json

from model_tools import model_identity
from plain_search import dfs, generate_replies, is_unsloth_model, reply_nll
from text_tokens import token_ids


# fields of a generation configuration that do not bear on greedy replies: those of sampling (which is switched off),
# beams, tokens and lengths (which are given), and speed and form of the output
_NO_MATTER = frozenset({
    "do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "early_stopping", "length_penalty", "bos_token_id", "eos_token_id", "pad_token_id", "max_length", "max_new_tokens",
    "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "transformers_version", "_from_model_config", "_commit_hash",
})  # fmt: skip
# values with which fields that could bear on them do not
_NEUTRAL = {"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "diversity_penalty": 0, "min_length": 0,
            "min_new_tokens": 0, "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0,
            "encoder_no_repeat_ngram_size": 0, "guidance_scale": 1, "remove_invalid_values": False}  # fmt: skip


def load_pair(model_tok):
    """Return (model, tokenizer) from the pair itself or a function that returns it, ready for inference."""
    model, tokenizer = model_tok() if callable(model_tok) else model_tok
    if is_unsloth_model(model):
        from unsloth import FastLanguageModel  # heavy, needs a GPU

        FastLanguageModel.for_inference(model)
    model.eval()  # a trainer leaves dropout and gradient checkpointing on
    return model, tokenizer


def with_model_id(model_tok, options):
    """Return ``options`` (of ``infer_single``; any ``min_prob`` to score) with a ``model_id`` if a cache needs one.

    It stands for the model and for what else decides a reply without being said in the options: the end token, and,
    where ``model.generate`` replies, the recommendations that came with the model (its generation configuration).
    """
    if options.get("cache") is None or options.get("model_id") is not None:
        return options
    model, tokenizer = load_pair(model_tok)
    model_id = f"{model_identity(model)} end {tokenizer.eos_token_id}"
    recommended = getattr(model, "generation_config", None)
    if options.get("min_prob") is None and recommended is not None:
        fields = json.loads(recommended.to_json_string())
        for name in [name for name in fields if name.endswith(("_token_id", "_version")) or name.startswith("_")]:
            del fields[name]  # the tokenizer's tokens are taken
        model_id += " generate " + hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return {**options, "model_id": model_id}


def generates_greedily(model):
    """Tell whether ``generate_replies`` without options of its own takes the most probable token at every step.

    What came with the model (its generation configuration) can hold more that ``model.generate`` heeds, such as
    ``repetition_penalty`` or ``suppress_tokens``: whatever is not known to be harmless counts as such.
    """
    recommended = getattr(model, "generation_config", None)
    fields = {} if recommended is None else recommended.to_diff_dict()
    return all(value is None or name in _NO_MATTER or value == _NEUTRAL.get(name) for name, value in fields.items())


def prompt_tokens(tokenizer, prompts):
    """Return a list of tokens for each of the texts ``prompts``.

    Raises:
        ValueError: for an empty one.
    """
    if not all(prompts):
        raise ValueError("the prompt is empty: a key that names no test input ('<task>', not '<task>_0') has no query")
    # a tokenizer that begins texts with a token of its own does it here
    return [ids.tolist() for ids in token_ids(tokenizer, list(prompts))]


def reply_tokens(tokenizer, replies):
    """Return a list of tokens for each of the texts ``replies``."""
    return [ids.tolist() for ids in token_ids(tokenizer, list(replies), add_special_tokens=False)]


def calc_score(input, reply, model_tok, cache=None, model_id=None, **ignored):  # noqa: PLR0913
    """Return the NLL in nats of the text ``reply`` (with its end token) after the text ``input``.

    Args:
        model_tok: (model, tokenizer) or a function that returns it.
        cache: a ``ResultCache`` or published-style decorator; ``model_id`` is part of its keys.
        model_id: text that stands for model and tokenizer, if known; worked out otherwise when there is a cache, for
            which ``model_tok`` is called even if the result is kept.
        ignored: whatever else a formatted task holds (``calc_score(**fmt, model_tok=...)``).

    Source: published function of this name. differs: computes the logits of the reply only; prompt and reply become
    tokens separately, as in the search, so no token can reach over the border.
    """
    if cache is not None:
        model_id = with_model_id(model_tok, dict(cache=cache, model_id=model_id, min_prob=1))["model_id"]
        return float(cache(calc_score)(input=input, reply=reply, model_tok=model_tok, model_id=model_id))
    model, tokenizer = load_pair(model_tok)
    return reply_nll(model, prompt_tokens(tokenizer, [input])[0], reply_tokens(tokenizer, [reply])[0])


def infer_single(prompt, model_tok, guess=None, min_prob=None, cache=None, model_id=None, stats=None, **generate):  # noqa: PLR0913
    """Return the replies to one prompt as [(text with end token, NLL in nats)], best first.

    Args:
        prompt: text up to the beginning of the reply.
        model_tok: (model, tokenizer) or a function that returns it.
        guess: a text that the reply may be like, alone or (as published) with the prompt in front; speed only.
        min_prob: threshold of the search; None = ``model.generate``, greedily unless ``generate`` or the model's
            generation configuration says otherwise.
        cache: a ``ResultCache`` or published-style decorator; ``model_id`` is part of its keys.
        model_id: text that stands for model and tokenizer, if known; worked out otherwise when there is a cache, for
            which ``model_tok`` is called even if the result is kept.
        stats: a ``SearchStats`` to add to; searches only, and not with a cache, whose answers cost nothing.
        generate: ``max_new_tokens`` (needed in both cases) and options of ``model.generate``.

    Source: published function of this name. differs: prompt and guess become tokens separately; the model's identity
    is part of the cache key.
    """
    if cache is not None:
        if stats is not None:
            raise ValueError("counting (stats) and caching (cache) exclude each other: measure without a cache")
        model_id = with_model_id(model_tok, dict(cache=cache, model_id=model_id, min_prob=min_prob))["model_id"]
        generate.update(prompt=prompt, model_tok=model_tok, guess=guess, min_prob=min_prob, model_id=model_id)
        return [(text, float(nll)) for text, nll in cache(infer_single)(**generate)]
    model, tokenizer = load_pair(model_tok)
    tokens = prompt_tokens(tokenizer, [prompt])[0]
    if min_prob is None:
        options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **generate}
        replies = generate_replies(model, tokens, **options)
    else:
        guessed = reply_tokens(tokenizer, [(guess or "").removeprefix(prompt)])[0]
        options = {"eos_token_id": tokenizer.eos_token_id, "stats": stats, **generate}
        replies = dfs(model, tokens + guessed, min_prob=min_prob, pos=len(tokens), **options)
    return [(tokenizer.decode(tokens), nll) for tokens, nll in replies]
