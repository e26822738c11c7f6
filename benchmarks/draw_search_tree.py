"""Draw what the engine explores in one view of an evaluation task, and the buffer that holds it.

    python benchmarks/draw_search_tree.py --output docs/search_tree.png

Two views are searched, the second with the best answer of the first as its draft; the second is drawn. The model is
Mini as it ships, without test-time training. Takes seconds on a CPU.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from search_benchmark import text_of

from draw_tools import ARC_COLOURS, BRIGHT, GOOD, draw_grid, save
from evaluation_tools import make_views, only_tasks
from mini_model import MINI_FORMAT
from model_tools import load_model
from run_tools import load_evaluation_set
from search import Engine, EngineSettings
from search_requests import Find

CHAIN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A88A00", "#56B4E9", "#7A4FBF", "#6B6B6B")
GREY, DARK = "#A5A5A5", "#222222"
WIDTH, LEFT, RIGHT = 12.4, 1.3, 1.75  # inches: the picture, and what is beside the tree
ROW, BUFFER, BELOW = 0.58, 1.5, 0.76  # heights: a chain, the buffer with its attention, the caption


@dataclass(frozen=True)
class Config:
    """What to draw."""

    task: str = "6ea4a07e"
    views: tuple[int, int] = (1, 6)  # of the 16: the one that is searched first, the one to draw
    min_prob: float = 0.1
    output: Path = Path("docs/search_tree.png")


class Recorder(Engine):
    """An engine that remembers its passes, and every tree as it was when its buffer was given back."""

    def __init__(self, model):
        super().__init__(model)
        self.passes, self.finished = [], {}

    def _launch(self, works):
        self.passes.append(list(works))
        return super()._launch(works)

    def drop(self, tree):
        self.finished[tree.number] = copy.copy(tree)
        super().drop(tree)


@dataclass
class Row:
    """A chain in the picture: its nodes, how many of them are within the threshold, and where it belongs."""

    nodes: range
    held: int
    parent: int
    depth: int  # of its first node
    prob: float  # of the reply up to its first node
    number: int  # of the pass that ran it


def search(config, tasks, model_tok):
    """Search the two views; return (rows of the second one's tree, the tree, its replies, its key, the views)."""
    model, tokenizer = model_tok
    views = make_views(SimpleNamespace(config=SimpleNamespace(seed=0, repeats=2)), tasks)
    keys = [views.grouped_keys()[config.task][0][place] for place in config.views]
    prompts = [tuple(tokenizer(text_of(views, key, None)[0])["input_ids"]) for key in keys]
    engine = Recorder(model, EngineSettings(draft_rows=3))  # drafts of the length that shows best

    def guess_for(_, found):
        grid, _, _ = views.decode(tokenizer.decode(found[0][0][0]), MINI_FORMAT["lines_sep"], keys[0])
        return tokenizer(text_of(views, keys[1], grid)[1], add_special_tokens=False)["input_ids"]

    def job():
        return (yield Find(prompts, config.min_prob, 932, frozenset([tokenizer.eos_token_id]), guess_for))

    [(_, found)] = engine.serve([job()])
    tree = next(tree for tree in engine.finished.values() if tree.prompt == prompts[1])
    launched = [[work for work in works if work.tree.number == tree.number] for works in engine.passes]
    numbered = enumerate((works for works in launched if works), 1)
    rows = [row_of(tree, work, number) for number, works in numbered for work in works]
    return sorted(rows, key=lambda row: row.nodes.start), tree, found[1], keys[1], views


def row_of(tree, work, number):
    """Return the ``Row`` of a chain that has run."""
    nodes = range(work.first, work.first + len(work.tokens))
    spent = work.nll - np.cumsum(tree.edges[nodes.start + 1 : nodes.stop])
    held = 1 + int((spent < work.max_nll).sum())  # probabilities of beginnings only fall
    return Row(nodes, held, work.parent, work.depth, math.exp(-work.nll), number)


class Picture:
    """The picture in the making; x and y in inches from the top left corner."""

    def __init__(self, height):
        self.figure = Figure(figsize=(WIDTH, height), dpi=120, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")
        self.height = height

    def text(self, x, y, text, size=9, **style):
        """Write a text, its middle at height y."""
        self.axes.text(x, y, text, fontsize=size, **{"va": "center_baseline", "color": DARK, **style})

    def box(self, x, y, size, **style):
        """Draw a box around a place; ``size`` = (width, height)."""
        corner = (x - size[0] / 2, y - size[1] / 2)
        style = {"boxstyle": "round,pad=0,rounding_size=0.04", "linewidth": 0.8, **style}
        self.axes.add_patch(FancyBboxPatch(corner, *size, **style))

    def token(self, x, y, size, token, held):
        """Draw a node: a colour, the end of a line, or the prompt's last token; hollow unless it was held."""
        symbol = {"\n": "↵"}.get(token, token)
        colour = ARC_COLOURS[int(token)] if token.isdigit() else "#E4E4E4"
        self.box(x, y, (size, size), facecolor=colour if held else "white", edgecolor=DARK if held else GREY,
                 linestyle="-" if held else (0, (2, 1.5)))
        bright = not token.isdigit() or int(token) in BRIGHT
        self.text(x, y, symbol, 9, ha="center", color=(DARK if bright else "white") if held else GREY)

    def grid(self, x, y, cell, grid):
        """Draw a small grid, its left edge at x, its middle at height y."""
        rows, columns = np.shape(grid)
        top = y - rows * cell / 2
        axes = self.figure.add_axes((x / WIDTH, 1 - (top + rows * cell) / self.height, columns * cell / WIDTH,
                                     rows * cell / self.height))
        draw_grid(axes, grid)


def draw(config, rows, tree, replies, key, views, tokenizer):  # noqa: PLR0913
    """Return the picture of a tree and its buffer."""
    picture = Picture(0.9 + ROW * len(rows) + BUFFER + BELOW)
    names = [tokenizer.decode([token]) for token in tree.tokens]
    chain_of = {node: i for i, row in enumerate(rows) for node in row.nodes}
    marked = max((row.nodes[row.held - 1] for row in rows),
                 key=lambda node: (len({chain_of[n] for n in tree.path(node)}), len(tree.path(node))))
    ancestors = tree.path(marked)[:-1].tolist()
    seen = len(tree.prompt) + len(ancestors)  # the prompt's last token is an ancestor
    picture.text(0.15, 0.24, f"Task {config.task}, one of its views: the tree of beginnings of replies", 11,
                 fontweight="bold")
    places = draw_tree(picture, rows, tree, names, 0.9)
    for node, (x, y, size) in places.items():
        if node == marked or node in ancestors:
            wider = 0.07 if node == marked else 0
            picture.box(x, y, (size + wider, size + wider), facecolor="none", edgecolor=DARK, linewidth=2.4)
    for reply, nll in replies:
        node, _ = tree.walk(reply)
        draw_reply(picture, places[node], tokenizer.decode(reply), math.exp(-nll), (views, key))
    y = 0.9 + ROW * len(rows)
    picture.text(0.15, y, "The view's buffer: one slot per token, only ever appended to", 11, fontweight="bold")
    draw_buffer(picture, rows, len(tree.prompt) - 1, names, (marked, ancestors), y + 0.45)
    held = sum(row.held for row in rows)
    picture.text(0.15, picture.height - 0.7,
                 "Chain A: the prompt's last token and, as its draft, the best answer of another view. The other "
                 "chains begin with a token that left a draft, or that follows one.")
    picture.text(0.15, picture.height - 0.46,
                 "Filled: within the threshold. Hollow: drafted, and ruled out by the true probabilities. Percentages "
                 "at branches: the probability of the reply up to there.")
    picture.text(0.15, picture.height - 0.2,
                 f"Mini without test-time training, threshold {config.min_prob:.0%}: {len(names)} nodes ran in "
                 f"{max(row.number for row in rows)} passes, {held} of them are within the threshold, "
                 f"replies found: {len(replies)}. The token with a double frame attends to {seen} slots.")
    return picture.figure


def draw_tree(picture, rows, tree, names, top):
    """Draw the chains below each other, by depth from left to right; return {node: (x, y, size)}."""
    deepest = max(row.depth + len(row.nodes) for row in rows)
    step = (WIDTH - LEFT - RIGHT) / (deepest + 1)
    size, places = 0.78 * min(step, ROW), {}
    picture.text(0.15, top - 0.36, "chain", color="#666666")
    picture.text(0.8, top - 0.36, "pass", color="#666666")
    for i, row in enumerate(rows):
        y, colour = top + ROW * i, CHAIN_COLOURS[i % len(CHAIN_COLOURS)]
        picture.text(0.2, y, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i], 11, color=colour, fontweight="bold")
        picture.text(0.87, y, str(row.number), 10)
        x = LEFT + step * (row.depth + 0.5)
        if row.parent >= 0:
            above = places[row.parent]
            lane = 1 if next(j for j, other in enumerate(rows) if row.parent in other.nodes) % 2 else -1
            corner = above[0] + step * (0.5 + 0.06 * lane)  # neighbouring rows branch off in lanes of their own
            line = [above[0], corner, corner, x]
            picture.axes.plot(line, [above[1], above[1], y, y], color=colour, lw=1.6, zorder=0.9 - i / 99)
            picture.text(above[0] + 0.44 * step - 0.06, y, f"{row.prob:.0%}", 9, ha="right", color=colour)
        picture.axes.plot([x, x + step * (len(row.nodes) - 1)], [y, y], color=GREY, lw=1, zorder=0)
        picture.axes.plot([x, x + step * (row.held - 1)], [y, y], color=colour, lw=1.6, zorder=0.5)
        for place, node in enumerate(row.nodes):
            places[node] = x + step * place, y, size
            picture.token(*places[node], names[node], place < row.held)
    return places


def draw_reply(picture, place, text, prob, decoding):
    """Draw the end of a reply behind its last token: a mark, the probability, and the grid as it reads in the view."""
    x, y, size = place
    views, key = decoding
    _, correct, _ = views.decode(text, MINI_FORMAT["lines_sep"], key)
    colour = GOOD if correct else DARK
    lines = text.split("\n")[:-1]
    x += 1.28 * size
    picture.axes.plot([x - 0.78 * size, x], [y, y], color=colour, lw=1.6, zorder=0)
    picture.axes.plot([x], [y], "o", color=colour, markersize=9)
    picture.text(x + 0.16, y - (0.1 if correct else 0), f"{prob:.0%}", 12, fontweight="bold", color=colour)
    if correct:
        picture.text(x + 0.16, y + 0.12, "correct", 9, color=colour)
    picture.grid(x + 0.75, y, 0.115, [[int(cell) for cell in line] for line in lines])


def draw_buffer(picture, rows, prompt, names, attention, y):  # noqa: PLR0913
    """Draw the buffer as a strip, slots coloured by chain, and below it the slots that the marked node attends to."""
    marked, ancestors = attention
    head = 1.25
    begin = LEFT + head
    step = (WIDTH - begin - 0.2) / len(names)
    height, lower = 0.3, y + 0.66
    picture.text(0.15, y, "slots")
    picture.text(0.15, lower, "attends to")
    picture.box(LEFT + head / 2 - 0.03, y, (head - 0.06, height), facecolor="#E4E4E4", edgecolor=DARK)
    picture.text(LEFT + head / 2 - 0.03, y, f"prompt: {prompt}", 9, ha="center")
    picture.box(LEFT + head / 2 - 0.03, lower, (head - 0.06, height), facecolor=DARK, edgecolor=DARK)
    picture.text(LEFT + head / 2 - 0.03, lower, "all", 9, ha="center", color="white")
    for i, row in enumerate(rows):
        colour = CHAIN_COLOURS[i % len(CHAIN_COLOURS)]
        for place, node in enumerate(row.nodes):
            x, held = begin + step * (node + 0.5), place < row.held
            symbol = {"\n": "↵"}.get(names[node], names[node])
            picture.box(x, y, (step * 0.86, height), facecolor=colour if held else "white", edgecolor=colour,
                        linestyle="-" if held else (0, (2, 1.5)))
            picture.text(x, y, symbol, 9, ha="center", color="white" if held else GREY)
            seen = node == marked or node in ancestors
            picture.box(x, lower, (step * 0.86, height), facecolor=DARK if seen else "white",
                        edgecolor=DARK if seen else "#D0D0D0")
        middle = begin + step * (row.nodes.start + len(row.nodes) / 2)
        picture.text(middle, y + 0.33, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i], 9, ha="center", color=colour, fontweight="bold")
    x = begin + step * (marked + 0.5)
    for place in (y, lower):
        picture.box(x, place, (step * 0.86 + 0.07, height + 0.08), facecolor="none", edgecolor=DARK, linewidth=2.4)


def main(config):
    """Search, draw, write."""
    model_tok = load_model("pretrained_models/Mini", bits=32, device="cpu")
    tasks = only_tasks(load_evaluation_set(), [config.task])
    found = search(config, tasks, model_tok)
    print(f"written: {save(draw(config, *found, model_tok[1]), config.output)}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
