"""Inference: from the views of a task to its candidates with their scores, for one task or a whole dataset.

It owns the order of the steps (search every view, gather distinct grids, score them in scoring views), the result
cache, and the seam to the engine: ``find_candidates`` and ``score_replies`` serve *sets* of prompts, everything else
goes through these two. The plain engine behind them is ``plain_search``.

Terms: *candidate* = a distinct output grid, upright, with ``scores_inf`` {search view: NLL} of the views whose search
found it and ``scores_aug`` {scoring view: NLL}; *reply* = the text after a prompt, end token included.

Source: "The LLM ARChitect" (2024) and arXiv 2505.07859, sections on candidate generation and scoring.
"""

import functools
import hashlib
import json
import math

import diskcache
import numpy as np
from tqdm import tqdm

from arc_loader import TaskTooLongError
from model_tools import model_identity
from plain_search import SearchStats, dfs, generate_replies, is_unsloth_model, logits_to_score, reply_nll

__all__ = [
    "ResultCache", "SearchStats", "calc_score", "dfs", "draw_scoring_views", "find_candidates", "infer_single",
    "infer_task", "inference_run", "is_unsloth_model", "logits_to_score", "score_replies",
]  # fmt: skip


# --- cache -----------------------------------------------------------------------------------------------------------


class _TextDisk(diskcache.Disk):
    """Storage of diskcache that takes and gives text only: a file from elsewhere cannot make it unpickle anything."""

    def put(self, key):
        """Store the key as text."""
        return _text(key), True

    def get(self, key, raw):
        """Give the key as stored."""
        return _text(key)

    def store(self, value, read, key=diskcache.UNKNOWN):
        """Store a text value."""
        return super().store(_text(value), read, key=key)

    def fetch(self, mode, filename, value, read):
        """Give a text value; anything pickled is refused."""
        if mode == diskcache.core.MODE_PICKLE:
            raise ValueError(f"{self._directory} holds a pickled value, which is never written here: delete the folder")
        return super().fetch(mode, filename, value, read)


def _text(value):
    if not isinstance(value, str):
        raise TypeError(f"the result cache stores text only, not {type(value).__name__}")
    return value


class ResultCache:
    """Results of ``infer_single`` and ``calc_score`` on disk, called like a published cache: ``cache(function)(**kw)``.

    The key is readable text: the function's name and all keywords in canonical JSON, prompt, search options and
    ``model_id`` included; ``model_tok``, ``guess``, ``stats`` and ``cache`` do not change the result and are left out.
    Values are JSON. Writes are transactions, so a killed process leaves a usable cache; entries are never evicted.
    Close it when done: ``with ResultCache(path) as cache``.
    """

    IGNORED = frozenset({"model_tok", "guess", "stats", "cache"})

    def __init__(self, path):
        """Open or create the cache in the folder ``path``."""
        self._store = diskcache.Cache(str(path), disk=_TextDisk, eviction_policy="none")

    def key(self, function, keywords):
        """Return the key of a call.

        Raises:
            TypeError: for a keyword that JSON cannot hold, naming it.
        """
        kept = {}
        for name, value in keywords.items():
            if name not in self.IGNORED:
                value = value.item() if isinstance(value, np.generic) else value
                try:
                    json.dumps(value)
                except TypeError as error:
                    raise TypeError(f"{function.__name__}: {name}={value!r} cannot be part of a cache key") from error
                kept[name] = value
        return function.__name__ + " " + json.dumps(kept, sort_keys=True)

    def __call__(self, function):
        """Return ``function`` (keywords only) with its results kept here; fresh and kept results are equal."""

        @functools.wraps(function)
        def cached(**keywords):
            key = self.key(function, keywords)
            text = self._store.get(key)
            if text is None:
                text = json.dumps(function(**keywords))
                self._store.set(key, text)
            value = json.loads(text)
            return [tuple(reply) for reply in value] if isinstance(value, list) else value

        return cached

    def __len__(self):
        return len(self._store)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the files; the next use opens them again."""
        self._store.close()


# --- one prompt ------------------------------------------------------------------------------------------------------


def _load(model_tok):
    """Return (model, tokenizer) from the pair itself or a function that returns it, ready for inference."""
    model, tokenizer = model_tok() if callable(model_tok) else model_tok
    if is_unsloth_model(model):
        from unsloth import FastLanguageModel  # heavy, needs a GPU

        FastLanguageModel.for_inference(model)
    model.eval()  # a trainer leaves dropout and gradient checkpointing on
    return model, tokenizer


def _with_model_id(model_tok, options):
    """Return ``options`` (of ``infer_single``; any ``min_prob`` to score) with a ``model_id`` if a cache needs one.

    It stands for the model and for what else decides a reply without being said in the options: the end token, and,
    where ``model.generate`` replies, the recommendations that came with the model (its generation configuration).
    """
    if options.get("cache") is None or options.get("model_id") is not None:
        return options
    model, tokenizer = _load(model_tok)
    model_id = f"{model_identity(model)} end {tokenizer.eos_token_id}"
    recommended = getattr(model, "generation_config", None)
    if options.get("min_prob") is None and recommended is not None:
        fields = json.loads(recommended.to_json_string())
        for name in [name for name in fields if name.endswith(("_token_id", "_version")) or name.startswith("_")]:
            del fields[name]  # the tokenizer's tokens are taken
        model_id += " generate " + hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
    return {**options, "model_id": model_id}


def _prompt_tokens(tokenizer, prompt):
    if not prompt:
        raise ValueError("the prompt is empty: a key that names no test input ('<task>', not '<task>_0') has no query")
    return tokenizer(prompt)["input_ids"]  # a tokenizer that begins texts with a token of its own does it here


def _reply_tokens(tokenizer, reply):
    return tokenizer(reply, add_special_tokens=False)["input_ids"]


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
        model_id = _with_model_id(model_tok, dict(cache=cache, model_id=model_id, min_prob=1))["model_id"]
        return float(cache(calc_score)(input=input, reply=reply, model_tok=model_tok, model_id=model_id))
    model, tokenizer = _load(model_tok)
    return reply_nll(model, _prompt_tokens(tokenizer, input), _reply_tokens(tokenizer, reply))


def infer_single(prompt, model_tok, guess=None, min_prob=None, cache=None, model_id=None, stats=None, **generate):  # noqa: PLR0913
    """Return the replies to one prompt as [(text with end token, NLL in nats)], best first.

    Args:
        prompt: text up to the beginning of the reply.
        model_tok: (model, tokenizer) or a function that returns it.
        guess: a text that the reply may be like, alone or (as published) with the prompt in front; speed only.
        min_prob: threshold of the search; None = ``model.generate``, greedily unless ``generate`` says otherwise.
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
        model_id = _with_model_id(model_tok, dict(cache=cache, model_id=model_id, min_prob=min_prob))["model_id"]
        generate.update(prompt=prompt, model_tok=model_tok, guess=guess, min_prob=min_prob, model_id=model_id)
        return [(text, float(nll)) for text, nll in cache(infer_single)(**generate)]
    model, tokenizer = _load(model_tok)
    prompt_tokens = _prompt_tokens(tokenizer, prompt)
    if min_prob is None:
        options = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, **generate}
        replies = generate_replies(model, prompt_tokens, **options)
    else:
        guessed = _reply_tokens(tokenizer, (guess or "").removeprefix(prompt))
        options = {"eos_token_id": tokenizer.eos_token_id, "stats": stats, **generate}
        replies = dfs(model, prompt_tokens + guessed, min_prob=min_prob, pos=len(prompt_tokens), **options)
    return [(tokenizer.decode(tokens), nll) for tokens, nll in replies]


# --- the seam: sets of prompts ---------------------------------------------------------------------------------------


def find_candidates(prompts, model_tok, guess_for=None, **search):
    """Return for each prompt its replies [(text with end token, NLL)], best first.

    Args:
        prompts: list of texts, in any number; their replies do not depend on each other.
        guess_for: function (i, found) -> text or None: a guess of the reply to prompt i, given ``found`` = {index of a
            prompt already served: its replies}; it may be asked at any time and changes the speed only.
        search: as of ``infer_single``.

    This plain version serves one prompt after another; a batched engine takes its place with the same arguments.
    """
    found, search = {}, _with_model_id(model_tok, search)
    for i, prompt in enumerate(prompts):
        guess = guess_for(i, found) if guess_for else None
        found[i] = infer_single(prompt, model_tok, guess=guess, **search)
    return list(found.values())


def score_replies(pairs, model_tok, cache=None, model_id=None):
    """Return the NLL in nats of every reply in ``pairs`` = [(prompt, reply)], in their order.

    This plain version takes one forward pass per pair; a batched engine takes its place with the same arguments.
    """
    known = _with_model_id(model_tok, dict(cache=cache, model_id=model_id, min_prob=1))
    return [calc_score(prompt, reply, model_tok, cache=cache, model_id=known["model_id"]) for prompt, reply in pairs]


# --- one test input --------------------------------------------------------------------------------------------------


def _md5_number(text):
    return int(hashlib.md5(text.encode()).hexdigest()[:6], 16)


_NO_SEED = "aug_score_opts has no seed, from which the scoring views are drawn: add one, for example seed=10000"


def draw_scoring_views(dataset, key, grid=None, *, seed=None, **augment):
    """Return the keys of the scoring views of one test input, drawn as published.

    Args:
        key: any key of the test input; its own view does not matter.
        grid: the candidate; None = one set of views for all candidates (the 2025 version).
        seed, augment: options of ``ArcDataset.augment``; hashes of test input and grid are added to the seed.

    Raises:
        ValueError: without a seed.
    """
    if seed is None:
        raise ValueError(_NO_SEED)
    name = key.split(".")[0]
    seed += _md5_number(name)
    if grid is not None:
        seed += _md5_number(str(_hashable(grid)))
    return list(dataset.change_keys([name]).augment(seed=seed, **augment).keys)


def _hashable(grid):
    return tuple(tuple(int(cell) for cell in row) for row in grid)


class _TestInput:
    """The views of one test input as they are searched, and the candidates that replies stand for."""

    def __init__(self, keys, dataset, fmt_opts, print_func, on_dropped):  # noqa: PLR0913
        self.dataset, self.print_func = dataset, print_func or (lambda line: None)
        self.on_dropped = on_dropped or (lambda key, error: None)
        self.fmt_opts = {**fmt_opts, "len_name": "input"}
        self.views = dict(self.format_views(keys))  # {key as shown: prompt}
        self.decode = functools.cache(lambda key, text: dataset.decode(text, fmt_opts["lines_sep"], key))

    def format_views(self, keys, reply=None):
        """Return [(key with the pairs that fit, prompt or (prompt, text of ``reply``))]; report what does not fit."""
        views = []
        for key in keys:
            try:
                key, fmt = self.dataset.get_task(key, reply=reply, **self.fmt_opts)
            except TaskTooLongError as error:
                self.print_func(f" ! {key}: left out. {error}")
                self.on_dropped(key, error)
                continue
            views.append((key, fmt["input"] if reply is None else (fmt["input"], fmt["reply"])))
        return views

    def candidates(self, found):
        """Return the candidates that ``found`` {index of a view: replies} holds, in order of first appearance."""
        candidates = {}
        for key, replies in ((key, found.get(i, ())) for i, key in enumerate(self.views)):
            for text, nll in replies:
                grid, correct, _ = self.decode(key, text)
                if grid is None:
                    continue
                fresh = {"output": grid, "correct": correct, "scores_inf": {}}
                scores = candidates.setdefault(_hashable(grid), fresh)["scores_inf"]
                scores[key] = min(nll, scores.get(key, math.inf))  # texts that differ can stand for one grid
        return list(candidates.values())

    def guess(self, i, found):
        """Return the best candidate so far as the reply in view i. Source: published ``infer_task``."""
        best = min(self.candidates(found), key=lambda candidate: min(candidate["scores_inf"].values()), default=None)
        if best is None:
            return None
        return self.dataset.get_task(list(self.views)[i], reply=best["output"], **self.fmt_opts)[1]["reply"]

    def report(self, found):
        """Print a line per reply."""
        for i, key in enumerate(self.views):
            for j, (text, nll) in enumerate(found[i]):
                grid, _, info = self.decode(key, text)
                shape = "--x--" if grid is None else "{:>2}x{:<2}".format(*np.shape(grid))
                lengths = f"in:{self.dataset.count_tokens(self.views[key]):>5} out:{self.dataset.count_tokens(text):>4}"
                self.print_func(f" {lengths} {shape} p={math.exp(-nll):7.2%} {info} [{key}.out{j}]")


def infer_task(  # noqa: PLR0913
    keys, dataset, fmt_opts, aug_score_opts=None, pass_guess=True, print_func=print, *,
    model_tok, scoring_views="per_candidate", cache=None, model_id=None, on_dropped=None, **search,
):  # fmt: skip
    """Return the candidates of one test input, in order of first appearance.

    Args:
        keys: the views to search, all of one test input. A key that does not fit ``max_tokens`` even with one pair is
            reported and left out. Keys in results are those shown: with the pairs that fit.
        dataset: ``ArcDataset``. fmt_opts: prompt format; its ``max_tokens`` applies to the prompt.
        aug_score_opts: options of ``augment`` with a seed, for the scoring views; None = no scoring.
        pass_guess: whether the best candidate so far is the guess for the next view; speed only.
        print_func: takes a line per reply; None prints nothing.
        model_tok, cache, model_id, search: as of ``infer_single``.
        scoring_views: 'per_candidate' = drawn anew for each candidate (2024), 'shared' = drawn once per test input
            (2025), 'search' = the searched views (``aug_score_opts`` is not needed then).
        on_dropped: called as (key, error) for each view, searched or scoring, that does not fit and is left out.

    Returns:
        list of {'output': grid, 'correct': True/False/None, 'scores_inf': {key: NLL}, 'scores_aug': {key: NLL}}, the
        last one only with scoring. Replies that stand for no grid are dropped.

    Raises:
        ValueError: for another ``scoring_views``, or scoring views to draw without a seed.

    Source: published function of this name. differs: a reply that the search has already weighed in a scoring view is
    not scored again; views that are the same once their pairs are cut are searched once; views that do not fit are
    left out. Where scoring views are, all candidates are scored in the same number of views, the first of each, since
    the published rules add scores up. What remains: a candidate none of whose views fits has no scores, and equal
    views of one candidate count once, as published.
    """
    if scoring_views not in ("per_candidate", "shared", "search"):
        raise ValueError(f"scoring_views is 'per_candidate', 'shared' or 'search', not {scoring_views!r}")
    if scoring_views != "search" and aug_score_opts and aug_score_opts.get("seed") is None:
        raise ValueError(_NO_SEED)  # before the search
    test_input = _TestInput(keys, dataset, fmt_opts, print_func, on_dropped)
    search = _with_model_id(model_tok, dict(search, cache=cache, model_id=model_id))
    model = dict(model_tok=model_tok, cache=cache, model_id=search["model_id"])
    prompts = list(test_input.views.values())
    guess_for = test_input.guess if pass_guess else None
    found = dict(enumerate(find_candidates(prompts, model_tok, guess_for=guess_for, **search)))
    test_input.report(found)
    candidates = test_input.candidates(found)
    if scoring_views == "search" or aug_score_opts:
        known = {(prompts[i], text): nll for i, replies in found.items() for text, nll in replies}
        if scoring_views == "search":
            views_of = dict.fromkeys(range(len(candidates)), list(test_input.views))
        else:
            grids = [candidate["output"] if scoring_views == "per_candidate" else None for candidate in candidates]
            views_of = {i: draw_scoring_views(dataset, keys[0], grid, **aug_score_opts) for i, grid in enumerate(grids)}
        _score(test_input, candidates, views_of, known, model)
    return candidates


def _score(test_input, candidates, views_of, known, model):
    """Add ``scores_aug`` to the candidates, in one call for all of them.

    Args:
        views_of: {index of a candidate: keys of its scoring views}.
        known: {(prompt, reply): NLL} that the search has already worked out.
    """
    fitting = [test_input.format_views(views_of[i], reply=c["output"]) for i, c in enumerate(candidates)]
    fewest = min((len(views) for views in fitting if views), default=0)
    if any(len(views) > fewest for views in fitting):
        test_input.print_func(f" ! scored in {fewest} views per candidate, as not all scoring views fit")
    views = [dict(views[:fewest]) for views in fitting]
    missing = dict.fromkeys(pair for formatted in views for pair in formatted.values() if pair not in known)
    known = {**known, **dict(zip(missing, score_replies(list(missing), **model), strict=True))}
    for candidate, formatted in zip(candidates, views, strict=True):
        candidate["scores_aug"] = {key: known[pair] for key, pair in formatted.items()}


# --- a whole dataset -------------------------------------------------------------------------------------------------


def inference_run(  # noqa: PLR0913
    dataset, fmt_opts, model_tok, min_prob=None, aug_score_opts=None, callback=None, cache=None, max_new_tokens=None,
    print_func=tqdm.write, progress=True, model_id=None, **options,
):  # fmt: skip
    """Search and score every test input of a dataset.

    Args:
        dataset: ``ArcDataset`` whose keys are the views to search.
        fmt_opts: prompt format; its ``max_tokens`` holds for prompt and reply together.
        model_tok, min_prob: as of ``infer_single``.
        aug_score_opts: as of ``infer_task``.
        callback: called as (candidates, name='<task>_<i>', value=1 / number of test inputs, print_func=...) after each
            test input; how it sorts the candidates in place decides the attempts.
        cache: a ``ResultCache`` or published-style decorator; None = nothing is kept.
        max_new_tokens: most tokens of a reply; None = what a 30 x 30 grid needs in this format.
        print_func: takes the lines to print; None prints nothing.
        progress: whether to show a bar over the test inputs with the time left.
        model_id: identity of the model; None = worked out once, which loads the model, if there is a cache.
        options: others of ``infer_task`` and ``infer_single``: ``pass_guess``, ``scoring_views``, ``on_dropped``,
            ``num_beams``...

    Returns:
        {task: [candidates per test input]}, [] where nothing was found or nothing fits.

    Raises:
        ValueError: when ``max_tokens`` leaves no room for a prompt; as of ``infer_task``.

    Source: published function of this name. differs: with a cache, a function ``model_tok`` is called for the model's
    identity even if all results are kept (give ``model_id`` to avoid that).
    """
    print_func = print_func or (lambda line: None)
    if max_new_tokens is None:
        max_new_tokens = dataset.max_new_tokens(**fmt_opts)
    if fmt_opts.get("max_tokens") is not None:
        room = fmt_opts["max_tokens"] - max_new_tokens
        if room <= 0:
            raise ValueError(f"max_tokens={fmt_opts['max_tokens']} is for prompt and reply together and must be more "
                             f"than max_new_tokens={max_new_tokens}, the room that the reply needs")  # fmt: skip
        fmt_opts = {**fmt_opts, "max_tokens": room}
    options.update(cache=cache, model_id=model_id, min_prob=min_prob)
    options = _with_model_id(model_tok, options)
    options.update(model_tok=model_tok, max_new_tokens=max_new_tokens, print_func=print_func)
    grouped, results = dataset.grouped_keys(), {}
    with tqdm(total=sum(map(len, grouped.values())), desc="inference", disable=not progress) as bar:
        for task, inputs in grouped.items():
            results[task] = []
            for i, keys in enumerate(inputs):
                candidates = infer_task(keys, dataset, fmt_opts, aug_score_opts, **options)
                results[task].append(candidates)
                if callback is not None:
                    callback(candidates, name=f"{task}_{i}", value=1 / len(inputs), print_func=print_func)
                bar.update()
    return results
