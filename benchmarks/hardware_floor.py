"""The least time that a search can take on a device: arithmetic and memory traffic at the rates measured there."""

import math
import time

import torch


def _seconds(function, device, repeats=10):
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def measure_rates(model):
    """Return {"flops": per second of a large matrix product in the model's dtype, "bytes": per second of a copy}."""
    device, size = model.device, 8192 if model.device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=model.dtype) for _ in range(2))
    flops = 2 * size**3 / _seconds(lambda: left @ right, device)
    data = torch.randn(2**28 if device.type == "cuda" else 2**24, device=device)
    target = torch.empty_like(data)
    return {"flops": flops, "bytes": 2 * data.nbytes / _seconds(lambda: target.copy_(data), device)}


def count_weights(model):
    """Return (number, bytes) of a model's weights without the embeddings, of which a token reads one row."""
    embedding, number, size = model.get_input_embeddings().weight, 0, 0
    for parameter in model.parameters():
        if parameter is not embedding or model.get_output_embeddings().weight is embedding:
            state = getattr(parameter, "quant_state", None)  # of 4-bit weights, which are packed
            number += parameter.numel() if state is None else math.prod(state.shape)
            size += parameter.nbytes
    return number, size


def floor_seconds(model, stats, rates):
    """Return the floor of the work that an engine's counters tell of.

    Arithmetic: 2 FLOP per weight and token (prompts, nodes of the search, tokens to score) and 4 per layer, head width
    and pair of tokens for attention. Traffic: weights once per pass, keys and values of every tree once per pass.
    """
    config = model.config.get_text_config()
    weights, weight_bytes = count_weights(model)
    tokens = stats["prompt_rows"] + stats["nodes"] + stats["scored"]
    width = config.num_attention_heads * getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    attention = 4 * config.num_hidden_layers * width * stats["attended"]
    traffic = stats["passes"] * weight_bytes + stats["read_slots"] * stats["slot_bytes"]
    return (2 * weights * tokens + attention) / rates["flops"] + traffic / rates["bytes"]
