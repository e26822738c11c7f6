"""Tasks, the views of them that keys describe, and submissions.

Owns `ArcDataset`: tasks with a list of keys. Every method returns a new data set and changes none in place. Random
draws come from a private `numpy.random.RandomState(seed)` whose stream equals the published one's, so the same seed
gives the published keys; the caller's global random state is never touched and `seed=None` draws fresh.

The spelling of keys, views and texts is `arc_views.py`'s, reading and checking files is `arc_files.py`'s; what is
public of them is importable from here.

    ds = ArcDataset.load_from_json('arc-agi_evaluation_challenges.json')
    ds = ds.load_solutions('arc-agi_evaluation_solutions.json')
    texts = ds.augment(seed=0, tp='all', rt='all', perm=True, shfl_ex=True).as_list(len_name='text', **fmt_opts)

Source: "The LLM ARChitect" (2024), published `arc_loader.ArcDataset`. differs: input is checked where it enters, the
random state is private, a submission is scored by the data set's own tasks.
"""
import itertools

import numpy as np

from arc_files import (
    ArcDataError, check_challenge, check_grids, check_solutions, match_solutions, read_kaggle_challenges,
    read_kaggle_solutions, read_neoneye, read_rearc, read_sudoku_rows, sudoku_tasks,
)
from arc_views import (
    base_key_replace_invalid_chars, count_tokens, fmt_array, fmt_input, fmt_output, fmt_train, get_base_key,
    get_base_key_and_reply_num, key_operations, max_new_tokens, parse_grid, permute_array, rand_perm,
    select_pairs, shuffled, transform_array, turned_keys,
)

__all__ = [
    'ArcDataError', 'ArcDataset', 'TaskTooLongError', 'base_key_replace_invalid_chars', 'count_tokens', 'fmt_array',
    'fmt_input', 'fmt_output', 'fmt_train', 'get_base_key', 'get_base_key_and_reply_num', 'max_new_tokens',
    'permute_array', 'rand_perm', 'transform_array',
]

_DIGITS_ONLY = {'preprompt': '', 'query_beg': '', 'reply_beg': '', 'reply_end': '', 'lines_sep': ''}
_ATTEMPTS = ('attempt_1', 'attempt_2')


class _Checked(dict):
    """A challenge that has been checked, its solutions with it."""


class TaskTooLongError(ArcDataError):
    """A task that does not fit a limit even with one demonstration pair.

    Attributes: key, length and limit (tokens).
    """

    def __init__(self, key, length, limit, len_name):
        super().__init__(f"{key}: its '{len_name}' has {length} tokens with one train pair, the limit is {limit}; "
                         'raise max_tokens or leave the task out')
        self.key, self.length, self.limit = key, length, limit


class ArcDataset:
    """Tasks, their solutions as far as known, and the keys of the views to show.

    Args:
        challenge: {task: {'train': [{'input', 'output'}], 'test': [{'input'}]}}; grids are H x W whole numbers 0..9.
        solutions: {task: [grid per test input]}, tasks may be missing.
        keys: keys in order; None makes `<task>_<i>` per test input, `<task>` where there is none, sorted. The data set
            holds the tasks that its keys name.
        is_fake: the tasks are the public placeholder of the hidden test set.
        is_orig: keys and tasks are as loaded; `split`, `get_submission` and others need that.

    Raises: ArcDataError for input that is not such data.
    """

    base_key_replace_invalid_chars = staticmethod(base_key_replace_invalid_chars)
    count_tokens = staticmethod(count_tokens)
    fmt_array = staticmethod(fmt_array)
    fmt_input = staticmethod(fmt_input)
    fmt_output = staticmethod(fmt_output)
    fmt_train = staticmethod(fmt_train)
    get_base_key = staticmethod(get_base_key)
    get_base_key_and_reply_num = staticmethod(get_base_key_and_reply_num)
    max_new_tokens = staticmethod(max_new_tokens)
    permute_array = staticmethod(permute_array)
    rand_perm = staticmethod(rand_perm)
    transform_array = staticmethod(transform_array)

    def __init__(self, challenge, solutions=None, keys=None, is_fake=False, is_orig=False):  # noqa: PLR0913
        if not isinstance(challenge, _Checked):
            challenge = check_challenge(challenge)
            solutions = match_solutions(challenge, check_solutions(solutions or {}), 'solutions', complete=False)
        if keys is None:
            keys = sorted(key for task, value in challenge.items()
                          for key in ([f'{task}_{i}' for i in range(len(value['test']))] or [task]))
        self.keys = [str(key) for key in keys]
        named = {_parse_key(key, challenge)[0] for key in self.keys}
        self.challenge = {name: task for name, task in challenge.items() if name in named}
        self.solutions = {name: grids for name, grids in solutions.items() if name in named}
        self.is_fake, self.is_orig = is_fake, is_orig

    @classmethod
    def _new(cls, challenge, solutions, keys=None, is_fake=False, is_orig=False):  # noqa: PLR0913
        """Make a data set of parts that have been checked."""
        return cls(_Checked(challenge), solutions, keys, is_fake, is_orig)

    def __repr__(self):
        return (f'ArcDataset({len(self.challenge)} tasks, {len(self.solutions)} with solutions, {len(self.keys)} keys, '
                f'is_orig={self.is_orig}, is_fake={self.is_fake})')

    def _need_orig(self, action):
        if not self.is_orig:
            raise ArcDataError(f'{action} needs the data set as it was loaded: call it before change_keys, repeat, '
                               'augment, sorted_by_len or remove_test_data')

    # --- loading

    @classmethod
    def load_from_json(cls, challenges_file):
        """Load a challenges file in Kaggle's layout; the md5 of the public placeholder test set sets `is_fake`."""
        challenge, is_fake = read_kaggle_challenges(challenges_file)
        return cls._new(challenge, {}, is_fake=is_fake, is_orig=True)

    def load_solutions(self, solutions_file):
        """Return the data set with the solutions of a file, which may hold more tasks.

        Raises: ArcDataError for a task without solution or with another number of them than test inputs.
        """
        solutions = match_solutions(self.challenge, read_kaggle_solutions(solutions_file), str(solutions_file),
                                    complete=True)
        return self._new(self.challenge, solutions, self.keys, self.is_fake, self.is_orig)

    @classmethod
    def load_from_rearc(cls, path, n, sizes, seed, mix_datasets=None, shuffle=True, remove_easiest=0):  # noqa: PLR0913
        """Load n epochs of a RE-ARC folder: in each epoch one task per generator.

        Args:
            path: folder with metadata.json and tasks/<id>.json.
            sizes: numbers of demonstration pairs; each is used once before one is used again.
            mix_datasets: {name: data set}; the keys of each are spread over the epochs, as `<name>-<key>`.
            shuffle: shuffle the keys within each epoch.
            remove_easiest: share of each generator's examples to leave out, by metadata.json's `pso_difficulties`.

        Raises: ArcDataError naming the task that has too few examples and how many are missing.
        """
        rng = np.random.RandomState(seed)
        challenge, solutions, epochs = read_rearc(path, n, sizes, rng, remove_easiest)
        for name, dataset in (mix_datasets or {}).items():
            prefix = base_key_replace_invalid_chars(name) + '-'
            _add_renamed(challenge, dataset.challenge, prefix)
            _add_renamed(solutions, dataset.solutions, prefix)
            parts = np.array_split(np.arange(len(dataset.keys)), n)
            for keys, part in zip(epochs, parts, strict=True):
                keys.extend(prefix + dataset.keys[i] for i in part)
        if shuffle:
            epochs = [shuffled(keys, rng) for keys in epochs]
        return cls._new(challenge, solutions, list(itertools.chain(*epochs)), is_orig=True)

    @classmethod
    def load_from_neoneye(cls, path):
        """Load a data set of neoneye's collection: `path`/data/*/*.json, of `x.json`, `x_v2.json`... the newest.

        The repositories of ARC-AGI-1 and -2 have the same layout.
        """
        challenge, solutions = read_neoneye(path)
        return cls._new(challenge, solutions, is_orig=True)

    @classmethod
    def load_sudoku_csv(cls, path, examples_per_challenge=3, num_challenges=10, diff_lim=None,  # noqa: PLR0913
                        diff_lim_lower=None, min_indx=None, max_indx=None):
        """Load Sudokus from a CSV file with the columns id, puzzle, solution, difficulty as tasks of 9 x 9 grids.

        Args:
            examples_per_challenge: demonstration pairs; the row after them is the test pair and names the task.
            diff_lim, diff_lim_lower: keep rows with diff_lim_lower < difficulty < diff_lim.
            min_indx, max_indx: use the rows min_indx..max_indx-1 of the file (the limits on difficulty come after).

        Raises: ArcDataError if there are too few rows.
        """
        rows = read_sudoku_rows(path, min_indx, max_indx, diff_lim, diff_lim_lower)
        challenge, solutions = sudoku_tasks(rows, examples_per_challenge, num_challenges, path)
        return cls._new(challenge, solutions, is_orig=True)

    # --- other tasks and keys

    def change_keys(self, keys):
        """Return the data set with other keys and the tasks that they name.

        Raises: ArcDataError for a key of a task or test input that is not there, ValueError for an unknown operation.
        """
        return self._new(self.challenge, self.solutions, keys)

    def repeat(self, n, seed=None):
        """Return the keys n times; with a seed, in a new order each time."""
        if seed is None:
            return self.change_keys(self.keys * n)
        rng = np.random.RandomState(seed)
        return self.change_keys([key for _ in range(n) for key in shuffled(self.keys, rng)])

    def split(self, n, split_seed, **length_options):
        """Cut the tasks into n data sets.

        Args:
            split_seed: a number shuffles the tasks; 'len' sorts them by length first, which takes the options of
                `sort_keys_by_len` (a task's `input` is empty there, so that by `input` it stays alphabetical).

        Raises: ArcDataError for another word than 'len', or options without it.
        """
        self._need_orig('split')
        names = sorted(self.challenge)
        if split_seed == 'len':
            names = self.sort_keys_by_len(names, **length_options)
        elif length_options or isinstance(split_seed, str):
            raise ArcDataError(f'split: split_seed={split_seed!r} with options {list(length_options)}; give a number '
                               "and no options, or 'len' with those of sort_keys_by_len")
        else:
            names = shuffled(names, np.random.RandomState(split_seed))
        parts = [[names[i] for i in part] for part in np.array_split(np.arange(len(names)), n)]
        return [self._new({name: self.challenge[name] for name in part},
                          {name: self.solutions[name] for name in part if name in self.solutions},
                          is_fake=self.is_fake, is_orig=True) for part in parts]

    def remove_test_data(self):
        """Return the demonstration pairs only: one key per task, no test inputs, no solutions."""
        self._need_orig('remove_test_data')
        return self._new({name: {'train': task['train'], 'test': []} for name, task in self.challenge.items()}, {})

    def move_test_to_train(self):
        """Return tasks whose test pairs, solved, follow the demonstration pairs.

        Raises: ArcDataError for a task without solutions.
        """
        self._need_orig('move_test_to_train')
        match_solutions(self.challenge, self.solutions, 'move_test_to_train', complete=True)
        challenge = {}
        for name, task in self.challenge.items():
            solved = [{'input': query['input'], 'output': grid}
                      for query, grid in zip(task['test'], self.solutions.get(name, ()), strict=True)]
            challenge[name] = {'train': task['train'] + solved, 'test': []}
        return self._new(challenge, {}, is_orig=True)

    def grouped_keys(self):
        """Return {task: [[keys of test input 0], [keys of test input 1], ...]} in order of first appearance."""
        groups = {}
        for key in self.keys:
            task, number = get_base_key_and_reply_num(key)
            if number < 0:
                raise ArcDataError(f'{key}: grouped_keys needs keys of test inputs, <task>_<i>; this task has none')
            inputs = groups.setdefault(task, [])
            inputs.extend([] for _ in range(number + 1 - len(inputs)))
            inputs[number].append(key)
        return groups

    # --- augmentation

    def augment_keys(self, keys, tp=False, rt=False, n=1, perm=False, keep_background=False,  # noqa: PLR0913
                     shfl_ex=False, shfl_keys=False, keep_bg=False, rng=None):
        """Return the keys with operations appended; see `augment`. `rng` None draws fresh."""
        rng = rng or np.random.RandomState()
        result = []
        turned = turned_keys(list(keys), tp, rt, n, shfl_keys, rng)
        recoloured = [(key, rand_perm(10, '', keep_background or keep_bg, rng)) for key in turned]
        for key, colours in recoloured:
            order = rand_perm(len(self.challenge[get_base_key(key)]['train']), '-', rng=rng)
            result.append(key + bool(perm) * f'.perm{colours}' + bool(shfl_ex) * f'.ex{order}')
        return result

    def augment(self, seed=None, shfl_keys=False, **options):
        """Return the data set with random views of each key.

        Args:
            tp, rt: transpositions, quarter turns: False, True (one drawn) or 'all' (2 and 4 keys).
            n: times each key (after 'all').
            perm: recolour; keep_background (or keep_bg) leaves the colour 0 in place.
            shfl_ex: shuffle the demonstration pairs.
            shfl_keys: follow the 2025 version: all keys at once, each of the n times in a new order.

        Draws: for each key in turn; an option that is off draws all the same, so that switching it changes no other.
        With tp=True and rt='all' the drawn transposition follows the turns: `.rt.tp`.
        """
        rng = np.random.RandomState(seed)
        groups = [self.keys] if shfl_keys else [[key] for key in self.keys]
        return self.change_keys([key for group in groups
                                 for key in self.augment_keys(group, shfl_keys=shfl_keys, rng=rng, **options)])

    # --- text

    def fmt_task(self, key, preprompt, query_beg, reply_beg, reply_end, lines_sep, reply=True):  # noqa: PLR0913
        """Write one view of a task as text.

        Args:
            preprompt, query_beg, reply_beg, reply_end, lines_sep: the format.
            reply: True takes the solution if there is one, None leaves the reply out, a grid (upright: the view is
                applied to it) takes its place.

        Returns: dict of key, train, query, input (= train + query), reply (absent without one) and text. A key without
            `_i` has empty query and input; without a reply text is train alone.

        Raises: ArcDataError or ValueError for a key of something that is not there, a reply that is not a grid.
        """
        name, number, operations = _parse_key(key, self.challenge)
        train = select_pairs(self.challenge[name]['train'], operations, key)
        train = fmt_train(train, preprompt, query_beg, reply_beg, reply_end, lines_sep, operations)
        result = {'key': key, 'train': train, 'query': '', 'input': ''}
        if number >= 0:
            query = self.challenge[name]['test'][number]['input']
            result['query'] = fmt_input(query, query_beg, reply_beg, lines_sep, operations)
            result['input'] = result['train'] + result['query']
        if reply is True:
            reply = self.solutions[name][number] if number >= 0 and name in self.solutions else None
        elif reply is not None and number < 0:
            raise ArcDataError(f'{key}: a reply was given, but the key names no test input; use <task>_<i>')
        if reply is not None:
            result['reply'] = fmt_output(reply, reply_end, lines_sep, operations)
        result['text'] = result['train'] + (result['query'] + result['reply'] if reply is not None else '')
        return result

    def get_task(self, key, max_tokens=None, len_name=None, **fmt_opts):
        """Write one view of a task, without as many of its last pairs as it takes to fit a limit.

        Args:
            max_tokens: limit on the tokens of the part `len_name` ('text', 'input', ...); None is no limit.

        Returns: (key whose `ex` part says which pairs are left, dict as of `fmt_task`).

        Raises: TaskTooLongError if one pair does not fit.
        """
        shown_key, fmt = key, self.fmt_task(key, **fmt_opts)
        while max_tokens is not None and (length := count_tokens(_part(fmt, len_name))) > max_tokens:
            shown_key = self._without_last_pair(shown_key)
            if shown_key is None:
                raise TaskTooLongError(key, length, max_tokens, len_name)
            fmt = self.fmt_task(shown_key, **fmt_opts)
        return shown_key, fmt

    def _without_last_pair(self, key):
        """Return the key with one pair less, None where it has one only."""
        name, _, operations = _parse_key(key, self.challenge)
        pairs = select_pairs(list(range(len(self.challenge[name]['train']))), operations, key)
        if len(pairs) == 1:
            return None
        parts = key.split('.')
        place = max((i for i, part in enumerate(parts) if part.startswith('ex') and i), default=None)
        if place is None:
            return f'{key}.ex' + '-'.join(map(str, pairs[:-1]))
        parts[place] = parts[place].rpartition('-')[0]
        return '.'.join(parts)

    def convert_with_token_limit(self, **options):
        """Return (list of dicts as of `get_task`, data set with the rewritten keys); options are `get_task`'s."""
        tasks = [self.get_task(key, **options) for key in self.keys]
        return [fmt for _, fmt in tasks], self.change_keys([key for key, _ in tasks])

    def as_list(self, **options):
        """Return a list of dicts, one per key; options are `get_task`'s."""
        return self.convert_with_token_limit(**options)[0]

    # --- length

    def get_length(self, key, len_name, max_of_transposed=False, max_tokens=None, **fmt_opts):
        """Return the length of a part ('input', 'text', ...) of a view.

        Without format options its digits are counted, with them its tokens + 1 (the token that begins a sequence).

        Args:
            max_of_transposed: the longer of the view and its transpose.
            max_tokens: taken so that a whole format can be passed, changes nothing.
        """
        keys = [key, f'{key}.tp'] if max_of_transposed else [key]
        lengths = [count_tokens(_part(self.fmt_task(each, **(fmt_opts or _DIGITS_ONLY)), len_name)) for each in keys]
        return max(lengths) + bool(fmt_opts)

    def sort_keys_by_len(self, keys, reverse=False, **length_options):
        """Return the keys sorted by length; ties keep their order. Options are `get_length`'s."""
        return sorted(keys, key=lambda key: self.get_length(key, **length_options), reverse=reverse)

    def sorted_by_len(self, reverse=False, **length_options):
        """Return the data set with its keys sorted by length; ties keep their order. Options are `get_length`'s."""
        return self.change_keys(self.sort_keys_by_len(self.keys, reverse=reverse, **length_options))

    # --- replies and submissions

    def decode(self, text, lines_sep, key=None):
        """Read a reply as a grid and compare it with the solution.

        Returns: (grid with the key's view undone, or None; correct: True, False, None = unknown; a word on why:
            'cant_decode', 'unknown', 'sol_unknown', 'bad_xy_size', 'bad_content' or 'ALL_CORRECT').

        Raises: ArcDataError for a key of a test input that its task does not have.
        """
        grid = parse_grid(text, lines_sep)
        if grid is None:
            return None, False, 'cant_decode'
        if key is None:
            return grid, None, 'unknown'
        grid = transform_array(grid, key_operations(key), invert=True)
        name, number = get_base_key_and_reply_num(key)
        if number < 0 or name not in self.solutions:
            return grid, None, 'sol_unknown'
        _parse_key(key, self.challenge)
        solution = np.asarray(self.solutions[name][number])
        if solution.shape != grid.shape:
            return grid, False, 'bad_xy_size'
        correct = np.array_equal(solution, grid)
        return grid, correct, 'ALL_CORRECT' if correct else 'bad_content'

    def get_submission(self, results=None):
        """Return a submission: {task: [{'attempt_1': grid, 'attempt_2': grid} per test input]}.

        `[[0]]` stands where nothing was found; `results` are `fill_submission`'s.
        """
        self._need_orig('get_submission')
        submission = {name: [{attempt: [[0]] for attempt in _ATTEMPTS} for _ in task['test']]
                      for name, task in self.challenge.items()}
        if results is not None:
            self.fill_submission(results, submission)
        return submission

    @staticmethod
    def fill_submission(results, submission):
        """Write the first candidates of each test input into a submission, in place.

        Args:
            results: {task: [list of {'output': grid} per test input]}, best candidate first.

        Raises: ArcDataError for a task or test input that the submission does not hold.
        """
        for name, inputs in results.items():
            if len(inputs) > len(submission.get(name, ())):
                raise ArcDataError(f'results, task {name}: {len(inputs)} test inputs, but the submission has '
                                   f'{len(submission.get(name, ()))}; make it with get_submission of the same tasks')
            for answers, candidates in zip(submission[name], inputs, strict=False):
                for attempt, candidate in zip(_ATTEMPTS, candidates, strict=False):
                    answers[attempt] = np.asarray(candidate['output']).tolist()

    def validate_submission(self, submission):
        """Return the score of a submission: the sum over tasks of solved test inputs / test inputs.

        Tasks of the submission that the data set does not hold do not count.

        Raises: ArcDataError for a task without solution, a missing task, test input or attempt, an attempt that is
            not a grid.
        """
        self._need_orig('validate_submission')
        match_solutions(self.challenge, self.solutions, 'validate_submission', complete=True)
        score = 0
        for name, grids in self.solutions.items():
            if len(submission.get(name, ())) != len(grids):
                raise ArcDataError(f'submission, task {name}: answers for {len(submission.get(name, ()))} test inputs, '
                                   f'expected {len(grids)}; make the submission with get_submission')
            score += sum(_is_solved(grid, answers, f'submission, task {name}, test pair {i}')
                         for i, (grid, answers) in enumerate(zip(grids, submission[name], strict=True))) / len(grids)
        return score


def _part(fmt, len_name):
    if len_name not in fmt or len_name == 'key':
        raise ArcDataError(f"{fmt['key']}: len_name={len_name!r} names no part of its text; there are "
                           f"{[name for name in fmt if name != 'key']}")
    return fmt[len_name]


def _parse_key(key, challenge):
    """Return (task, number of the test input or -1, operations) of a key, checked to be of the challenge."""
    name, number = get_base_key_and_reply_num(key)
    if name not in challenge:
        raise ArcDataError(f'key {key!r}: the data set has no task {name!r}')
    if number >= len(challenge[name]['test']):
        raise ArcDataError(f'key {key!r}: test input {number} (counted from 0) of {len(challenge[name]["test"])}')
    return name, number, key_operations(key)


def _add_renamed(target, tasks, prefix):
    for name, value in tasks.items():
        if prefix + name in target:
            raise ArcDataError(f'task {prefix + name}: two of the mixed data sets have it; give the data sets '
                               'of mix_datasets names that differ')
        target[prefix + name] = value


def _is_solved(solution, answers, where):
    lacking = [attempt for attempt in _ATTEMPTS if attempt not in answers]
    if lacking:
        raise ArcDataError(f'{where}: {lacking} missing; every test input needs {list(_ATTEMPTS)}')
    return solution in [check_grids([answers[attempt]], f'{where}, {attempt}')[0] for attempt in _ATTEMPTS]
