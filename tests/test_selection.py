"""Score rules against the published system's values, and the running accuracies of EvalTool."""

import functools
import json
import math
from pathlib import Path

import pytest

import selection
from selection import EvalTool, all_score_algos, max_gen_prob, more_score_algos, nvarc, product_of_experts

GOLDEN = json.loads((Path(__file__).parent / "data" / "selection_golden.json").read_text())


def candidate(correct, inf=(1.0,), aug=None):
    result = {"output": [[0]], "correct": correct, "scores_inf": {f"k{i}": nll for i, nll in enumerate(inf)}}
    if aug is not None:
        result["scores_aug"] = {f"v{i}": nll for i, nll in enumerate(aug)}
    return result


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_published_scores(case):
    for res, scores in zip(case["candidates"], case["scores"], strict=True):
        assert {rule.__name__: rule(res) for rule in all_score_algos} == pytest.approx(scores, rel=1e-12)


def test_published_rules_in_published_order():
    names = "max_gen_prob max_aug_prob min_aug_prob sum_aug_prob mul_aug_prob mul_all_prob"
    assert [rule.__name__ for rule in all_score_algos] == names.split()


def test_further_rules():
    res = candidate(True, inf=[1.0, 2.0], aug=[1.0, 2.0, 3.0, 4.0, 8.0])
    assert product_of_experts(res) == pytest.approx(18 / 5)
    assert nvarc(res) == pytest.approx(18 / 5 - 2)
    assert selection.sum_all_prob(res) == pytest.approx(-sum(math.exp(-nll) for nll in [1, 2, 1, 2, 3, 4, 8]))
    assert selection.top_n_augs_mult(res) == pytest.approx(1 + 2 + 3 + 4 + 1 + 2 - 6 * 3)
    assert selection.top_n_augs_mult(res, n=1) == pytest.approx(1 + 1 + 2 - 3 * 3)
    assert not set(more_score_algos) & set(all_score_algos)


def rule_a(res):
    return res["scores_inf"]["k0"]


def rule_b(res):
    return -res["scores_inf"]["k0"]


def test_accuracy_of_every_rule_counts_attempts_and_values():
    tool, lines = EvalTool(n_guesses=1, score_algos=[rule_a, rule_b]), []
    first = [candidate(True, [1.0]), candidate(False, [2.0])]
    tool.process_result(first, "x_0", 0.5, lines.append)
    assert [c["correct"] for c in first] == [False, True]  # in place, by the last rule
    tool.process_result([candidate(False, [1.0]), candidate(True, [2.0])], "x_1", 0.5, lines.append)
    tool.process_result([candidate(True, [1.0]), candidate(False, [2.0])], "y_0", 1, lines.append)
    tool.process_result([], "z_0", 1, lines.append)
    assert tool.n_acc == [1.5, 0.5] and tool.n_count == [3, 3]
    assert (tool.a_acc, tool.count) == (2, 3)
    assert "rule_a: 50.00% (1.50/3.00)" in " ".join(lines[-3].split())
    assert "correct_found: 66.67% (2.00/3.00)" in " ".join(lines[-1].split())


def test_two_attempts_find_the_second_candidate():
    results = [candidate(False, [1.0]), candidate(True, [2.0]), candidate(False, [3.0])]
    for n_guesses, solved in [(1, 0), (2, 1)]:
        tool = EvalTool(n_guesses, score_algos=[max_gen_prob])
        tool.process_result(list(results), "x_0", 1, None)
        assert tool.n_acc == [solved]


@pytest.mark.parametrize("rule", [0, "max_gen_prob", max_gen_prob, "product_of_experts", -1])
def test_sorting_rule_by_index_name_or_function(rule):
    good, bad = candidate(False, [1.0], [1.0]), candidate(True, [2.0], [2.0])
    res = [bad, good]
    tool = EvalTool(2, sorting_algo=rule)
    tool.process_result(res, "x_0", 1, None)
    assert res[0] is good
    assert tool.sorting_algo == rule  # as given, the way published scripts read it
    names = [algo.__name__ for algo in tool.score_algos]  # its accuracy is kept too
    place = rule if isinstance(rule, int) else names.index(getattr(rule, "__name__", rule))
    assert good["scores_alg"][place] == tool.score_algos[place](good)


def test_no_sorting_and_unknown_rule():
    res = [candidate(False, [2.0]), candidate(True, [1.0])]
    EvalTool(2, sorting_algo=None).process_result(res, "x_0", 1, None)
    assert [c["correct"] for c in res] == [False, True]
    with pytest.raises(ValueError, match="no score rule is called 'best'; there are max_gen_prob"):
        EvalTool(2, sorting_algo="best")


def test_without_scoring_the_rules_that_need_it_are_left_out_and_it_is_said():
    tool, lines = EvalTool(1), []
    tool.process_result([], "w_0", 1, lines.append)
    for name in ["x_0", "y_0"]:
        res = [candidate(False, [2.0]), candidate(True, [1.0])]
        tool.process_result(res, name, 1, lines.append)
        assert res[0]["correct"]
    assert tool.n_acc == [2, 0, 0, 0, 0, 0]
    said = [line for line in lines if "sorted by max_gen_prob instead of mul_all_prob" in line]
    assert [line.split("'")[1] for line in said] == ["x_0", "y_0"]
    assert any("max_gen_prob:" in line for line in lines)
    assert not any("aug_prob:" in line for line in lines)


def test_partly_scored_candidates_keep_their_rules_and_the_unscored_come_last():
    tool, lines = EvalTool(1, [*all_score_algos, *more_score_algos], sorting_algo="mul_all_prob"), []
    for name in ["x_0", "y_0"]:
        unscored, good, bad = candidate(False, [0.1], []), candidate(True, [2.0], [4.0]), candidate(False, [3.0], [9.0])
        never_scored = candidate(False, [0.05])
        res = [unscored, bad, never_scored, good]
        tool.process_result(res, name, 1, lines.append)
        assert [c is other for c, other in zip(res, [good, bad, never_scored, unscored], strict=True)] == [True] * 4
        assert good["scores_alg"] == [rule(good) for rule in tool.score_algos]
        assert unscored["scores_alg"] == [0.1] + [math.inf] * 9
    assert tool.n_acc == [0] + [2] * 9 and tool.n_count == [2] * 10
    said = [line for line in lines if "2 of 4 candidates have no scores in scoring views: put last" in line]
    assert [line.split("'")[1] for line in said] == ["x_0", "y_0"]


def mine(res):
    return max(res["scores_aug"].values())


def test_rules_of_ones_own_and_with_fixed_arguments():
    best_only = functools.partial(selection.top_n_augs_mult, n=1)
    tool, lines = EvalTool(1, [max_gen_prob, mine, best_only]), []
    scored = [candidate(False, [0.5], [4.0, 4.0]), candidate(True, [1.0], [3.0, 9.0])]
    tool.process_result(scored, "x_0", 1, lines.append)
    assert scored[0]["correct"] and tool.n_acc == [0, 0, 1]
    assert any("top_n_augs_mult(n=1): 100.00%" in line for line in lines)
    tool.process_result([candidate(False, [2.0]), candidate(True, [1.0])], "y_0", 1, lines.append)
    assert tool.n_acc == [1, 0, 1] and tool.n_count == [2, 1, 1]  # left out where there is nothing to rank by
    by_name = EvalTool(1, [max_gen_prob, best_only], sorting_algo="top_n_augs_mult(n=1)")
    by_name.process_result(scored, "x_0", 1, None)
    assert scored[0]["correct"]

    def misspelt(res):
        return res["score_aug"]

    with pytest.raises(KeyError, match="score_aug"):
        EvalTool(1, [misspelt]).process_result([candidate(True)], "x_0", 1, None)


def test_what_is_not_known_to_be_right_counts_as_not_solved_and_hidden_sets_print_no_accuracy():
    tool, lines = EvalTool(1, score_algos=[max_gen_prob]), []
    res = [candidate(None, [2.0]), candidate(None, [1.0])]
    tool.process_result(res, "x_0", 1, lines.append)
    tool.process_result([], "y_0", 1, lines.append)
    assert max_gen_prob(res[0]) == 1.0
    assert (tool.n_acc, tool.n_count, tool.a_acc, tool.count) == ([0], [2], 0, 2)
    assert "solution unknown" in lines[0] and not any("%" in line for line in lines)
    tool.process_result([candidate(True)], "z_0", 1, lines.append)
    assert (tool.n_acc, tool.n_count) == ([1], [3]) and "33.33% (1.00/3.00)" in lines[-1]


def test_candidates_that_no_view_found_stay_behind_unless_asked_for():
    planted, found = candidate(True, [], [0.1]), candidate(False, [2.0], [3.0])
    res = [planted, found]
    tool = EvalTool(1)
    tool.process_result(res, "x_0", 1, None)
    assert res == [found, planted] and tool.a_acc == 0
    tool = EvalTool(1, sorting_algo="mul_aug_prob", use_not_found=True)
    tool.process_result(res, "x_0", 1, None)
    assert res == [planted, found] and tool.a_acc == 1
