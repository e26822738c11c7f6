"""Triton kernels of training on a GPU: silu(gate) * up and its gradients, each in one pass over memory.

Imported only where there is a GPU.
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit
def _silu_times(gate, up, output, size, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    g = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0).to(tl.float32)
    tl.store(output + place, g * tl.sigmoid(g) * u, mask=inside)


@triton.jit
def _silu_times_backward(gradient, gate, up, d_gate, d_up, size, block: tl.constexpr):  # noqa: PLR0913
    place = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = place < size
    d = tl.load(gradient + place, mask=inside, other=0).to(tl.float32)
    g = tl.load(gate + place, mask=inside, other=0).to(tl.float32)
    u = tl.load(up + place, mask=inside, other=0).to(tl.float32)
    share = tl.sigmoid(g)
    silu = g * share
    tl.store(d_up + place, d * silu, mask=inside)
    tl.store(d_gate + place, d * u * (share + silu - silu * share), mask=inside)


def silu_times(gate, up):
    """Return silu(gate) * up of two contiguous tensors of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(gate)
    _silu_times[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, output, gate.numel(), BLOCK)
    return output


def silu_times_backward(gradient, gate, up):
    """Return the gradients of gate and up."""
    gradient, gate, up = gradient.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _silu_times_backward[(triton.cdiv(gate.numel(), BLOCK),)](gradient, gate, up, d_gate, d_up, gate.numel(), BLOCK)
    return d_gate, d_up
