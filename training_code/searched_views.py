"""The views that an evaluation searches, and how they fit the token limit.

Follows "The LLM ARChitect" (2024), candidate generation: every test input under all symmetries.
"""

import hashlib
from dataclasses import dataclass, field

from arc_loader import ArcDataset, TaskTooLongError

VIEW_OPTIONS = {"tp": "all", "rt": "all", "perm": True, "shfl_ex": True}
VIEW_SEED = 10000


def make_views(run, tasks):
    """Return the views to search: `repeats` times every symmetry, recoloured and with pairs in random order.

    differs: drawn for each task from a stream of its own (seeded as the published scoring views are: plus a hash of the
    task's name) instead of one stream for all, so the views of a task do not depend on the tasks beside it.
    """
    keys = []
    for name, queries in tasks.grouped_keys().items():
        seed = VIEW_SEED + run.config.seed + int(hashlib.md5(name.encode()).hexdigest()[:6], 16)
        own = tasks.change_keys([key for keys_of_query in queries for key in keys_of_query])
        keys += own.repeat(run.config.repeats).augment(seed=seed, **VIEW_OPTIONS).keys
    return tasks.change_keys(keys)


@dataclass
class Fit:
    """How the views of one test input fit the token limit."""

    keys: list = field(default_factory=list)  # of the views that fit, with the pairs that are left
    tokens: int = 0  # of their prompts
    longest: int = 0  # tokens of the longest one
    cut: int = 0  # views that lost demonstration pairs
    left_out: int = 0  # views that do not even fit with one pair
    reason: str = ""  # why


def fit_views(run, views):
    """Return {test input `<task>_<i>`: `Fit` of its views}; a prompt must leave room for the largest reply."""
    fmt_opts = run.fmt_opts()
    fmt_opts["max_tokens"] -= ArcDataset.max_new_tokens(**fmt_opts)
    fits = {}
    for key in views.keys:
        fit = fits.setdefault(key.split(".")[0], Fit())
        try:
            shown, prompt = views.get_task(key, len_name="input", **fmt_opts)
        except TaskTooLongError as error:
            fit.left_out, fit.reason = fit.left_out + 1, str(error)
            continue
        fit.cut += shown != key
        if shown not in fit.keys:
            fit.keys.append(shown)
            tokens = 1 + ArcDataset.count_tokens(prompt["input"])  # with the start token
            fit.tokens, fit.longest = fit.tokens + tokens, max(fit.longest, tokens)
    return fits


def report_fits(fits):
    """Print a line for every test input with views that do not fit as they are."""
    for name, fit in fits.items():
        if not fit.keys:
            print(f"no view of {name} fits, it is answered with [[0]]: {fit.reason}")
        elif fit.cut or fit.left_out:
            reason = f" ({fit.reason})" if fit.reason else ""
            print(f"{name}: views that lost demonstration pairs to fit {fit.cut}, left out {fit.left_out}{reason}")
