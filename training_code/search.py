"""The engine: search and scoring of many prompts at once, in key-value buffers that stay on the device.

Every prompt has a *tree*: its append-only buffer holds the prompt and then one slot per explored *node* (a beginning
of a reply); a node attends to the prompt and to its ancestors (``tree_attention``). One forward pass runs *chains* of
any number of trees: runs of tokens, each the child of the one before. A prompt, a single node of the frontier, a whole
drafted reply and a reply to score are all chains, so search, drafting and scoring are one mechanism:

- *search*: what exceeds the threshold is a set, so its order is free. After a pass, every next token within the
  threshold (in a greedy search: the most probable one alone) starts a new chain, whichever tree it is of.
- *draft*: tokens behind a chain's first one are a guess. Their true probabilities decide whether they count; a guess
  saves passes, never changes the result. The best answer so far is the draft of the other views of a task; a branch
  that leaves it drafts the rest of it again; without an answer, earlier text is looked up.
- *scoring*: a reply is walked down the tree as far as it has been explored; the rest is one chain.

Callers hand in *jobs*: generators that yield requests (``Find``, ``Score``) and receive the results, one per test
input. Jobs are admitted while their buffers fit in memory; finished trees are dropped when memory runs short, and what
does not fit alone is answered by ``plain_search``.

Source: "The LLM ARChitect" (2024), section on candidate generation; arXiv 2505.07859, "Augmented DFS".
differs: breadth first over all views of many tasks; the set of replies is the same.
"""

import contextlib
import itertools
import math
import time
from collections import deque
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from model_tools import position_ids, position_rule
from search_pass import Pass
from search_requests import Find, Scoring, Search
from search_trees import Tree
from tree_attention import PAGE, attention_window, make_store, members_of, slot_bytes, tree_mode
from tree_graphs import make_runner
from tree_memory import choose_room


_SPARE = 64  # slots that a buffer gets beyond what it needs at the moment
_LEAST_GRAPH = 256  # tokens of the largest graph, for which passes are kept short
_OVERBOOKING = 1.5  # test inputs under way rarely need all their buffers at once


@dataclass(frozen=True)
class EngineSettings:
    """How the engine works; nothing here changes a result, apart from rounding."""

    memory_limit: int | None = None  # bytes for keys and values; None: what is free
    max_rows: int | None = None  # most tokens of one forward pass; None: by device and model
    leaders: int = 1  # views of a test input that are searched before there is an answer to draft from
    draft_rows: int | None = None  # first length of a drafted continuation, doubled when it holds; None: by device
    lookup: bool = True  # draft from earlier text where there is no answer yet
    graphs: bool = True  # replay small passes as CUDA graphs (GPU only, not with packed 4-bit weights)
    unpack: bool | None = None  # use unpacked copies of 4-bit weights; None: if half of the free memory holds them

    def __post_init__(self):
        for name in ("memory_limit", "max_rows", "leaders", "draft_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, not {getattr(self, name)}")


@dataclass
class EngineStats:
    """Counters of an engine."""

    passes: int = 0  # forward passes
    graph_passes: int = 0  # of these, replayed as CUDA graphs
    rows: int = 0  # tokens that ran through the model
    prompt_rows: int = 0  # of these, tokens of prompts
    nodes: int = 0  # nodes of the search: within the threshold
    drafted: int = 0  # drafted tokens
    accepted: int = 0  # of these, within the threshold
    scored: int = 0  # tokens that ran for scoring alone
    replies: int = 0  # found
    dropped_views: int = 0  # finished views whose buffers had to make room; their prompts run again to be scored
    restarted_views: int = 0  # searches that had to make room and began anew
    plain_views: int = 0  # prompts that did not fit and were left to the plain search
    failed_views: int = 0  # of these, the ones for which memory did not suffice there either
    peak_slots: int = 0  # most slots in use
    slot_bytes: int = 0  # of keys and values
    attended: int = 0  # pairs (token, token that it attends to)
    read_slots: int = 0  # slots of trees that went on, once per pass
    seconds: dict = field(default_factory=dict)  # {stage: seconds}

    def as_dict(self):
        """Return the counters by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def numbered_jobs(jobs):
    """Yield (index, job) for every job; None, which stands for none now, as it is."""
    index = 0
    for job in jobs:
        yield None if job is None else (index, job)
        index += job is not None


class _Job:
    """A generator of requests, and the trees of its prompts."""

    def __init__(self, index, steps):
        self.index, self.steps = index, steps
        self.trees = {}  # {prompt: Tree}
        self.request = None  # what is being served: a Search or a Scoring
        self.need = 0  # slots
        self.member = 0  # its adapter, of several


class Engine:
    """Serves jobs on one model."""

    def __init__(self, model, settings=None, print_func=None, store=None, share=1.0, adapters=None):  # noqa: PLR0913
        """Prepare buffers for a model in evaluation mode.

        print_func takes lines about what was chosen. store: a ``KeyValueStore`` of one's own, None = made to fit.
        share: part of the free memory to take, less for few jobs; a ``memory_limit`` is taken as it is. adapters: the
        model's ``AdapterRows``, entered, whose members the requests name.
        """
        self.model, self.settings, self.adapters = model, settings or EngineSettings(), adapters
        self.print_func = print_func or (lambda line: None)
        self._given, self._share, self.max_rows = store, share, None
        self.stats = EngineStats(slot_bytes=slot_bytes(model))
        on_gpu = model.device.type == "cuda"
        self.draft_rows = self.settings.draft_rows or (8 if on_gpu else 1)
        self.window = attention_window(model)
        self.next_position = position_rule(model)
        self.overlap = on_gpu
        self.ready = deque()  # chains to run, in order
        self.flying = None  # the pass under way
        self.jobs, self.coming = [], None  # under way, waiting for memory
        self.idle = iter(())  # trees in memory with nothing to run, when a pass is chosen
        self.outcasts = []  # (request, tree) left to the plain search
        self.mean_nodes = 256.0  # of a finished tree, for the planning of memory
        self._take_memory()

    def _take_memory(self):
        """Make the buffers."""
        room = choose_room(self.model, self.stats.slot_bytes, self.settings.memory_limit, self.settings.max_rows,
                           0 if self.adapters is None else self.adapters.row_bytes)
        self.max_rows = min(room.rows, self.max_rows or room.rows)
        slots = room.slots if self.settings.memory_limit is not None else max(1, int(self._share * room.slots))
        self.store = self._given or make_store(self.model, slots)
        self.graphs = None
        if self.settings.graphs:
            self.graphs = make_runner(self.model, self.store, self.print_func, self.adapters)
        taken = self.store.total * self.stats.slot_bytes / 2**30
        self.print_func(f"engine: {self.store.total} slots for keys and values take {taken:.2f} GiB (room: "
                        f"{room.reason}), at most {self.max_rows} tokens per pass")  # fmt: skip

    # --- jobs

    def serve(self, jobs):
        """Run all jobs; yield (index, value returned by the job) as they finish.

        jobs: iterable of generators. It is asked for the next one when there is room; None among them (which does not
        count as one) says that it has none now but will have when a job under way has finished.

        Raises:
            FloatingPointError: when the model yields NaN.
        """
        queue = numbered_jobs(jobs)
        while True:
            finished = False
            for result in itertools.chain(self._admit(queue), self._finished_jobs()):
                finished = True
                yield result
            if self.ready or self.flying is not None:
                self._step()
            elif self.outcasts:
                self._serve_outcasts()
            elif self.jobs:
                raise RuntimeError(f"{len(self.jobs)} jobs wait, but nothing is left to run: an error of the engine")
            elif self.coming is None and not finished:  # else there may be a next one now
                return

    def _admit(self, queue):
        """Start jobs as long as their buffers fit; yield (index, value) of those that need nothing."""
        while True:
            if self.coming is None:
                index, steps = next(queue, None) or (None, None)
                if steps is None:  # none is left, or none now
                    return
                job = _Job(index, steps)
                done = self._advance(job, None)
                if done is not None:
                    yield index, done[0]
                    continue
                self.coming = job
            if self.jobs and sum(job.need for job in [*self.jobs, self.coming]) > _OVERBOOKING * self.store.total:
                return
            job, self.coming = self.coming, None
            self.jobs.append(job)
            job.request.start()

    def _finished_jobs(self):
        for job in list(self.jobs):
            while (result := job.request.result()) is not None:
                done = self._advance(job, result)
                if done is not None:
                    for tree in job.trees.values():
                        self.drop(tree)
                    self.jobs.remove(job)
                    yield job.index, done[0]
                    break
                job.request.start()

    def _advance(self, job, result):
        """Give a job its result; return None, or (its value,) when it is over."""
        try:
            request = job.steps.send(result)
        except StopIteration as stop:
            return (stop.value,)
        job.member = request.member
        job.request = (Search if isinstance(request, Find) else Scoring)(self, job, request)
        job.need = max(job.need, sum(len(tree.prompt) + int(self.mean_nodes) for tree in job.trees.values()))
        return None

    def close(self):
        """Give all memory back; the engine is of no use after that."""
        self.ready.clear()
        self.jobs.clear()
        self.store = self.graphs = self.flying = None

    def trees(self, job, prompts):
        """Return the trees of prompts (tuples of tokens) in a job; those that are not there are made."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in job.trees]
        if not all(new):
            raise ValueError("a prompt is empty")
        if new:
            lengths = [len(prompt) for prompt in new]
            tokens = np.zeros((len(new), max(lengths)), np.int64)  # what stands behind a prompt does not matter
            for row, prompt in zip(tokens, new, strict=True):
                row[: len(prompt)] = prompt
            positions = position_ids(self.model, torch.from_numpy(tokens)).numpy()
            for prompt, row, own in zip(new, tokens, positions, strict=True):
                own = own[: len(prompt)].copy()
                job.trees[prompt] = Tree(prompt, row[: len(prompt)], own, self.next_position, self.draft_rows,
                                          job.member)  # fmt: skip
        return [job.trees[prompt] for prompt in prompts]

    def drop(self, tree):
        """Give the buffer of a tree back and forget its nodes."""
        if tree.view is not None:
            self.mean_nodes += 0.02 * (len(tree.tokens) - self.mean_nodes)
            self.store.close(tree.view)
        tree.reset()

    # --- one pass

    def _step(self):
        """Launch a pass of as many chains as fit, and read the results of the one before (on a CPU: of this one).

        So a GPU works on one pass while the results of another are read here.
        """
        clock = time.perf_counter()
        works = self._choose()
        if not works and self.flying is None:
            self._make_room()
            return
        # the rows of an adapter and prompts of equal length side by side; a tree's chains stay in order
        works.sort(key=lambda work: (work.tree.member,
                                     len(work.tree.prompt) + len(work.tokens) if work.brings_prompt else math.inf,
                                     work.tree.number))  # fmt: skip
        self._tick("choose", clock)
        self.stats.peak_slots = max(self.stats.peak_slots, self.store.total - self.store.free)
        launched = self._try(works) if works else None
        self._land()
        self.flying = launched
        if works and launched is None:
            self._run_in_parts(works)
        if not self.overlap:
            self._land()

    def _try(self, works):
        """Launch a pass; None where the memory does not suffice (outside of the error, which holds on to some)."""
        try:
            return self._launch(works)
        except torch.OutOfMemoryError:
            pass
        return None

    def _land(self):
        """Read the results of the pass that is under way, if one is."""
        if self.flying is not None:
            landed, self.flying = self.flying, None
            clock = time.perf_counter()
            results = landed.results()
            clock = self._tick("wait", clock)
            self._read(landed, *results)
            self._tick("read", clock)

    def _run_in_parts(self, works):
        """Run chains for which the memory did not suffice at once; leave a tree to the plain search if it must be."""
        parts = [works]
        while parts:
            part = [work for work in parts.pop() if work.tree.view is not None]  # else its tree was left
            torch.cuda.empty_cache()
            self.flying = self._try(part) if part else None
            if self.flying is not None:
                self._land()
            elif len(part) == 1:
                self.leave(part[0].owner, part[0].tree, "its pass does not fit into the GPU's memory")
            elif part:
                self.max_rows = max(1, min(self.max_rows, sum(len(work.pieces()[0]) for work in part) // 2))
                self.print_func(f"engine: out of memory, now at most {self.max_rows} tokens per pass")
                parts += [part[len(part) // 2 :], part[: len(part) // 2]]

    def _tick(self, stage, since):
        now = time.perf_counter()
        self.stats.seconds[stage] = self.stats.seconds.get(stage, 0) + now - since
        return now

    def _choose(self):
        """Take chains from the queue until the pass is full; those without room stay in it.

        With graphs, a pass has chains that bring their prompts or such that do not: as the first of them.
        """
        works, left, rows, blocked = [], [], 0, set()
        self.idle = (tree for job in reversed(self.jobs) for tree in job.trees.values()
                     if tree.view is not None and not tree.pending)  # fmt: skip
        graphs, most, prompts = self.graphs is not None and self.graphs.largest > 0, self.max_rows, None
        while self.ready:
            work = self.ready.popleft()
            cost, brings_prompt = work.rows(), work.tree.view is None
            other_kind = graphs and prompts not in (None, brings_prompt)
            if works and not other_kind and rows + cost > most:
                left.append(work)
                break
            if work.tree in blocked or other_kind or not self._seat(work):
                blocked.add(work.tree)
                left.append(work)
                continue
            works.append(work)
            rows += cost
            prompts = brings_prompt
            if graphs and not prompts and self.graphs.largest >= _LEAST_GRAPH:
                most = min(self.max_rows, self.graphs.largest)
        self.ready.extendleft(reversed(left))
        return works

    def _seat(self, work):
        """Make place in the buffer for a chain; trees with nothing to run make room if need be."""
        spare = _SPARE if self.store.grows_in_place else max(_SPARE, int(self.mean_nodes))
        while not work.tree.seat(self.store, work, spare):
            if (idle := next(self.idle, None)) is None:
                return False
            self.stats.dropped_views += 1
            self.drop(idle)
        return True

    def _make_room(self):
        """Deal with a queue of which nothing fits: the youngest trees begin anew, later, until the oldest has room.

        It is never restarted, so this comes to an end; what does not fit alone is left to the plain search.
        """
        first = min((work.tree for work in self.ready), key=lambda tree: tree.number)
        own = [work for work in self.ready if work.tree is first]
        self.ready = deque([*own, *(work for work in self.ready if work.tree is not first)])
        others = [(job, tree) for job in self.jobs for tree in job.trees.values()
                  if tree.view is not None and tree is not first]  # fmt: skip
        if first.length_with(own[0]) > self.store.total or not others:
            self.leave(own[0].owner, first, "it does not fit into the engine's memory")
            return
        held = first.view.capacity if first.view is not None and self.store.grows_in_place else 0
        for job, tree in sorted(others, key=lambda other: -other[1].number):
            self.stats.restarted_views += 1
            self._forget(tree)
            job.request.restart(tree)
            if self.store.free >= first.length_with(own[0]) - held + PAGE:  # which may begin a page
                break

    def _forget(self, tree):
        self.ready = deque(work for work in self.ready if work.tree is not tree)
        self.drop(tree)

    def leave(self, request, tree, why):
        """Leave a tree to the plain search, when all others are done."""
        self.print_func(f"engine: a prompt of {len(tree.prompt)} tokens goes to the plain search: {why}")
        self._forget(tree)
        tree.pending = 1  # for its request, until the plain search has answered
        self.outcasts.append((request, tree))

    def _serve_outcasts(self):
        """Let the plain search answer for the trees left to it, with the engine's memory given back."""
        for tree in (tree for job in self.jobs for tree in job.trees.values() if tree.view is not None):
            self.stats.dropped_views += 1
            self.drop(tree)
        self.store = self.graphs = None
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        outcasts, self.outcasts = self.outcasts, []
        answered = [(request, tree, self._plainly(request, tree)) for request, tree in outcasts]
        self._take_memory()
        for request, tree, answer in answered:
            self.stats.plain_views += 1
            tree.pending = 0
            request.take_plain(tree, answer)

    def _plainly(self, request, tree):
        if self.adapters is not None:
            self.adapters.use(torch.tensor([tree.member], device=self.model.device))
        with contextlib.suppress(torch.OutOfMemoryError):
            return request.plainly(tree)
        torch.cuda.empty_cache()
        self.stats.failed_views += 1
        self.print_func(f"engine: a prompt of {len(tree.prompt)} tokens does not fit into memory at all: it is left "
                        "without an answer")
        request.request.complete = False
        return request.nothing(tree)

    def beyond_window(self, length):
        """Tell whether the model's attention does not reach over so many tokens; the plain search heeds that."""
        return self.window is not None and length > self.window

    @torch.no_grad()
    def _launch(self, works):
        """Launch the forward pass of chains; return it as a ``Pass``."""
        clock = time.perf_counter()
        pieces = [work.pieces() for work in works]  # (tokens, positions, rows without logits) of each
        tokens, positions = (np.concatenate([piece[i] for piece in pieces]) for i in (0, 1))
        lengths = np.array([len(piece[0]) for piece in pieces])
        skipped = np.array([piece[2] for piece in pieces])
        counts = lengths - skipped
        keep = np.arange(counts.sum()) + np.repeat(skipped.cumsum(), counts)
        clock = self._tick("prepare", clock)
        logits = self.logits([work.chain() for work in works], tokens, positions, keep)
        launched = Pass(works, counts, logits.float().log_softmax(-1))
        self._count(works, lengths, skipped)
        self._tick("launch", clock)
        return launched

    def logits(self, chains, tokens, positions, keep):
        """Run the model on the tokens (N,) of chains at positions (N,); return logits of the rows ``keep``, (R, V)."""
        return self.run_model(self.model, self.store, self.graphs, (chains, tokens, positions, keep))

    def run_model(self, model, store, graphs, inputs):
        """Run a model with its store: as a recorded graph where the pass fits into one; as ``logits``."""
        chains, tokens, positions, keep = inputs
        if graphs is not None and graphs.load(chains, tokens, positions):  # then without prompts: all rows are kept
            before, seconds = graphs.capture_seconds, self.stats.seconds
            logits = graphs.replay()
            seconds["capture"] = seconds.get("capture", 0) + graphs.capture_seconds - before
            self.stats.graph_passes += 1
            return logits
        store.prepare(chains)
        arrays = tokens, positions, keep, members_of(chains)
        integers = torch.from_numpy(np.concatenate(arrays)).to(model.device)
        ids, positions, keep, members = integers.split([len(array) for array in arrays])
        if self.adapters is not None:
            self.adapters.use(members, members[keep])
        mask = torch.ones_like(ids)[None]  # else transformers looks for borders in the positions, and waits for that
        with tree_mode(model):
            return model(input_ids=ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False,
                         logits_to_keep=keep, tree_store=store).logits[0]  # fmt: skip

    def _count(self, works, lengths, skipped):
        """Add a pass to the counters of traffic and arithmetic."""
        stats = self.stats
        stats.passes += 1
        stats.rows += int(lengths.sum())
        stats.prompt_rows += int(skipped.sum())
        before = np.array([0 if work.brings_prompt else len(work.tree.prompt) + len(work.path) for work in works])
        stats.attended += int((lengths * before + lengths * (lengths + 1) // 2).sum())
        going_on = {work.tree for work in works if not work.brings_prompt}
        stats.read_slots += sum(len(tree.prompt) + len(tree.tokens) for tree in going_on)

    def _read(self, landed, hit_rows, hit_tokens, hit_logp, target_logp):
        """Enter the results of a pass into the trees and hand every chain to its owner."""
        borders = np.searchsorted(hit_rows, np.append(landed.starts, np.inf))
        rows = (hit_rows - np.repeat(landed.starts, np.diff(borders))).tolist()
        tokens, logps, borders = hit_tokens.tolist(), hit_logp.tolist(), borders.tolist()
        target_logp, at = target_logp.tolist(), 0
        for work, lo, hi in zip(landed.works, borders, borders[1:], strict=False):
            work.enter(target_logp[at : at + len(work.targets)])
            at += len(work.targets)
            work.owner.take(work, zip(rows[lo:hi], tokens[lo:hi], logps[lo:hi], strict=True))
