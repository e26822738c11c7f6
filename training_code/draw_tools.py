"""Draw grids, tasks and solved queries: as PNG with matplotlib, as text with rich.

Owns the ARC colours and everything that is shown to a person. A *solved query* is one test input together with the
candidates that an evaluation run found for it; its picture shows the task, some of the views that the model was asked
with, the candidates with their scores under every selection rule, and the solution.

    python training_code/draw_tools.py output_evaluation_Mini_with_ttt [--task 0ca9ddb6] [--png picture.png]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from arc_views import key_operations, select_pairs, transform_array
from selection import all_score_algos, max_gen_prob

ARC_COLOURS = ("#000000", "#0074D9", "#FF4136", "#2ECC40", "#FFDC00",
               "#AAAAAA", "#F012BE", "#FF851B", "#7FDBFF", "#870C25")
BRIGHT = frozenset((2, 3, 4, 5, 6, 7, 8))  # colours on which black digits read better than white ones
LINE_COLOUR = "#555555"
GOOD = "#1A7F37"  # frame of a correct candidate
DPI = 100
DIGIT_CELL = 16  # pixels; smaller cells carry no digit

# inches
WIDTH, MARGIN = 13.0, 0.15  # of every picture
INNER = WIDTH - 2 * MARGIN
GAP, SECTION_GAP, TEXT_LINE = 0.12, 0.3, 0.19
LARGEST_CELL, SMALL_CELL = 0.3, 0.06
PAIRS_HEIGHT = 4.5  # most that inputs and outputs above each other take
LABELS = 2.0  # width of the row names under the candidates

Grid = Sequence[Sequence[int]]
NamedPair = tuple[str, Grid, Grid | None]  # title, input, output (None: unknown)
View = tuple[str, list[NamedPair]]  # key, what it shows


@dataclass(frozen=True)
class SolvedQuery:
    """One test input and what a run found for it.

    Attributes:
        name: `<task>_<i>`.
        task: {'train': [{'input', 'output'}...], 'test': [{'input'}...]}.
        solution: the known answer, or None.
        candidates: best first, each {'output', 'scores_inf': {key: NLL}, 'scores_aug': {key: NLL}}; the first
            `n_attempts` were submitted.
        rule: name of the selection rule that ordered them.
    """

    name: str
    task: dict
    solution: Grid | None
    candidates: list[dict]
    rule: str
    n_attempts: int = 2

    @property
    def query(self) -> Grid:
        return self.task["test"][int(self.name.rsplit("_", 1)[1])]["input"]

    @property
    def found(self) -> int | None:
        """Return the place (0 = best) of the solution among the candidates, None if it is not there."""
        return next((i for i, c in enumerate(self.candidates) if same(c["output"], self.solution)), None)

    @property
    def solved(self) -> bool:
        return self.found is not None and self.found < self.n_attempts

    @property
    def view_keys(self) -> list[str]:
        """Return the keys of the views under which the model found candidates, in their order of first appearance."""
        return list(dict.fromkeys(key for c in self.candidates for key in c["scores_inf"]))


def same(grid: Grid | None, other: Grid | None) -> bool:
    return grid is not None and other is not None and np.array_equal(np.asarray(grid), np.asarray(other))


# ---- one grid ----

def draw_grid(ax: Axes, grid: Grid, title: str = "") -> None:
    """Draw one grid (H, W) of colours 0..9 into an axes, with its digits where the cells are large enough."""
    grid = np.asarray(grid)
    height, width = grid.shape
    ax.imshow(grid, cmap=ListedColormap(ARC_COLOURS), vmin=0, vmax=len(ARC_COLOURS) - 1, interpolation="nearest")
    ax.set_xticks(np.arange(width + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(height + 1) - 0.5, minor=True)
    ax.grid(which="minor", color=LINE_COLOUR, linewidth=0.6)
    ax.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_color(LINE_COLOUR)
    ax.set_title(title, fontsize=8, pad=3)
    box = ax.get_window_extent()
    cell = min(box.width / width, box.height / height)
    if cell < DIGIT_CELL:
        return
    size = min(0.45 * cell * 72 / ax.figure.dpi, 9)
    for (row, column), value in np.ndenumerate(grid):
        colour = "black" if value in BRIGHT else "white"
        ax.text(column, row, str(value), color=colour, alpha=0.75, fontsize=size, ha="center", va="center_baseline")


class Page:
    """A picture in the making: grids and texts at places in inches, counted from the top left corner."""

    def __init__(self):
        self.grids = []
        self.texts = []

    def grid(self, place: tuple[float, float], cell: float, grid: Grid, title: str = "", frame: dict | None = None):
        """Put a grid with its top left corner at `place` (x, y), `cell` inches a cell; `frame` styles its outline."""
        self.grids.append((place, cell, np.asarray(grid), title, frame or {}))

    def text(self, place: tuple[float, float], text: str, **style):
        """Put a text at `place` (x, y), its baseline there."""
        self.texts.append((place, text, style))

    def heading(self, y: float, text: str) -> float:
        """Put a section's heading at height y; return where the section goes on."""
        self.text((MARGIN, y + 0.15), text, fontsize=11, fontweight="bold")
        return y + 0.45

    def figure(self, height: float) -> Figure:
        """Return the picture, `height` inches high, drawn without any display."""
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        for (x, y), cell, grid, title, frame in self.grids:
            rows, columns = grid.shape
            box = (x / WIDTH, 1 - (y + rows * cell) / height, columns * cell / WIDTH, rows * cell / height)
            ax = figure.add_axes(box)
            draw_grid(ax, grid, title)
            for spine in ax.spines.values():
                spine.set(**frame)
        for (x, y), text, style in self.texts:
            figure.text(x / WIDTH, 1 - y / height, text, **style)
        return figure


def fit_cell(pairs: Sequence[NamedPair], width: float) -> float:
    """Return the size in inches of the cells with which these pairs fit side by side into a width."""
    above, columns, below = zip(*map(pair_shape, pairs), strict=True)
    return min((width - GAP * (len(pairs) - 1)) / sum(columns), PAIRS_HEIGHT / (max(above) + max(below)), LARGEST_CELL)


def pair_shape(pair: NamedPair) -> tuple[int, int, int]:
    """Return (rows of the input, columns of input and output, rows of the output) of a pair."""
    _, question, answer = pair
    shown = np.shape(question if answer is None else answer)
    return np.shape(question)[0], max(np.shape(question)[1], shown[1]), shown[0]


def draw_pairs(page: Page, place: tuple[float, float], cell: float, pairs: Sequence[NamedPair]) -> float:
    """Draw pairs side by side, inputs above outputs, a question mark for an unknown output; return the lower end."""
    x, top = place
    middle = top + cell * max(pair_shape(pair)[0] for pair in pairs)
    for pair in pairs:
        title, question, answer = pair
        rows, columns, _ = pair_shape(pair)
        centre = x + cell * columns / 2
        page.grid((centre - cell * np.shape(question)[1] / 2, middle - cell * rows), cell, question, title)
        if answer is None:
            page.text((centre, middle + GAP + 0.25), "?", fontsize=16, ha="center")
        else:
            page.grid((centre - cell * np.shape(answer)[1] / 2, middle + GAP), cell, answer)
        x += cell * columns + GAP
    return middle + GAP + max(cell * max(pair_shape(pair)[2] for pair in pairs if pair[2] is not None), 0.4)


def demonstration_pairs(task: dict) -> list[NamedPair]:
    return [(f"pair {i + 1}", pair["input"], pair["output"]) for i, pair in enumerate(task["train"])]


# ---- one solved query ----

def draw_solved(solved: SolvedQuery, max_candidates: int = 5) -> Figure:
    """Draw a query's whole way: the task, some of its views, its candidates and the solution."""
    shown = solved.candidates[:max_candidates]
    if solved.found is not None and solved.found >= max_candidates:
        shown = [*shown[:-1], solved.candidates[solved.found]]
    page = Page()
    y = draw_query_section(page, MARGIN, solved)
    y = draw_view_section(page, y, solved)
    y = draw_candidate_section(page, y, solved, shown)
    return page.figure(y)


def draw_query_section(page: Page, y: float, solved: SolvedQuery) -> float:
    pairs = [*demonstration_pairs(solved.task), ("query", solved.query, None)]
    y = page.heading(y, f"1. Task {solved.name.rsplit('_', 1)[0]}: {len(pairs) - 1} demonstration pairs (input above "
                        "output), and a query whose output is wanted")
    return draw_pairs(page, (MARGIN, y), fit_cell(pairs, INNER), pairs) + SECTION_GAP


def draw_view_section(page: Page, y: float, solved: SolvedQuery) -> float:
    """Draw a few views side by side, fewer where grids are large."""
    views = [(key, view_pairs(solved.task, solved.query, key)) for key in solved.view_keys]
    n_in_row = views_in_row(views)
    shown = varied(views, n_in_row)
    y = page.heading(y, f"2. {len(shown)} of the {len(views)} views in which the search found a candidate")
    return draw_views(page, y, shown, n_in_row)


def views_in_row(views: Sequence[View]) -> int:
    """Return how many of these views can stand side by side: two to four, as their grids allow."""
    return next((n for n in (4, 3)
                 if min(fit_cell(pairs, INNER / n - 2 * GAP) for _, pairs in views) >= SMALL_CELL), 2)


def draw_views(page: Page, y: float, views: Sequence[View], n_in_row: int, with_keys: bool = False) -> float:
    """Draw views in rows, each under its description, and its key if asked for; return where the page goes on."""
    width = INNER / n_in_row - 2 * GAP
    cell = min(fit_cell(pairs, width) for _, pairs in views)
    for start in range(0, len(views), n_in_row):
        ends = []
        for i, (key, pairs) in enumerate(views[start:start + n_in_row]):
            x, top = MARGIN + i * INNER / n_in_row, y
            page.text((x, top), describe_view(key), fontsize=8, style="italic")
            if with_keys:  # as large as fits: a letter is 0.6 of the font's size wide
                top += TEXT_LINE
                page.text((x, top), key, fontsize=min(7, 72 * width / (0.6 * len(key))), family="monospace")
            ends.append(draw_pairs(page, (x, top + 0.28), cell, pairs))
        y = max(ends) + SECTION_GAP
    return y


def view_pairs(task: dict, query: Grid | None, key: str) -> list[NamedPair]:
    """Return the pairs that a view of a task shows, in its order, and its query if there is one."""
    operations = key_operations(key)

    def view(pair: dict) -> tuple[Grid, Grid]:
        return transform_array(pair["input"], operations), transform_array(pair["output"], operations)

    pairs = [("", *view(pair)) for pair in select_pairs(task["train"], operations, key)]
    return pairs if query is None else [*pairs, ("query", transform_array(query, operations), None)]


def describe_view(key: str) -> str:
    """Say in words what a view's key does, e.g. `x_0.rt.rt.tp.ex1-0` -> turned 180°, transposed, pairs 2 1."""
    words = []
    turns = 0
    for op in [*key_operations(key), ""]:
        turns += op == "rt"
        if op != "rt" and turns:
            words.append(f"turned {90 * turns}°")
            turns = 0
        if op == "tp":
            words.append("transposed")
        elif op.startswith("perm") and op != "perm0123456789":
            words.append("recoloured")
        elif op.startswith("ex"):
            words.append("pairs " + " ".join(str(int(i) + 1) for i in op[2:].split("-")))
    return ", ".join(words) or "as it is"


def varied(views: list[View], n: int) -> list[View]:
    """Return up to n of the views, evenly spread over the list."""
    return [views[i] for i in np.unique(np.linspace(0, len(views) - 1, min(n, len(views))).astype(int))]


def score_rows(candidates: list[dict]) -> list[tuple[str, list[str]]]:
    """Return the table under the candidates: (row name, one text per candidate)."""
    rules = all_score_algos if all(c.get("scores_aug") for c in candidates) else [max_gen_prob]
    return [("views that found it", [str(len(c["scores_inf"])) for c in candidates]),
            ("best probability", [f"{np.exp(-max_gen_prob(c)):.2f}" for c in candidates]),
            *((rule.__name__, [f"{rule(c):.2f}" for c in candidates]) for rule in rules)]


def draw_candidate_section(page: Page, y: float, solved: SolvedQuery, shown: list[dict]) -> float:
    """Draw candidates side by side with the solution at the right, and their scores below."""
    y = page.heading(y, f"3. The candidates, best first by {solved.rule}, and the solution "
                        "(in every rule lower is better; bold: the best)")
    grids = [c["output"] for c in shown] + ([] if solved.solution is None else [solved.solution])
    step = (INNER - LABELS) / max(len(grids), 4)
    cell = min(LARGEST_CELL, min((step - GAP) / np.shape(grid)[1] for grid in grids))
    bottom = y + cell * max(np.shape(grid)[0] for grid in grids)
    centres = [MARGIN + LABELS + step * (i + 0.5) for i in range(len(grids))]
    for i, (centre, grid) in enumerate(zip(centres, grids, strict=True)):
        rows, columns = np.shape(grid)
        title, frame = candidate_title(solved, shown[i]) if i < len(shown) else ("solution", {})
        page.grid((centre - cell * columns / 2, bottom - cell * rows), cell, grid, title, frame)
    for i, (name, texts) in enumerate(score_rows(shown)):
        bottom += 0.3 if i == 0 else TEXT_LINE
        page.text((MARGIN, bottom), name, fontsize=9, family="monospace")
        better = max if i < 2 else min  # counts and probabilities, then rules
        best = better(texts, key=float, default=None)
        for centre, text in zip(centres, texts, strict=False):
            weight = "bold" if text == best else "normal"
            page.text((centre, bottom), text, fontsize=9, family="monospace", ha="center", fontweight=weight)
    return bottom + 2 * MARGIN


def candidate_title(solved: SolvedQuery, candidate: dict) -> tuple[str, dict]:
    """Return what to write above a candidate, and the style of its frame."""
    place = next(i for i, c in enumerate(solved.candidates) if c is candidate)
    title = f"attempt {place + 1}" if place < solved.n_attempts else f"candidate {place + 1}"
    if same(candidate["output"], solved.solution):
        return title + ", correct", {"color": GOOD, "linewidth": 3}
    return title, {"linewidth": 1}


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG and return its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


# ---- terminal ----

def grid_text(grid: Grid) -> Text:
    """Return a grid as coloured terminal text, two characters a cell; the digits stay where there is no colour."""
    text = Text()
    for i, row in enumerate(np.asarray(grid).tolist()):
        if i:
            text.append("\n")
        for value in row:
            text.append(f"{value} ", style=f"{'black' if value in BRIGHT else 'white'} on {ARC_COLOURS[value]}")
    return text


def print_solved(solved: SolvedQuery, console: Console | None = None) -> None:
    """Print a query, its attempts and the solution side by side."""
    shown = [("query", solved.query)]
    shown += [(f"attempt {i + 1}", c["output"]) for i, c in enumerate(solved.candidates[:solved.n_attempts])]
    if solved.solution is not None:
        shown.append(("solution", solved.solution))
    panels = [Panel.fit(grid_text(grid), title=title) for title, grid in shown]
    (console or Console()).print(Columns(panels, title=solved.name))


# ---- a finished run ----

def load_run(output_path: str | Path, tasks: Sequence[str] | None = None) -> list[SolvedQuery]:
    """Return the queries of an evaluation run, from the `candidates/` that it wrote for its finished tasks.

    Args:
        tasks: names of the tasks to return, for a folder that holds those of earlier runs too; None: all.

    Raises:
        FileNotFoundError: the folder holds no candidates.
    """
    files = sorted(Path(output_path).glob("candidates/*.json"))
    if not files:
        raise FileNotFoundError(f"{output_path} holds no candidates/*.json: name the output folder of an evaluation")
    queries = []
    for saved in (json.loads(file.read_text(encoding="utf-8")) for file in files):
        if tasks is not None and saved["task"] not in tasks:
            continue
        for i, candidates in enumerate(saved["candidates"]):
            solution = saved["solutions"][i] if saved["solutions"] else None
            queries.append(SolvedQuery(f"{saved['task']}_{i}", saved["challenge"], solution, candidates,
                                       saved["score_rule"]))
    return queries


def choose_query(queries: list[SolvedQuery]) -> SolvedQuery | None:
    """Choose the solved query to show: with few pairs and the most candidates; None if none is solved."""
    solved = [query for query in queries if query.solved]
    return max(solved, key=lambda q: (len(q.task["train"]) <= 4, len(q.candidates), q.name), default=None)


def draw_run(output_path: str | Path, tasks: Sequence[str] | None = None) -> Path | None:
    """Draw one solved query of a finished run, of these tasks alone if any are named, to its `solved_task.png`.

    Returns the path of the picture, None if the run solved nothing; a picture of an earlier run is removed then.
    """
    picture = Path(output_path) / "solved_task.png"
    query = choose_query(load_run(output_path, tasks)) if any(picture.parent.glob("candidates/*.json")) else None
    if query is None:
        picture.unlink(missing_ok=True)
        return None
    return save(draw_solved(query), picture)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw and print one query of a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_folder", help="output folder of an evaluation run")
    parser.add_argument("--task", help="the task to draw (default: a solved one)")
    parser.add_argument("--png", type=Path, help="where the picture goes (default: <output_folder>/solved_task.png)")
    options = parser.parse_args(arguments)
    queries = load_run(options.output_folder)
    if options.task is not None:
        query = next((q for q in queries if options.task in (q.name, q.name.rsplit("_", 1)[0])), None)
    else:
        query = choose_query(queries)
    if query is None:
        parser.exit(1, f"{options.task or 'a solved task'} is not among the {len(queries)} finished queries "
                       f"of {options.output_folder}\n")
    print_solved(query)
    print(save(draw_solved(query), options.png or Path(options.output_folder) / "solved_task.png"))


if __name__ == "__main__":
    main()
