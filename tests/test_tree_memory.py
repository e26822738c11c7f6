"""How much memory the engine takes."""

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch

import tree_memory
from tree_memory import choose_room, weights_for_the_engine


def model(kind="cpu"):
    config = SimpleNamespace(hidden_size=64, intermediate_size=128, vocab_size=80, get_text_config=lambda: config)
    return SimpleNamespace(config=config, device=torch.device(kind), dtype=torch.float32)


def test_a_limit_is_kept_and_there_is_always_a_slot():
    assert choose_room(model(), 100, memory_limit=12345).slots == 123
    assert choose_room(model(), 100, memory_limit=1).slots == 1  # what does not fit goes to the plain search
    assert choose_room(model(), 100, memory_limit=10**6, max_rows=7).rows == 7
    assert "as asked for" in choose_room(model(), 100, memory_limit=10**6).reason


@pytest.mark.parametrize("free", [10**6, 10**8, 10**11])
def test_slots_and_rows_follow_the_free_memory(free, monkeypatch):
    monkeypatch.setattr(tree_memory, "free_bytes", lambda device: free)
    room = choose_room(model(), 1000)
    assert 1 <= room.rows <= 4096 and "free" in room.reason
    assert 0.3 * free < room.slots * 1000 + room.rows * tree_memory._row_bytes(model()) <= 0.5 * free


def test_a_gpu_takes_more_tokens_at_once_where_layers_are_narrow(monkeypatch):
    monkeypatch.setattr(tree_memory, "free_bytes", lambda device: 10**12)
    rows = []
    for width in (64, 512, 576, 1024, 4096):
        wide = model("cuda")
        wide.config.hidden_size = width
        rows.append(choose_room(wide, 1000).rows)
    assert rows[0] == rows[1] == 4 * 32768 and rows[1] > rows[2] > rows[3] == rows[4] == 32768


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_memory, "Path", lambda _: tmp_path)
    assert tree_memory._container_bytes() == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert tree_memory._container_bytes() == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert tree_memory._container_bytes() == 700


def test_four_bit_weights_are_unpacked_where_half_of_the_free_memory_holds_them(monkeypatch):
    four_bits = bnb.nn.Linear4bit(64, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    four_bits.weight = bnb.nn.Params4bit(torch.randn(128, 64), requires_grad=False, quant_type="nf4")
    four_bits.to("cpu")
    net = torch.nn.Sequential(four_bits)
    net.device = torch.device("cpu")
    needed = 128 * 64 * four_bits.weight.quant_state.dtype.itemsize

    def unpacked(free, unpack=None, lines=()):
        monkeypatch.setattr(tree_memory, "free_bytes", lambda device: free)
        with weights_for_the_engine(net, unpack, lines.append if lines else None):
            return net[0] is not four_bits

    said = ["start"]
    assert unpacked(2 * needed, lines=said) and not unpacked(2 * needed - 1) and net[0] is four_bits
    assert "unpacked" in said[1] and "GiB" in said[1]
    assert unpacked(0, unpack=True) and not unpacked(10**12, unpack=False)
    plain = torch.nn.Linear(4, 4)
    with weights_for_the_engine(plain, True) as same:
        assert same is plain
