"""The engine: threshold search and scoring of many prompts at once, in key-value buffers that stay on the device.

Every prompt has a *tree*: its append-only buffer holds the prompt and then one slot per explored *node* (a beginning
of a reply); a node attends to the prompt and to its ancestors (``tree_attention``). One forward pass runs *chains* of
any number of trees: runs of tokens, each the child of the one before. A prompt, a single node of the frontier, a whole
drafted reply and a reply to score are all chains, so search, drafting and scoring are one mechanism:

- *search*: what exceeds the threshold is a set, so its order is free. After a pass, every next token within the
  threshold starts a new chain, whichever tree it is of.
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

import itertools
import math
import time
from collections import deque
from dataclasses import dataclass, field, fields

import numpy as np
import torch

from model_tools import position_ids, position_rule
from plain_search import refuse_nan
from search_requests import Find, Scoring, Search
from search_trees import Tree
from tree_attention import attention_window, make_store, slot_bytes, tree_mode
from tree_graphs import make_runner
from tree_memory import choose_room


_SMALL_VOCABULARY = 512  # up to here all log-probabilities are fetched from the device
_OVERBOOKING = 1.5  # test inputs under way rarely need all their buffers at once


@dataclass(frozen=True)
class EngineSettings:
    """How the engine works; nothing here changes a result, apart from rounding."""

    memory_limit: int | None = None  # bytes for keys and values; None: what is free
    max_rows: int | None = None  # most tokens of one forward pass; None: by device and model
    leaders: int = 1  # views of a test input that are searched before there is an answer to draft from
    draft_rows: int | None = None  # first length of a drafted continuation, doubled when it holds; None: by device
    lookup: bool = True  # draft from earlier text where there is no answer yet
    graphs: bool = True  # replay small passes as CUDA graphs (GPU only, not for 4-bit models)


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
    peak_slots: int = 0  # most slots in use
    slot_bytes: int = 0  # of keys and values
    attended: int = 0  # pairs (token, token that it attends to)
    read_slots: int = 0  # slots of trees that went on, once per pass
    seconds: dict = field(default_factory=dict)  # {stage: seconds}

    def as_dict(self):
        """Return the counters by name."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


class _Job:
    """A generator of requests, and the trees of its prompts."""

    def __init__(self, index, steps):
        self.index, self.steps = index, steps
        self.trees = {}  # {prompt: Tree}
        self.request = None  # what is being served: a Search or a Scoring
        self.need = 0  # slots


class _Pass:
    """A forward pass under way: its chains and the log-probabilities that it will yield."""

    def __init__(self, works, counts, logp):
        """Take chains, the number of rows with logits of each, and log-probabilities (rows, V) on the device."""
        self.works, self.starts = works, counts.cumsum() - counts
        self.bounds = np.repeat(np.array([work.bound for work in works], np.float32), counts)
        wanted = np.array([len(work.targets) for work in works])
        self.rows = np.arange(wanted.sum()) + np.repeat(self.starts - wanted.cumsum() + wanted, wanted)
        self.targets = np.fromiter(itertools.chain.from_iterable(work.targets for work in works), np.int64)
        self.trees = {work.tree for work in works}
        if logp.shape[1] > _SMALL_VOCABULARY:  # too much to fetch: what matters is picked out there, and waited for
            self.found = self._pick(logp)
        else:
            self.found, self.logp = None, logp.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if logp.is_cuda else None
        if self.event is not None:
            self.event.record()

    def _pick(self, logp):
        rows, targets = torch.from_numpy(np.stack([self.rows, self.targets])).to(logp.device)
        hits = (logp > -torch.from_numpy(self.bounds).to(logp.device)[:, None]).nonzero()
        refuse_nan(logp[:, 0].isnan().any().item())
        hit_logp, target_logp = logp[hits[:, 0], hits[:, 1]], logp[rows, targets]
        hit_rows, hit_tokens = hits.cpu().numpy().T
        return hit_rows, hit_tokens, hit_logp.double().cpu().numpy(), target_logp.double().cpu().numpy()

    def results(self):
        """Wait for the pass; return (rows, tokens, log-probabilities of what may be within the threshold, by rows;
        log-probabilities of the chains' targets).

        Raises:
            FloatingPointError: when the model yields NaN.
        """
        if self.event is not None:
            self.event.synchronize()
        if self.found is not None:
            return self.found
        logp = self.logp.numpy()
        refuse_nan(np.isnan(logp[:, 0]).any())
        rows, tokens = np.nonzero(logp > -self.bounds[:, None])
        return rows, tokens, logp[rows, tokens].astype(np.float64), logp[self.rows, self.targets].astype(np.float64)


class Engine:
    """Serves jobs on one model."""

    def __init__(self, model, settings=None, print_func=None, store=None):
        """Prepare buffers for a model in evaluation mode.

        print_func takes lines about what was chosen. store: a ``KeyValueStore`` of one's own, None = made to fit.
        """
        self.model, self.settings = model, settings or EngineSettings()
        self.print_func = print_func or (lambda line: None)
        room = choose_room(model, slot_bytes(model), self.settings.memory_limit, self.settings.max_rows)
        self.max_rows = room.rows
        self.store = store or make_store(model, room.slots)
        self.print_func(f"engine: {self.store.total} slots of {slot_bytes(model)} bytes for keys and values "
                        f"({room.reason}), at most {self.max_rows} tokens per pass")  # fmt: skip
        self.graphs = make_runner(model, self.store, self.print_func) if self.settings.graphs else None
        on_gpu = model.device.type == "cuda"
        self.draft_rows = self.settings.draft_rows or (8 if on_gpu else 3)
        self.window = attention_window(model)
        self.next_position = position_rule(model)
        self.stats = EngineStats(slot_bytes=slot_bytes(model))
        self.ready = deque()  # chains to run, in order
        self.in_pass = set()  # trees of the pass that is being put together
        self.blocked = set()  # trees whose chains have to wait for the next one
        self.flying = None  # the pass under way
        self.overlap = on_gpu
        self.jobs = []
        self.mean_nodes = 256.0  # of a finished tree, for the planning of memory

    # --- jobs

    def serve(self, jobs):
        """Run all jobs; yield (index, value returned by the job) as they finish.

        Raises:
            FloatingPointError: when the model yields NaN.
        """
        queue = enumerate(jobs)
        coming = None  # a job that waits for memory
        while True:
            while True:
                if coming is None:
                    index, steps = next(queue, (None, None))
                    if steps is None:
                        break
                    coming = _Job(index, steps)
                    done = self._advance(coming, None)
                    if done is not None:
                        yield index, done[0]
                        coming = None
                        continue
                if self.jobs and sum(job.need for job in [*self.jobs, coming]) > _OVERBOOKING * self.store.total:
                    break
                self.jobs.append(coming)
                coming.request.start()
                coming = None
            yield from self._finished_jobs()
            if self.ready or self.flying is not None:
                self._step()
            elif not self.jobs and coming is None:
                return

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
        job.request = (Search if isinstance(request, Find) else Scoring)(self, job, request)
        job.need = max(job.need, sum(len(tree.prompt) + int(self.mean_nodes) for tree in job.trees.values()))
        return None

    def close(self):
        """Give all memory back; the engine is of no use after that."""
        self.ready.clear()
        self.jobs.clear()
        self.store = self.graphs = None

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
                job.trees[prompt] = Tree(prompt, row[: len(prompt)], own, self.next_position, self.draft_rows)
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
        # prompts of equal length side by side; a tree's chains stay in order
        works.sort(key=lambda work: (len(work.tree.prompt) + len(work.tokens) if work.brings_prompt else math.inf,
                                     work.tree.number))  # fmt: skip
        self._tick("choose", clock)
        self.stats.peak_slots = max(self.stats.peak_slots, self.store.total - self.store.free)
        launched = None
        try:
            launched = self._launch(works) if works else None
        except torch.OutOfMemoryError:
            self._land()
            self._halve(works)
        self._land()
        self.flying = launched
        if not self.overlap:
            self._land()

    def _land(self):
        """Read the results of the pass that is under way, if one is."""
        if self.flying is not None:
            landed, self.flying = self.flying, None
            clock = time.perf_counter()
            results = landed.results()
            clock = self._tick("wait", clock)
            self._read(landed, *results)
            self._tick("read", clock)

    def _halve(self, works):
        """Run chains, for which the memory did not suffice at once, in two passes."""
        if len(works) == 1:
            raise torch.OutOfMemoryError(f"the GPU's memory does not suffice for one pass of {works[0].rows()} tokens")
        torch.cuda.empty_cache()
        self.max_rows = max(1, self.max_rows // 2)
        self.print_func(f"engine: out of memory, now at most {self.max_rows} tokens per pass")
        for part in (works[: len(works) // 2], works[len(works) // 2 :]):
            try:
                self.flying = self._launch(part)
            except torch.OutOfMemoryError:
                self._halve(part)
            self._land()

    def _tick(self, stage, since):
        now = time.perf_counter()
        self.stats.seconds[stage] = self.stats.seconds.get(stage, 0) + now - since
        return now

    def _choose(self):
        """Take chains from the queue until the pass is full; those without room stay in it.

        With graphs, a pass has chains that bring their prompts or such that do not: as the first of them.
        """
        works, left, rows = [], [], 0
        self.in_pass, self.blocked = set(), set()
        blocked = self.blocked
        graphs, most, prompts = self.graphs is not None and self.graphs.largest > 0, self.max_rows, None
        while self.ready:
            work = self.ready.popleft()
            cost, brings_prompt = work.rows(), work.tree.view is None
            other_kind = graphs and prompts not in (None, brings_prompt)
            if works and not other_kind and rows + cost > most:
                left.append(work)
                blocked.add(work.tree)
                break
            if work.tree in blocked or other_kind or not self._seat(work):
                blocked.add(work.tree)
                left.append(work)
                continue
            works.append(work)
            self.in_pass.add(work.tree)
            rows += cost
            prompts = brings_prompt
            if graphs and not prompts:
                most = min(self.max_rows, self.graphs.largest)
        self.ready.extendleft(reversed(left))
        return works

    def _seat(self, work):
        """Make place in the buffer for a chain; finished trees of other prompts make room if need be."""
        tree = work.tree
        while not tree.seat(self.store, work):
            idle = self._idle_tree(tree)
            if idle is None:
                return False
            self.stats.dropped_views += 1
            self.drop(idle)
        return True

    def _idle_tree(self, other):
        """Return a tree with a buffer and nothing to run, of the youngest job; None if there is none."""
        busy = {work.tree for work in self.ready} | {other} | self.in_pass | self.blocked
        busy |= self.flying.trees if self.flying is not None else set()
        for job in reversed(self.jobs):
            for tree in job.trees.values():
                if tree.view is not None and tree not in busy:
                    return tree
        return None

    def _make_room(self):
        """Deal with a queue of which nothing fits: restart the youngest search; what is alone goes the plain way."""
        first = self.ready[0].tree
        for job in reversed(self.jobs):
            for tree in reversed(job.trees.values()):
                if tree.view is not None and tree is not first:
                    self.stats.restarted_views += 1
                    self._forget(tree)
                    job.request.restart(tree)
                    return
        job = next(job for job in self.jobs if first in job.trees.values())
        self._forget(first)
        self.print_func(f"engine: a prompt of {len(first.prompt)} tokens does not fit into its memory: plain search")
        job.request.serve_plainly(first)

    def _forget(self, tree):
        self.ready = deque(work for work in self.ready if work.tree is not tree)
        self.drop(tree)

    def beyond_window(self, length):
        """Tell whether the model's attention does not reach over so many tokens; the plain search heeds that."""
        return self.window is not None and length > self.window

    @torch.no_grad()
    def _launch(self, works):
        """Launch the forward pass of chains; return it as a ``_Pass``."""
        clock = time.perf_counter()
        pieces = [work.pieces() for work in works]  # (tokens, positions, rows without logits) of each
        tokens, positions = (np.concatenate([piece[i] for piece in pieces]) for i in (0, 1))
        lengths = np.array([len(piece[0]) for piece in pieces])
        skipped = np.array([piece[2] for piece in pieces])
        counts = lengths - skipped
        keep = np.arange(counts.sum()) + np.repeat(skipped.cumsum(), counts)
        clock = self._tick("prepare", clock)
        logits = self.logits([work.chain() for work in works], tokens, positions, keep)
        launched = _Pass(works, counts, logits.float().log_softmax(-1))
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
        integers = torch.from_numpy(np.concatenate([tokens, positions, keep])).to(model.device)
        ids, positions, keep = integers.split([len(tokens), len(positions), len(keep)])
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
