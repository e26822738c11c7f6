"""Pictures: colours of single pixels, the picture of a solved query, terminal text."""

import io
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

import draw_tools

GRID = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
TASK = {"train": [{"input": [[1, 0, 0]], "output": [[0], [1]]}, {"input": [[2, 0, 3]], "output": [[3], [2]]}],
        "test": [{"input": [[4, 5, 6]]}]}
SOLUTION, WRONG = [[6], [4]], [[6], [5]]


def candidate(output, search_nll, scoring_nll, keys):
    return {"output": output, "correct": output == SOLUTION, "scores_inf": dict.fromkeys(keys, search_nll),
            "scores_aug": dict.fromkeys(keys, scoring_nll)}


@pytest.fixture
def output_folder(tmp_path):
    """The output folder of a run that solved `first` by its second attempt and not `second`."""
    keys = ["first_0.rt.perm0123456789.ex1-0", "first_0.tp.perm1032547698.ex0-1"]
    candidates = [candidate(WRONG, 0.1, 0.2, keys), candidate(SOLUTION, 0.5, 0.6, keys[:1])]
    folder = tmp_path / "candidates"
    folder.mkdir()
    for name, found in (("first", candidates), ("second", candidates[:1])):
        saved = {"task": name, "challenge": TASK, "solutions": [SOLUTION], "score_rule": "mul_all_prob",
                 "candidates": [found]}
        (folder / f"{name}.json").write_text(json.dumps(saved))
    return tmp_path


def rendered(figure):
    """Return the picture (rows, columns, RGB) in 0..1."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3] / 255


@pytest.mark.parametrize("pixels", [8, 40])  # a cell without and with a digit
def test_cells_have_the_arc_colours(pixels):
    figure = Figure(figsize=(5 * pixels / 100, 2 * pixels / 100), dpi=100)
    draw_tools.draw_grid(figure.add_axes((0, 0, 1, 1)), GRID)
    picture = rendered(figure)
    for (row, column), value in np.ndenumerate(GRID):
        corner = picture[int((row + 0.25) * pixels), int((column + 0.25) * pixels)]
        np.testing.assert_allclose(corner, to_rgb(draw_tools.ARC_COLOURS[value]), atol=0.02)


def test_large_cells_show_their_digit_and_small_ones_do_not():
    texts = {}
    for pixels in (8, 40):
        figure = Figure(figsize=(5 * pixels / 100, 2 * pixels / 100), dpi=100)
        ax = figure.add_axes((0, 0, 1, 1))
        draw_tools.draw_grid(ax, GRID)
        texts[pixels] = [text.get_text() for text in ax.texts]
    assert texts == {8: [], 40: list("0123456789")}


def test_a_run_is_drawn_from_its_folder(output_folder):
    path = draw_tools.draw_run(output_folder)
    assert path == output_folder / "solved_task.png"
    assert path.read_bytes().startswith(b"\x89PNG")
    picture = np.round(255 * imread(path)[..., :3]).astype(int)  # (rows, columns, RGB)
    assert picture.shape[1] == round(draw_tools.WIDTH * draw_tools.DPI)
    for value in (1, 4, 5, 6):
        colour = np.round(255 * np.asarray(to_rgb(draw_tools.ARC_COLOURS[value])))
        assert (picture == colour).all(axis=-1).sum() > 100, f"no cell of colour {value}"


def test_the_solved_picture_says_what_was_attempted(output_folder):
    query = draw_tools.choose_query(draw_tools.load_run(output_folder))
    assert query.name == "first_0" and query.found == 1
    figure = draw_tools.draw_solved(query)
    titles = [ax.get_title() for ax in figure.axes]
    assert "attempt 1" in titles and "attempt 2, correct" in titles and "solution" in titles
    texts = {text.get_text() for text in figure.texts}
    assert {"turned 90°, pairs 2 1", "transposed, recoloured, pairs 1 2"} <= texts
    assert f"{0.6 + 0.5 - 6:.2f}" in texts  # mul_all_prob of the solution: one scoring and one search view


def test_nothing_solved_gives_no_picture(output_folder):
    (output_folder / "candidates" / "first.json").unlink()
    assert draw_tools.draw_run(output_folder) is None
    assert not (output_folder / "solved_task.png").exists()


def test_views_are_drawn_as_the_model_sees_them(output_folder):
    query = draw_tools.choose_query(draw_tools.load_run(output_folder))
    pairs = draw_tools.view_pairs(query.task, query.query, "first_0.tp.perm1032547698.ex1-0")
    assert [np.asarray(grid).tolist() for _, grid, _ in pairs] == [[[3], [1], [2]], [[0], [1], [1]], [[5], [4], [7]]]
    assert np.asarray(pairs[0][2]).tolist() == [[2, 3]] and pairs[2][2] is None


def test_command_draws_the_task_asked_for(output_folder, capsys):
    png = output_folder / "picture.png"
    draw_tools.main([str(output_folder), "--task", "second", "--png", str(png)])
    assert png.exists() and str(png) in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        draw_tools.main([str(output_folder), "--task", "third"])
    assert stop.value.code == 1 and "third is not among" in capsys.readouterr().err


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="output folder of an evaluation"):
        draw_tools.load_run(tmp_path)


def test_a_run_is_drawn_from_its_own_tasks_alone(output_folder):
    assert [query.name for query in draw_tools.load_run(output_folder, ["second"])] == ["second_0"]
    assert draw_tools.draw_run(output_folder) is not None
    assert draw_tools.draw_run(output_folder, ["second"]) is None, "first was solved by an earlier run"
    assert not (output_folder / "solved_task.png").exists(), "nor is that run's picture left"


def test_terminal_shows_digits_without_colour(output_folder):
    out = io.StringIO()
    draw_tools.print_solved(draw_tools.load_run(output_folder)[0], Console(file=out, no_color=True))
    assert "4 5 6" in out.getvalue()
    assert all(title in out.getvalue() for title in ("first_0", "query", "attempt 1", "attempt 2", "solution"))


def test_terminal_grid_is_coloured():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor")
    console.print(draw_tools.grid_text([[2]]))
    assert "48;2;255;65;54" in out.getvalue()
