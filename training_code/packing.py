"""Packing: the texts of a forward pass laid end to end, without padding; attention stays within each text.

It owns the packed batch, the attention over it, and the place where it enters transformers' models (attention function
``arc_packed``). A packed batch has ``input_ids``, ``labels`` and ``position_ids`` of shape (1, T), positions starting
anew with every text, and the borders under the names of transformers' own variable-length attention:
``cu_seq_lens_q`` (N + 1,) int32, the first token of each text and the end, and ``max_length_q``, the longest text.

    with packed_attention(model):
        loss = model(**pack(texts, position_ids_of(model)), use_cache=False).loss

Source: sequence packing as of "Efficient Sequence Packing without Cross-contamination" (2021), by variable-length
FlashAttention (2022); on a CPU, on GPUs before Ampere (T4, V100), and for fp32, one attention per text.
"""

import inspect
from contextlib import contextmanager

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tree_attention import attention_window, heads_for

PACKED_ATTENTION = "arc_packed"  # name of the attention function
NO_LABEL = -100


def _varlen_attention():
    """Return (PyTorch's variable-length attention, its options for causal attention with shared key heads) or None."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # before PyTorch 2.10
        return None
    known = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    shared = {"enable_gqa": True} if "enable_gqa" in known else {}
    return varlen_attn, causal | shared


VARLEN = _varlen_attention()


def varlen_possible(device, dtype):
    """Tell whether variable-length FlashAttention computes there: in 16 bits, on a GPU from Ampere on."""
    return (VARLEN is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
            and torch.cuda.get_device_capability(device) >= (8, 0))


def can_pack(model, longest):
    """Tell whether packing is possible: every layer attends to all tokens before of a text, in plain attention.

    longest: tokens of the longest text.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    plain = set(getattr(config, "layer_types", None) or ["full_attention"]) <= {"full_attention", "sliding_attention"}
    window = attention_window(model)
    return plain and (window is None or longest <= window) and not getattr(config, "attn_logit_softcapping", None)


def position_ids_of(model):
    """Return the function tokens (T,) of one text -> positions (T,): Mini's own ones, else 0 to T - 1."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if hasattr(base, "get_position_ids"):
        return lambda ids: base.get_position_ids(torch.from_numpy(np.asarray(ids))[None])[0].numpy()
    return lambda ids: np.arange(len(ids))


def pack(texts, position_ids):
    """Lay texts end to end.

    Args:
        texts: list of (tokens, labels), integers (T,) each; a first token that has a label loses it, as there is
            nothing to predict it from.
        position_ids: as ``position_ids_of`` returns it.

    Returns:
        dict of a packed batch.
    """
    ids = np.concatenate([tokens for tokens, _ in texts])
    labels = np.concatenate([labels for _, labels in texts])
    ends = np.cumsum([len(tokens) for tokens, _ in texts])
    borders = np.concatenate([[0], ends]).astype(np.int32)
    labels[borders[:-1]] = NO_LABEL
    positions = np.concatenate([position_ids(tokens) for tokens, _ in texts])
    return {"input_ids": torch.from_numpy(ids)[None].long(), "labels": torch.from_numpy(labels)[None].long(),
            "position_ids": torch.from_numpy(positions)[None].long(), "cu_seq_lens_q": torch.from_numpy(borders),
            "max_length_q": int(np.diff(borders).max())}  # fmt: skip


def to_device(batch, device):
    """Return a batch with its tensors on a device; a GPU's copies are made while Python goes on."""

    def moved(value):
        waits = device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned()
        return (value.pin_memory() if waits else value).to(device, non_blocking=True)

    return {name: moved(value) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@contextmanager
def packed_attention(model):
    """Let the model attend within the texts of packed batches; restore its attention on leaving."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    before, config._attn_implementation = config._attn_implementation, PACKED_ATTENTION
    try:
        yield model
    finally:
        config._attn_implementation = before


def _packed_attention(  # noqa: PLR0913
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **options
):
    """Attend causally within each text: an attention function of transformers.

    query (1, heads, T, D), key and value (1, shared heads, T, D) -> (1, T, heads, D).

    Raises:
        ValueError: without borders, with dropout, or (where finding that out costs nothing: not on a GPU) for a text
            longer than ``max_length_q``.
    """
    if cu_seq_lens_q is None:
        raise ValueError("packed attention needs the borders of the texts: model(**packing.pack(...))")
    if options.get("dropout"):
        raise ValueError("packed attention has no dropout: set the model's attention_dropout to 0")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if torch.is_autocast_enabled(query.device.type):  # rotated queries and keys may be fp32, which is faster on a CPU
        dtype = torch.get_autocast_dtype(query.device.type) if query.is_cuda else torch.float32
        query, key, value = (states.to(dtype) for states in (query, key, value))
    if varlen_possible(query.device, query.dtype):
        attend, causal = VARLEN
        query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
        output = attend(query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q, scale=scaling,
                        **causal)  # fmt: skip
        return output[None], None
    borders = cu_seq_lens_q.tolist()
    if max_length_q is not None and max(np.diff(borders)) > max_length_q:
        raise ValueError(f"a text has {max(np.diff(borders))} tokens, the longest should have {max_length_q}")
    key, value = heads_for(query, key, value)
    outputs = [
        scaled_dot_product_attention(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end],
                                     is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
        for start, end in zip(borders, borders[1:], strict=False)
    ]  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _no_mask(*args, **kwargs):
    """Stand in for transformers' mask function: the borders say who attends to whom."""


AttentionInterface.register(PACKED_ATTENTION, _packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, _no_mask)
