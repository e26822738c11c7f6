"""Keys, the views they describe, and grids as text.

Owns the spelling of keys and what the operations in them do to a grid, and the text form of grids and pairs.

A key is `<task>` or `<task>_<i>` (i = test input), followed by dot-separated operations, applied left to right:
`tp` transpose, `rt` a quarter turn (`numpy.rot90`), `perm0123456789` colour map (digit at place c = new colour of c),
`exA-B-C` the demonstration pairs to show, in that order. `outN` may follow in logs. A *view* is a task as one key
shows it; undoing a view applies the inverses right to left.

Source: "The LLM ARChitect" (2024), augmentation and representation; published `ArcDataset`. differs: an operation that
is none of these is an error, and draws come from the generator that is passed in, never from numpy's global one.
"""
import functools
import re

import numpy as np

# Ten digits after `perm`, none of which comes again later: each of the ten colours once.
_OPERATION = re.compile(r'tp|rt|perm(?!\d*(\d)\d*\1)\d{10}|ex\d+(?:-\d+)*|out\d+', re.ASCII)
_SPECIAL_TOKEN = re.compile('<[^<>]*>')
_NOT_A_DIGIT = re.compile('[^0-9]')


# --- keys

def base_key_replace_invalid_chars(base_key):
    """Replace the characters that separate parts of a key by `-` in a task's name."""
    return base_key.replace('_', '-').replace('.', '-')


def get_base_key_and_reply_num(key):
    """Return (task, number of the test input, -1 where the key names none)."""
    task, separator, number = key.split('.', 1)[0].partition('_')
    if separator and not (number.isascii() and number.isdigit()):
        raise ValueError(f'key {key!r}: {number!r} is not the number of a test input; '
                         'write <task> or <task>_<i>, then operations after dots')
    return task, int(number) if number else -1


def get_base_key(key):
    """Return the task that a key belongs to."""
    return get_base_key_and_reply_num(key)[0]


def key_operations(key):
    """Return the operations of a key.

    Raises: ValueError for one that is unknown.
    """
    operations = key.split('.')[1:]
    for operation in operations:
        if not _OPERATION.fullmatch(operation):
            raise ValueError(f'key {key!r}: unknown operation {operation!r}; use tp, rt, '
                             'perm<the ten digits, each once>, ex<A-B-C>')
    return operations


def select_pairs(pairs, operations, key):
    """Return the demonstration pairs that a key shows, in its order."""
    for operation in operations:
        if operation.startswith('ex'):
            chosen = [int(number) for number in operation[2:].split('-')]
            if max(chosen) >= len(pairs):
                raise ValueError(f'key {key!r}: {operation!r} asks for pair {max(chosen)} (counted from 0) '
                                 f'of {len(pairs)} train pairs')
            pairs = [pairs[number] for number in chosen]
    return pairs


# --- views of grids

def _colours(array):
    """Return a grid as an array, checked to hold colours."""
    array = np.asarray(array)
    if array.dtype.kind not in 'iu' or not array.size:
        raise ValueError(f'a grid holds whole numbers, got values of type {array.dtype}, shape {array.shape}')
    if array.min() < 0 or array.max() > 9:
        raise ValueError(f'a grid holds colours 0..9, got values {array.min()}..{array.max()}')
    return array


def permute_array(a, descriptor, invert=False):
    """Recolour a grid.

    Args:
        a: grid of colours 0..9.
        descriptor: `perm` with ten digits, or the ten colours: place c holds the new colour of c.
        invert: undo it.
    """
    colours = [int(c) for c in descriptor if str(c).isdigit()]
    if sorted(colours) != list(range(10)):
        raise ValueError(f'{descriptor!r} does not hold each of the ten colours once')
    return np.asarray(np.argsort(colours) if invert else colours)[_colours(a)]


def transform_array(array, transforms, apply_perm=True, invert=False):
    """Apply a view's operations to a grid (H, W), left to right; None stays None.

        key 'x.rt':   1 2      2 4          key 'x.tp':   1 2      1 3
                      3 4  ->  1 3                        3 4  ->  2 4

    Args:
        transforms: list of operations (of a key, those on pairs change nothing).
        apply_perm: False leaves colours as they are.
        invert: undo the view: inverses, right to left.

    Raises: ValueError for something that is not a grid.
    """
    if array is None:
        return None
    array = np.asarray(array)
    if array.ndim != 2:
        raise ValueError(f'expected a grid (H, W), got an array of shape {array.shape}')
    for operation in reversed(transforms) if invert else transforms:
        if operation == 'tp':
            array = array.T
        elif operation == 'rt':
            array = array[::-1].T if invert else array.T[::-1]
        elif operation.startswith('perm') and apply_perm:
            array = permute_array(array, operation, invert=invert)
    return array


# --- text

@functools.lru_cache(maxsize=1024)
def _new_digits(perms):
    """Return the digits that recolouring by `perms`, one after the other, makes of the bytes 0..9, as a table."""
    colours = np.arange(10)
    for perm in perms:
        colours = permute_array(colours, perm)
    return bytes.maketrans(bytes(range(10)), (colours + 48).astype(np.uint8).tobytes())


def fmt_array(array, lines_sep, tf=None):
    """Write a grid as rows of digits joined by `lines_sep`, seen through the operations `tf`."""
    operations = tf or []
    array = _colours(transform_array(array, operations, apply_perm=False))  # recolouring can as well be done in text
    table = _new_digits(tuple([operation for operation in operations if operation.startswith('perm')]))
    digits, width = array.astype(np.uint8).tobytes().translate(table).decode('ascii'), array.shape[1]
    return lines_sep.join([digits[start:start + width] for start in range(0, len(digits), width)])


def fmt_input(array, query_beg, reply_beg, lines_sep, tf=None):
    """Write an input grid with what precedes it and what precedes its reply."""
    return query_beg + fmt_array(array, lines_sep, tf) + reply_beg


def fmt_output(array, reply_end, lines_sep, tf=None):
    """Write an output grid with its end."""
    return fmt_array(array, lines_sep, tf) + reply_end


def fmt_train(train, preprompt, query_beg, reply_beg, reply_end, lines_sep, tf=None):  # noqa: PLR0913
    """Write the demonstration pairs."""
    return preprompt + ''.join([fmt_input(pair['input'], query_beg, reply_beg, lines_sep, tf)
                                + fmt_output(pair['output'], reply_end, lines_sep, tf) for pair in train])


def count_tokens(text):
    """Count tokens: one per character, a special token `<...>` counts one."""
    if '<' not in text:
        return len(text)
    return len(_SPECIAL_TOKEN.sub('x', text))


def max_new_tokens(reply_end, lines_sep, max_size=30, safety_margin=1, **_):
    """Return the number of tokens that the largest reply needs (932 in the published format)."""
    largest = np.zeros([max_size, max_size], dtype=int)
    return count_tokens(fmt_output(largest, reply_end, lines_sep)) + safety_margin


def parse_grid(text, lines_sep, max_size=30):
    """Read a reply: in each line what is not a digit is ignored, lines without digits are dropped.

    Returns: grid (H, W), or None where the text is ragged, empty or too large.
    """
    lines = [line for line in (_NOT_A_DIGIT.sub('', part) for part in text.split(lines_sep)) if line]
    if not 0 < len(lines) <= max_size or len(lines[0]) > max_size or len(set(map(len, lines))) != 1:
        return None
    return np.array([[int(digit) for digit in line] for line in lines])


# --- random draws

def rand_perm(n, sep=None, keep_zero=False, rng=None):
    """Draw a permutation of 0..n-1: a list, or text joined by `sep`; `keep_zero` moves the 0 to the front.

    Args:
        rng: a `numpy.random.RandomState`; None draws fresh.
    """
    order = (rng or np.random.RandomState()).permutation(n).tolist()
    if keep_zero:
        order = [0] + [number for number in order if number != 0]
    return order if sep is None else sep.join(map(str, order))


def shuffled(items, rng):
    """Return the items in an order drawn from `rng` (the stream of `rng.permutation(items)`), unchanged in type."""
    return [items[i] for i in rng.permutation(len(items))]


def _random_turns(keys, tp, rt, rng):
    """Append drawn operations; an option that is off draws all the same, one that is 'all' draws nothing."""
    for operation, option, count in (('.tp', tp, 2), ('.rt', rt, 4)):
        if option != 'all':
            keys = [key + bool(option) * int(rng.randint(0, count)) * operation
                    for key in keys]
    return keys


def turned_keys(keys, tp, rt, n, shfl_keys, rng):  # noqa: PLR0913
    """Return n times the keys with transpositions and quarter turns appended; see `ArcDataset.augment`."""
    for name, option in (('tp', tp), ('rt', rt)):
        if option not in (False, True, 'all'):
            raise ValueError(f"{name}={option!r}: use False, True (drawn) or 'all'")
    for operation, option, count in (('.tp', tp, 2), ('.rt', rt, 4)):
        if option == 'all':
            keys = [key + times * operation for times in range(count) for key in keys]
    if shfl_keys:
        return _random_turns([key for _ in range(n) for key in shuffled(keys, rng)], tp, rt, rng)
    return _random_turns(keys, tp, rt, rng) * n
