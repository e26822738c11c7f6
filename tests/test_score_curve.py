"""The score curve: shares of solved test inputs, tasks by length, and no picture without solutions."""

import json

import pytest
from matplotlib.axes import Axes

from score_curve import draw_score_curve, solved_shares


def result(ranks, tokens=10, solutions=True):
    """Return what a task leaves: per test input the place of the right one among 4 candidates, or None."""
    candidates = [[{"correct": i == rank} for i in range(4)] for rank in ranks]
    return {"candidates": candidates, "prompt_tokens": tokens, "solutions": [[[1]]] * len(ranks) if solutions else None}


@pytest.mark.parametrize(("ranks", "found", "solved", "first"), [
    ([0], 1, 1, 1), ([1], 1, 1, 0), ([2], 1, 0, 0), ([None], 0, 0, 0), ([0, 3], 1, 0.5, 0.5), ([None, 1], 0.5, 0.5, 0)])
def test_shares_of_a_task(ranks, found, solved, first):
    assert list(solved_shares(result(ranks)).values()) == [found, solved, first]


def test_the_curve_goes_from_short_to_long_tasks_of_the_run(tmp_path, monkeypatch):
    (tmp_path / "candidates").mkdir()
    (tmp_path / "record.json").write_text(json.dumps({"tasks": ["a", "b/c", "unfinished"]}))
    for name, saved in {"a": result([None], 99), "b%2Fc": result([1], 5), "of another run": result([0])}.items():
        (tmp_path / "candidates" / f"{name}.json").write_text(json.dumps(saved))
    drawn, plot = {}, Axes.plot

    def watched(axes, x, y, *style, label, **options):
        drawn[label] = (list(x), list(y))
        return plot(axes, x, y, *style, label=label, **options)

    monkeypatch.setattr(Axes, "plot", watched)
    assert draw_score_curve(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert list(drawn.values()) == [([1, 2], [100, 50]), ([1, 2], [100, 50]), ([1, 2], [0, 0])]


def test_no_curve_without_solutions(tmp_path):
    (tmp_path / "candidates").mkdir()
    (tmp_path / "record.json").write_text(json.dumps({"tasks": ["a"]}))
    (tmp_path / "candidates" / "a.json").write_text(json.dumps(result([None], solutions=False)))
    assert draw_score_curve(tmp_path) is None and not (tmp_path / "score_curve.png").exists()
