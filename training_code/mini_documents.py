"""Training documents of Mini: where the pairs come from, how they become packed rows of tokens.

Terms: *source* = a set of tasks whose pairs may all be trained on; *document* = one task in one random view: some
demonstration pairs and a query with its reply; *row* = several whole documents packed without padding. The loss is
taken on replies only, the first reply of a document masked, as in the published fine-tuning.
"""

import copy
import hashlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import IterableDataset

from arc_downloader import load_arc_agi_1_training, load_arc_agi_2_training_without_arc_agi_1
from arc_files import read_rearc_examples, read_rearc_metadata
from arc_loader import ArcDataset
from mini_model import BOS, EOS, VOCABULARY

IGNORED = -100  # label of a token without loss
_DIGIT, _NEWLINE, _INPUT, _OUTPUT = (VOCABULARY.index(token) for token in ("0", "\n", "I", "O"))
_MAX_DRAWS = 1000  # of documents that all turn out too long
_PENDING = 32  # documents waiting to be packed: enough for rows to be about 96 % full


def load_sources(path):
    """Load all that Mini is trained on: nothing of ARC-AGI-1's evaluation set, nor of ARC-AGI-2's.

    Args:
        path: the folder `input`, with re_arc and ConceptARC as `arc_downloader.py` writes them.

    Returns:
        {source: {task: [(input, output) uint8 arrays (H, W)...]}} for the sources re_arc, arc_training, arc2_training
        and concept_arc, test pairs of these training tasks included.
    """
    path = Path(path)
    rearc = path / "re_arc"
    return {
        "re_arc": {
            task: [(_array(pair.input), _array(pair.output)) for pair in read_rearc_examples(rearc, task)]
            for task in sorted(read_rearc_metadata(rearc))
        },
        "arc_training": _all_pairs(load_arc_agi_1_training()),
        "arc2_training": _all_pairs(load_arc_agi_2_training_without_arc_agi_1()),
        "concept_arc": _all_pairs(ArcDataset.load_from_neoneye(path / "ConceptARC")),
    }


def _array(grid):
    return np.array(grid, dtype=np.uint8)


def _all_pairs(dataset):
    tasks = dataset.move_test_to_train().challenge
    return {name: [(_array(p["input"]), _array(p["output"])) for p in task["train"]] for name, task in tasks.items()}


def demonstration_pairs(dataset):
    """Return {task: [(input, output) uint8 arrays (H, W)...]} of the demonstration pairs, without any test pair."""
    return {name: [(_array(p["input"]), _array(p["output"])) for p in task["train"]]
            for name, task in dataset.remove_test_data().challenge.items()}  # fmt: skip


class DocumentStream(IterableDataset):
    """Endless stream of packed rows; every data-loading worker draws from its own seeded stream.

    Args:
        sources: {source: {task: [(input, output) uint8 arrays (H, W)...]}}, see :func:`load_sources`.
        settings: see :class:`mini_pretraining.PretrainingSettings`.

    Yields:
        dict of int64 tensors of (max_tokens,): input_ids, labels (-100 where no loss is taken), document_ids.
    """

    def __init__(self, sources, settings):
        self.sources = {source: list(tasks.values()) for source, tasks in sources.items()}
        self.names, self.weights = zip(*settings.source_weights.items(), strict=True)
        self.settings, self.start = settings, 0

    def digest(self):
        """Return a hash of all pairs of all sources, by which a run that goes on knows its data."""
        hasher = hashlib.sha256()
        for source, tasks in sorted(self.sources.items()):
            hasher.update(f"{source} {[len(pairs) for pairs in tasks]}".encode())
            for grid in (grid for pairs in tasks for pair in pairs for grid in pair):
                hasher.update(f"{grid.shape}".encode() + grid.tobytes())
        return hasher.hexdigest()

    def starting_at(self, step):
        """Return the stream of a run that goes on at this step: the same sources, fresh documents."""
        stream = copy.copy(self)
        stream.start = step
        return stream

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        rng = np.random.default_rng([self.settings.seed, self.start, worker.id if worker else 0])
        waiting = []
        while True:
            row, space = [], self.settings.max_tokens
            while True:  # the first waiting document that fits, until none does
                while len(waiting) < _PENDING:
                    waiting.append(self.draw_document(rng))
                fitting = next((i for i, (ids, _) in enumerate(waiting) if len(ids) <= space), None)
                if fitting is None:
                    break
                row.append(waiting.pop(fitting))
                space -= len(row[-1][0])
            yield self._pack(row)

    def draw_document(self, rng):
        """Draw a document that fits into a row; return (ids, labels), int64 arrays of (T,).

        Raises:
            ValueError: ``max_tokens`` is too small for the documents of these sources.
        """
        for _ in range(_MAX_DRAWS):
            grids = self._draw_grids(rng)
            while len(grids) > 2 and _n_tokens(grids) > self.settings.max_tokens:
                grids.pop()
            if _n_tokens(grids) <= self.settings.max_tokens:
                return _document(grids)
        raise ValueError(f"no document of {_MAX_DRAWS} fits into {self.settings.max_tokens} tokens: raise --max-tokens")

    def _draw_grids(self, rng):
        """Draw a task, pairs, a symmetry and colours; return the pairs as tokens [(input (T,), output (T,))...]."""
        pairs = self.sources[self.names[rng.choice(len(self.names), p=self.weights)]]
        pairs = pairs[rng.integers(len(pairs))]
        wanted = int(rng.integers(self.settings.min_pairs, self.settings.max_pairs + 1)) + 1
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:wanted]]
        quarter_turns, transposed = int(rng.integers(4)), bool(rng.integers(2))
        colours = (rng.permutation(10) + _DIGIT).astype(np.uint8)
        return [[_encode(grid, quarter_turns, transposed, colours) for grid in pair] for pair in chosen]

    def _pack(self, documents):
        size = self.settings.max_tokens
        row = {
            "input_ids": np.full(size, VOCABULARY.index(BOS)),  # the unused end: documents of one token, no loss
            "labels": np.full(size, IGNORED),
            "document_ids": np.arange(size) + size,
        }
        place = 0
        for number, (ids, labels) in enumerate(documents):
            span = slice(place, place + len(ids))
            row["input_ids"][span], row["labels"][span], row["document_ids"][span] = ids, labels, number
            place = span.stop
        return {name: torch.from_numpy(values) for name, values in row.items()}


def _n_tokens(grids):
    return 1 + sum(len(query) + len(reply) + 3 for query, reply in grids)  # start token; markers and end token


def _document(grids):
    ids, labels = [[VOCABULARY.index(BOS)]], [[IGNORED]]
    for number, (query, reply) in enumerate(grids):
        reply = np.append(reply, VOCABULARY.index(EOS))
        ids += [[_INPUT], query, [_OUTPUT], reply]
        labels += [np.full(len(query) + 2, IGNORED), reply if number else np.full(len(reply), IGNORED)]
    return np.concatenate(ids).astype(np.int64), np.concatenate(labels).astype(np.int64)


def _encode(grid, quarter_turns, transposed, colours):
    grid = np.rot90(grid.T if transposed else grid, quarter_turns)
    tokens = np.full((grid.shape[0], grid.shape[1] + 1), _NEWLINE, dtype=np.uint8)
    tokens[:, :-1] = colours[grid]
    return tokens.ravel()
