"""Attention and storage of keys and values for trees of tokens: many prompts, many branches, one forward pass.

It owns the stores of keys and values, the attention over them, and the place where both enter transformers' models
(attention function ``arc_tree``). It knows slots and rows only; what the tokens mean is the business of the search.

Terms: *view* = one prompt with the tree grown on it; *slot* = place of one token in a view's buffer, the prompt's
tokens first, then one per node of the tree, only ever appended; *row* = one token of a pass; *chain* = rows of one
view, each the child of the one before; *pass* = one forward pass over the rows of any chains of any views, laid end to
end: input ids and positions are (1, N), without padding. A row attends to its prompt, its ancestors and itself:

    with tree_mode(model), torch.no_grad():
        store = make_store(model, slots=4096)
        view = store.open(prompt=len(tokens), length=len(tokens) + 100)
        store.prepare([Chain(view, 0, len(tokens))])
        logits = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, tree_store=store).logits
"""

import importlib.util
import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

PAGE = 64  # slots are handed out by pages
TREE_ATTENTION = "arc_tree"  # name of the attention function
# all but cuDNN's, which plans anew, for tens of milliseconds, for every length of a sequence
_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_NO_PATH = np.zeros(0, np.int32)


@dataclass(eq=False)
class View:
    """A buffer of slots: the first ``prompt`` are the prompt's, the others the tree's. Handed out by ``store.open``."""

    prompt: int
    capacity: int = 0  # slots it has; 0 when closed
    data: object = field(default=None, repr=False)  # what the store keeps there


@dataclass(eq=False)
class Chain:
    """Rows of one view in one pass, each the child of the one before; they fill slots ``start`` to ``start+length-1``.

    Row ``b`` attends to the slots below ``min(view.prompt, start)``, to those of ``path`` and to ``start`` to ``b``. So
    a chain that starts at 0 is plain causal: the prompt, maybe with the beginning of a reply behind it.
    """

    view: View
    start: int
    length: int
    path: np.ndarray = field(default_factory=lambda: _NO_PATH)  # (P,) slots of the first row's ancestors in the tree
    member: int = 0  # adapter of its rows, of several (``adapter_rows``)

    @property
    def visible(self):
        """Number of the prompt's slots that all rows attend to."""
        return min(self.view.prompt, self.start)


@dataclass(frozen=True)
class Shape:
    """What a store needs to know of a model."""

    layers: int
    heads: int  # of the keys and values
    group: int  # heads of the queries that share one of them
    head_dim: int
    dtype: torch.dtype
    device: torch.device


def _config(model):
    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel hides it
    return base, base.config.get_text_config()


def model_shape(model):
    """Return the ``Shape`` of a model's keys and values.

    Raises:
        NotImplementedError: when layers attend in a way that a tree cannot (chunks, states).
    """
    base, config = _config(model)
    strange = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if strange:
        raise NotImplementedError(f"{type(base).__name__} has layers of type {sorted(strange)}: use the plain search")
    queries = config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or queries
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // queries
    return Shape(config.num_hidden_layers, heads, queries // heads, head_dim, base.dtype, torch.device(base.device))


def slot_bytes(model):
    """Return the bytes that keys and values of one slot take, all layers together."""
    shape = model_shape(model)
    return 2 * shape.layers * shape.heads * shape.head_dim * shape.dtype.itemsize


def attention_window(model):
    """Return the longest sequence that every layer attends to as a whole; None = any."""
    _, config = _config(model)
    layer_types = getattr(config, "layer_types", None)
    if layer_types and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)


@contextmanager
def tree_mode(model):
    """Let the model attend through the ``tree_store`` of each forward call; restore its attention on leaving."""
    _, config = _config(model)
    before = config._attn_implementation
    config._attn_implementation = TREE_ATTENTION
    try:
        with sdpa_kernel(_KERNELS):
            yield model
    finally:
        config._attn_implementation = before


def equal_prompts(chains):
    """Group the chains that start at 0: [(first row, chains, rows of each)] of neighbours of equal length."""
    groups, row = [], 0
    for chain in chains:
        if chain.start == 0:
            if groups and groups[-1][0] + groups[-1][1] * groups[-1][2] == row and groups[-1][2] == chain.length:
                groups[-1] = (groups[-1][0], groups[-1][1] + 1, chain.length)
            else:
                groups.append((row, 1, chain.length))
        row += chain.length
    return groups


def grouped_heads_are_fast(device, dtype):
    """Tell whether PyTorch's fast attention takes fewer key heads than query heads: on a GPU only flash attention."""
    return device.type != "cuda" or (dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0))


def heads_for(query, key, value):
    """Return key and value (1, Hkv, N, D) for a query (1, Hq, N, D), repeated to Hq heads where that is faster.

    Else attention would take the way that holds a number for each pair of tokens.
    """
    group = query.shape[1] // key.shape[1]
    if group == 1 or grouped_heads_are_fast(query.device, query.dtype):
        return key, value
    return key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)


def attend_causally(query, key, value, groups, scaling, output):  # noqa: PLR0913
    """Attend within each chain of the groups of ``equal_prompts``.

    query (1, Hq, N, D), key and value (1, Hkv, N, D); fills the chains' rows of output (1, N, Hq, D).
    """
    key, value = heads_for(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    for row, count, length in groups:
        rows = slice(row, row + count * length)
        parts = [part[0, :, rows].unflatten(1, (count, length)).transpose(0, 1) for part in (query, key, value)]
        part = scaled_dot_product_attention(*parts, is_causal=True, scale=scaling, enable_gqa=grouped)
        output[0, rows] = part.transpose(1, 2).flatten(0, 1)  # (count * length, Hq, D)


def members_of(chains):
    """Return the adapter of each row of a pass, (rows,) int64."""
    return np.repeat(np.array([c.member for c in chains], np.int64), [c.length for c in chains])


class KeyValueStore:
    """Keys and values of views, and the attention of the rows of one pass to them; slots are counted by pages of 64.

    Use: ``open`` views; per pass ``prepare`` its chains, then run the model, whose layers call ``attend``.

    Attributes:
        total: slots in all. free: slots that no view has. rows: rows of the pass prepared last.
        longest: tokens of the longest sequence in it, from the prompt's first token on.
        grows_in_place: whether growing a view leaves what it holds where it is.
    """

    grows_in_place = False

    def __init__(self, shape, slots):
        self.shape = shape
        self.total = self.free = -(-slots // PAGE) * PAGE
        self.rows = self.longest = 0

    def open(self, prompt, length):
        """Return a new ``View`` with at least ``length`` slots, ``prompt`` of them the prompt's; None without room.

        Raises:
            ValueError: unless 0 <= prompt <= length and 0 < length.
        """
        if not 0 <= prompt <= length or length < 1:
            raise ValueError(f"a view needs slots, and a prompt of at most {length} tokens (its slots), not {prompt}")
        view = View(prompt)
        return view if self._give(view, length) else None

    def grow(self, view, length):
        """Give ``view`` at least ``length`` slots and keep what it holds; False, with nothing changed, without room."""
        self._check_open(view)
        return length <= view.capacity or self._give(view, length)

    def close(self, view):
        """Take back the slots of ``view``."""
        self._check_open(view)
        self.free += view.capacity
        self._resize(view, 0)
        view.capacity, view.data = 0, None

    def prepare(self, chains):
        """Get ready for one pass over the rows of the list ``chains``, laid end to end in this order.

        A chain's path may hold slots that other chains fill in the same pass.

        Raises:
            ValueError: without chains, or for a chain that does not fit into its view.
        """
        self._measure(chains)
        self._plan(chains)

    def attend(self, layer, query, key, value, scaling):
        """Store a layer's keys and values of the rows, then attend.

        Args:
            layer: number of the layer, from 0.
            query: (1, Hq, N, D) of the N rows of the pass. key, value: (1, Hkv, N, D).
            scaling: factor on the products of queries and keys.

        Returns:
            (1, N, Hq, D)

        Raises:
            ValueError: when the rows are not those that were prepared.
        """
        if query.shape[0] != 1 or query.shape[2] != self.rows:
            raise ValueError(f"{self.rows} rows were prepared, but the model runs {tuple(query.shape)}: call prepare "
                             "with the chains of every pass and give input_ids (1, N)")  # fmt: skip
        dtype, given = self.shape.dtype, query.dtype  # they differ when an adapter or autocast computes in another one
        query, key, value = (part.detach().to(dtype) for part in (query, key, value))
        output = query.new_empty(1, self.rows, query.shape[1], query.shape[3])
        self._attend(layer, query, key, value, scaling, output)
        return output.to(given)

    def _give(self, view, length):
        capacity = -(-length // PAGE) * PAGE
        if capacity - view.capacity > self.free:
            return False
        self._resize(view, capacity)
        self.free -= capacity - view.capacity
        view.capacity = capacity
        return True

    @staticmethod
    def _check_open(view):
        if not view.capacity:
            raise ValueError("this view is closed")

    def _measure(self, chains):
        """Check the chains of a pass and set ``rows`` and ``longest``; the errors are those of ``prepare``."""
        if not chains:
            raise ValueError("there are no chains to run")
        self.rows = self.longest = 0
        for chain in chains:
            self._check_chain(chain)
            self.rows += chain.length
            self.longest = max(self.longest, chain.visible + len(chain.path) + chain.length)

    def _check_chain(self, chain):
        self._check_open(chain.view)
        end, path, view = chain.start + chain.length, chain.path, chain.view
        if chain.start < 0 or chain.length < 1 or end > view.capacity:
            raise ValueError(f"rows for slots {chain.start} to {end - 1} of a view with {view.capacity}: grow it first")
        if len(path) and not (view.prompt <= path.min() and path.max() < view.capacity and chain.start >= view.prompt):
            raise ValueError(f"the ancestors of slot {chain.start} lie in slots {path.min()} to {path.max()} of a view "
                             f"with a prompt of {view.prompt} and {view.capacity} slots in all")  # fmt: skip

    def _resize(self, view, capacity):
        """Change the room of ``view`` from ``view.capacity`` to ``capacity`` slots; 0 frees it."""
        raise NotImplementedError

    def _plan(self, chains):
        """Make ready whatever ``_attend`` needs in every layer."""
        raise NotImplementedError

    def _attend(self, layer, query, key, value, scaling, output):  # noqa: PLR0913
        """Do the work of ``attend``; fill output (1, N, Hq, D)."""
        raise NotImplementedError


def runs_of(chains):
    """Join chains of one view that follow each other: [(view, first row, [chains])]."""
    runs, row = [], 0
    for chain in chains:
        if not runs or runs[-1][0] is not chain.view:
            runs.append((chain.view, row, []))
        runs[-1][2].append(chain)
        row += chain.length
    return runs


def _zeros(shape, dtype, device):
    """Return zeros (what is masked must still be a number); on a CPU they take memory only where they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


class ContiguousStore(KeyValueStore):
    """One tensor (layers, 2, Hkv, capacity, D) per view; attention by PyTorch with one mask per view.

    For the CPU and for devices without Triton; also the reference that other stores are tested against.
    """

    def __init__(self, shape, slots):
        super().__init__(shape, slots)
        self._copies, self._causals, self._masked = [], [], []

    def grow(self, view, length):
        """As the base class; takes an eighth more where there is room, so that growing step by step copies little."""
        generous = max(length, view.capacity + view.capacity // 8)
        return super().grow(view, length if length <= view.capacity else generous) or super().grow(view, length)

    def _resize(self, view, capacity):
        if not capacity:
            return
        shape, before = self.shape, view.data
        view.data = _zeros((shape.layers, 2, shape.heads, capacity, shape.head_dim), shape.dtype, shape.device)
        if before is not None:
            view.data[:, :, :, : view.capacity] = before

    def _plan(self, chains):
        """Plan copies (view, slots, rows), groups of prompts, and masked runs of rows (view, slots, rows, mask)."""
        self._copies, self._causals, self._masked = [], equal_prompts(chains), []
        for view, row, run in runs_of(chains):
            waiting = []
            for chain in run:
                self._plan_copy(view, chain, row)
                if chain.start == 0:
                    self._plan_masked(view, waiting, row)
                    waiting = []
                else:
                    waiting.append(chain)
                row += chain.length
            self._plan_masked(view, waiting, row)

    def _plan_copy(self, view, chain, row):
        """Plan to copy the rows of ``chain``, the first of which is ``row``; with those of the last one if possible."""
        slots, rows = slice(chain.start, chain.start + chain.length), slice(row, row + chain.length)
        if self._copies and self._copies[-1][0] is view and self._copies[-1][1].stop == slots.start:
            _, before, row_before = self._copies.pop()
            slots, rows = slice(before.start, slots.stop), slice(row_before.start, rows.stop)
        self._copies.append((view, slots, rows))

    def _plan_masked(self, view, chains, stop):
        """Plan the attention of ``chains``, whose last row is ``stop - 1``, to the slots that any of them sees."""
        if not chains:
            return
        used = max(int(max(chain.start + chain.length, chain.path.max(initial=-1) + 1)) for chain in chains)
        count = sum(chain.length for chain in chains)
        mask = np.full((count, used), -np.inf, np.float32)
        row = 0
        for chain in chains:
            rows = mask[row : row + chain.length]
            rows[:, : chain.visible] = 0
            rows[:, chain.path] = 0
            among = rows[:, chain.start : chain.start + chain.length]
            among[np.tri(chain.length, dtype=bool) if chain.length > 1 else 0] = 0
            row += chain.length
        mask = torch.from_numpy(mask).to(self.shape.device, self.shape.dtype).repeat(self.shape.group, 1)
        self._masked.append((view, used, slice(stop - count, stop), mask))

    def _attend(self, layer, query, key, value, scaling, output):  # noqa: PLR0913
        for view, slots, rows in self._copies:
            view.data[layer, 0, :, slots] = key[0, :, rows]
            view.data[layer, 1, :, slots] = value[0, :, rows]
        attend_causally(query, key, value, self._causals, scaling, output)
        heads, group, dim = self.shape.heads, self.shape.group, self.shape.head_dim
        output = output.view(self.rows, heads, group, dim)
        for view, used, rows, mask in self._masked:
            keys, values = view.data[layer, :, None, :, :used]  # (1, Hkv, used, D)
            folded = query[:, :, rows].reshape(1, heads, -1, dim)  # (1, Hkv, G * rows, D)
            part = scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scaling)
            output[rows] = part.view(heads, group, -1, dim).permute(2, 0, 1, 3)


def _kernel_runs_on(device):
    """Tell whether the kernel runs on ``device``: a GPU, or the CPU where Triton is told to interpret kernels."""
    wanted = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return wanted and importlib.util.find_spec("triton") is not None


def make_store(model, slots, kind=None):
    """Make a store with room for at least ``slots`` slots.

    Args:
        kind: "paged" (needs Triton and a GPU) or "contiguous"; None = "paged" where it works.

    Raises:
        ValueError: for less than one slot, an unknown kind, or "paged" where it does not work.
        NotImplementedError: for a model that a tree cannot run on.
    """
    shape = model_shape(model)
    if slots < 1:
        raise ValueError(f"a store needs at least one slot, not {slots}")
    usable = _kernel_runs_on(shape.device)
    kind = kind or ("paged" if usable and shape.device.type == "cuda" else "contiguous")
    if kind not in ("paged", "contiguous"):
        raise ValueError(f"kind must be 'paged', 'contiguous' or None, not {kind!r}")
    if kind == "paged" and not usable:
        raise ValueError(f"a paged store needs Triton and a GPU, the model is on {shape.device}: use kind='contiguous'")
    if kind == "contiguous":
        return ContiguousStore(shape, slots)
    from tree_pages import PagedStore  # builds on this module

    return PagedStore(shape, slots)


def _tree_attention(  # noqa: PLR0913
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, tree_store=None, **options
):
    """Attend through ``tree_store``: an attention function of transformers, see ``KeyValueStore.attend``.

    Raises:
        ValueError: without a store, with a mask, in training, or for sequences longer than the layer's window.
        NotImplementedError: for what some models add to attention.
    """
    if tree_store is None:
        raise ValueError("tree attention needs a store: model(input_ids, position_ids=..., tree_store=store)")
    if attention_mask is not None or options.get("dropout") or torch.is_grad_enabled() and query.requires_grad:
        raise ValueError("tree attention takes no mask and does not train: call model.eval(), use torch.no_grad()")
    added = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if added:
        raise NotImplementedError(f"{type(module).__name__} adds {', '.join(added)} to attention: use the plain search")
    if sliding_window is not None and tree_store.longest > sliding_window:
        raise ValueError(f"{type(module).__name__} attends to the last {sliding_window} tokens only, a sequence has "
                         f"{tree_store.longest}: use shorter prompts or the plain search")  # fmt: skip
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_store.attend(module.layer_idx, query, key, value, scaling), None


def _no_mask(*args, **kwargs):
    """Stand in for transformers' mask function: who attends to whom is the store's business."""


AttentionInterface.register(TREE_ATTENTION, _tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, _no_mask)
