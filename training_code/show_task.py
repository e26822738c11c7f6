"""Show one task in the terminal and as a picture: its pairs, its queries, and some views as the model would see them.

    python training_code/show_task.py 0ca9ddb6
    python training_code/show_task.py 0ca9ddb6 --views 8 --seed 1 --png picture.png

The task is looked for in the ARC-AGI-1 evaluation set and its training set, or in a file of your own. Views are random
ones, drawn as for the training: a symmetry, other colours, another order of the pairs.
"""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from arc_loader import ArcDataset
from draw_tools import (INNER, MARGIN, SECTION_GAP, Grid, NamedPair, Page, View, demonstration_pairs, describe_view,
                        draw_pairs, draw_views, fit_cell, grid_text, save, view_pairs, views_in_row)
from run_tools import load_evaluation_set, load_training_set, task_file


def find_task(name: str, sets: Sequence[ArcDataset]) -> ArcDataset:
    """Return the data set of this task alone, from the first set that has it.

    Raises:
        ValueError: none has it.
    """
    wanted = ArcDataset.base_key_replace_invalid_chars(name)
    for tasks in sets:
        if wanted in tasks.challenge:
            return tasks.change_keys([key for key in tasks.keys if tasks.get_base_key(key) == wanted])
    names = sorted({known for tasks in sets for known in tasks.challenge})
    near = difflib.get_close_matches(wanted, names, n=5, cutoff=0.5)
    raise ValueError(f"no task is called {name!r} among {len(names)}; "
                     + (f"near names: {', '.join(near)}" if near else f"the first of them is {names[0]}"))


def draw_task(task: ArcDataset, n_views: int, seed: int) -> tuple[list[NamedPair], list[View]]:
    """Return the task's pairs with its queries behind them, and random views of its first query."""
    [(name, challenge)] = task.challenge.items()
    solutions: Sequence[Grid | None] = task.solutions.get(name) or [None] * len(challenge["test"])
    queries = [query["input"] for query in challenge["test"]]
    shown = [*demonstration_pairs(challenge),
             *((f"query {i + 1}" if len(queries) > 1 else "query", query, solution)
               for i, (query, solution) in enumerate(zip(queries, solutions, strict=True)))]
    keys = task.change_keys(task.keys[:1]).repeat(n_views).augment(tp=True, rt=True, perm=True, shfl_ex=True,
                                                                   seed=seed).keys
    query = queries[0] if queries else None
    return shown, [(key, view_pairs(challenge, query, key)) for key in keys]


def picture(name: str, pairs: Sequence[NamedPair], views: Sequence[View]) -> Figure:
    """Draw a task and views of it."""
    page = Page()
    y = page.heading(MARGIN, f"Task {name}: demonstration pairs (input above output) and what is asked")
    y = draw_pairs(page, (MARGIN, y), fit_cell(pairs, INNER), pairs) + SECTION_GAP
    if views:
        y = page.heading(y, f"{len(views)} views")
        y = draw_views(page, y, views, views_in_row(views), with_keys=True)
    return page.figure(y)


def panel(title: str, pair: NamedPair, width: int) -> Panel:
    """Return a pair for the terminal: input and output side by side, or one above the other where it is too narrow."""
    _, question, answer = pair
    grids = [grid_text(question), Text("?") if answer is None else grid_text(answer)]
    table = Table.grid(padding=(0, 1))
    arrow = Text("->", style="bold")
    if sum(2 * np.shape(grid)[1] for grid in (question, answer) if grid is not None) + 10 <= width:
        table.add_row(grids[0], arrow, grids[1])
    else:
        for part in (grids[0], arrow, grids[1]):
            table.add_row(part)
    return Panel.fit(table, title=title)


def print_task(name: str, pairs: Sequence[NamedPair], views: Sequence[View], console: Console) -> None:
    """Print a task and views of it."""
    sections = [(f"task {name}", pairs), *((f"view {key}: {describe_view(key)}", shown) for key, shown in views)]
    for heading, shown in sections:
        console.print(Text(f"\n{heading}", style="bold"), soft_wrap=True)
        console.print(Columns(panel(pair[0] or f"pair {i + 1}", pair, console.width) for i, pair in enumerate(shown)))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print and draw the task that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", help="its name, for example 0ca9ddb6")
    parser.add_argument("--views", type=int, default=4, help="number of views (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed that the views are drawn from (default: 0)")
    parser.add_argument("--png", type=Path, help="where the picture goes (default: <task>.png in this folder)")
    parser.add_argument("--challenges", type=Path, help="tasks in Kaggle's format instead of the public ones")
    parser.add_argument("--solutions", type=Path, help="their solutions")
    options = parser.parse_args(arguments)
    if options.views < 0 or options.seed < 0:
        parser.error("--views and --seed must be 0 or more")
    if options.solutions and not options.challenges:
        parser.error("--solutions needs --challenges, the file with the tasks that they belong to")
    try:
        if options.challenges:
            own = ArcDataset.load_from_json(str(options.challenges))
            sets = [own.load_solutions(str(options.solutions)) if options.solutions else own]
        else:
            sets = [load_evaluation_set(), load_training_set()]
        task = find_task(options.task, sets)
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    [name] = task.challenge
    pairs, views = draw_task(task, options.views, options.seed)
    print_task(name, pairs, views, Console())
    print(save(picture(name, pairs, views), options.png or task_file(".", name, ".png")))


if __name__ == "__main__":
    main()
