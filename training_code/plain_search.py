"""The plain search and the plain scoring of one prompt: slow, simple, exact; the reference for every faster engine.

It owns everything that runs a model on one sequence: the threshold search (depth first, one node per forward pass,
batch one), ``generate``, and the NLL of a given reply. It knows tokens and logits only; tasks, grids and views are the
business of ``inference_tools``.

Terms: *node* = a beginning of a reply whose next-token probabilities are looked at; *end token* = a token that
completes the reply and belongs to it; *guess* = tokens that the reply probably starts with.

Source: "The LLM ARChitect" (2024), section on candidate generation; arXiv 2505.07859, "Augmented DFS".
differs: iterative (a stack instead of recursion), so a reply may be of any length.
"""

import inspect
import math
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache

from model_tools import position_ids


@dataclass
class SearchStats:
    """Counters of one or many searches, for benchmarks; ``dfs`` adds to them."""

    nodes: int = 0  # distributions looked at, those of the guess included
    forward_passes: int = 0  # calls of the model, the one with the prompt included
    prompt_tokens: int = 0  # tokens of the prompts
    guessed_tokens: int = 0  # guessed tokens that ran with the prompt
    accepted_tokens: int = 0  # guessed tokens that stayed within the threshold; each saved one forward pass


def is_unsloth_model(model):
    """Tell whether ``model`` was loaded by unsloth, by its model tags. Source: published function of this name."""
    return "unsloth" in (getattr(model, "model_tags", None) or ())


def logits_to_score(sequence, logits):
    """Return the NLL in nats of ``sequence`` under ``logits``; log-softmax in float32, sum in float64.

    Args:
        sequence: (N,) tokens.
        logits: (at least N, V), row i is the prediction of token i.

    Raises:
        ValueError: when the shapes are others.
    """
    if sequence.ndim != 1 or logits.ndim != 2 or len(sequence) > len(logits):
        raise ValueError(f"expected (N,) tokens and (at least N, V) logits, got {sequence.shape} and {logits.shape}")
    targets = sequence.to(logits.device)
    nlls = torch.nn.functional.cross_entropy(logits[: len(targets)].float(), targets, reduction="none")
    return nlls.double().sum().item()


def refuse_nan(found):
    """Raise FloatingPointError if NaN was found among the logits."""
    if found:
        raise FloatingPointError("the model's logits are NaN: load it in bfloat16 or float32, or check its weights")


def end_token_set(eos_token_id):
    """Return the set of end tokens of a number or a list of numbers.

    Raises:
        ValueError: when there is none, for then no reply would ever be complete.
    """
    ends = eos_token_id if isinstance(eos_token_id, (list, tuple, set)) else [eos_token_id]
    ends = {int(token) for token in ends if token is not None}
    if not ends:
        raise ValueError(f"no end token (eos_token_id={eos_token_id}): give the tokenizer an eos_token")
    return ends


class _Path:
    """One sequence on the model: the prompt, the path searched at the moment, and the cache of their keys and values.

    The path is changed at its end only; what the cache holds beyond the change is cut off before the next pass.
    """

    def __init__(self, model, tokens, room):
        """Hold ``tokens`` (T,), with place for ``room`` tokens in all."""
        self.model = model
        self.ids = torch.zeros(1, room, dtype=torch.long, device=model.device)  # (1, room)
        self.ids[0, : len(tokens)] = tokens
        self.cached = 0  # tokens at the beginning of ids whose keys and values are in the cache
        # full layers whatever the model's attention window is: these can always be cut back (unsloth makes its own)
        self.cache = None if is_unsloth_model(model) else DynamicCache()

    def logits(self, length, rows):
        """Run the tokens up to ``length`` that the cache lacks, at least the last; return the last (rows, V) logits."""
        start = min(self.cached, length - 1)
        self._cut_cache(start)
        positions = position_ids(self.model, self.ids[:, :length])[:, start:]  # may depend on the whole sequence
        output = self.model(
            input_ids=self.ids[:, start:length],
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            **_keep_logits(self.model, rows),
        )
        self.cache, self.cached = output.past_key_values, length
        if not isinstance(self.cache, tuple) and (self.cache is None or self.cache.get_seq_length() != length):
            raise RuntimeError("the model did not extend its cache: call model.eval() and end gradient checkpointing")
        return output.logits[0, -rows:]

    def _cut_cache(self, length):
        surplus = self.cached - length
        if surplus <= 0:
            return
        if isinstance(self.cache, tuple):  # unsloth hands out bare (keys, values) per layer
            self.cache = tuple(tuple(part[:, :, :length] for part in layer) for layer in self.cache)
        else:
            self.cache.crop(-surplus)  # a negative number of tokens to remove means the same in all versions


def _keep_logits(model, rows):
    """Return the argument that makes the model compute the last ``rows`` logits only, where it has such an argument."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel hides it
    taken = inspect.signature(base.forward).parameters
    return {name: rows for name in ("logits_to_keep", "num_logits_to_keep") if name in taken}


class _Search:
    """One threshold search: the tree of a prompt's replies, walked depth first."""

    def __init__(self, path, start, max_new_tokens, max_nll, ends, stats):  # noqa: PLR0913
        """Search the replies that follow the first ``start`` tokens of ``path``; other arguments as of ``dfs``."""
        self.path, self.start, self.max_new_tokens = path, start, max_new_tokens
        self.max_nll, self.ends, self.stats = max_nll, ends, stats
        self.found = []  # (tokens of the reply, NLL)
        self.stack = []  # (tokens of the reply so far, the last of them, NLL), the one to visit next at the end

    def run(self, guess):
        """Visit all nodes, those along the list ``guess`` first: they take one forward pass together."""
        nll = 0.0
        for depth, logits in enumerate(self._pass(self.start + len(guess), rows=len(guess) + 1)):
            self._visit(logits, depth, nll)
            guessed = (depth + 1, guess[depth]) if depth < len(guess) else None
            place = next((i for i, node in enumerate(self.stack) if node[:2] == guessed), None)
            if place is None:  # the guess has come to its end or has left the threshold
                break
            nll = self.stack.pop(place)[2]
            self.stats.accepted_tokens += 1
        while self.stack:
            depth, token, nll = self.stack.pop()
            self.path.ids[0, self.start + depth - 1] = token  # before it stands its parent: children come right after
            self._visit(self._pass(self.start + depth, rows=1)[0], depth, nll)

    def _pass(self, length, rows):
        self.stats.forward_passes += 1
        return self.path.logits(length, rows)

    def _visit(self, logits, depth, nll):
        """Look at the next tokens (V,) after ``depth`` tokens: record replies that end, put the others on the stack."""
        self.stats.nodes += 1
        nlls = nll - logits.float().log_softmax(-1).cpu().double().numpy()  # (V,)
        refuse_nan(np.isnan(nlls).any())
        below = np.flatnonzero(nlls < self.max_nll)
        for token in below[np.argsort(-nlls[below])].tolist():  # the best one comes to lie on top
            if token in self.ends:
                reply = self.path.ids[0, self.start : self.start + depth].tolist()
                self.found.append((reply + [token], float(nlls[token])))
            elif depth + 1 < self.max_new_tokens:  # else there is no room left for the end token
                self.stack.append((depth + 1, token, float(nlls[token])))


def _split_guess(input_ids, pos, attention_mask, ends, max_new_tokens):
    """Return the prompt (P,) and the usable part of the guess (G,): before its end token, and not too long."""
    ids = torch.as_tensor(input_ids, dtype=torch.long)
    if ids.ndim == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.ndim != 1:
        raise ValueError(f"input_ids must be (T,) or (1, T), not {tuple(ids.shape)}: search one prompt at a time")
    pos = len(ids) if pos is None else pos
    if attention_mask is not None:  # leave the padding out
        kept = torch.as_tensor(attention_mask).reshape(-1).bool().to(ids.device)
        ids, pos = ids[kept], int(kept[:pos].sum())
    if not 0 < pos <= len(ids):
        raise ValueError(f"pos must lie in 1..{len(ids)} (the first token of the guess), not {pos}")
    guess = ids[pos:].tolist()
    closed = next((i for i, token in enumerate(guess) if token in ends), len(guess))
    return ids[:pos], guess[: min(closed, max_new_tokens - 1)]


@torch.no_grad()
def dfs(model, input_ids, eos_token_id, max_new_tokens, min_prob, pos=None, attention_mask=None, stats=None):  # noqa: PLR0913
    """Find all complete replies to a prompt whose probability exceeds ``min_prob``.

    Args:
        model: a causal language model.
        input_ids: (T,) or (1, T) tokens of the prompt, from ``pos`` on a guess of the reply. The guess runs with the
            prompt in one pass and is followed first; where it leaves the threshold it just stops serving. It changes
            the speed, never the result.
        eos_token_id: the end token, or a list of them.
        max_new_tokens: most tokens of a reply, end token included.
        min_prob: threshold in (0, 1].
        pos: length of the prompt; None = all of ``input_ids``.
        attention_mask: as ``input_ids``; 0 marks padding, which is left out.
        stats: a ``SearchStats`` to add to.

    Returns:
        [(token array with the end token, NLL in nats)], NLL strictly below -ln(min_prob), best first.

    Raises:
        ValueError: for arguments out of range. FloatingPointError: when the model yields NaN.

    Source: published ``dfs``. differs: no recursion, several end tokens, padding, counters.
    """
    if not 0 < min_prob <= 1 or max_new_tokens < 1:
        raise ValueError(f"need 0 < min_prob <= 1 and max_new_tokens >= 1, not {min_prob} and {max_new_tokens}")
    ends, stats = end_token_set(eos_token_id), stats or SearchStats()
    prompt, guess = _split_guess(input_ids, pos, attention_mask, ends, max_new_tokens)
    path = _Path(model, torch.cat([prompt, prompt.new_tensor(guess)]), room=len(prompt) + max_new_tokens)
    search = _Search(path, len(prompt), max_new_tokens, -math.log(min_prob), ends, stats)
    search.run(guess)
    stats.prompt_tokens += len(prompt)
    stats.guessed_tokens += len(guess)
    return [(np.array(tokens), nll) for tokens, nll in sorted(search.found, key=lambda reply: (reply[1], reply[0]))]


@torch.no_grad()
def reply_nll(model, prompt, reply):
    """Return the NLL in nats of the tokens ``reply`` (N,) after the tokens ``prompt`` (T,), in one forward pass.

    Raises:
        FloatingPointError: when the model yields NaN.
    """
    prompt, reply = (torch.as_tensor(part, dtype=torch.long, device=model.device) for part in (prompt, reply))
    rows = len(reply) + 1  # the last row predicts what follows the reply
    output = model(input_ids=torch.cat([prompt, reply])[None], use_cache=False, **_keep_logits(model, rows))
    nll = logits_to_score(reply, output.logits[0, -rows:-1])
    refuse_nan(math.isnan(nll))
    return nll


def _no_nan(input_ids, scores):
    """Let scores (B, V) pass through ``generate`` as they are; NaN would make it choose any token."""
    refuse_nan(scores.isnan().any())
    return scores


@torch.no_grad()
def generate_replies(model, prompt, eos_token_id, pad_token_id, **generate):
    """Let ``model.generate`` reply: greedily unless ``generate`` says otherwise (sampling, beams, several sequences).

    Args:
        prompt: (T,) tokens.
        generate: options of ``model.generate``; ``max_new_tokens`` must be among them.

    Returns:
        [(token array with the end token, NLL in nats)] of the distinct replies that reached an end token, best first.
        The NLL is the model's own, whatever sampling temperature or beam penalty was used.

    Raises:
        ValueError: without ``max_new_tokens``; for beam search on a model of unsloth, which cannot do it.
        FloatingPointError: when the model yields NaN.
    """
    if generate.get("max_new_tokens") is None:
        raise ValueError("max_new_tokens is missing: how many tokens may a reply have? (932 in the published format)")
    if is_unsloth_model(model) and (generate.get("num_beams") or 1) > 1:
        raise ValueError("unsloth cannot search by beams: leave num_beams out, search with min_prob, or load the model "
                         "with backend='transformers'")  # fmt: skip
    ends = end_token_set(eos_token_id)
    prompt = torch.as_tensor(prompt, dtype=torch.long, device=model.device)
    options = {"do_sample": False, "eos_token_id": sorted(ends), "pad_token_id": pad_token_id, **generate}
    options["logits_processor"] = [*(generate.get("logits_processor") or ()), _no_nan]
    output = model.generate(input_ids=prompt[None], attention_mask=torch.ones_like(prompt)[None], **options)
    replies = set()
    for sequence in getattr(output, "sequences", output)[:, len(prompt) :].tolist():
        closed = next((i for i, token in enumerate(sequence) if token in ends), None)
        if closed is not None:
            replies.add(tuple(sequence[: closed + 1]))
    scored = [(np.array(reply), reply_nll(model, prompt, reply)) for reply in sorted(replies)]
    return sorted(scored, key=lambda reply: reply[1])
