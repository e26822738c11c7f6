"""The requests that the engine serves, search and scoring, and how far each has come.

A request turns the results of chains into new chains; the engine only runs them.
"""

import math
from collections import deque
from dataclasses import dataclass

from plain_search import dfs, generate_replies, reply_nll
from search_trees import Draft, Work


@dataclass
class Find:
    """Request all replies above a threshold to each prompt: answered by [[(token list, NLL in nats)] best first].

    Without a threshold the search is greedy: at most one reply, the chain of the most probable tokens (of equally
    probable ones the lowest, as ``torch.argmax``), if it comes to an end token within ``max_new_tokens``.
    """

    prompts: list  # of token lists
    min_prob: float | None  # None: greedy
    max_new_tokens: int
    ends: frozenset  # end tokens
    guess_for: object = None  # function (i, {index: replies found so far}) -> token list or None
    member: int = 0  # number of the adapter, of several; the same in all requests of a job
    complete: bool = True  # set to False by the engine: a prompt for which no memory sufficed has no replies


@dataclass
class Score:
    """Request the NLL of replies: answered by [NLL in nats]."""

    pairs: list  # of (prompt tokens, reply tokens)
    member: int = 0  # as of ``Find``
    complete: bool = True  # as of ``Find``; such replies have an infinite NLL


class Search:
    """A ``Find`` request being served."""

    def __init__(self, engine, job, request):
        self.greedy = request.min_prob is None
        if not (self.greedy or 0 < request.min_prob <= 1) or request.max_new_tokens < 1:
            raise ValueError(f"need 0 < min_prob <= 1 and max_new_tokens >= 1, not {request.min_prob} and "
                             f"{request.max_new_tokens}")  # fmt: skip
        self.engine, self.request = engine, request
        self.max_nll = math.inf if self.greedy else -math.log(request.min_prob)
        prompts = [tuple(prompt) for prompt in request.prompts]
        self.trees = engine.trees(job, prompts)
        self.same = {}  # a prompt that occurs twice is searched once
        for i, tree in enumerate(self.trees):
            self.same.setdefault(tree, []).append(i)
        self.found = {}  # {index: [(tokens, NLL)] best first} of finished prompts
        self.partial = {tree: [] for tree in self.same}
        self.finished = set()
        self.waiting = deque(self.same)
        self.batch = engine.settings.leaders if request.guess_for else len(self.same)

    def start(self):
        """Start as many searches as there are to be leaders."""
        for _ in range(min(self.batch, len(self.waiting))):
            self._begin(self.waiting.popleft(), None)

    def _begin(self, tree, guess):
        engine, request = self.engine, self.request
        if tree.planned:  # scored before
            engine.drop(tree)
        if engine.beyond_window(len(tree.prompt) + request.max_new_tokens):
            engine.leave(self, tree, "the model's attention does not reach over its reply")
            return
        draft = Draft(request.ends, guess, engine.settings.lookup)
        self._add(tree, Work.root(tree, self.max_nll, draft, request.max_new_tokens))

    def _add(self, tree, work):
        work.owner = self
        tree.pending += 1
        self.engine.stats.drafted += len(work.tokens) - 1
        self.engine.ready.append(work)

    def restart(self, tree):
        """Begin the search of a tree anew, after its buffer was taken away."""
        if tree in self.finished:
            return
        self.partial[tree] = []
        self.waiting.appendleft(tree)
        self._start_waiting()

    def take(self, work, hits):
        """Read the results of a chain: record replies, start a chain for every other token within the threshold.

        hits: iterator of (row of the chain, token, log-probability) that may lie within the threshold, by rows.
        """
        tree, stats, found = work.tree, self.engine.stats, self.partial[work.tree]
        nlls = self._held(work)
        if self.greedy:
            hits = self._most_probable(work, hits)
            nlls = nlls[: len(hits)]
        stats.nodes += len(nlls)
        stats.accepted += len(nlls) - 1
        for row, token, logp in hits:
            if row >= len(nlls):
                break
            total = nlls[row] - logp
            if token in self.request.ends:
                tree.ends[work.first + row, token] = logp
                if total < self.max_nll:
                    found.append((tree.reply(work.first + row) + [token], total))
            elif total < self.max_nll and work.depth + row + 1 < self.request.max_new_tokens:
                if row + 1 == len(work.tokens) or token != work.tokens[row + 1]:
                    self._add(tree, work.branch(row, token, total, logp))
        tree.pending -= 1
        if not tree.pending:
            self._finish(tree, found)
        elif self.waiting and found and min(nll for _, nll in found) < math.log(2):
            self._start_waiting()

    def _held(self, work):
        """Return the NLL up to each row of a chain, as far as they stay within the threshold."""
        nll, nlls = work.nll, [work.nll]
        for edge in work.tree.edges[work.first + 1 : work.first + len(work.tokens)]:
            nll -= edge
            if not nll < self.max_nll:
                break
            nlls.append(nll)
        return nlls

    @staticmethod
    def _most_probable(work, hits):
        """Return the first hit of each row, up to the first one that is not the chain's next token."""
        best = []
        for row, token, logp in hits:
            if row == len(best):  # else it is as probable as the one before
                best.append((row, token, logp))
                if work.tokens[row + 1 : row + 2] != [token]:
                    break
        return best

    def plainly(self, tree):
        """Return the replies to a tree's prompt by the plain search, or by ``generate``."""
        model, prompt, request, ends = self.engine.model, list(tree.prompt), self.request, sorted(self.request.ends)
        if self.greedy:
            replies = generate_replies(model, prompt, ends, ends[0], max_new_tokens=request.max_new_tokens)
        else:
            replies = dfs(model, prompt, ends, request.max_new_tokens, request.min_prob)
        return [(tokens.tolist(), nll) for tokens, nll in replies]

    def nothing(self, tree):
        """Return what stands for the answer of the plain search where memory does not suffice for it."""
        return []

    def take_plain(self, tree, replies):
        """Take the answer of the plain search."""
        self._finish(tree, replies)

    def _finish(self, tree, replies):
        """Note the replies of a tree whose search is over."""
        replies = sorted(replies, key=lambda reply: (reply[1], reply[0]))
        self.engine.stats.replies += len(replies)
        self.finished.add(tree)
        for i in self.same[tree]:
            self.found[i] = replies
        self._start_waiting()

    def _start_waiting(self):
        """Start the searches that wait: all with a guess if there is one, else some more leaders if none is left."""
        if not self.waiting:
            return
        so_far = dict(self.found)
        for tree, replies in self.partial.items():
            for i in self.same[tree]:
                so_far.setdefault(i, replies)
        so_far = {i: so_far[i] for i in sorted(so_far) if so_far[i]}
        guesses = {tree: self.request.guess_for(self.same[tree][0], so_far) if self.request.guess_for else None
                   for tree in self.waiting}
        if all(guess is None for guess in guesses.values()):
            if not any(tree.pending for tree in self.same):
                self.batch *= 2
                self.start()
            return
        while self.waiting:
            tree = self.waiting.popleft()
            self._begin(tree, guesses[tree])

    def result(self):
        """Return the answer of the request, None as long as it is not complete."""
        if len(self.found) < len(self.trees):
            return None
        return [self.found[i] for i in range(len(self.trees))]


class Scoring:
    """A ``Score`` request being served."""

    def __init__(self, engine, job, request):
        self.engine, self.job, self.request, self.nlls = engine, job, request, {}
        self.pairs = [(tuple(prompt), list(reply)) for prompt, reply in request.pairs]
        if not all(reply for _, reply in self.pairs):
            raise ValueError("a reply to score is empty: it needs at least its end token")
        places = {}  # {prompt: indices of its pairs}
        for i, (prompt, _) in enumerate(self.pairs):
            places.setdefault(prompt, []).append(i)
        self.kept = set(job.trees)
        # {tree: indices of the pairs to score}, replies with equal beginnings side by side
        self.left = {tree: sorted(places[tree.prompt], key=lambda i: self.pairs[i][1])
                     for tree in engine.trees(job, list(places))}  # fmt: skip
        self.planned = {}  # {tree: how many of these are under way}

    def start(self):
        """Plan the chains of all replies."""
        for tree in self.left:
            self.restart(tree)

    def restart(self, tree):
        """Plan the chains of a tree, anew if its buffer was taken away: of as many replies as fit at once."""
        left, engine = self.left.get(tree), self.engine
        if not left:  # a tree of an earlier request, or done
            return
        if engine.beyond_window(len(tree.prompt) + max(len(self.pairs[i][1]) for i in left)):
            engine.leave(self, tree, "the model's attention does not reach over its reply")
            return
        if len(tree.prompt) + len(tree.tokens) + len(self.pairs[left[0]][1]) > engine.store.total:
            engine.drop(tree)  # what the search has left may take the place that the reply needs
        planned = 0
        for _, reply in (self.pairs[i] for i in left):
            if planned and len(tree.prompt) + len(tree.tokens) + len(reply) > engine.store.total:
                break
            planned += 1
            work = Work.scoring(tree, reply)
            if work is not None:
                work.owner = self
                tree.pending += 1
                engine.ready.append(work)
        self.planned[tree] = planned
        if not tree.pending:
            self._finish(tree)

    def take(self, work, hits):
        """Note that a chain has run; its results are edges of the tree."""
        self.engine.stats.scored += len(work.tokens)
        work.tree.pending -= 1
        if not work.tree.pending:
            self._finish(work.tree)

    def _finish(self, tree):
        """Note the NLLs of the replies that were planned; go on with the others, if there are any."""
        done, self.left[tree] = self.left[tree][: self.planned[tree]], self.left[tree][self.planned[tree] :]
        for i in done:
            self.nlls[i] = tree.reply_nll(self.pairs[i][1])
        if self.left[tree]:
            self.engine.drop(tree)
            self.restart(tree)
        elif tree.prompt not in self.kept:
            self.engine.drop(tree)
            del self.job.trees[tree.prompt]

    def plainly(self, tree):
        """Return the NLLs of a tree's replies, scored one after the other."""
        return [reply_nll(self.engine.model, list(tree.prompt), self.pairs[i][1]) for i in self.left[tree]]

    def nothing(self, tree):
        """Return what stands for the answer of the plain scoring where memory does not suffice for it."""
        return [math.inf] * len(self.left[tree])

    def take_plain(self, tree, nlls):
        """Take the answer of the plain scoring."""
        self.nlls.update(zip(self.left[tree], nlls, strict=True))
        self.left[tree] = []

    def result(self):
        """Return the answer of the request, None as long as it is not complete."""
        return [self.nlls[i] for i in range(len(self.pairs))] if len(self.nlls) == len(self.pairs) else None
