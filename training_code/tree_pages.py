"""The store of keys and values for GPUs: pages in one pool, and the tables that lead the rows of a pass to them.

Planning (tables in NumPy, a ``Plan``) is apart from the place where the tables end up: tensors made for the pass
(``PagedStore.prepare``), or buffers of fixed shape at fixed addresses (``FixedTables``), as CUDA graphs need them.
Terms as in ``tree_attention``; the *trash page* is page 0, which belongs to no view: rows that only fill up a pass
write there, and nobody reads it.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tree_attention import PAGE, KeyValueStore, attend_causally, equal_prompts, members_of, runs_of

_ALIGN = 16  # int64 per 128 bytes: where a table may begin


def _aligned(size):
    return -(-size // _ALIGN) * _ALIGN


def _upload(arrays, device):
    """Bring int64 arrays to the device in one transfer; return them as tensors of the same shapes."""
    sizes = [_aligned(array.size) for array in arrays]
    whole = torch.zeros(sum(sizes), dtype=torch.long, pin_memory=device.type == "cuda")
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    for array, offset in zip(arrays, offsets, strict=True):
        whole.numpy()[offset : offset + array.size] = array.ravel()
    whole = whole.to(device, non_blocking=True)
    return [whole[o : o + array.size].view(array.shape) for array, o in zip(arrays, offsets, strict=True)]


@dataclass(frozen=True)
class Plan:
    """The tables of one pass, int64; those of the kernel are described in ``tree_kernel``."""

    rows: int
    longest: int  # tokens of the longest sequence in it
    causals: list  # chains that begin with the prompt, as of ``equal_prompts``
    slots: np.ndarray  # (rows,) where in the pool each row goes
    members: np.ndarray  # (rows,) which adapter each row uses
    tiles: np.ndarray  # (tiles, TILE_FIELDS), of the kernel
    entries: np.ndarray  # (rows without those of causals, ROW_FIELDS), of the kernel
    pages: np.ndarray  # pages of all views, one after the other
    filled: np.ndarray  # places in the mask that are 1
    mask_size: int
    per_tile: int  # most rows of a tile


class FixedTables:
    """Tables for passes of up to ``rows`` rows at fixed addresses; each pass is padded to ``rows``.

    Rows in excess are of token 0 at position 0, write to the trash page and belong to no tile; tiles in excess have no
    rows. ``load`` overwrites the staging memory of the pass before, whose transfer must be over: it waits for that,
    which takes no time where the results of every pass are fetched before the next one. So one buffer suffices.

    Attributes:
        rows: rows of every pass. tokens, positions, slots, members: (rows,). tables: tiles (rows, TILE_FIELDS), entries
        (rows, ROW_FIELDS), pages and mask, for the kernel.
    """

    def __init__(self, rows, store, mask, most_filled):
        """Make buffers for a ``PagedStore``.

        Args:
            mask: (any,) uint8, may be shared between tables. most_filled: most places of the mask that are 1.
        """
        self.rows, self._mask = rows, mask
        tile, row = store.table_fields
        sizes = {"tokens": rows, "positions": rows, "slots": rows, "members": rows, "tiles": rows * tile,
                 "entries": rows * row, "pages": store.total // PAGE, "filled": most_filled}  # fmt: skip
        ends = np.cumsum([_aligned(size) for size in sizes.values()]).tolist()
        self._begins = dict(zip(sizes, [0, *ends[:-1]], strict=True))
        self._sizes, on_gpu = sizes, mask.is_cuda
        self._staging = torch.zeros(ends[-1], dtype=torch.long, pin_memory=on_gpu)
        self._buffer = torch.zeros(ends[-1], dtype=torch.long, device=mask.device)
        self._transfer = torch.cuda.Event() if on_gpu else None
        self.tokens, self.positions, self.slots, self.members = (
            self._part(name) for name in ("tokens", "positions", "slots", "members"))
        tiles, entries = self._part("tiles").view(rows, tile), self._part("entries").view(rows, row)
        self.tables = tiles, entries, self._part("pages"), mask

    def _part(self, name, size=None):
        begin = self._begins[name]
        return self._buffer[begin : begin + (self._sizes[name] if size is None else size)]

    def fit(self, plan):
        """Tell whether a pass fits in."""
        sizes = self._sizes
        inside = plan.rows <= self.rows and len(plan.pages) <= sizes["pages"] and len(plan.filled) <= sizes["filled"]
        return inside and plan.mask_size <= len(self._mask) and not plan.causals

    def load(self, plan, tokens, positions):
        """Bring a pass that fits to the device: its plan, and tokens and positions (plan.rows,) int64, in one copy."""
        if self._transfer is not None:
            self._transfer.synchronize()
        host, begins = self._staging.numpy(), self._begins
        host[: begins["pages"]] = 0
        trash = np.arange(self.rows - plan.rows) % PAGE
        members = np.append(plan.members, np.repeat(plan.members[-1:], len(trash)))  # stay in order
        arrays = {"tokens": tokens, "positions": positions, "slots": np.append(plan.slots, trash),
                  "members": members, "tiles": plan.tiles, "entries": plan.entries, "pages": plan.pages,
                  "filled": plan.filled}  # fmt: skip
        for name, array in arrays.items():
            host[begins[name] : begins[name] + array.size] = array.ravel()
        used = begins["filled"] + len(plan.filled)
        self._buffer[:used].copy_(self._staging[:used], non_blocking=True)
        if self._transfer is not None:
            self._transfer.record()
        self._mask[: plan.mask_size].zero_()
        self._mask.index_fill_(0, self._part("filled", len(plan.filled)), 1)


class PagedStore(KeyValueStore):
    """Pages of 64 slots in one pool (slots, Hkv, D) per layer; attention to them in one launch of a Triton kernel.

    For GPUs. What ``attend`` reads is made in ``prepare``, or handed over with ``use``; ``attend`` neither waits for
    the device nor copies anything to it.

    Attributes:
        table_fields: fields of a tile and of a row in the kernel's tables.
    """

    grows_in_place = True

    def __init__(self, shape, slots):
        import tree_kernel  # needs Triton, which PyTorch for the CPU lacks

        super().__init__(shape, slots)
        self._kernel = tree_kernel
        self.table_fields = tree_kernel.TILE_FIELDS, tree_kernel.ROW_FIELDS
        pages = self.total // PAGE + 1
        kind = {"dtype": shape.dtype, "device": shape.device}
        self._pools = [  # zeros: what is masked must still be a number
            tuple(torch.zeros(pages * PAGE, shape.heads, shape.head_dim, **kind) for _ in range(2))
            for _ in range(shape.layers)
        ]
        self._free_pages = list(range(pages - 1, 0, -1))
        self._causals, self._slots, self._tables, self._per_tile = [], None, None, 0

    def _resize(self, view, capacity):
        held = [] if view.data is None else view.data.tolist()
        while len(held) > capacity // PAGE:
            self._free_pages.append(held.pop())
        while len(held) < capacity // PAGE:
            held.append(self._free_pages.pop())
        view.data = np.array(held, np.int64)  # the pages, in order

    def plan(self, chains):
        """Return the ``Plan`` of a pass over ``chains``; arguments and errors as of ``prepare``."""
        self._measure(chains)
        return self._make_plan(chains)

    def use(self, tables, plan):
        """Attend by ``FixedTables`` in which a pass has been loaded: the model runs ``tables.rows`` rows."""
        self.rows, self.longest, self._per_tile = tables.rows, plan.longest, plan.per_tile
        self._causals, self._slots, self._tables = [], tables.slots, tables.tables

    def _plan(self, chains):
        plan, device = self._make_plan(chains), self.shape.device
        self._causals, self._per_tile = plan.causals, plan.per_tile
        arrays = [plan.slots, plan.tiles, plan.entries, plan.pages, plan.filled]
        self._slots, *tables, filled = _upload(arrays, device)
        mask = torch.zeros(max(plan.mask_size, 1), dtype=torch.uint8, device=device).index_fill_(0, filled, 1)
        self._tables = *tables, mask

    def _make_plan(self, chains):
        runs, lengths = runs_of(chains), np.array([chain.length for chain in chains], np.int64)
        firsts = np.cumsum(lengths) - lengths
        page_offsets = np.cumsum([0] + [len(view.data) for view, _, _ in runs])
        pages = np.concatenate([view.data for view, _, _ in runs])
        run_of = np.repeat(np.arange(len(runs)), [len(run) for _, _, run in runs])  # of each chain

        starts = np.array([chain.start for chain in chains], np.int64)
        own = np.arange(self.rows) + np.repeat(starts - firsts, lengths)  # slot of each row in its view
        slots = pages[np.repeat(page_offsets[run_of], lengths) + own // PAGE] * PAGE + own % PAGE
        entries, run_of_entry, filled, size = self._row_table(chains, lengths, own, run_of)
        counts = np.bincount(run_of_entry, minlength=len(runs))
        per_tile = self._kernel.tile_rows(int(counts.max(initial=0)), self.shape.group, self.shape.dtype)
        tiles = self._tile_table(entries, counts, page_offsets, per_tile)
        causals = equal_prompts(chains)
        members = members_of(chains)
        return Plan(self.rows, self.longest, causals, slots, members, tiles, entries, pages, filled, size, per_tile)

    def _row_table(self, chains, lengths, own, run_of):
        """Return the kernel's row table, the run of each entry, the places in the mask to fill, and the mask's size."""
        masked = np.array([chain.start > 0 for chain in chains], bool)
        ends = np.array([chain.path.max(initial=-1) + 1 for chain in chains], np.int64)  # of the ancestors' slots
        prompts = np.array([chain.view.prompt for chain in chains], np.int64)
        sizes = np.maximum(ends - prompts, 0)
        places = np.cumsum(sizes) - sizes - prompts  # of slot 0 in the mask
        filled = np.concatenate([chain.path + place for chain, place in zip(chains, places, strict=True)])
        visible, starts = (np.array([getattr(c, n) for c in chains], np.int64) for n in ("visible", "start"))
        chain_of = np.repeat(np.arange(len(chains)), lengths)
        rows = np.flatnonzero(masked[chain_of])
        of = chain_of[rows]
        entries = np.stack([rows, visible[of], starts[of], own[rows], places[of], ends[of]], axis=1)
        return entries, run_of[of], filled, int(sizes.sum())

    @staticmethod
    def _tile_table(entries, counts, page_offsets, per_tile):
        """Return the kernel's tile table for ``counts`` entries of each run."""
        tiles = -(-counts // per_tile)  # of each run
        run = np.repeat(np.arange(len(counts)), tiles)
        number = np.arange(len(run)) - np.repeat(np.cumsum(tiles) - tiles, tiles)  # within its run
        first = (np.cumsum(counts) - counts)[run] + number * per_tile
        count = np.minimum(counts[run] - number * per_tile, per_tile)
        shared, end = np.zeros_like(first), np.zeros_like(first)
        if len(first):
            shared = np.minimum.reduceat(entries[:, 1], first)
            end = np.maximum.reduceat(np.maximum(entries[:, 3] + 1, entries[:, 5]), first)
        return np.stack([first, count, page_offsets[run], shared, end], axis=1)

    def _attend(self, layer, query, key, value, scaling, output):  # noqa: PLR0913
        keys, values = self._pools[layer]
        keys.index_copy_(0, self._slots, key[0].transpose(0, 1))
        values.index_copy_(0, self._slots, value[0].transpose(0, 1))
        attend_causally(query, key, value, self._causals, scaling, output)
        if len(self._tables[0]):
            self._kernel.attend(query, keys, values, output, self._tables, self._per_tile, scaling)
