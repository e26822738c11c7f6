"""Adapters of several tasks for search and scoring side by side: each row of a pass uses that of its own task.

The LoRA matrices of K adapters stand one under the other, as one of rank K r; of a row's K r inner numbers those of
other adapters become zero. So a pass is made of ordinary matrix products with fixed shapes, whatever rows it has; their
cost grows with K r, which is why K has a limit (`most_adapters`).
Embeddings and heads that were trained in full stand side by side in the same way.

Source: many adapters over one base in a batch as of arXiv 2310.18547; by masks instead of gathered matrices, here.
"""

import hashlib
from contextlib import ExitStack
from functools import partial

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional as F

from adapter_stack import adapter_names
from lora_layers import is_plain_lora, replaced

WIDTH = 1024  # most inner numbers of all LoRA matrices together
TOKENS = 8192  # most tokens of all vocabularies together


def most_adapters(model):
    """Return how many adapters of a PEFT model are worth their time side by side, 0 for what cannot stand there."""
    ranks, tokens = [], [1]
    for module in model.modules():
        if is_plain_lora(module):
            ranks.append(module.r[module.active_adapters[0]])
        elif isinstance(module, ModulesToSaveWrapper):
            trained = module.modules_to_save[module.active_adapters[0]]
            if not _stands_beside(trained):
                return 0
            tokens.append(trained.weight.shape[0])
    known = {id(p) for module in model.modules() if is_plain_lora(module) or isinstance(module, ModulesToSaveWrapper)
             for p in module.parameters()}  # fmt: skip
    others = any(p.requires_grad and id(p) not in known for p in model.parameters())
    return 0 if others or not ranks else min(WIDTH // max(ranks), TOKENS // max(tokens))


def _stands_beside(trained):
    return isinstance(trained, nn.Embedding) or (isinstance(trained, nn.Linear) and trained.bias is None)


class AdapterRows:
    """K adapters of one PEFT model, by name.

    Attributes:
        members: {name: number of the adapter}. ids: {name: text that stands for its weights}.
        row_bytes: of the widest results of a row that come from these adapters.
    """

    def __init__(self, model, adapters):
        """model: whose own adapter has the same shapes; it has no part in the with-block. adapters: {name: {name of a
        tensor in a PEFT adapter: tensor}}.
        """
        self.model = model
        self.members = {name: number for number, name in enumerate(adapters)}
        self.ids = {name: _digest(adapter) for name, adapter in adapters.items()}
        self.member = self.kept = self.mask = None  # of the pass that is computed
        dtype, names, states = model.dtype, adapter_names(model), list(adapters.values())
        device, self._tables = model.device, {}  # id of a module -> its tables

        def stacked(parameter, dtype):
            return torch.stack([state[names[id(parameter)]].to(device, dtype) for state in states])

        for module in model.modules():
            if is_plain_lora(module):
                adapter = module.active_adapters[0]
                matrix_a = stacked(module.lora_A[adapter].weight, dtype)  # (K, r, in)
                matrix_b = stacked(module.lora_B[adapter].weight, torch.float32) * module.scaling[adapter]
                self._tables[id(module)] = matrix_a.flatten(0, 1), matrix_b.movedim(0, 1).flatten(1).to(dtype)
            elif isinstance(module, ModulesToSaveWrapper):
                weight = module.modules_to_save[module.active_adapters[0]].weight
                self._tables[id(module)] = (stacked(weight, weight.dtype).flatten(0, 1),)  # (K V, width)
        width = max(len(tables[0]) for tables in self._tables.values())  # inner numbers, or logits
        self.row_bytes = 3 * width * dtype.itemsize  # with its mask, or its copy in another dtype

    def use(self, member, kept=None):
        """Say which adapter each row of the next pass uses.

        member: (N,) long, or (1,) for all rows alike. kept: of the rows that have logits; None: all.
        """
        self.member, self.kept = member, member if kept is None else kept
        self.mask = None  # made when the rank is known

    def _lora(self, module, x):
        matrix_a, matrix_b = self._tables[id(module)]
        if self.mask is None:
            own = F.one_hot(self.member, len(self.members)).to(matrix_a.dtype)
            self.mask = own.repeat_interleave(matrix_a.shape[0] // len(self.members), dim=1)  # (N, K r)
        inner = F.linear(x.to(matrix_a.dtype), matrix_a) * self.mask
        y = module.get_base_layer()(x)
        return y + F.linear(inner, matrix_b).to(y.dtype)

    def _embed(self, module, ids):
        (table,) = self._tables[id(module)]
        return F.embedding(ids + self.member * (len(table) // len(self.members)), table)

    def _head(self, module, hidden):
        (table,) = self._tables[id(module)]
        logits = F.linear(hidden.to(table.dtype), table).unflatten(-1, (len(self.members), -1))  # (..., K, V)
        own = self.kept.expand(hidden.shape[:-1])[..., None, None].expand(*hidden.shape[:-1], 1, logits.shape[-1])
        return logits.gather(-2, own).squeeze(-2)

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
        self.member = self.kept = self.mask = None


def _digest(adapter):
    """Return a hash of the tensors of an adapter."""
    digest = hashlib.sha256()
    for name in sorted(adapter):
        tensor = adapter[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
