"""Trees of explored replies, the chains that extend them, and the drafts that lengthen chains: the engine's data.

Nothing here runs a model. Terms: *node* = a beginning of a reply, numbered in the order of its slot in the buffer,
behind the prompt; node 0, the *root*, is the prompt's last token (its logits predict the reply's first); *edge* = the
log-probability of a node's token after its ancestors.
"""

import array
import itertools
import math

import numpy as np

from tree_attention import Chain

_ITEM = array.array("I").itemsize
_TAILS = (16, 8, 5, 3)  # how many tokens must recur for their continuation to be a draft
_SLACK = 1e-3  # nats by which the device's test in float32 is laxer than the exact one in float64


def _bytes(tokens):
    return array.array("I", tokens).tobytes()


class Draft:
    """Where the guessed continuations of a tree come from: a known answer, or (without one) earlier text."""

    def __init__(self, ends, tokens=None, lookup=True):
        """Draft from the reply ``tokens`` (up to its end token), or (``lookup``) from earlier text."""
        self.ends, self.tokens, self.end, self.lookup = ends, None, None, lookup
        if tokens is not None:
            closed = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
            self.tokens = list(tokens[:closed])
            self.end = tokens[closed] if closed < len(tokens) else None

    def propose(self, tree, so_far, at, limit):
        """Return (at most ``limit`` tokens, the end token expected behind them or None).

        Args:
            so_far: the reply up to the place to draft for, as bytes.
            at: the place in the known answer that follows, None = the answer is of no use here.
        """
        if self.tokens is not None and at is not None:
            tokens = self.tokens[at : at + limit]
            return tokens, self.end if at + len(tokens) == len(self.tokens) else None
        return self._look_up(tree.prompt_bytes + so_far, limit) if self.lookup else ([], None)

    def _look_up(self, text, limit):
        """Return what followed the latest earlier occurrence of the last tokens."""
        for length in _TAILS:
            tail, stop = text[-length * _ITEM :], len(text) - _ITEM
            place = text.rfind(tail, 0, stop)
            while place > 0 and place % _ITEM:  # a match between tokens
                place = text.rfind(tail, 0, place + len(tail) - 1)
            if place >= 0 and len(tail) == length * _ITEM:
                start = place + len(tail)
                tokens = array.array("I", text[start : start + limit * _ITEM]).tolist()
                closed = next((i for i, token in enumerate(tokens) if token in self.ends), None)
                return (tokens, None) if closed is None else (tokens[:closed], tokens[closed])
        return [], None


class Tree:
    """One prompt and the nodes explored behind it.

    Attributes:
        view: its buffer in the store, None while it has none. tokens, parents, positions, edges: lists per node.
        children: {(node, token): node}. ends: {(node, end token): log-probability}.
    """

    _numbers = itertools.count()

    def __init__(self, prompt, tokens, positions, next_position, draft_rows, member=0):  # noqa: PLR0913
        """Hold a prompt, a tuple and (T,) tokens, at positions (T,); ``next_position`` as of ``position_rule``, member
        as of ``Chain``.
        """
        self.number = next(Tree._numbers)
        self.prompt, self.prompt_bytes = prompt, _bytes(prompt)
        self.prompt_tokens, self.prompt_positions = tokens, positions
        self.next_position, self.draft_rows, self.member = next_position, draft_rows, member
        self.view = None
        self.reset()

    def reset(self):
        """Forget buffer and nodes."""
        self.view, self.planned = None, False
        self.pending = 0  # its chains that have not run yet
        self.tokens, self.parents, self.edges = [self.prompt[-1]], [-1], [0.0]
        self.positions = [int(self.prompt_positions[-1])]
        self.children, self.ends = {}, {}

    def add(self, parent, token):
        """Add a node behind ``parent``."""
        self.extend(parent, [token], known_as=parent)

    def extend(self, parent, tokens, known_as):
        """Add a chain of nodes behind ``parent``, the first of them as the child of ``known_as``."""
        next_position, node = self.next_position, len(self.tokens)
        position, before = self.positions[parent], self.tokens[parent]
        children, positions = self.children, self.positions
        for place, token in enumerate(tokens, node):
            position = next_position(position, before, token)
            positions.append(position)
            children[known_as, token] = known_as = place
            before = token
        self.tokens += tokens
        if tokens:
            self.parents.append(parent)
            self.parents += range(node, node + len(tokens) - 1)
            self.edges += [math.nan] * len(tokens)

    def repeat(self, node):
        """Add a node that stands in for an explored one, to bring its logits back."""
        self.tokens.append(self.tokens[node])
        self.parents.append(self.parents[node])
        self.positions.append(self.positions[node])
        self.edges.append(self.edges[node])

    def reply(self, node):
        """Return the tokens from the root (left out) to a node."""
        tokens = []
        while node > 0:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def path(self, node):
        """Return the nodes from the root to a node, both included, (depth + 1,) int32."""
        nodes = []
        while node >= 0:
            nodes.append(node)
            node = self.parents[node]
        return np.array(nodes[::-1], dtype=np.int32)

    def walk(self, reply):
        """Return (the node that the reply's tokens lead to as far as it has been explored, how many tokens)."""
        node = depth = 0
        while depth < len(reply) - 1 and (child := self.children.get((node, reply[depth]))) is not None:
            node, depth = child, depth + 1
        return node, depth

    def reply_nll(self, reply):
        """Return the NLL in nats of a reply that has been explored to its end."""
        nll, node = 0.0, 0
        for token in reply[:-1]:
            node = self.children[node, token]
            nll -= self.edges[node]
        return nll - self.ends[node, reply[-1]]

    def length_with(self, work):
        """Return how many slots the buffer has once a chain is in it."""
        return len(self.prompt) - 1 + work.first + len(work.tokens)

    def seat(self, store, work, spare):
        """Make sure that the buffer has place for a chain; return whether there was room.

        spare: slots that a new buffer gets beyond what it needs at the moment, if there is room.
        """
        before = len(self.prompt) - 1
        length = self.length_with(work)
        if self.view is None:
            self.view = store.open(before, length + spare) or store.open(before, length)
            work.brings_prompt = self.view is not None
            return work.brings_prompt
        if length <= self.view.capacity:
            return True
        return store.grow(self.view, int(before + 1.5 * (length - before))) or store.grow(self.view, length)


class Work:
    """A chain to run: tokens, each the child of the one before, of which the first is certain.

    Attributes:
        tree, path: the ancestors (nodes) of the first token. tokens: one row of the pass each. first: its first node.
        depth: tokens of the reply up to and with the first. text: of the search: these tokens, as bytes. targets: per
        row the token whose log-probability is asked for, for the first rows. stands_for: the explored node whose
        logits the first row brings back, or None.
        nll, bound: of the search: NLL up to the first token, and how much may still be added (infinity: a greedy
        search, for which the most probable token of each row counts). owner: request served.
    """

    def __init__(self, tree, path, depth):
        """Begin an empty chain behind the nodes of ``path``."""
        self.tree, self.path, self.depth = tree, path, depth
        self.tokens, self.targets, self.first, self.stands_for = [], [], len(tree.tokens), None
        self.text = b""
        self.nll, self.bound = 0.0, -1.0
        self.max_nll = self.max_new_tokens = self.draft = self.at = self.owner = None
        self.limit, self.misses, self.brings_prompt = tree.draft_rows, 0, False

    @classmethod
    def root(cls, tree, max_nll, draft, max_new_tokens):
        """Begin a search with the prompt's last token and, where an answer is known, all of it as draft."""
        work = cls(tree, np.zeros(0, dtype=np.int32), 0)
        work.first, work.tokens, tree.planned = 0, [tree.prompt[-1]], True
        work.max_nll, work.draft, work.max_new_tokens = max_nll, draft, max_new_tokens
        if draft is not None and draft.tokens is not None:
            work.at, work.limit = 0, len(draft.tokens) + 1
        work._expect(0.0)
        if work.at is not None:
            work.limit = tree.draft_rows
        return work

    def _expect(self, nll):
        """Set the NLL so far and append the draft."""
        self.nll, self.bound = nll, self.max_nll - nll + _SLACK
        room = self.max_new_tokens - 1 - self.depth
        if self.draft is None or room <= 0:
            return
        drafted, end = self.draft.propose(self.tree, self.text, self.at, min(self.limit, room))
        self._append(drafted, end)

    def _append(self, tokens, end):
        """Append tokens as descendants of the first; ``end``: the end token to ask for behind them, or None."""
        self.tree.extend(self.first, tokens, known_as=self._name(0))
        self.tokens += tokens
        self.targets = tokens if end is None else [*tokens, end]
        if end is not None:
            self.tree.ends[self._name(len(tokens)), end] = math.nan

    def _name(self, row):
        """Return the node whose logits a row brings."""
        return self.stands_for if row == 0 and self.stands_for is not None else self.first + row

    def branch(self, row, token, nll, logp):
        """Return the chain that continues behind a row of this one with another token, with a draft."""
        node = self.first + row
        path = np.append(self.path, np.arange(self.first, node + 1, dtype=np.int32))
        work = Work(self.tree, path, self.depth + row + 1)
        work.text = self.text + _bytes([*self.tokens[1 : row + 1], token])
        work.max_nll, work.draft, work.max_new_tokens = self.max_nll, self.draft, self.max_new_tokens
        whole = row == len(self.tokens) - 1  # all that was drafted held
        work.misses = self.misses + 1 if row == 0 and not whole else 0
        if self.at is not None and work.misses < 2:
            work.at = self.at + row + 1
        if whole and row:
            work.limit = 2 * self.limit
        self.tree.add(node, token)
        self.tree.edges[work.first] = logp
        work.tokens = [token]
        work._expect(nll)
        return work

    @classmethod
    def scoring(cls, tree, reply):
        """Return the chain that completes the scoring of a reply, None if all is known (or planned) already."""
        node, depth = tree.walk(reply)
        if depth == len(reply) - 1 and (node, reply[-1]) in tree.ends:
            return None
        path = tree.path(node)[:-1]
        work = cls(tree, path, depth)
        if node == 0 and not tree.planned:
            work.first, tree.planned = 0, True
        else:
            work.stands_for = node
            tree.repeat(node)
        work.tokens = [tree.tokens[node]]
        work._append(reply[depth:-1], reply[-1])
        return work

    def rows(self):
        """Return how many rows the chain costs, with the prompt if it is not in the buffer yet."""
        return len(self.tokens) + (len(self.tree.prompt) - 1 if self.tree.view is None else 0)

    def pieces(self):
        """Return (tokens, positions, number of rows at the beginning whose logits do not matter)."""
        stop = self.first + len(self.tokens)
        tokens, positions = self.tokens, self.tree.positions[self.first : stop]
        if not self.brings_prompt:
            return tokens, positions, 0
        before = len(self.tree.prompt) - 1
        tokens = np.append(self.tree.prompt_tokens[:-1], tokens)
        return tokens, np.append(self.tree.prompt_positions[:-1], positions), before

    def chain(self):
        """Return the chain for the store."""
        before = len(self.tree.prompt) - 1
        if self.brings_prompt:
            return Chain(self.tree.view, 0, before + len(self.tokens), self.path, self.tree.member)
        path = self.path + np.int32(before)
        return Chain(self.tree.view, before + self.first, len(self.tokens), path, self.tree.member)

    def enter(self, logps):
        """Take the log-probabilities of the targets as edges of the tree."""
        inner = len(self.tokens) - 1
        self.tree.edges[self.first + 1 : self.first + 1 + inner] = logps[:inner]
        if len(logps) > inner:
            self.tree.ends[self._name(inner), self.targets[inner]] = logps[inner]
