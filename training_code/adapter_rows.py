"""Adapters of several tasks for search and scoring side by side: each row of a pass uses that of its own task.

*By groups*, where the device multiplies groups of rows by matrices of their own (``lora_layers.Groups``): the rows of a
pass stand in the order of the adapters, so any number of adapters costs hardly more than one, and memory limits it.
*By masks* elsewhere: the LoRA matrices of K adapters stand one under the other, as one of rank K r; of a row's K r
inner numbers those of other adapters become zero. The cost grows with K r, so K has a limit (`most_adapters`).
Embeddings stand side by side as one table. Heads multiply blocks of rows, each of one adapter.

Every shape follows from the number of rows alone, so passes can be recorded as CUDA graphs.

Source: many adapters over one base in a batch as of arXiv 2310.18547, by grouped products or masks here.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional as F

from adapter_stack import ALIGNED, adapter_names
from lora_layers import Groups, grouped_product_works, is_plain_lora, replaced
from tree_memory import free_bytes

WIDTH = 1024  # most inner numbers of all LoRA matrices together, by masks
GROUPS = 1023  # most groups of a grouped product
HEAD_BYTES = 4 << 20  # of the largest head, of which a block of rows has a copy; that is 256 tokens in the 8B
SHARE = 0.25  # most of the free memory that adapters take, on the device and beside it
SMALL_BLOCK, LARGE_BLOCK, LARGE_PASS = 16, 128, 4096  # rows that a head multiplies by one adapter; from which pass on


def most_adapters(model, n_workers=1):
    """Return how many adapters of a PEFT model can stand side by side and are worth their time, 0 for none.

    n_workers: processes that share the main memory.
    """
    ranks, known = [], set()
    for module in model.modules():
        if is_plain_lora(module):
            ranks.append(module.r[module.active_adapters[0]])
        elif isinstance(module, ModulesToSaveWrapper):
            if not _stands_beside(module.modules_to_save[module.active_adapters[0]]):
                return 0
        else:
            continue
        known |= {id(parameter) for parameter in module.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not ranks or any(id(parameter) not in known for parameter in trained):
        return 0
    n_weights = sum(parameter.numel() for parameter in trained)  # 4 bytes each, until they are side by side
    free = min(free_bytes(model.device), free_bytes(torch.device("cpu")) / n_workers)
    most = GROUPS if _has_grouped_products(model) else WIDTH // max(ranks)
    return max(1, min(most, int(SHARE * free / (4 * n_weights))))


def _stands_beside(trained):
    small_head = isinstance(trained, nn.Linear) and trained.bias is None and trained.weight.nbytes <= HEAD_BYTES
    return isinstance(trained, nn.Embedding) or small_head


def _has_grouped_products(model):
    """Tell whether there are grouped products for the model's LoRA matrices: of 16 bits, in steps of 16 bytes."""
    aligned = all(size % ALIGNED == 0 for module in model.modules() if is_plain_lora(module)
                  for size in (module.r[module.active_adapters[0]], module.in_features, module.out_features))
    return aligned and grouped_product_works(model.device, model.dtype)


def _ends(member, n_members):
    """Return where the rows of each adapter end, (K,) long; member: (N,) long, ascending."""
    return torch.searchsorted(member.contiguous(), torch.arange(n_members, device=member.device), right=True)


class _Blocks:
    """Rows in the order of their adapters as blocks of equally many rows, each of one adapter; the rest stays empty."""

    def __init__(self, member, n_members):
        """member: (N,) long, ascending."""
        n_rows, device = len(member), member.device
        self.size = SMALL_BLOCK if n_rows <= LARGE_PASS else LARGE_BLOCK
        ends = _ends(member, n_members)
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        blocks = (counts + self.size - 1) // self.size  # of each adapter
        block_ends = blocks.cumsum(0)
        within = torch.arange(n_rows, device=device) - (ends - counts)[member]
        self.places = (block_ends - blocks)[member] * self.size + within  # (N,) of the rows in the blocks
        most = torch.arange(n_rows // self.size + min(n_members, n_rows), device=device)
        self.member = torch.searchsorted(block_ends, most, right=True).clamp(max=n_members - 1)  # (blocks,)

    def multiply(self, x, weights):
        """Return x (N, n) times its adapters' weights (K, m, n)^T, (N, m)."""
        spread = x.new_zeros(len(self.member) * self.size, x.shape[1])
        spread[self.places] = x
        products = spread.view(len(self.member), self.size, -1) @ weights[self.member].mT
        return products.flatten(0, 1)[self.places]


class AdapterRows:
    """K adapters of one PEFT model, by name.

    Attributes:
        members: {name: number of the adapter}. ids: {name: text that stands for its weights}.
        row_bytes: of the widest results of a row that come from these adapters.
    """

    def __init__(self, model, adapters, by_groups=None):
        """Bring the adapters to the model's device.

        model: whose own adapter has the same shapes; it has no part in the with-block. adapters: {name: {name of a
        tensor in a PEFT adapter: tensor}}. by_groups: multiply groups of rows; None: where the device has such
        products.
        """
        self.model = model
        self.by_groups = _has_grouped_products(model) if by_groups is None else by_groups
        self.members = {name: number for number, name in enumerate(adapters)}
        with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
            self.ids = dict(zip(adapters, pool.map(_digest, adapters.values()), strict=True))
        self.use(None)
        dtype, names, states = model.dtype, adapter_names(model), list(adapters.values())
        device, self._tables = model.device, {}  # id of a module -> its tables

        def stacked(parameter, dtype, scaling=1.0):
            name = names[id(parameter)]
            table = torch.stack([state[name].to(torch.float32) for state in states])
            return (table.to(device) * scaling).to(dtype)

        widths = [0]
        for module in model.modules():
            if is_plain_lora(module):
                adapter = module.active_adapters[0]
                matrix_a = stacked(module.lora_A[adapter].weight, dtype)  # (K, r, in)
                matrix_b = stacked(module.lora_B[adapter].weight, dtype, module.scaling[adapter])  # (K, out, r)
                widths.append(matrix_a.shape[1])
                if not self.by_groups:
                    matrix_a, matrix_b = matrix_a.flatten(0, 1), matrix_b.movedim(0, 1).flatten(1)
                    widths.append(len(matrix_a))
                self._tables[id(module)] = matrix_a, matrix_b
            elif isinstance(module, ModulesToSaveWrapper):
                weight = module.modules_to_save[module.active_adapters[0]].weight
                self._tables[id(module)] = (stacked(weight, weight.dtype),)  # (K, V, width)
                widths.append(2 * weight.shape[1] + weight.numel() // LARGE_BLOCK)  # hidden states and heads of blocks
        self.row_bytes = 3 * max(widths) * dtype.itemsize  # with its mask, or its copy in another dtype

    def use(self, member, kept=None):
        """Say which adapter each row of the next pass uses.

        member: (N,) long, ascending, or (1,) for all rows alike. kept: of the rows that have logits; None: all.
        """
        self.member, self.kept = member, member if kept is None else kept
        self._made = {}  # of what a pass needs, when its shapes are known

    def _lora(self, module, x):
        matrix_a, matrix_b = self._tables[id(module)]
        rows = x.reshape(-1, x.shape[-1]).to(matrix_a.dtype)
        if self.by_groups:
            groups = self._once("groups", len(rows), self._make_groups)
            part = groups.rows(groups.rows(rows, matrix_a.mT), matrix_b.mT)
        else:
            part = F.linear(F.linear(rows, matrix_a) * self._once("mask", len(matrix_a), self._make_mask), matrix_b)
        y = module.get_base_layer()(x)
        return y + part.view(y.shape).to(y.dtype)

    def _once(self, name, size, make):
        """Return what ``make(size)`` returned in this pass for this size."""
        if (name, size) not in self._made:
            self._made[name, size] = make(size)
        return self._made[name, size]

    def _make_groups(self, n_rows):
        return Groups(_ends(self.member.expand(n_rows), len(self.members)).int())

    def _make_mask(self, width):
        own = F.one_hot(self.member, len(self.members)).to(self.model.dtype)
        return own.repeat_interleave(width // len(self.members), dim=1)  # (N, K r)

    def _make_blocks(self, n_rows):
        return _Blocks(self.kept.expand(n_rows), len(self.members))

    def _embed(self, module, ids):
        (table,) = self._tables[id(module)]
        return F.embedding(ids + self.member * table.shape[1], table.flatten(0, 1))

    def _head(self, module, hidden):
        (table,) = self._tables[id(module)]
        rows = hidden.reshape(-1, hidden.shape[-1]).to(table.dtype)
        blocks = self._once("blocks", len(rows), self._make_blocks)
        return blocks.multiply(rows, table).view(*hidden.shape[:-1], -1)

    def __enter__(self):
        """Let the model compute with these adapters in the with-block; ``use`` says which row has which."""
        with ExitStack() as stack:
            for module in self.model.modules():
                if is_plain_lora(module):
                    stack.enter_context(replaced(module, partial(self._lora, module)))
                elif isinstance(module, ModulesToSaveWrapper):
                    trained = module.modules_to_save[module.active_adapters[0]]
                    forward = self._embed if isinstance(trained, nn.Embedding) else self._head
                    stack.enter_context(replaced(module, partial(forward, module)))
            self._replacements = stack.pop_all()
        return self

    def __exit__(self, *error):
        """Give the model its own layers back, and the memory: the adapters are of no use after that."""
        self._replacements.close()
        self._tables.clear()
        self.use(None)


def _digest(adapter):
    """Return a hash of the tensors of an adapter."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        tensor = adapter[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
