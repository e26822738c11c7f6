"""Fast layers for LoRA adapters on a frozen base: the same results in fewer and smaller steps.

While a model is in ``fast_layers``, for training, or in ``inference_layers``, its LoRA layers, RMS norms and gated MLPs
compute by the functions here instead of by their own modules'. In training a LoRA layer keeps its input once, in the
precision of the matrix products, unpacks NF4 weights once per direction, and adds the adapter's part into the product;
a gated MLP keeps two of four intermediate results.

Terms: *stack* = the LoRA matrices of K adapters, A (K, r, in) and B (K, out, r); *groups* = which rows of a packed
batch belong to which adapter of a stack (neighbouring rows, in the order of the adapters).

Source: arXiv 2106.09685 (LoRA), 2305.14314 (QLoRA: frozen 4-bit base). Several adapters over one base as of arXiv
2310.18547 and 2311.03285, for training here.
"""

import functools
import importlib.util
from contextlib import ExitStack, contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from adapter_tools import frozen_weight, weight_dtype

KERNELS = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
if KERNELS:
    from training_kernels import silu_times, silu_times_backward


class Groups:
    """The rows of a packed batch by adapter: the first of K groups goes to the first adapter of a stack, and so on."""

    def __init__(self, offsets):
        """offsets: (K,) int32, where each group ends; multiples of 8 where a GPU's grouped ``products`` are to work."""
        self.offsets = offsets

    @functools.cached_property
    def _slices(self):
        ends = self.offsets.tolist()
        return list(zip([0, *ends], ends, strict=False))

    def rows(self, x, weights):
        """Multiply the rows of each group by its matrix: x (T, n), weights (K, n, m) -> (T, m)."""
        if grouped_product_works(x.device, x.dtype):
            return F.grouped_mm(x, weights, offs=self.offsets)
        return torch.cat([x[start:end] @ weight for (start, end), weight in zip(self._slices, weights, strict=True)])

    def products(self, x, y):
        """Return x^T y of each group: x (T, n), y (T, m) -> (K, n, m)."""
        if grouped_product_works(x.device, x.dtype):
            products = F.grouped_mm(x.T, y, offs=self.offsets)
            if torch.cuda.get_device_capability(x.device)[0] > 9:  # it leaves anything for groups without rows
                filled = self.offsets.diff(prepend=self.offsets.new_zeros(1)) > 0
                products = torch.where(filled[:, None, None], products, 0)
            return products
        return torch.stack([x[start:end].T @ y[start:end] for start, end in self._slices])


class _OneGroup:
    """All rows for the one adapter there is."""

    def rows(self, x, weight):
        return x @ weight

    def products(self, x, y):
        return x.T @ y


ONE_GROUP = _OneGroup()


def grouped_product_works(device, dtype):
    """Tell whether PyTorch multiplies groups of rows in one step there, without waiting for the device."""
    able = device.type == "cuda" and dtype == torch.bfloat16 and hasattr(F, "grouped_mm")  # PyTorch 2.10
    return able and torch.cuda.get_device_capability(device)[0] in (9, 10)  # others wait for the device


def _add_product(total, x, y):
    """Add x y to a matrix, in one step where that is the faster way."""
    if x.is_cuda or x.dtype == torch.float32:
        total.addmm_(x, y)
    else:
        total += x @ y


class _Projection(torch.autograd.Function):
    """y = x W^T + scaling (x A^T) B^T with a frozen W; A and B of one adapter, or a stack of them with groups."""

    @staticmethod
    def forward(ctx, x, matrix_a, matrix_b, layer, scaling, groups, sums):  # noqa: PLR0913
        """x (..., in) -> (..., out), in the dtype of autocast, else of x."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            a, b = matrix_a.to(dtype), matrix_b.to(dtype)
            inner = groups.rows(rows, a.mT).mul_(scaling)
            y = groups.rows(inner, b.mT)
            _add_product(y, rows, frozen_weight(layer, dtype).T)
            if layer.bias is not None:
                y += layer.bias.to(dtype)
        ctx.save_for_backward(rows, inner, a, b)
        ctx.layer, ctx.scaling, ctx.groups, ctx.sums = layer, scaling, groups, sums
        ctx.dtypes = x.dtype, matrix_a.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, gradient):
        """Return the gradients of x, A and B; where there are sums, those of A and B are added to them instead."""
        rows, inner, a, b = ctx.saved_tensors
        groups, (x_dtype, adapter_dtype), dx = ctx.groups, ctx.dtypes, None
        with torch.autocast(rows.device.type, enabled=False):
            dy = gradient.reshape(-1, gradient.shape[-1]).to(rows.dtype)
            d_inner = groups.rows(dy, b).mul_(ctx.scaling)
            da, db = groups.products(d_inner, rows), groups.products(dy, inner)
            if ctx.needs_input_grad[0]:
                dx = groups.rows(d_inner, a)
                _add_product(dx, dy, frozen_weight(ctx.layer, rows.dtype))
                dx = dx.view(*gradient.shape[:-1], -1).to(x_dtype)
            if ctx.sums is None:
                da, db = da.to(adapter_dtype), db.to(adapter_dtype)
            else:
                for total, part in zip(ctx.sums, (da, db), strict=True):
                    total += part
                da = db = None
        return dx, da, db, None, None, None, None


def lora_projection(x, matrix_a, matrix_b, layer, scaling, groups=ONE_GROUP, sums=None):  # noqa: PLR0913
    """Apply a frozen linear layer with LoRA.

    Args:
        x: (..., in), of which a stack takes (1, T, in).
        matrix_a, matrix_b: (r, in) and (out, r) of one adapter, or (K, r, in) and (K, out, r) of a stack.
        layer: frozen ``nn.Linear`` or bitsandbytes ``Linear4bit``.
        groups: ``Groups`` of the T rows, with a stack.
        sums: two tensors of the matrices' shapes, to which their gradients are added in the backward pass, so that
            autograd has none for them.

    Returns:
        (..., out) in the dtype of autocast, else of x.
    """
    return _Projection.apply(x, matrix_a, matrix_b, layer, scaling, groups, sums)


class _SiluTimes(torch.autograd.Function):
    """silu(gate) * up; the backward pass computes silu anew."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if KERNELS and gate.is_cuda:
            return silu_times(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient):
        gate, up = ctx.saved_tensors
        if KERNELS and gate.is_cuda:
            return silu_times_backward(gradient, gate, up)
        share = torch.sigmoid(gate)
        silu = gate * share
        d_up = gradient * silu
        return share.add_(silu - silu * share).mul_(gradient).mul_(up), d_up


# ---- in place of a model's own layers ----

def _gated_mlp(module, x):
    """Compute a gated MLP with SiLU."""
    return module.down_proj(_SiluTimes.apply(module.gate_proj(x), module.up_proj(x)))


def _inferred_mlp(module, x):
    """Compute a gated MLP with SiLU, without gradients."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    return module.down_proj(silu_times(gate, up) if KERNELS and gate.is_cuda else F.silu(gate).mul_(up))


def _rms_norm(module, x):
    """Compute an RMS norm."""
    return F.rms_norm(x, module.weight.shape, module.weight.to(x.dtype), module.variance_epsilon)


def _is_gated_mlp(module):
    known = type(module).__name__ in ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
    return known and type(module.act_fn) in (nn.SiLU, type(ACT2FN["silu"]))


def _is_rms_norm(module):
    return type(module).__name__ in ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def is_plain_lora(module):
    """Tell whether a module is a LoRA layer that ``lora_projection`` can stand in for."""
    return (isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), nn.Linear)
            and len(module.active_adapters) == 1 and not module.merged and not module.disable_adapters
            and not module.lora_variant and module.active_adapters[0] in module.lora_A
            and module.lora_B[module.active_adapters[0]].bias is None
            and isinstance(module.lora_dropout[module.active_adapters[0]], nn.Identity))  # fmt: skip


def single_adapter(module, sum_of=None):
    """Return the forward function of a LoRA layer with its own adapter.

    sum_of: function (parameter) -> the tensor to which its gradient is added; None: autograd cares for gradients.
    """
    name = module.active_adapters[0]
    matrices = module.lora_A[name].weight, module.lora_B[name].weight
    sums = sum_of and [sum_of(matrix) for matrix in matrices]
    base, scaling = module.get_base_layer(), module.scaling[name]
    return lambda x: lora_projection(x, *matrices, base, scaling, sums=sums)


@contextmanager
def replaced(module, forward):
    """Let a module compute by another function in this context."""
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


@contextmanager
def fast_layers(model, lora=single_adapter):
    """Let a PEFT model's LoRA layers, RMS norms and gated MLPs compute by this module's functions in this context.

    lora: function (LoRA layer) -> its forward function. Layers of other kinds stay as they are.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if is_plain_lora(module):
                stack.enter_context(replaced(module, lora(module)))
            elif _is_rms_norm(module):
                stack.enter_context(replaced(module, lambda x, module=module: _rms_norm(module, x)))
            elif _is_gated_mlp(module):
                stack.enter_context(replaced(module, lambda x, module=module: _gated_mlp(module, x)))
        yield model


def inferred_projection(module):
    """Return the forward function of a LoRA layer with its own adapter, without gradients.

    The adapter's matrices are rounded to the dtype of the base once, not its input to theirs in every pass.
    """
    name, base = module.active_adapters[0], module.get_base_layer()
    dtype = weight_dtype(base)
    matrix_a = module.lora_A[name].weight.detach().to(dtype)
    matrix_b = (module.lora_B[name].weight.detach().float() * module.scaling[name]).to(dtype)

    def forward(x):
        y = base(x)
        inner = x.reshape(-1, x.shape[-1]).to(y.dtype) @ matrix_a.T.to(y.dtype)
        _add_product(y.view(-1, y.shape[-1]), inner, matrix_b.T.to(y.dtype))
        return y

    return forward


@contextmanager
def inference_layers(model):
    """Let a model, with or without adapter, infer (under ``torch.no_grad``) by this module's functions in this context.

    Layers that compute by another function already, as those with adapters side by side, and layers of other kinds stay
    as they are. The adapter must stay as it is meanwhile.
    """
    with ExitStack() as stack:
        for module in model.modules():
            if "forward" in vars(module):
                continue
            if is_plain_lora(module):
                stack.enter_context(replaced(module, inferred_projection(module)))
            elif _is_rms_norm(module):
                stack.enter_context(replaced(module, functools.partial(_rms_norm, module)))
            elif _is_gated_mlp(module):
                stack.enter_context(replaced(module, functools.partial(_inferred_mlp, module)))
        yield model
