"""Small passes as CUDA graphs: what Python takes long to launch is recorded once and replayed with new contents.

A forward pass of few rows is bound by the launches of its hundreds of kernels. A graph repeats them at once, but at
fixed addresses and with fixed shapes: so a pass without prompts is padded to the next *bucket* of rows and its tables
go into fixed buffers (``tree_pages.FixedTables``). Graphs are recorded when they are first needed.
"""

import time

import torch

from adapter_tools import four_bit_layers
from cuda_recorder import CudaRecorder
from tree_attention import attention_window, tree_mode
from tree_pages import FixedTables, PagedStore

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048)
_MASK_BYTES = 8 << 20  # ancestors of all chains; one buffer for all buckets
_ANCESTORS = 1024  # slots for them per row, on average
_LEAST_FILLED = 1 << 16
_WARM_UPS = 2


def make_runner(model, store, print_func=None, adapters=None):
    """Return a ``GraphRunner``, or None: without a GPU or a paged store, and for packed 4-bit weights."""
    usable = isinstance(store, PagedStore) and store.shape.device.type == "cuda" and not four_bit_layers(model)
    return GraphRunner(model, store, print_func, adapters) if usable else None


class GraphRunner:
    """Runs passes that fit into fixed buffers: replayed on a GPU, elsewhere (for tests) run from the same buffers.

    The graphs hold addresses: the model's weights must stay where and as they are. All graphs share their memory, so
    the logits of a pass are valid until the next pass.

    Attributes:
        largest: most rows of a pass; 0 when the model turned out not to be recordable.
        captured: graphs recorded. capture_seconds: time that took, warming up and compiling included.
    """

    def __init__(self, model, store, print_func=None, adapters=None):
        """Make a runner for a model in evaluation mode and its ``PagedStore``; adapters: its ``AdapterRows``."""
        self.model, self.store, self.print_func = model, store, print_func or (lambda line: None)
        self.adapters = adapters
        self.largest, self.captured, self.capture_seconds = BUCKETS[-1], 0, 0.0
        device = store.shape.device
        self._window = attention_window(model)
        self._mask = torch.zeros(_MASK_BYTES, dtype=torch.uint8, device=device)
        self._tables, self._loaded = {}, None  # {bucket: FixedTables}, (tables, plan)
        self._graphs = {}  # {(bucket, rows per tile): (graph, its logits)}; the tile size is a constant of the kernel
        on_gpu = device.type == "cuda"
        self._recorder = CudaRecorder(device) if on_gpu else None

    def fits(self, rows, chains):
        """Tell whether a pass may fit: no chain brings its prompt, and there is a bucket for so many rows."""
        return rows <= self.largest and all(chain.start > 0 for chain in chains)

    def load(self, chains, tokens, positions):
        """Prepare a pass, tokens and positions (N,) int64 arrays; False, with nothing loaded, if it does not fit.

        Raises:
            ValueError: as ``PagedStore.prepare``.
        """
        if not self.fits(len(tokens), chains):
            return False
        plan = self.store.plan(chains)
        bucket = next(size for size in BUCKETS if size >= plan.rows)
        if bucket not in self._tables:
            most_filled = max(_LEAST_FILLED, bucket * _ANCESTORS)
            self._tables[bucket] = FixedTables(bucket, self.store, self._mask, most_filled)
        tables = self._tables[bucket]
        if not tables.fit(plan) or (self._window is not None and plan.longest > self._window):
            return False
        tables.load(plan, tokens, positions)
        self.store.use(tables, plan)
        self._loaded = tables, plan
        return True

    @torch.no_grad()
    def replay(self):
        """Run the loaded pass; return logits (N, V) on the device, valid until the next pass."""
        tables, plan = self._loaded
        key = tables.rows, plan.per_tile
        if self._recorder is None:
            logits = self._forward(tables)
        elif key in self._graphs or self._record(key, tables):
            graph, logits = self._graphs[key]
            graph.replay()
        else:
            logits = self._forward(tables)
        return logits[: plan.rows]

    def run(self, chains, tokens, positions):
        """Load and run a pass: logits (N, V) as of ``replay``, or None if it does not fit."""
        return self.replay() if self.load(chains, tokens, positions) else None

    def _forward(self, tables):
        """Run the model on what has been loaded; return the logits of all rows, (tables.rows, V)."""
        ids, positions = tables.tokens[None], tables.positions[None]
        mask = torch.ones_like(ids)  # keeps transformers from looking into the positions, which waits for the device
        if self.adapters is not None:
            self.adapters.use(tables.members)
        with tree_mode(self.model):
            return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False,
                              logits_to_keep=0, tree_store=self.store).logits[0]  # fmt: skip

    def _record(self, key, tables):
        """Warm up on the loaded pass and record it; return whether that worked."""
        clock, failure = time.perf_counter(), None
        try:
            for _ in range(_WARM_UPS):  # writes the keys and values of the pass, each time the same
                self._recorder.warm_up(lambda: self._forward(tables))
            self._graphs[key] = self._recorder.record(lambda: self._forward(tables))
        except RuntimeError as error:
            failure = isinstance(error, torch.OutOfMemoryError), str(error)
        if failure is not None:  # outside of the error, which holds on to memory
            self._give_up(tables.rows, *failure)
            return False
        self.captured += 1
        self.capture_seconds += time.perf_counter() - clock
        return True

    def _give_up(self, rows, short, why):
        """Do without graphs: without those of so many rows where only the memory is ``short``."""
        self.largest = max((size for size in BUCKETS if short and size < rows), default=0)
        self.print_func(f"engine: no CUDA graphs of {rows if short else 'any number of'} rows: {why}")
