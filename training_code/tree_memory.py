"""How much of the memory the engine takes: slots for keys and values, tokens per forward pass, unpacked weights."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from adapter_tools import four_bit_layers, plain_weights

_ROWS = {"cuda": 32768, "cpu": 2048}  # more tokens at once gain nothing
_WIDE, _MOST_TIMES = 1024, 4  # hidden size from which on that holds on a GPU; most times as many for narrower models
_SHARE = {"cuda": 0.9, "cpu": 0.5}  # of the free memory; a CPU's is shared with other programs
_LIVE = 3  # layers' worth of intermediate results alive at once


@dataclass(frozen=True)
class Room:
    """What was chosen: ``slots`` for keys and values, ``rows`` (tokens) per pass, and the reason in words."""

    slots: int
    rows: int
    reason: str


def free_bytes(device):
    """Return how many bytes of a device's memory are free; of a CPU's, within the limit of its container."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch holds in pieces is no room for large buffers
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_bytes())


def _container_bytes():
    """Return what the limit of a container leaves, infinity without one."""
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    text = limit.read_text().strip() if limit.is_file() and used.is_file() else "max"
    return math.inf if text == "max" else max(0, int(text) - int(used.read_text()))


def _row_bytes(model):
    """Return an estimate of the bytes that one row of a pass takes beside its slot."""
    config = model.config.get_text_config()
    width = 8 * config.hidden_size + 3 * config.intermediate_size
    return _LIVE * width * model.dtype.itemsize + 12 * config.vocab_size


def _useful_rows(model):
    """Return how many tokens of a pass keep a device busy while the next pass is launched."""
    narrower = _WIDE / model.config.get_text_config().hidden_size if model.device.type == "cuda" else 1
    return int(_ROWS.get(model.device.type, 4096) * min(_MOST_TIMES, max(1, narrower**2)))


def choose_room(model, slot_bytes, memory_limit=None, max_rows=None, more_per_row=0):
    """Choose slots and rows per pass for a model that is in memory already.

    Args:
        slot_bytes: bytes of keys and values per token. memory_limit: bytes for these, None = what is free.
        max_rows: tokens per pass, None = as many as a fifth of the memory holds, within what is useful.
        more_per_row: bytes that a row takes beside those of the model alone.
    """
    row_bytes = _row_bytes(model) + more_per_row
    kind = model.device.type
    budget = memory_limit if memory_limit is not None else int(_SHARE.get(kind, 0.5) * free_bytes(model.device))
    reason = f"{budget / 2**30:.2f} GiB, " + ("as asked for" if memory_limit is not None else "of what is free")
    rows = max_rows or max(1, min(_useful_rows(model), budget // 5 // row_bytes))
    slots = (budget if memory_limit is not None else budget - rows * row_bytes) // slot_bytes
    return Room(max(1, int(slots)), int(rows), reason)


def weights_for_the_engine(model, unpack=None, print_func=None):
    """Return a context in which NF4 weights are replaced by unpacked ones, if that is wanted: passes are faster.

    Args:
        unpack: None = where the copies take at most half of the free memory.
    """
    states = [layer.weight.quant_state for layer in four_bit_layers(model).values()]
    if not states or unpack is False:
        return nullcontext(model)
    needed, free = sum(math.prod(state.shape) * state.dtype.itemsize for state in states), free_bytes(model.device)
    if unpack is None and needed > free / 2:
        return nullcontext(model)
    if print_func:
        print_func(f"engine: 4-bit weights unpacked for the time of the search, {needed / 2**30:.2f} GiB of "
                   f"{free / 2**30:.2f} GiB that are free")  # fmt: skip
    return plain_weights(model)
