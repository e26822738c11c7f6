"""Selection of the attempts: score rules that rank the candidates of one test input, and their running accuracy.

A candidate is a dict {'output': grid, 'correct': True/False/None, 'scores_inf': {key: NLL}, 'scores_aug': {key: NLL}}
where ``scores_inf`` holds the search views in which it was found and ``scores_aug`` the scoring views in which it was
scored (absent where no scoring took place). Every rule maps one candidate to one number, lower is better.

Source: "The LLM ARChitect" (2024), section on candidate selection; arXiv 2505.07859, section 4 (product of experts).
"""

import functools
import math


def _values(candidate, *names):
    return [nll for name in names for nll in candidate[name].values()]


def _summed_probs(nlls):
    return sum(math.exp(-nll) for nll in nlls)


def max_gen_prob(res):
    """Rank by the highest probability that the search found (infinite NLL for a candidate that it did not find)."""
    return min(_values(res, "scores_inf"), default=math.inf)


def max_aug_prob(res):
    """Rank by the best scoring view."""
    return min(_values(res, "scores_aug"))


def min_aug_prob(res):
    """Rank by the worst scoring view."""
    return max(_values(res, "scores_aug"))


def sum_aug_prob(res):
    """Rank by the sum of the probabilities of the scoring views."""
    return -_summed_probs(_values(res, "scores_aug"))


def mul_aug_prob(res, base_log_prob=3):
    """Rank by the product of the probabilities of the scoring views, each times exp(``base_log_prob``)."""
    return sum(nll - base_log_prob for nll in _values(res, "scores_aug"))


def mul_all_prob(res, base_log_prob=3):
    """Rank as ``mul_aug_prob`` over scoring and search views; being found in one more view thus counts."""
    return sum(nll - base_log_prob for nll in _values(res, "scores_aug", "scores_inf"))


def product_of_experts(res):
    """Rank by the mean NLL of the scoring views; best when all candidates share them. Source: arXiv 2505.07859."""
    nlls = _values(res, "scores_aug")
    return sum(nlls) / len(nlls)


def nvarc(res):
    """Rank by the mean NLL of the scoring views less the number of views it was found in. Source: NVARC (2025)."""
    return product_of_experts(res) - len(res["scores_inf"])


def sum_all_prob(res):
    """Rank by the sum of the probabilities of scoring and search views."""
    return -_summed_probs(_values(res, "scores_aug", "scores_inf"))


def top_n_augs_mult(res, n=4, base_log_prob=3):
    """Rank as ``mul_all_prob``, with the ``n`` best scoring views only."""
    nlls = sorted(_values(res, "scores_aug"))[:n] + _values(res, "scores_inf")
    return sum(nll - base_log_prob for nll in nlls)


# the published rules in the published order; the last is the default
all_score_algos = [max_gen_prob, max_aug_prob, min_aug_prob, sum_aug_prob, mul_aug_prob, mul_all_prob]
more_score_algos = [product_of_experts, nvarc, sum_all_prob, top_n_augs_mult]


def _name(rule):
    """Return what to call a rule: its function's name, with the arguments that ``functools.partial`` fixed."""
    if isinstance(rule, functools.partial):
        fixed = [*map(repr, rule.args), *(f"{name}={value!r}" for name, value in rule.keywords.items())]
        return f"{_name(rule.func)}({', '.join(fixed)})"
    return getattr(rule, "__name__", None) or type(rule).__name__


def _score(rule, candidate):
    """Return the score of a candidate; None if the rule needs ``scores_aug`` and there are none."""
    if not candidate.get("scores_aug"):  # an empty one would make sums of nothing, which look like good scores
        candidate = {name: value for name, value in candidate.items() if name != "scores_aug"}
    try:
        return rule(candidate)
    except KeyError as error:
        if error.args != ("scores_aug",):
            raise
        return None


def _rank(candidates, rule):
    """Return the candidates, best first; those without a score come last, the more probable ones first."""

    def place(candidate):
        score = _score(rule, candidate)
        return (True, max_gen_prob(candidate)) if score is None else (False, score)

    return sorted(candidates, key=place)


class EvalTool:
    """Sort candidates by one rule and keep the running accuracy of many.

    Args:
        n_guesses: attempts per test input.
        score_algos: the rules to compare, functions of one candidate. One of your own that needs ``scores_aug`` reads
            ``candidate["scores_aug"]``, by which it is recognised where there are none.
        sorting_algo: the rule that sorts: index into ``score_algos``, name (of ``more_score_algos`` too), function, or
            None to leave the order alone.
        use_not_found: whether candidates that were scored but found in no view (empty ``scores_inf``) count and may be
            attempts; otherwise they are sorted behind all others.

    Attributes:
        score_algos: list of the rules, the one that sorts included. sorting_algo: as given.
        n_acc: solved test inputs per rule, weighted by their value. n_count: the total value that goes with it.
        a_acc: value of the test inputs whose solution was among the candidates at all. count: value of all.

    Where some candidates have no ``scores_aug``, rules that need them rank these last. Where none has any, such rules
    are left out of that result, and if one of them was to sort, ``max_gen_prob`` sorts. Both are said every time.

    Every result counts, and what is not known to be right is not solved, as published: an empty one does not tell
    whether its solution is known. Source: published class of this name. differs: no accuracies are printed before the
    first candidate whose correctness is known, so none for a hidden test set.
    """

    def __init__(self, n_guesses, score_algos=all_score_algos, sorting_algo=-1, use_not_found=False):
        self.n_guesses, self.use_not_found = n_guesses, use_not_found
        self.score_algos, self.sorting_algo = list(score_algos), sorting_algo
        self._sorting_rule = self._find_rule(sorting_algo)
        if self._sorting_rule not in (None, *self.score_algos):
            self.score_algos.append(self._sorting_rule)
        self.n_acc = [0] * len(self.score_algos)
        self.n_count = [0] * len(self.score_algos)
        self.a_acc = self.count = 0
        self._applied = set()  # places of rules that have ranked a candidate: the accuracies worth printing
        self._any_known = False

    def _find_rule(self, rule):
        if isinstance(rule, int):
            return self.score_algos[rule]
        if isinstance(rule, str):
            names = {_name(algo): algo for algo in [*all_score_algos, *more_score_algos, *self.score_algos]}
            if rule not in names:
                raise ValueError(f"no score rule is called '{rule}'; there are {', '.join(names)}")
            return names[rule]
        return rule

    def process_result(self, res, name, value, print_func=print):
        """Sort ``res``, the candidates of one test input, in place, and update and print the accuracies.

        Every candidate gets ``scores_alg``, its scores by all rules in the order of ``score_algos``: infinity where a
        rule needs ``scores_aug`` and there are none.

        Args:
            res: list of candidates.
            name: what to call the test input in the output.
            value: its weight, 1 / number of test inputs of its task.
            print_func: takes the lines to print; None prints nothing.
        """
        print_func = print_func or (lambda line: None)
        for candidate in res:
            scores = [_score(rule, candidate) for rule in self.score_algos]
            candidate["scores_alg"] = [math.inf if score is None else score for score in scores]
        self._sort(res, name, print_func)
        counted = res if self.use_not_found else [candidate for candidate in res if candidate["scores_inf"]]
        found = any(candidate["correct"] for candidate in counted)
        unknown = any(candidate["correct"] is None for candidate in counted)
        self._any_known |= bool(counted) and not unknown
        self.count += value
        self.a_acc += value * found
        self._count_solved(counted, value)
        info = "FOUND" if found else "unknown" if unknown else "not found"
        print_func(f" * '{name}': {len(counted)} candidates, solution {info}")
        for line in self._summary():
            print_func(line)

    def _sort(self, res, name, print_func):
        rule = self._sorting_rule
        if rule is None:
            return
        unscored = sum(_score(rule, candidate) is None for candidate in res)
        if unscored and unscored == len(res):
            print_func(f" ! '{name}': no scores in scoring views, sorted by max_gen_prob instead of {_name(rule)}")
            rule = max_gen_prob
        elif unscored:
            print_func(f" ! '{name}': {unscored} of {len(res)} candidates have no scores in scoring views: put last")
        res[:] = _rank(res, rule)
        if not self.use_not_found:
            res.sort(key=lambda candidate: not candidate["scores_inf"])

    def _count_solved(self, counted, value):
        for i, rule in enumerate(self.score_algos):
            if counted and all(_score(rule, candidate) is None for candidate in counted):
                continue
            attempts = _rank(counted, rule)[: self.n_guesses]
            self.n_acc[i] += value * any(candidate["correct"] for candidate in attempts)
            self.n_count[i] += value
            self._applied.update([i] if counted else [])

    def _summary(self):
        rows = [
            (_name(rule), self.n_acc[i], self.n_count[i])
            for i, rule in enumerate(self.score_algos)
            if self._any_known and i in self._applied
        ]
        for name, solved, count in [*rows, ("correct_found", self.a_acc, self.count)] if rows else []:
            yield f"   {name + ':':20} {solved / count:7.2%} ({solved:.2f}/{count:.2f})"
