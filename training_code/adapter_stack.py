"""Adapters of several tasks over one frozen base, computed together: a *stack*.

Every trained tensor of a PEFT model's adapter (LoRA matrices, embeddings, head) is there K times, one per *member*. The
rows of a packed batch (see ``packing``) use the member that their text belongs to. A member has the names and shapes of
an ordinary PEFT adapter: ``stack.adapter(i)`` is what ``adapter_tools.set_peft_weights`` takes and PEFT saves.

All weights of a member lie in one row of one tensor, their gradients in one row of another, so that norms, clipping and
AdamW are a few operations per member, which know nothing of the others.

Source: several adapters in one batch as of arXiv 2310.18547 and 2311.03285, here with their training.
"""

from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from peft import get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn import functional as F

from lora_layers import Groups, fast_layers, is_plain_lora, lora_projection, replaced
from training_passes import add_gradients

ALIGNED = 8  # rows of a member in a batch, and numbers of a tensor in a row of the stack, are multiples of it
_LORA, _IN_FULL = 0, 1  # kinds of weights: they have learning rates of their own


def adapter_names(model):
    """Return {id of a trained parameter: the name of its tensor in a PEFT adapter} of a PEFT model."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    by_place = {tensor.data_ptr(): name for name, tensor in state.items()}
    return {id(p): by_place[p.data_ptr()] for p in model.parameters() if p.requires_grad}


class _GroupedLinear(torch.autograd.Function):
    """x (T, in) and weights (K, out, in) -> (T, out), each group of rows with its own weights."""

    @staticmethod
    def forward(ctx, x, weights, groups):
        ctx.save_for_backward(x, weights)
        ctx.groups = groups
        return groups.rows(x, weights.mT)

    @staticmethod
    def backward(ctx, gradient):
        x, weights = ctx.saved_tensors
        gradient = gradient.contiguous()
        return ctx.groups.rows(gradient, weights), ctx.groups.products(gradient, x), None


class AdapterStack:
    """K adapters of one PEFT model, all starting as its present adapter."""

    def __init__(self, model, size):
        """model: of ``adapter_tools.create_lora``, with plain LoRA; it keeps its own adapter. size: K.

        Raises:
            ValueError: for a trained tensor that a stack cannot hold.
        """
        self.model, self.size = model, size
        self.groups = None  # of the batch that is computed
        parts = self._parts()
        lengths = [aligned(parameter.numel()) for parameter, _ in parts.values()]
        device = next(iter(parts.values()))[0].device
        self.weights = torch.zeros(size, sum(lengths), device=device)  # (K, P)
        self.gradients = torch.zeros_like(self.weights)
        self.in_full_from, place = sum(lengths), 0
        self.tensors = {}  # parameter's id -> leaf (K, *shape), a view of the weights
        for (parameter, kind), length in zip(parts.values(), lengths, strict=True):
            if kind == _IN_FULL:
                self.in_full_from = min(self.in_full_from, place)
            shape, numbers = (size, *parameter.shape), slice(place, place + parameter.numel())
            leaf = self.weights[:, numbers].view(shape)
            leaf.copy_(parameter.detach())
            leaf.requires_grad_()
            leaf.grad = self.gradients[:, numbers].view(shape)
            self.tensors[id(parameter)] = leaf
            place += length
        self.names = {name: parameter for parameter, name in adapter_names(model).items()}

    def _parts(self):
        """Return {name: (trained parameter, kind)}: LoRA matrices first, then embeddings and head."""
        lora, in_full = {}, {}
        for name, module in self.model.named_modules():
            if is_plain_lora(module):
                adapter = module.active_adapters[0]
                lora[f"{name}.A"] = module.lora_A[adapter].weight, _LORA
                lora[f"{name}.B"] = module.lora_B[adapter].weight, _LORA
            elif isinstance(module, ModulesToSaveWrapper):
                trained = module.modules_to_save[module.active_adapters[0]]
                if isinstance(trained, nn.Embedding) or (isinstance(trained, nn.Linear) and trained.bias is None):
                    in_full[name] = trained.weight, _IN_FULL
        parts = lora | in_full
        known = {id(parameter) for parameter, _ in parts.values()}
        others = [name for name, p in self.model.named_parameters() if p.requires_grad and id(p) not in known]
        if others or not parts:
            raise ValueError(f"a stack holds LoRA without dropout, embeddings and heads; not {', '.join(others[:5])}: "
                             "train one task at a time with training_tools.train_lora")
        return parts

    def adapter(self, member):
        """Return the adapter of a member as {name: tensor}, on the device of the stack."""
        return {name: self.tensors[key].detach()[member].contiguous() for name, key in self.names.items()}

    def adapters(self):
        """Return the adapters of all members as ``adapter`` does, in main memory, which they share."""
        whole, leaves = self.weights.detach().cpu(), {name: self.tensors[key] for name, key in self.names.items()}
        tensors = {name: whole.as_strided(leaf.shape, leaf.stride(), leaf.storage_offset())
                   for name, leaf in leaves.items()}  # fmt: skip
        return [{name: tensor[member] for name, tensor in tensors.items()} for member in range(self.size)]

    def rows_of_member(self, member):
        """Return [(weights, gradients)] of a member, flat: those of the LoRA matrices, those trained in full."""
        whole, cut = (self.weights[member], self.gradients[member]), self.in_full_from
        parts = [tuple(row[:cut] for row in whole), tuple(row[cut:] for row in whole)]
        return [part for part in parts if part[0].numel()]

    def _lora(self, module):
        """Return the forward function of a LoRA layer with the members' matrices."""
        adapter = module.active_adapters[0]
        matrix_a = self.tensors[id(module.lora_A[adapter].weight)]
        matrix_b = self.tensors[id(module.lora_B[adapter].weight)]
        base, scaling = module.get_base_layer(), module.scaling[adapter]
        sums = matrix_a.grad, matrix_b.grad
        return lambda x: lora_projection(x, matrix_a, matrix_b, base, scaling, self.groups, sums)

    def _embed(self, table, ids):
        """Look up tokens (1, T) in the members' embeddings."""
        n_tokens = table.shape[1]
        return F.embedding(ids + n_tokens * self.member_of_row, table.flatten(0, 1))

    def _head(self, table, hidden):
        """Compute the logits (1, T, V) by the members' heads."""
        on = torch.is_autocast_enabled(hidden.device.type)
        dtype = torch.get_autocast_dtype(hidden.device.type) if on else hidden.dtype
        n_tokens = table.shape[1]
        padded = F.pad(table, (0, 0, 0, aligned(n_tokens) - n_tokens)).to(dtype)
        return _GroupedLinear.apply(hidden[0].to(dtype), padded, self.groups)[None, :, :n_tokens]

    @contextmanager
    def in_place(self):
        """Let the model compute with the stack in this context, by fast layers; ``use`` says who is where."""
        with fast_layers(self.model, lora=self._lora), ExitStack() as replacements:
            for module in self.model.modules():
                if isinstance(module, ModulesToSaveWrapper):
                    trained = module.modules_to_save[module.active_adapters[0]]
                    forward = self._embed if isinstance(trained, nn.Embedding) else self._head
                    forward = partial(forward, self.tensors[id(trained.weight)])
                    replacements.enter_context(replaced(module, forward))
            yield self.model

    def rows(self, sizes):
        """Return what says which rows of a batch belong to which member: its ``offsets`` and ``member_of_row``.

        sizes: rows of each member, in their order; multiples of ``ALIGNED``.
        """
        member = torch.repeat_interleave(torch.arange(self.size), torch.tensor(sizes))
        return {"offsets": torch.tensor(sizes).cumsum(0, dtype=torch.int32), "member_of_row": member[None]}

    def use(self, offsets, member_of_row):
        """Take over, from ``rows``, whose rows the next batch has."""
        self.groups, self.member_of_row = Groups(offsets), member_of_row

    def add_gradients(self, loss):
        """Add the gradients of a loss to those of all members."""
        leaves = list(self.tensors.values())
        add_gradients(loss, leaves, [leaf.grad for leaf in leaves])


def aligned(number):
    """Return the least multiple of ``ALIGNED`` that is no smaller."""
    return -(-number // ALIGNED) * ALIGNED
