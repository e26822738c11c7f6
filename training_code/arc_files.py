"""Read and check the files that tasks come from.

Owns the checks at the entry: everything that enters an `ArcDataset` passes through here, so the rest of the code
relies on grids of 1..30 equally long rows of whole numbers 0..9. A fault is an `ArcDataError` that names file, task,
pair (train or test), row and column, all counted from 0, and says what to do.

Terms: a *challenge* is {task: {'train': [{'input', 'output'}], 'test': [{'input'}]}}, *solutions* are
{task: [output grid per test input]}.
"""
import contextlib
import csv
import gc
import hashlib
import itertools
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from arc_views import base_key_replace_invalid_chars, shuffled

MAX_SIDE = 30
PLACEHOLDER_MD5 = 'a6b7dac3cab03abf2eb333e16610d6dc'  # the public stand-in for the hidden test set

Cell = Annotated[int, Meta(ge=0, le=9)]
Row = Annotated[list[Cell], Meta(min_length=1, max_length=MAX_SIDE)]
Grid = Annotated[list[Row], Meta(min_length=1, max_length=MAX_SIDE)]


class ArcDataError(ValueError):
    """Data or a request that does not fit: names file, task, pair and row and says what to do."""


class Query(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One test input."""
    input: Grid


class Pair(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """A demonstration pair, or a test input with its solution."""
    input: Grid
    output: Grid


class OpenTask(msgspec.Struct, forbid_unknown_fields=True):
    """A task as in Kaggle's challenges files: no solutions."""
    train: Annotated[list[Pair], Meta(min_length=1)]
    test: list[Query]
    name: str | None = None


class SolvedTask(msgspec.Struct, forbid_unknown_fields=True):
    """A task as in the folders of ARC-AGI, ConceptARC and other collections: solutions included."""
    train: Annotated[list[Pair], Meta(min_length=1)]
    test: Annotated[list[Pair], Meta(min_length=1)]
    name: str | None = None


# --- error messages

_ADVICE = (
    ('contains unknown field', "remove the field (a task has 'train' and 'test'; a pair 'input' and 'output', "
                               "a test pair of a challenges file 'input' only)"),
    ('missing required field', 'add the field'),
    ('', f'a grid is a list of 1..{MAX_SIDE} rows of 1..{MAX_SIDE} whole numbers 0..9, all rows equally long; '
         'correct the file or fetch it again'),
)


def _advice(fault):
    return next(text for start, text in _ADVICE if start in fault)


def _place(path, root):
    """Say a msgspec path such as `.train[1].input[0][3]` in words; `root` is what an index at its start counts."""
    words, counted = [], [root, 'output, row', 'column']
    tokens = re.findall(r'\.(\w+)|\[(\d+)\]', path)
    for position, (field, index) in enumerate(tokens):
        if field in ('train', 'test'):
            counted = [f'{field} pair']
            words += [f'{field} pairs'] if position == len(tokens) - 1 else []
        elif field:
            words.append(field)
            counted = ['row', 'column']
        else:
            words.append(f'{counted.pop(0)} {index}' if counted else f'[{index}]')
    return ', '.join(words)


def _structure_error(error, where, root):
    fault, _, path = str(error).partition(' - at `$')
    place = _place(path.rstrip('`'), root)
    return ArcDataError(f'{where}{", " if place else ""}{place}: {fault}; {_advice(fault)}')


def _check_rows(grid, where):
    width = len(grid[0])
    for number, row in enumerate(grid):
        if len(row) != width:
            raise ArcDataError(f'{where}, row {number}: {len(row)} values, but row 0 has {width}; {_advice("")}')


def _check_pairs(pairs, where):
    for number, pair in enumerate(pairs):
        for side in pair.__struct_fields__:
            grid = getattr(pair, side)
            if len(set(map(len, grid))) != 1:
                _check_rows(grid, f'{where} {number}, {side}')


def pair_as_dict(pair):
    """Return a checked pair as {'input', 'output'} (a test input as {'input'})."""
    return {side: getattr(pair, side) for side in pair.__struct_fields__}


# --- checks of values

def _plain(value):
    """Turn numpy arrays and tuples into lists; the result shares nothing that can change with `value`."""
    return msgspec.to_builtins(value, enc_hook=lambda other: other.tolist())


def _convert(value, kind, where, root='test pair'):
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise _structure_error(error, where, root) from None


def check_task(value, kind, where, names):
    """Check one task; `names` are those that its `name` field, if it has one, may hold.

    Raises: ArcDataError.
    """
    task = _convert(value, kind, where)
    if task.name is not None and task.name not in names:
        raise ArcDataError(f"{where}: its field 'name' says {task.name!r}; remove the field or correct the task's name")
    _check_pairs(task.train, f'{where}, train pair')
    _check_pairs(task.test, f'{where}, test pair')
    return task


def check_grids(value, where):
    """Check the list of solutions of one task: a grid per test input."""
    grids = _convert(value, list[Grid], where)
    for number, grid in enumerate(grids):
        _check_rows(grid, f'{where}, test pair {number}, output')
    return grids


def _renamed(names, where):
    """Map each name to one that keys can hold; two names that become the same are an error."""
    result = {}
    for name in names:
        new = base_key_replace_invalid_chars(name)
        if new in result:
            raise ArcDataError(f'{where}: tasks {result[new]!r} and {name!r} both get the name {new!r} '
                               "('_' and '.' become '-'); rename one of them")
        result[new] = name
    return {name: new for new, name in result.items()}


def check_challenge(challenge, where='challenge', rename=False):
    """Check and copy a challenge.

    Raises: ArcDataError for a value that is not a task, a ragged or oversized grid, a name that keys cannot hold.
    """
    if not isinstance(challenge, dict):
        raise ArcDataError(f'{where}: expected an object {{task: ...}}, got {type(challenge).__name__}')
    names = _renamed(challenge, where) if rename else {name: name for name in challenge}
    result = {}
    for old, new in names.items():
        if base_key_replace_invalid_chars(new) != new:
            raise ArcDataError(f"{where}, task {new!r}: '_' and '.' are not allowed in a task's name; write '-'")
        task = check_task(_plain(challenge[old]), OpenTask, f'{where}, task {old}', {old, new})
        result[new] = {'train': [pair_as_dict(pair) for pair in task.train],
                       'test': [pair_as_dict(query) for query in task.test]}
    return result


def check_solutions(solutions, where='solutions', rename=False):
    """Check and copy solutions {task: [grid per test input]}.

    Raises: ArcDataError.
    """
    if not isinstance(solutions, dict):
        raise ArcDataError(f'{where}: expected an object {{task: [grid]}}, got {type(solutions).__name__}')
    names = _renamed(solutions, where) if rename else {name: name for name in solutions}
    return {new: check_grids(_plain(solutions[old]), f'{where}, task {old}') for old, new in names.items()}


def match_solutions(challenge, solutions, where, complete):
    """Return the solutions of the challenge's tasks; tasks of others are left out.

    Raises: ArcDataError for a number of solutions that is not the number of test inputs and, with `complete`, for a
        task without solutions.
    """
    result = {}
    for task, value in challenge.items():
        wanted = len(value['test'])
        if task in solutions:
            if len(solutions[task]) != wanted:
                raise ArcDataError(f'{where}, task {task}: {len(solutions[task])} solutions for {wanted} test inputs; '
                                   'give one per test pair, in their order')
            result[task] = solutions[task]
        elif complete and wanted:
            raise ArcDataError(f'{where}, task {task}: no solution for its test pair 0; use the solutions file '
                               'that belongs to the challenges file')
    return result


# --- files

def parse_json(data, file):
    """Parse the JSON text of a file.

    Raises: ArcDataError if it is none, or a name appears twice in an object (all but one would be lost).
    """
    def unique(items):
        names = [name for name, _ in items]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ArcDataError(f'{file}: the name {twice!r} appears twice in one object; remove one of the two')
        return dict(items)
    try:
        return json.loads(data, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArcDataError(f'{file}: not JSON ({error}); fetch the file again') from None


def read_kaggle_challenges(file):
    """Read a challenges file in Kaggle's layout (2024 and 2025 are alike).

    Returns: (challenge, whether the file is the public placeholder of the hidden test set).
    """
    data = Path(file).read_bytes()
    challenge = check_challenge(parse_json(data, file), where=str(file), rename=True)
    if not challenge:
        raise ArcDataError(f'{file}: no tasks in it; fetch the file again')
    return challenge, hashlib.md5(data).hexdigest() == PLACEHOLDER_MD5


def read_kaggle_solutions(file):
    """Read a solutions file in Kaggle's layout."""
    return check_solutions(parse_json(Path(file).read_bytes(), file), where=str(file), rename=True)


def _newest_versions(path):
    """Return the newest file of each task below `path`/data/*/, sorted; `x_v3.json` replaces `x_v2.json`, `x.json`."""
    newest = {}
    for file in sorted(Path(path).glob('data/*/*.json')):
        stem, version = re.fullmatch(r'(.+?)(?:_v(\d+))?', file.stem).groups()
        version = int(version or 1)
        if version > newest.get((file.parent, stem), (0, None))[0]:
            newest[file.parent, stem] = version, file
    return sorted(file for _, file in newest.values())


def read_neoneye(path):
    """Read a data set of neoneye's collection (or an ARC-AGI repository): `path`/data/*/*.json, solutions included.

    Returns: (challenge, solutions).
    """
    challenge, solutions, sources = {}, {}, {}
    for file in _newest_versions(path):
        name = base_key_replace_invalid_chars(file.stem)
        if name in sources:
            raise ArcDataError(f'{file}: its task gets the name {name!r}, which {sources[name]} has already; '
                               'rename one of the two files')
        sources[name] = file
        names = {file.stem, name, re.sub(r'_v\d+$', '', file.stem)}
        task = check_task(parse_json(file.read_bytes(), file), SolvedTask, f'{file}, task {name}', names)
        challenge[name] = {'train': [pair_as_dict(pair) for pair in task.train],
                           'test': [{'input': pair.input} for pair in task.test]}
        solutions[name] = [pair.output for pair in task.test]
    if not challenge:
        raise ArcDataError(f'{path}: no task files data/*/*.json in it; input/README.md says what goes where')
    return challenge, solutions


def read_rearc_metadata(path):
    """Read `path`/metadata.json of a RE-ARC folder: {task: {...}}."""
    file = Path(path) / 'metadata.json'
    if not file.exists():
        raise ArcDataError(f'{file}: missing; make the data with `python training_code/arc_downloader.py re_arc`')
    metadata = parse_json(file.read_bytes(), file)
    if not isinstance(metadata, dict) or not all(isinstance(entry, dict) for entry in metadata.values()):
        raise ArcDataError(f'{file}: expected an object {{task: {{...}}}}; fetch or make the folder again')
    return metadata


def read_rearc_examples(path, task):
    """Read `path`/tasks/<task>.json of a RE-ARC folder: a list of `Pair`."""
    file = Path(path) / 'tasks' / f'{task}.json'
    if not file.exists():
        raise ArcDataError(f'{file}: missing, though metadata.json names the task {task}; '
                           'make the data with `python training_code/arc_downloader.py re_arc`')
    where = f'{file}, task {task}'
    try:
        pairs = msgspec.json.decode(file.read_bytes(), type=list[Pair])
    except msgspec.ValidationError as error:
        raise _structure_error(error, where, 'example') from None
    except msgspec.DecodeError as error:
        raise ArcDataError(f'{where}: not JSON ({error}); fetch or make the file again') from None
    _check_pairs(pairs, f'{where}, example')
    return pairs


def _without_easiest(pairs, entry, share, where):
    """Drop the share (0..1) of examples with the lowest difficulty, the rest sorted by it.

    The difficulties are metadata.json's `pso_difficulties`.  Source: the published loader's `remove_easiest` (2025).
    """
    difficulties = entry.get('pso_difficulties')
    if not isinstance(difficulties, list) or len(difficulties) != len(pairs):
        raise ArcDataError(f"{where}: no 'pso_difficulties' for its {len(pairs)} examples, which remove_easiest needs; "
                           'make the data with `python training_code/arc_downloader.py re_arc`')
    order = sorted(range(len(pairs)), key=difficulties.__getitem__)
    return [pairs[i] for i in order[int(len(pairs) * share):]]


def _rearc_groups(pairs, n, sizes, rng, where):
    """Take n groups of 1 + size examples from the end of a list; sizes are drawn so that each comes up as often."""
    counts, left = [], []
    for _ in range(n):
        left = left or shuffled(list(sizes), rng)
        counts.append(1 + left.pop())
    if sum(counts) > len(pairs):
        raise ArcDataError(f'{where}: {sum(counts) - len(pairs)} examples are missing: {len(pairs)} of {sum(counts)}; '
                           f'ask for fewer (n, --rearc-epochs) or run `python training_code/arc_downloader.py re_arc '
                           f'--examples {sum(counts)}`')
    pairs = list(pairs)
    return [[pairs.pop() for _ in range(count)] for count in counts]


@contextlib.contextmanager
def _no_garbage_collection():
    """Pause Python's search for cycles: with millions of rows alive it takes two thirds of the loading time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_no_garbage_collection()
def read_rearc(path, n, sizes, rng, remove_easiest=0):
    """Read n epochs of a RE-ARC folder; arguments are those of `ArcDataset.load_from_rearc`.

    Draws from `rng`: for each task, sorted, the order of its examples, then sizes whenever none is left.

    Returns: (challenge, solutions, list of the keys of each epoch).
    """
    challenge, solutions, epochs = {}, {}, [[] for _ in range(n)]
    for task, entry in sorted(read_rearc_metadata(path).items()):
        where = f'{path}, task {task}'
        pairs = read_rearc_examples(path, task)
        if remove_easiest:
            pairs = _without_easiest(pairs, entry, remove_easiest, where)
        pairs = shuffled(pairs, rng)
        for epoch, shown in enumerate(_rearc_groups(pairs, n, sizes, rng, where)):
            name = f'rearc-{base_key_replace_invalid_chars(task)}{epoch:02x}'
            *train, query = [pair_as_dict(pair) for pair in shown]
            challenge[name] = {'train': train, 'test': [{'input': query['input']}]}
            solutions[name] = [query['output']]
            epochs[epoch].append(f'{name}_0')
    return challenge, solutions, epochs


# --- Sudoku

_SUDOKU_COLUMNS = ('id', 'puzzle', 'solution', 'difficulty')


def _sudoku_grid(text, where):
    digits = text.replace('.', '0')
    if not re.fullmatch('[0-9]{81}', digits):
        raise ArcDataError(f"{where}: expected 81 digits or '.', got {len(text)} characters {text[:12]!r}...")
    return [[int(digit) for digit in digits[start:start + 9]] for start in range(0, 81, 9)]


def _sudoku_number(row, where):
    try:
        return float(row['difficulty'])
    except (TypeError, ValueError):
        raise ArcDataError(f"{where}: difficulty {row['difficulty']!r} is not a number") from None


def read_sudoku_rows(path, first, stop, below, above):
    """Yield (id, puzzle grid, solution grid) of the rows first..stop-1 with above < difficulty < below.

    None leaves a limit out. Rows are read one by one, so a file of millions of rows costs what is used of it.
    """
    with open(path, newline='', encoding='utf-8-sig') as stream:
        reader = csv.DictReader(stream)
        lacking = [name for name in _SUDOKU_COLUMNS if name not in (reader.fieldnames or ())]
        if lacking:
            raise ArcDataError(f'{path}: no column {lacking}; the columns must be {list(_SUDOKU_COLUMNS)}')
        for number, row in enumerate(itertools.islice(reader, first, stop), start=first or 0):
            where = f'{path}, row {number}, task sudoku{row["id"]}'
            if below is not None or above is not None:
                difficulty = _sudoku_number(row, where)
                if (below is not None and difficulty >= below) or (above is not None and difficulty <= above):
                    continue
            yield (row['id'], _sudoku_grid(row['puzzle'] or '', f'{where}, puzzle'),
                   _sudoku_grid(row['solution'] or '', f'{where}, solution'))


def sudoku_tasks(rows, examples, count, path):
    """Make `count` tasks of rows as of `read_sudoku_rows`: `examples` pairs, the next row is the test pair.

    Returns: (challenge, solutions).
    """
    challenge, solutions = {}, {}
    for made in range(count):
        group = list(itertools.islice(rows, examples + 1))
        if len(group) <= examples:
            raise ArcDataError(f'{path}: rows for {made} tasks only, {count} were asked for; '
                               'lower num_challenges or widen the limits on rows and difficulty')
        *train, (number, puzzle, solution) = group
        name = base_key_replace_invalid_chars(f'sudoku{number}')
        if name in challenge:
            raise ArcDataError(f'{path}, task {name}: the id {number!r} appears twice; make the ids distinct')
        challenge[name] = {'train': [{'input': p, 'output': s} for _, p, s in train], 'test': [{'input': puzzle}]}
        solutions[name] = [solution]
    return challenge, solutions


# --- writing

def write_atomically(file, data):
    """Write bytes so that the file either keeps its old content or has all of the new one."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=f'.{file.name}.')
    try:
        with os.fdopen(handle, 'wb') as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(OSError):  # of file systems without permissions
            os.chmod(temporary, 0o644)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def content_sha256(value):
    """Return the sha256 of a JSON value, whatever its spelling (spaces, order of fields)."""
    return hashlib.sha256(msgspec.json.encode(value, order='sorted')).hexdigest()


def write_json(file, value, indent=None):
    """Write a value as JSON, atomically; what JSON does not know (paths, for example) as text."""
    write_atomically(file, json.dumps(value, indent=indent, default=str).encode())
