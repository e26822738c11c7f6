"""How much memory the engine takes."""

from types import SimpleNamespace

import pytest
import torch

import tree_memory
from tree_memory import choose_room


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
    monkeypatch.setattr(tree_memory, "_free_bytes", lambda device: free)
    room = choose_room(model(), 1000)
    assert 1 <= room.rows <= 4096 and "free" in room.reason
    assert 0.3 * free < room.slots * 1000 + room.rows * tree_memory._row_bytes(model()) <= 0.5 * free


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(tree_memory, "Path", lambda _: tmp_path)
    assert tree_memory._container_bytes() == float("inf")
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("300\n")
    assert tree_memory._container_bytes() == float("inf")
    (tmp_path / "memory.max").write_text("1000\n")
    assert tree_memory._container_bytes() == 700
