"""One task in the terminal and as a picture: what is shown, where it is looked for, and what is refused."""

import io
import json

import pytest
from rich.console import Console

import show_task
from arc_loader import ArcDataset

PAIRS = [{"input": [[1, 0, 0]], "output": [[0], [1]]}, {"input": [[2, 0, 3]], "output": [[3], [2]]}]
CHALLENGES = {"one": {"train": PAIRS, "test": [{"input": [[4, 5, 6]]}, {"input": [[7, 8, 9]]}]},
              "other": {"train": PAIRS, "test": []}}
SOLUTIONS = {"one": [[[6], [4]], [[9], [7]]], "other": []}


@pytest.fixture
def files(tmp_path):
    """Return the options that name the files of `CHALLENGES` and `SOLUTIONS`."""
    (tmp_path / "challenges.json").write_text(json.dumps(CHALLENGES))
    (tmp_path / "solutions.json").write_text(json.dumps(SOLUTIONS))
    return ["--challenges", str(tmp_path / "challenges.json"), "--solutions", str(tmp_path / "solutions.json")]


def printed(pairs, views, width=120, **options):
    out = io.StringIO()
    show_task.print_task("one", pairs, views, Console(file=out, width=width, **options))
    return out.getvalue()


def test_views_are_those_that_the_data_set_draws():
    tasks = ArcDataset(CHALLENGES, SOLUTIONS)
    task = show_task.find_task("one", [tasks])
    pairs, views = show_task.draw_task(task, 5, seed=3)
    assert [title for title, _, _ in pairs] == ["pair 1", "pair 2", "query 1", "query 2"]
    assert [answer for _, _, answer in pairs[2:]] == SOLUTIONS["one"]
    expected = tasks.change_keys(["one_0"] * 5).augment(tp=True, rt=True, perm=True, shfl_ex=True, seed=3).keys
    assert [key for key, _ in views] == expected and len(set(expected)) == 5
    assert [key for key, _ in show_task.draw_task(task, 5, seed=4)[1]] != expected
    assert [len(shown) for _, shown in views] == [3] * 5 and all(shown[-1][2] is None for _, shown in views)


def test_a_task_without_queries_or_solutions_can_be_shown():
    for task, n_shown in ((ArcDataset({"other": CHALLENGES["other"]}), 2), (ArcDataset({"one": CHALLENGES["one"]}), 4)):
        pairs, views = show_task.draw_task(task, 1, seed=0)
        assert len(pairs) == n_shown and all(answer is None for _, _, answer in pairs[2:])
        assert "?" in printed(pairs, views) or n_shown == 2
        show_task.picture("x", pairs, views)


def test_terminal_shows_digits_with_and_without_colour():
    pairs, views = show_task.draw_task(show_task.find_task("one", [ArcDataset(CHALLENGES, SOLUTIONS)]), 1, seed=0)
    text = printed(pairs, views, no_color=True)
    assert "task one" in text and f"view {views[0][0]}: " in text and "4 5 6  -> 6" in text
    assert "48;2;255;65;54" in printed(pairs, [], force_terminal=True, color_system="truecolor")
    narrow = printed(pairs, [], width=16)
    assert "4 5 6  ->" not in narrow and "4 5 6" in narrow and "->" in narrow


def test_picture_holds_pairs_and_the_keys_of_the_views():
    pairs, views = show_task.draw_task(ArcDataset(CHALLENGES, SOLUTIONS).change_keys(["one_0", "one_1"]), 5, seed=0)
    figure = show_task.picture("one", pairs, views)
    texts = [text.get_text() for text in figure.texts]
    assert "5 views" in texts and {key for key, _ in views} <= set(texts)
    assert [ax.get_title() for ax in figure.axes].count("query") == 5
    assert len(figure.axes) == 8 + 5 * 5
    assert len(show_task.picture("one", pairs, []).axes) == 8


def test_command_takes_files_of_ones_own(files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    show_task.main(["one", *files, "--views", "0"])
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    assert "4 5 6" in capsys.readouterr().out
    show_task.main(["one", *files[:2], "--png", str(tmp_path / "there" / "picture.png")])
    assert (tmp_path / "there" / "picture.png").exists() and "?" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["0ca9ddb6", "2072aba6"], ids=["training", "evaluation"])
def test_public_tasks_are_known_by_name(name, tmp_path, capsys):
    show_task.main([name, "--png", str(tmp_path / "x.png")])
    out = capsys.readouterr().out
    assert f"task {name}" in out and out.count(f"view {name}_0.") == 4 and (tmp_path / "x.png").exists()


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        show_task.main(arguments)
    assert stop.value.code in (1, 2)
    return capsys.readouterr().err


def test_refusals_say_what_to_do(files, capsys):
    assert "no task is called 'on' among 2; near names: one" in refusal(["on", *files], capsys)
    assert "the first of them is one" in refusal(["zzzzzzzz", *files], capsys)
    assert "near names: 0ca9ddb6" in refusal(["0ca9ddb5"], capsys)
    assert "--solutions needs --challenges" in refusal(["one", *files[2:]], capsys)
    assert "must be 0 or more" in refusal(["one", *files, "--views", "-1"], capsys)
    assert "nowhere.json" in refusal(["one", "--challenges", "nowhere.json"], capsys)
    with open(files[1], "w") as file:
        file.write("{")
    assert "challenges.json: not JSON" in refusal(["one", *files], capsys)
