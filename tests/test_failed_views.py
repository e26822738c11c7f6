"""Views for which no memory suffices: left out of the scores of all candidates alike, and not kept as results."""

import math

import pytest

import inference_requests
import inference_tools
from inference_requests import Answering, FindReplies, ScoreReplies
from inference_tools import ResultCache
from small_models import small_mini

SHARED = [[("a", ("p", "1")), ("b", ("q", "1")), ("c", ("r", "1"))],
          [("a", ("p", "2")), ("b", ("q", "2")), ("c", ("r", "2"))], []]  # fmt: skip
OWN = [[("a", ("p", "1")), ("b", ("q", "1"))], [("c", ("p", "2")), ("d", ("q", "2"))]]


@pytest.mark.parametrize(("formatted", "failed", "left"), [
    (SHARED, [], ["abc", "abc", ""]), (SHARED, [("q", "2")], ["ac", "ac", ""]),
    (SHARED, [("p", "1"), ("q", "2"), ("r", "2")], ["", "", ""]), (OWN, [("q", "2")], ["a", "c"]),
])  # fmt: skip
def test_a_view_that_failed_is_left_out_for_all_candidates(formatted, failed, left):
    candidates = [{} for _ in formatted]
    steps = inference_tools._score(candidates, formatted, {("p", "1"): 0.25} if not failed else {}, None)
    pairs = next(steps).pairs
    with pytest.raises(StopIteration):
        steps.send([math.inf if pair in failed else float(pair[1]) for pair in pairs])
    assert ["".join(candidate["scores_aug"]) for candidate in candidates] == left
    assert all(math.isfinite(nll) for candidate in candidates for nll in candidate["scores_aug"].values())


@pytest.mark.parametrize("complete", [True, False])
def test_only_complete_answers_are_kept(tmp_path, complete):
    pair = small_mini()
    answering = Answering(lambda: pair, ResultCache(tmp_path), options={"min_prob": 0.1, "max_new_tokens": 6})
    tokens = pair[1]("1", add_special_tokens=False)["input_ids"]
    for answer, request, value in (
        (inference_requests._find, FindReplies(["I1\nO"], None), [[(tokens, 0.5)]]),
        (inference_requests._score, ScoreReplies([("I1\nO", "1")]), [0.5]),
    ):
        steps = answer(request, answering)
        asked = next(steps)
        asked.complete = complete
        with pytest.raises(StopIteration) as first:
            steps.send(value)
        again = answer(request, answering)
        if not complete:
            assert type(next(again)) is type(asked), "asked again"
            continue
        with pytest.raises(StopIteration) as kept:
            next(again)
        assert kept.value.value == first.value.value in ([[("1", 0.5)]], [0.5])
