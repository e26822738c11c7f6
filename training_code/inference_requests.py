"""The seam between inference and the engines: requests about *sets* of prompts, and who answers them.

What needs replies or scores is a *job*: a generator that yields ``FindReplies`` and ``ScoreReplies`` (texts), receives
their answers and returns its result. ``run_jobs`` answers the requests of many jobs, by the engine (``search``: all
jobs at once) or by the plain search (one prompt after the other). Both give the same replies, apart from rounding.
"""

import functools
import hashlib
import itertools
import json
from dataclasses import dataclass, field

import torch

from plain_search import dfs, end_token_set, is_unsloth_model, reply_nll
from prompt_inference import (calc_score, generates_greedily, infer_single, load_pair, prompt_tokens, reply_tokens,
                              with_model_id)
from search import Engine, EngineSettings, numbered_jobs
from search_requests import Find, Score
from lora_layers import inference_layers
from tree_memory import weights_for_the_engine


_SEARCH_OPTIONS = frozenset({"min_prob", "max_new_tokens", "eos_token_id", "stats"})  # others are of ``generate``


@dataclass(frozen=True)
class FindReplies:
    """Ask for the replies to prompts: answered by [[(text with end token, NLL in nats)] best first].

    prompts: texts, whose replies do not depend on each other. guess_for: function (i, found) -> text or None, a guess
    of the reply to prompt i, given ``found`` = {index of a prompt already served: its replies}; it may be asked at any
    time and changes the speed only. adapter: name of the adapter to use, of several.
    """

    prompts: list
    guess_for: object = None
    adapter: str | None = None


@dataclass(frozen=True)
class ScoreReplies:
    """Ask for the NLL of every reply in ``pairs`` = [(prompt, reply)], by an adapter: answered by [NLL in nats]."""

    pairs: list
    adapter: str | None = None


@dataclass
class Answering:
    """How requests are answered.

    model_tok, cache, model_id: as of ``infer_single``. search: 'tree' = the engine, 'plain' = one prompt after the
    other, which is also done for models loaded by unsloth, and where ``model.generate`` is to do more than to reply
    greedily (``min_prob`` None with further options, or with such as came with the model). options: of
    ``infer_single``, ``min_prob`` and ``max_new_tokens`` above all. engine: an ``EngineSettings``. adapters: the
    model's ``AdapterRows``, entered, whose adapters the requests name.
    """

    model_tok: object
    cache: object = None
    model_id: str | None = None
    search: str = "tree"
    options: dict = field(default_factory=dict)
    engine: EngineSettings | None = None
    print_func: object = None
    share: float = 1.0  # part of the memory that the engine takes: less for few jobs
    engine_stats: dict = field(default_factory=dict)  # filled in: counters of the engine
    adapters: object = None
    _pair: tuple | None = None

    def __post_init__(self):
        if self.search not in ("tree", "plain"):
            raise ValueError(f"search is 'tree' or 'plain', not {self.search!r}")
        if self.cache is not None and self.options.get("stats") is not None:
            raise ValueError("counting (stats) and caching (cache) exclude each other: measure without a cache")
        known = dict(self.options, cache=self.cache, model_id=self.model_id)
        self.model_id = with_model_id(self.pair, known)["model_id"]

    def pair(self):
        """Return (model, tokenizer), loaded when first needed."""
        if self._pair is None:
            self._pair = load_pair(self.model_tok)
        return self._pair

    def plain(self, adapter=None):
        """Return the arguments of ``infer_single`` and ``calc_score``, for an adapter that is used from now on."""
        if self.adapters is not None:
            self.adapters.use(torch.tensor([self.member(adapter)], device=self.pair()[0].device))
        return dict(model_tok=self.pair, cache=self.cache, model_id=self.id_with(adapter))

    def member(self, adapter):
        """Return the number of an adapter."""
        return 0 if self.adapters is None else self.adapters.members[adapter]

    def id_with(self, adapter):
        """Return the identity of the model with an adapter."""
        return self.model_id if self.adapters is None else f"{self.model_id} with {self.adapters.ids[adapter]}"

    def by_engine(self):
        """Tell whether the engine answers: by a threshold, or greedily; that depends on the model, which is loaded."""
        if self.search == "plain" or self.options.get("min_prob") is not None:
            return self.search == "tree"
        model = self.pair()[0]
        return set(self.options) <= _SEARCH_OPTIONS and generates_greedily(model) and not is_unsloth_model(model)


def run_jobs(jobs, answering):
    """Run jobs (an iterable of generators, with None as of ``Engine.serve``); yield (index, returned value) as they
    finish. Until the last has finished, or this generator is closed, the model and its adapter must stay as they are.

    Raises:
        ValueError, TypeError: for options that the search does not have.
    """
    queue = numbered_jobs(jobs)
    if not answering.by_engine():
        yield from ((index, _run_plainly(job, answering)) for index, job in filter(None, queue))
        return
    for index, job in filter(None, queue):
        steps = _in_tokens(job, answering)
        try:
            request = next(steps)
        except StopIteration as stop:  # the cache had all answers, the model is not needed yet
            yield index, stop.value
            continue
        yield from _run_on_engine(itertools.chain([(index, _resumed(request, steps))],
                                                  (entry and (entry[0], _in_tokens(entry[1], answering))
                                                   for entry in queue)), answering)


def _resumed(request, steps):
    """Return a job that goes on with a request already taken from it."""
    while True:
        answer = yield request
        try:
            request = steps.send(answer)
        except StopIteration as stop:
            return stop.value


def _run_on_engine(jobs, answering):
    """Serve (index, job in tokens) and None for none now, adding up the counters."""
    model = answering.pair()[0]
    if is_unsloth_model(model):  # its layers have an attention of their own
        yield from ((index, _answered_plainly(job, model)) for index, job in filter(None, jobs))
        return
    settings = answering.engine or EngineSettings()
    with weights_for_the_engine(model, settings.unpack, answering.print_func), inference_layers(model):
        yield from _served(jobs, Engine(model, settings, answering.print_func, share=answering.share,
                                        adapters=answering.adapters), answering)  # fmt: skip


def _served(jobs, engine, answering):
    indices = []

    def without_index():
        for entry in jobs:
            if entry is not None:
                indices.append(entry[0])
            yield entry and entry[1]

    try:
        for place, value in engine.serve(without_index()):
            yield indices[place], value
    finally:
        engine.close()
        _add_up(engine.stats, answering)


def _add_up(counted, answering):
    """Add an engine's counters to those of the caller."""
    total = answering.engine_stats
    for name, value in counted.as_dict().items():
        if isinstance(value, dict):
            total[name] = {key: total.get(name, {}).get(key, 0) + value.get(key, 0)
                           for key in {**total.get(name, {}), **value}}  # fmt: skip
        elif name in ("peak_slots", "slot_bytes"):
            total[name] = max(value, total.get(name, 0))
        else:
            total[name] = value + total.get(name, 0)
    if (stats := answering.options.get("stats")) is not None:
        stats.nodes += counted.nodes
        stats.forward_passes += counted.passes
        stats.prompt_tokens += counted.prompt_rows
        stats.guessed_tokens += counted.drafted
        stats.accepted_tokens += counted.accepted


def _driven(job, answer_to):
    """Run a job whose requests a function answers; return its value."""
    answer = None
    while True:
        try:
            request = job.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = answer_to(request)


def _one_by_one(request, search):
    """Answer a request to find: prompt after prompt by ``search(prompt, guess)``, each with what is found as guess."""
    found = {}
    for i, prompt in enumerate(request.prompts):
        found[i] = search(prompt, request.guess_for(i, found) if request.guess_for else None)
    return list(found.values())


def _answered_plainly(job, model):
    """Run a job in tokens by the plain search; return its value."""

    def answer_to(request):
        if isinstance(request, Score):
            return [reply_nll(model, prompt, reply) for prompt, reply in request.pairs]

        def search(prompt, guess):
            replies = dfs(model, prompt + (guess or []), sorted(request.ends), request.max_new_tokens,
                          request.min_prob, pos=len(prompt))  # fmt: skip
            return [(tokens.tolist(), nll) for tokens, nll in replies]

        return _one_by_one(request, search)

    return _driven(job, answer_to)


def find_candidates(prompts, model_tok, guess_for=None, *, search="tree", engine=None, cache=None,  # noqa: PLR0913
                    model_id=None, **options):  # fmt: skip
    """Return for each prompt its replies [(text with end token, NLL in nats)], best first.

    Args:
        prompts, guess_for: as of ``FindReplies``. search, engine: as of ``Answering``. Others as of ``infer_single``.
    """

    def job():
        return (yield FindReplies(list(prompts), guess_for))

    answering = Answering(model_tok, cache, model_id, search, options, engine)
    [(_, answer)] = run_jobs([job()], answering)
    return answer


def score_replies(pairs, model_tok, *, search="tree", engine=None, cache=None, model_id=None):  # noqa: PLR0913
    """Return the NLL in nats of every reply in ``pairs`` = [(prompt, reply)], in their order.

    Args:
        search, engine: as of ``Answering``. Others as of ``calc_score``.
    """

    def job():
        return (yield ScoreReplies(list(pairs)))

    answering = Answering(model_tok, cache, model_id, search, {"min_prob": 1.0}, engine)
    [(_, answer)] = run_jobs([job()], answering)
    return answer


# --- the plain search ------------------------------------------------------------------------------------------------


def _run_plainly(job, answering):
    def answer_to(request):
        plain = answering.plain(request.adapter)
        if isinstance(request, ScoreReplies):
            return [calc_score(prompt, reply, **plain) for prompt, reply in request.pairs]
        return _one_by_one(request, lambda prompt, guess: infer_single(prompt, guess=guess, **plain,
                                                                       **answering.options))  # fmt: skip

    return _driven(job, answer_to)


# --- the engine ------------------------------------------------------------------------------------------------------


class _Missing(Exception):
    """The cache has no answer."""


def _kept(cache, name, keywords):
    """Return the kept answer of a request, None if there is none."""

    def missing(**_):
        raise _Missing

    missing.__name__ = missing.__qualname__ = name  # by which caches tell functions apart
    try:
        return cache(missing)(**keywords) if cache is not None else None
    except _Missing:
        return None


def _keep(cache, name, keywords, answer):
    def known(**_):
        return answer

    known.__name__ = known.__qualname__ = name
    if cache is not None:
        cache(known)(**keywords)


def _digest(texts):
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _in_tokens(job, answering):
    """Turn a job's requests into those of the engine, and their answers back into texts."""
    answer = None
    while True:
        try:
            request = job.send(answer)
        except StopIteration as stop:
            return stop.value
        answer = yield from (_find if isinstance(request, FindReplies) else _score)(request, answering)


def _find(request, answering):
    options = _search_options(answering.options)
    keywords = dict(options, prompts=_digest(request.prompts), model_id=answering.id_with(request.adapter))
    kept = _kept(answering.cache, "find_replies", keywords)
    if kept is not None:
        return [[(text, float(nll)) for text, nll in replies] for replies in kept]
    tokenizer = answering.pair()[1]
    ends = end_token_set(options.get("eos_token_id", tokenizer.eos_token_id))

    @functools.cache
    def text_of(tokens):
        return tokenizer.decode(tokens)

    def texts(replies):
        return [(text_of(tuple(tokens)), nll) for tokens, nll in replies]

    def guess_for(i, found):
        guess = request.guess_for(i, {j: texts(replies) for j, replies in found.items()})
        return None if guess is None else reply_tokens(tokenizer, [guess.removeprefix(request.prompts[i])])[0]

    prompts = prompt_tokens(tokenizer, request.prompts) if request.prompts else []
    find = Find(prompts, options["min_prob"], options["max_new_tokens"], frozenset(ends),
                guess_for if request.guess_for else None, answering.member(request.adapter))  # fmt: skip
    found = yield find
    answer = [texts(replies) for replies in found]
    if find.complete:
        _keep(answering.cache, "find_replies", keywords, answer)
    return answer


def _search_options(options):
    if unknown := sorted(set(options) - _SEARCH_OPTIONS):
        raise TypeError(f"the threshold search takes {', '.join(sorted(_SEARCH_OPTIONS))}, not {', '.join(unknown)}")
    if options.get("max_new_tokens") is None:
        raise TypeError("max_new_tokens is missing: how many tokens may a reply have? (932 in the published format)")
    return {"min_prob": None} | {name: value for name, value in options.items() if name != "stats"}


def _score(request, answering):
    keywords = dict(pairs=_digest(request.pairs), model_id=answering.id_with(request.adapter))
    kept = _kept(answering.cache, "score_replies", keywords)
    if kept is None and not request.pairs:
        return []
    if kept is None:
        tokenizer = answering.pair()[1]
        prompts = list(dict.fromkeys(prompt for prompt, _ in request.pairs))
        tokens_of = dict(zip(prompts, prompt_tokens(tokenizer, prompts), strict=True))
        replies = reply_tokens(tokenizer, [reply for _, reply in request.pairs])
        pairs = [(tokens_of[prompt], reply) for (prompt, _), reply in zip(request.pairs, replies, strict=True)]
        kept = yield (score := Score(pairs, answering.member(request.adapter)))
        if score.complete:
            _keep(answering.cache, "score_replies", keywords, kept)
    return [float(nll) for nll in kept]
