"""The report of a run, from output folders made by hand: what it says, what it leaves out, and what it refuses."""

import base64
import hashlib
import json
import math
import re

import pytest

import report
import report_tasks
from report_folders import (FAR, HARMFUL_NAME, NEAR, OTHER_SIZE, SOLUTION, candidate, outcome_tasks, task_file,
                            view_keys, write_run)


def page_of(folder):
    return report.write_report(folder).read_text(encoding="utf-8")


def data_of(page):
    """Return the tasks that the page holds, {name: task}."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    return {task["name"]: task for task in json.loads(data, parse_constant=pytest.fail)["tasks"]}


def input_of(tmp_path, file, **record):
    """Return what the page holds of the only test input of a run's only task."""
    return data_of(page_of(write_run(tmp_path / "run", {file["task"]: file}, **record)))[file["task"]]["inputs"][0]


def text_of(page):
    """Return what the summary says, without tags."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", page.split("<body>")[1].split("<script")[0]))


# ---- summary ----

def test_summary_says_score_coverage_cost_and_configuration(tmp_path):
    page = page_of(write_run(tmp_path / "run", outcome_tasks()))
    text = text_of(page)
    for words in ("run_evaluation_test", "4 tasks, 4 test inputs answered, finished", "per task 25.0% 1 of 4",
                  "all-or-nothing 25.0%", "coverage 50.0% 2 of 4", "✓ solved 1", "▲ found but not submitted 1",
                  "✗ not found 1", "∅ no candidates 1", "find candidates 2 min", "prompts 1,280",
                  "product_of_experts ◂ this run", "less the number of views it was found in 2",
                  "16 views of each test input, all replies with more than 0.1 probability",
                  "2 CPU threads (Some CPU)", "commit 0123abc", "is drawn by JavaScript"):
        assert words in text, words
    assert "Loss of" not in text and "solution unknown" not in text


def test_loss_is_drawn_where_all_tasks_were_trained_on_at_once(tmp_path):
    folder = write_run(tmp_path / "run", outcome_tasks())
    history = [{"step": step, "loss": 2 / step, "learning_rate": 0.1} for step in range(1, 2001)]
    (folder / "finetuned_model").mkdir()
    (folder / "finetuned_model" / "training_loss.json").write_text(json.dumps(history))
    assert "Loss of" not in text_of(page_of(folder)), "the folder is of an earlier run: this one did not train"
    values = json.loads((folder / "record.json").read_text())
    values["config"] |= {"ttt": "joint", "joint": {"repeats": 32, "lora_rank": 64, "learning_rate": 5e-4,
                                                   "batch_size": 2, "gradient_accumulation": 2}}
    (folder / "record.json").write_text(json.dumps(values))
    page = page_of(folder)
    assert "from 2.000 to 0.001 in 2,000 steps" in text_of(page) and "means of 5 steps" in text_of(page)
    assert ("one adapter for all tasks, 32 views of each, LoRA rank 64, learning rate 0.0005, batches of 2 x 2"
            in text_of(page)) and "the mean over tasks" not in page  # fmt: skip
    points = re.search(r'class="curve" points="([^"]*)"', page)[1].split()
    assert len(points) == report.LOSS_POINTS and points[0].startswith("0.0,") and points[-1].startswith("600.0,")


def test_a_short_or_constant_training_can_be_drawn():
    assert report.loss_chart([{"step": 1, "loss": 1.0}]) is None
    for losses in ((0.5, 0.25), (0.0, 0.0), (0.125,) * 30):
        chart = report.loss_chart([{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)])
        assert len(chart["points"].split()) == len(losses) and "nan" not in chart["points"] + chart["smooth"]


@pytest.mark.parametrize("top", [0.001, 0.7, 1, 2.4, 99])
def test_ticks_are_few_and_round(top):
    tick = report.nice_tick(top)
    assert 2 <= top / tick <= 6 and re.fullmatch(r"0*(1|2|25|5)0*", f"{tick:.6f}".replace(".", ""))


# ---- what became of a test input ----

def test_every_outcome_has_its_sentence(tmp_path):
    tasks = data_of(page_of(write_run(tmp_path / "run", outcome_tasks())))
    said = {name: (task["inputs"][0]["outcome"], task["inputs"][0]["why"]) for name, task in tasks.items()}
    assert said == {
        "solved": ("solved",
                   "Solved by attempt 1: found in 12 of 16 views; product_of_experts 0.50 against 2.00 of attempt 2."),
        "outranked": ("found but not submitted",
                      "Found in 2 of 16 views, rank 3: product_of_experts 2.25 against 2.00 of attempt 2; best search "
                      "probability 10.5% against 13.5%. No other rule would have submitted it either."),
        "missed": ("not found", "Not found: in none of 16 views did the search reach the solution; the nearest "
                                "candidate, attempt 1, differs from it in 1 of 4 cells."),
        "empty": ("no candidates", "No candidate at all: in none of 16 views did a reply that is a grid have more than "
                                   "0.1 probability.")}


def test_sentence_names_mean_nll_and_the_rules_that_would_have_solved_it(tmp_path):
    file = task_file("one", [(NEAR, 1, 2.0), (FAR, 1, 2.5), (SOLUTION, 9, 2.6)], score_rule="max_aug_prob")
    why = input_of(tmp_path, file)["why"]
    assert "max_aug_prob 2.60 against 2.50 of attempt 2; mean NLL 2.60 against 2.50" in why
    assert why.endswith("It would have been submitted by mul_all_prob, nvarc, sum_all_prob, top_n_augs_mult.")


def test_second_attempt_is_compared_with_both_neighbours(tmp_path):
    one = input_of(tmp_path, task_file("one", [(NEAR, 3, 0.5), (SOLUTION, 2, 1.0), (FAR, 1, 2.0)]))
    assert one["why"] == ("Solved by attempt 2: found in 2 of 16 views; product_of_experts 1.00 against 0.50 of "
                          "attempt 1 and 2.00 of candidate 3.")


def test_only_candidate_and_other_sizes_are_said(tmp_path):
    one = input_of(tmp_path, task_file("one", [(SOLUTION, 16, 0.1)]))
    assert one["why"] == "Solved by attempt 1: found in 16 of 16 views; it is the only candidate."
    two = input_of(tmp_path / "2", task_file("two", [(OTHER_SIZE, 1, 0.1)]))
    assert two["why"].endswith("no candidate has its size, 2x2.")


def test_unknown_solution(tmp_path):
    files = {name: task_file(name, grids, solution=None)
             for name, grids in (("one", [(NEAR, 2, 0.5), (FAR, 1, 1.0)]), ("two", []))}
    page = page_of(unscored(write_run(tmp_path / "run", files)))
    one, two = (task["inputs"][0] for task in data_of(page).values())
    assert one["outcome"] == "solution unknown" and one["solution"] is None
    assert one["why"] == ("The solution is not known. Attempt 1 was found in 2 of 16 views; product_of_experts 0.50 "
                          "against 1.00 of attempt 2.")
    assert two["outcome"] == "no candidates"
    assert "No score" in text_of(page) and "per task" not in text_of(page)


def unscored(folder):
    """Make a run's record that of a run without solutions."""
    values = json.loads((folder / "record.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("found", "solved_by_rule")}
    (folder / "record.json").write_text(json.dumps(values | {"scores": None}))
    return folder


def test_nothing_searched_and_greedy_search_are_said(tmp_path):
    one = input_of(tmp_path, task_file("one", [], identity={"views": [[]]}))
    assert one["why"] == "No candidate at all: no view fits the token limit, so nothing was searched."
    folder = write_run(tmp_path / "greedy", {"empty": task_file("empty", [])})
    values = json.loads((folder / "record.json").read_text())
    values["config"]["min_prob"] = None
    (folder / "record.json").write_text(json.dumps(values))
    page = page_of(folder)
    why = data_of(page)["empty"]["inputs"][0]["why"]
    assert why == "No candidate at all: in none of 16 views was the most probable reply a grid."
    assert "the most probable reply of each" in text_of(page)


def test_candidates_without_scoring_views_are_ranked_by_the_search(tmp_path):
    file = task_file("one", [(NEAR, 3, 0.5), (SOLUTION, 2, 1.0)])
    for one in file["candidates"][0]:
        del one["scores_aug"]
    shown = input_of(tmp_path, file)
    assert shown["rule"] == "max_gen_prob" and "max_gen_prob 1.00 against 0.50 of attempt 1" in shown["why"]
    assert shown["candidates"][0]["scored"] == []


def test_views_that_the_files_do_not_name_are_not_counted(tmp_path):
    one = input_of(tmp_path, task_file("one", [(SOLUTION, 3, 0.5)], identity={}))
    assert "found in 3 views;" in one["why"] and one["searched"] == 3


def test_every_test_input_has_its_own_views_and_outcome(tmp_path):
    file = task_file("two", [(SOLUTION, 16, 0.5)])
    keys = view_keys("two", 1, 8)
    file["challenge"]["test"].append({"input": [[7]]})
    file["solutions"].append(SOLUTION)
    file["candidates"].append([candidate(NEAR, SOLUTION, keys, 4, 1.0)])
    file["identity"]["views"].append(keys)
    first, second = data_of(page_of(write_run(tmp_path / "run", {"two": file})))["two"]["inputs"]
    assert (first["outcome"], first["searched"]) == ("solved", 16)
    assert (second["outcome"], second["searched"], second["query"]) == ("not found", 8, "7")
    assert "in none of 8 views" in second["why"]


# ---- what the page holds ----

def test_grids_and_nlls_are_those_of_the_files(tmp_path):
    file = task_file("one", [(NEAR, 2, 0.5), (OTHER_SIZE, 1, 0.75)])
    own = {"one_0.rt.perm1032547698.ex1-0": 1.23456}  # a scoring view that was not searched
    file["candidates"][0][1]["scores_aug"] = own
    task = data_of(page_of(write_run(tmp_path / "run", {"one": file})))["one"]
    assert task["pairs"] == [["10", "01"]] * 2 and task["seconds"] == 1.5 and task["tokens"] == 320
    one = task["inputs"][0]
    assert (one["query"], one["solution"], one["size"]) == ("56", "12/34", [2, 2])
    assert [c["grid"] for c in one["candidates"]] == ["12/35", "123"]
    assert one["candidates"][0]["found"] == [[0, 0.5], [1, 0.5]]
    assert len(one["candidates"][0]["scored"]) == one["searched"] == 16
    assert one["candidates"][1]["scored"] == [[16, 1.235]] and one["views"][16] == "rt.perm1032547698.ex1-0"
    assert one["views"][0] == "perm0123456789.ex0-1" and one["candidates"][1]["score"] == "1.23"


def test_the_largest_grids_and_infinite_nlls_fit(tmp_path):
    large = [[(row + column) % 10 for column in range(30)] for row in range(30)]
    file = task_file("large", [(large, 2, 0.5)], solution=large)
    file["candidates"][0][0]["scores_aug"][view_keys("large")[0]] = math.inf
    one = input_of(tmp_path, file)
    assert one["size"] == [30, 30] and one["solution"].split("/")[29] == "".join(map(str, large[29]))
    assert len(one["candidates"][0]["scored"]) == 15 and one["candidates"][0]["score"] == "no score"


def test_names_and_texts_from_files_do_no_harm(tmp_path):
    files = {HARMFUL_NAME: task_file(HARMFUL_NAME, [(SOLUTION, 1, 0.5)])}
    page = page_of(write_run(tmp_path / "run", files, script=HARMFUL_NAME, commit="<b onclick=alert(1)>",
                             tokens={HARMFUL_NAME: 1}, seconds={HARMFUL_NAME: 1.0}))
    assert "<img" not in page and "<b onclick" not in page
    assert page.count("</script>") == 2
    assert HARMFUL_NAME in data_of(page) and "&lt;/script&gt;&lt;img" in page


def test_the_page_needs_nothing_from_outside(tmp_path):
    page = page_of(write_run(tmp_path / "run", outcome_tasks()))
    assert re.findall(r"https?://[^\"' ]*", page) == ["http://www.w3.org/2000/svg"]
    assert re.findall(r"(?:src|href)=\"([^\"]*)", page) == ["data:,", "#tasks"]
    assert not re.search(r"@import|url\(", page)
    script = page.rsplit("<script>")[-1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page and "default-src 'none'" in page


# ---- runs that have not come to their end, or have left something else ----

def test_a_run_under_way_is_reported_without_a_score(tmp_path):
    files = outcome_tasks()
    folder = write_run(tmp_path / "run", files, submit=False, tasks=[*files, "later", "broken"], set_aside=["broken"],
                       unfinished=["later", "broken", "solved"])
    (folder / "submission.json").write_text("{}")  # an early one, not yet checked
    page = page_of(folder)
    assert "6 tasks, 3 test inputs answered, 3 of 6 tasks finished" in text_of(page) and "No score" in text_of(page)
    tasks = data_of(page)
    assert tasks["later"] == {"name": "later", "note": "not finished"}
    assert "inputs" not in tasks["solved"], "its file is of an earlier run"
    assert "set aside" in tasks["broken"]["note"]


def test_a_run_that_has_just_begun(tmp_path):
    folder = write_run(tmp_path / "run", {}, submit=False, tasks=["later"], seconds={}, tokens={})
    assert data_of(page_of(folder)) == {"later": {"name": "later", "note": "not finished"}}
    (folder / "candidates").rmdir()
    assert "1 tasks, 0 test inputs answered, 0 of 1 tasks finished" in text_of(page_of(folder))


def test_tasks_of_earlier_runs_are_left_out(tmp_path):
    folder = write_run(tmp_path / "run", outcome_tasks(), tasks=["solved", "empty"])
    assert list(data_of(page_of(folder))) == ["solved", "empty"]


@pytest.mark.parametrize("other", [{"model": "another"}, {"seed": 1}, {"scoring_views": "shared"}, {"min_prob": 0.2}])
def test_results_of_other_settings_are_left_out(tmp_path, other):
    files = outcome_tasks()
    same = {"model": "this", "seed": 0, "scoring_views": "search", "min_prob": 0.1}
    for name, file in files.items():
        file["identity"] |= same | (other if name == "solved" else {})
    folder = write_run(tmp_path / "run", files, submit=False, model={"identity": "this", "parameters": 2_500_000})
    page = page_of(folder)
    assert [name for name, task in data_of(page).items() if "inputs" not in task] == ["solved"]
    assert "2.5 million parameters" in text_of(page)


@pytest.mark.parametrize(("kind", "made_with", "finished", "shown"), [
    ("none", None, False, True), ("none", "joint", True, False), ("joint", None, False, False),
    ("joint", "joint", False, True), ("joint", "per-task", False, False), ("joint", None, True, True),
])  # fmt: skip
def test_results_of_another_training_are_left_out(tmp_path, kind, made_with, finished, shown):
    file = task_file("one", [(SOLUTION, 1, 0.5)])
    file["identity"]["training"] = made_with and {"ttt": made_with}
    folder = write_run(tmp_path / "run", {"one": file}, submit=False, finished=finished)
    record = json.loads((folder / "record.json").read_text())
    record["config"]["ttt"] = kind
    (folder / "record.json").write_text(json.dumps(record))
    assert ("inputs" in data_of(page_of(folder))["one"]) == shown


def test_several_workers_are_said(tmp_path):
    assert "3 x 2 CPU threads" in text_of(page_of(write_run(tmp_path / "run", outcome_tasks(), workers=3)))


def test_training_on_one_task_is_said(tmp_path):
    training = {"steps": 192, "tokens": 12345, "loss": 0.1234, "seconds": 30.2, "texts": 64}
    file = task_file("one", [(SOLUTION, 1, 0.5)], training=training)
    note = data_of(page_of(write_run(tmp_path / "run", {"one": file})))["one"]["note"]
    assert note == "192 training steps on this task alone, 12,345 tokens, last loss 0.123, 30 s"


def broken_candidates(change):
    def spoil(folder):
        file = folder / "candidates" / "0.json"
        value = json.loads(file.read_text())
        change(value)
        file.write_text(json.dumps(value))
    return spoil


def other_attempts(folder):
    submission = json.loads((folder / "submission.json").read_text())
    submission["solved"][0]["attempt_2"] = FAR
    (folder / "submission.json").write_text(json.dumps(submission))


BROKEN = {
    "record.json is missing": lambda folder: (folder / "record.json").unlink(),
    "record.json is broken .Expecting value": lambda folder: (folder / "record.json").write_text("nothing"),
    "record.json is broken .Object missing required field `tasks`":
        lambda folder: (folder / "record.json").write_text(json.dumps(
            {k: v for k, v in json.loads((folder / "record.json").read_text()).items() if k != "tasks"})),
    "0.json is broken .Expected .object., got .array.":
        lambda folder: (folder / "candidates" / "0.json").write_text("[]"),
    "0.json is broken .invalid start|0.json is broken .'utf-8'":
        lambda folder: (folder / "candidates" / "0.json").write_bytes(b"\xff\xff\xff"),
    r"0.json is broken .Expected `int` <= 9 - at `\$.candidates":
        broken_candidates(lambda value: value["candidates"][0][0].update(output=[[10]])),
    "0.json is broken .a grid whose rows are not":
        broken_candidates(lambda value: value["candidates"][0][0].update(output=[[1, 2], [3]])),
    "0.json is broken .2 lists of candidates for 1": broken_candidates(lambda value: value["candidates"].append([])),
    "0.json is broken .0 solutions for 1": broken_candidates(lambda value: value.update(solutions=[])),
    "0.json is broken .no selection rule is called 'best'":
        broken_candidates(lambda value: value.update(score_rule="best")),
    "submission.json is missing": lambda folder: (folder / "submission.json").unlink(),
    "submission.json, task solved, does not hold the best":
        lambda folder: (folder / "submission.json").write_text("{}"),
    "task solved, does not hold the best two candidates": other_attempts,
}


@pytest.mark.parametrize("message", BROKEN)
def test_missing_and_broken_files_are_named(tmp_path, message):
    folder = write_run(tmp_path / "run", outcome_tasks())
    BROKEN[message](folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        report.write_report(folder)
    assert str(folder) in str(error.value) and not (folder / "report.html").exists()


def test_command_writes_the_page_or_says_what_is_wrong(tmp_path, capsys):
    folder = write_run(tmp_path / "run", outcome_tasks())
    report.main([str(folder)])
    assert capsys.readouterr().out.strip() == str(folder / "report.html") and (folder / "report.html").exists()
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path)])
    assert stop.value.code == 1 and "record.json is missing: name the output folder" in capsys.readouterr().err


def test_outcomes_have_signs_and_rules_are_those_of_selection():
    assert list(report.SIGNS) == list(report_tasks.OUTCOMES) and len(set(report.SIGNS.values())) == len(report.SIGNS)
    assert len(report_tasks.RULES) == 10
