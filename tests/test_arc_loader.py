"""ArcDataset: its methods, views undone exactly, instances and random state left alone."""
import hashlib
import json
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import arc_files
from arc_loader import (
    ArcDataError,
    ArcDataset,
    TaskTooLongError,
    count_tokens,
    fmt_array,
    max_new_tokens,
    permute_array,
    rand_perm,
    transform_array,
)

DATA = Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'arc_loader_evaluation.json').read_text())
MORE = json.loads((DATA / 'arc_loader_more.json').read_text())
FORMAT = {name: value for name, value in GOLDEN['fmt_opts'].items() if name != 'max_tokens'}


def sha(texts, separator):
    return hashlib.sha256(separator.join(texts).encode()).hexdigest()


def small(**changes):
    """A data set of two tasks, one of them with two test inputs."""
    challenge = {'aa': {'train': [{'input': [[1, 2]], 'output': [[2], [1]]}, {'input': [[3]], 'output': [[3]]}],
                        'test': [{'input': [[4, 5]]}, {'input': [[6]]}]},
                 'bb': {'train': [{'input': [[7, 7, 7]], 'output': [[7]]}], 'test': [{'input': [[8]]}]}}
    solutions = {'aa': [[[5], [4]], [[6]]], 'bb': [[[8]]]}
    return ArcDataset(challenge, **{'solutions': solutions, 'is_orig': True, **changes})


# --- random state and immutability

def test_the_callers_random_state_is_untouched(rearc_folder):
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    tasks = small()
    for seed in (None, 3):
        tasks.augment(seed=seed, tp=True, rt=True, perm=True, shfl_ex=True, shfl_keys=True)
        tasks.repeat(2, seed=seed)
        tasks.split(2, 7 if seed is None else seed)
        ArcDataset.load_from_rearc(rearc_folder, n=2, sizes=[2], seed=seed)
    rand_perm(10)
    after = np.random.get_state()[1].tolist(), np.random.get_state()[2], random.getstate()  # noqa: NPY002
    assert before == after


def test_seed_none_draws_fresh():
    tasks = small()
    assert len({tuple(tasks.augment(perm=True).keys) for _ in range(5)}) == 5


def test_instances_are_not_changed():
    tasks = small()
    before = json.dumps([tasks.challenge, tasks.solutions, tasks.keys])
    tasks.repeat(2, seed=1).augment(seed=1, tp='all', rt='all', perm=True, shfl_ex=True).as_list(**FORMAT)
    tasks.move_test_to_train()
    tasks.remove_test_data()
    tasks.sorted_by_len(len_name='input')
    tasks.split(2, 0)
    tasks.fill_submission({'aa': [[{'output': [[1]]}]]}, tasks.get_submission())
    assert json.dumps([tasks.challenge, tasks.solutions, tasks.keys]) == before
    assert pickle.loads(pickle.dumps(tasks)).keys == tasks.keys


class Named(ArcDataset):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.label = 'mine'


def test_attributes_can_be_set_and_subclasses_have_their_own():
    tasks = small()
    tasks.keys = tasks.keys[:1]
    assert tasks.repeat(2).keys == ['aa_0', 'aa_0']
    views = Named(small().challenge, small().solutions).repeat(2).augment(seed=0, tp=True)
    assert type(views) is Named and views.label == 'mine' and len(views.keys) == 6


def test_a_dataset_holds_the_tasks_that_its_keys_name():
    views = small().change_keys(['bb_0.tp', 'bb_0'])
    assert set(views.challenge) == set(views.solutions) == {'bb'} and views.grouped_keys() == {
        'bb': [['bb_0.tp', 'bb_0']]}
    one = small(keys=['aa_1'])
    assert set(one.challenge) == {'aa'} and one.is_orig and one.get_submission().keys() == {'aa'}
    assert one.validate_submission(one.get_submission({'aa': [[], [{'output': [[6]]}]]})) == 0.5
    assert set(small().repeat(2, seed=0).sorted_by_len(len_name='text').challenge) == {'aa', 'bb'}
    with pytest.raises(ArcDataError, match="no task 'aa'"):
        views.change_keys(['aa_0'])


def test_a_dataset_shares_nothing_with_what_it_was_made_of():
    challenge = {'aa': {'train': [{'input': np.array([[1]]), 'output': ((2,),)}], 'test': []}}
    tasks = ArcDataset(challenge)
    challenge['aa']['train'][0]['input'][0, 0] = 9
    assert tasks.challenge['aa']['train'] == [{'input': [[1]], 'output': [[2]]}] and tasks.keys == ['aa']


def test_is_orig_and_is_fake():
    tasks = small(is_fake=True)
    for new in (*tasks.split(2, 0), tasks.move_test_to_train()):
        assert new.is_orig
    assert all(part.is_fake for part in tasks.split(2, 'len', len_name='text'))
    assert [sorted(part.solutions) for part in tasks.split(2, 'len', len_name='input')] == [['aa'], ['bb']]
    for new in (tasks.change_keys(tasks.keys), tasks.repeat(1), tasks.augment(seed=0), tasks.remove_test_data(),
                tasks.sorted_by_len(len_name='text')):
        assert not new.is_orig
        for action in (new.get_submission, new.remove_test_data, new.move_test_to_train,
                       lambda new=new: new.split(2, 0), lambda new=new: new.validate_submission({})):
            with pytest.raises(ArcDataError, match='as it was loaded'):
                action()


def test_placeholder_test_set_is_recognised(tmp_path, monkeypatch):
    file = tmp_path / 'challenges.json'
    file.write_text(json.dumps(small().challenge))
    assert not ArcDataset.load_from_json(file).is_fake
    monkeypatch.setattr(arc_files, 'PLACEHOLDER_MD5', hashlib.md5(file.read_bytes()).hexdigest())
    solutions = tmp_path / 'solutions.json'
    solutions.write_text(json.dumps(small().solutions))
    tasks = ArcDataset.load_from_json(file)
    assert tasks.is_fake and tasks.load_solutions(solutions).is_fake and tasks.load_solutions(solutions).is_orig


def test_keys_are_plain_text(rearc_folder):
    rearc = ArcDataset.load_from_rearc(rearc_folder, n=2, sizes=[2], seed=0, mix_datasets={'m': small().repeat(2)})
    for tasks in (rearc, rearc.repeat(2, seed=0), small().change_keys(np.array(['aa_0'])), small(keys=[np.str_('aa')])):
        assert all(type(key) is str for key in tasks.keys)


def test_split_by_something_else():
    for options, message in (({'split_seed': 7, 'len_name': 'nonsense'}, "split_seed=7 .*'len_name'"),
                             ({'split_seed': 'length'}, "'length' .*or 'len'"),
                             ({'split_seed': 'len', 'len_name': 'nonsense'}, 'nonsense')):
        with pytest.raises(ArcDataError, match=message):
            small().split(2, **options)
    assert len(small().split(2, None)) == 2


# --- properties

grids = st.tuples(st.integers(1, 30), st.integers(1, 30)).flatmap(
    lambda shape: st.integers(0, 2 ** 32 - 1).map(
        lambda seed: np.random.RandomState(seed).randint(0, 10, shape)))  # noqa: NPY002
operations = st.lists(st.one_of(st.just('tp'), st.just('rt'), st.just('ex1-0'), st.permutations(range(10)).map(
    lambda colours: 'perm' + ''.join(map(str, colours)))), max_size=6)


@given(grids, operations)
def test_undo_of_view_is_identity(grid, ops):
    view = transform_array(grid, ops)
    assert np.array_equal(transform_array(view, ops, invert=True), grid)
    assert sorted(view.shape) == sorted(grid.shape)


@given(grids, operations)
def test_view_is_what_the_key_says(grid, ops):
    expected = grid
    for op in ops:
        if op == 'tp':
            expected = np.transpose(expected)
        elif op == 'rt':
            expected = np.rot90(expected)
        elif op.startswith('perm'):
            expected = np.vectorize(lambda colour, op=op: int(op[4 + colour]))(expected)
    assert np.array_equal(transform_array(grid, ops), expected)


@given(grids, operations, st.sampled_from(['\n', '|', ' / ']))
def test_text_to_grid_to_text(grid, ops, lines_sep):
    key = '.'.join(['bb_0', *ops])
    text = fmt_array(grid, lines_sep, ops)
    tasks = ArcDataset({'bb': small().challenge['bb']}, {'bb': [grid]})
    decoded, correct, info = tasks.decode(text + lines_sep + '<|eot_id|>', lines_sep, key)
    assert np.array_equal(decoded, grid) and correct is True and info == 'ALL_CORRECT'
    assert fmt_array(decoded, lines_sep, ops) == text


@given(st.text(alphabet='0123456789\n x²٣<>', max_size=60))
def test_any_text_decodes_or_is_refused(text):
    grid, correct, info = small().decode(text, '\n', 'bb_0')
    rows = [row for row in (re.sub('[^0-9]', '', line) for line in text.split('\n')) if row]
    fits = bool(rows) and len({len(row) for row in rows}) == 1 and len(rows) <= 30 and len(rows[0]) <= 30
    assert (grid is not None) == fits and (info == 'cant_decode') == (not fits)
    assert correct is (fits and grid.tolist() == [[8]])


# --- methods

def test_fmt_task_with_and_without_reply():
    fmt = {'preprompt': 'P', 'query_beg': 'I', 'reply_beg': 'O', 'reply_end': 'E', 'lines_sep': '\n'}
    tasks = small()
    assert list(tasks.fmt_task('aa_0.rt', **fmt)) == ['key', 'train', 'query', 'input', 'reply', 'text']
    assert tasks.fmt_task('aa_0.rt', **fmt) == {
        'key': 'aa_0.rt', 'train': 'PI2\n1O21EI3O3E', 'query': 'I5\n4O', 'input': 'PI2\n1O21EI3O3EI5\n4O',
        'reply': '54E', 'text': 'PI2\n1O21EI3O3EI5\n4O54E'}
    without = tasks.fmt_task('aa_0', reply=None, **fmt)
    assert 'reply' not in without and without['text'] == without['train'] and without['input']
    assert tasks.fmt_task('aa_1.tp', reply=[[1, 2]], **fmt)['reply'] == '1\n2E'
    demonstrations = tasks.fmt_task('aa.ex1-0', **fmt)
    assert demonstrations['query'] == demonstrations['input'] == '' and demonstrations['text'] == 'PI3O3EI12O2\n1E'
    assert small(solutions={}).fmt_task('aa_0', **fmt)['text'] == without['train']
    with pytest.raises(ArcDataError, match='names no test input'):
        tasks.fmt_task('aa', reply=[[1]], **fmt)
    for key in ('aa_0', 'aa_0.perm1023456789'):
        with pytest.raises(ValueError, match='0..9'):
            tasks.fmt_task(key, reply=[[10]], **fmt)
    for key, message in (('aa_2', 'test input 2'), ('cc_0', "no task 'cc'")):
        with pytest.raises(ArcDataError, match=message):
            tasks.fmt_task(key, **fmt)


@pytest.mark.parametrize('grid, message', [([[-1]], r'0\.\.9, got values -1'), ([[3, 10]], 'values 3..10'),
                                           ([[1.5]], 'type float64'), ([['1']], 'type <U1'), ([[True]], 'type bool'),
                                           ([[]], r'shape \(1, 0\)')])
def test_grids_that_hold_no_colours(grid, message):
    for action in (lambda: permute_array(grid, 'perm0123456789'), lambda: fmt_array(grid, ''),
                   lambda: fmt_array(grid, '', ['perm0123456789'])):
        with pytest.raises(ValueError, match=message):
            action()


def test_get_task_rewrites_the_pairs_that_are_shown():
    tasks = small()
    size = {key: tasks.get_length(key, 'input', **FORMAT) - 1 for key in ('aa_0.ex1', 'aa_0.ex0')}
    assert tasks.get_task('aa_0.ex1-0', size['aa_0.ex1'], 'input', **FORMAT)[0] == 'aa_0.ex1'
    assert tasks.get_task('aa_0.tp', size['aa_0.ex0'] + 1, 'input', **FORMAT)[0] == 'aa_0.tp.ex0'
    assert tasks.get_task('aa_0.ex1-0.tp', size['aa_0.ex1'] + 1, 'input', **FORMAT)[0] == 'aa_0.ex1.tp'
    texts, cut = tasks.change_keys(['aa_0']).convert_with_token_limit(len_name='input', max_tokens=size['aa_0.ex0'],
                                                                      **FORMAT)
    assert cut.keys == ['aa_0.ex0'] == [texts[0]['key']]
    with pytest.raises(TaskTooLongError, match=r'aa_0.*limit is 5'):
        tasks.as_list(len_name='input', max_tokens=5, **FORMAT)
    with pytest.raises(ArcDataError, match="len_name='imput'"):
        tasks.get_task('aa_0', 100, 'imput', **FORMAT)


def test_lengths():
    tasks = small()
    assert tasks.get_length('aa_0', 'input') == 2 + 2 + 1 + 1 + 2  # digits alone
    assert tasks.get_length('aa_0', 'input', **FORMAT) == count_tokens(tasks.fmt_task('aa_0', **FORMAT)['input']) + 1
    upright, transposed = (tasks.get_length(key, 'query', **FORMAT) for key in ('aa_0', 'aa_0.tp'))
    assert upright < transposed == tasks.get_length('aa_0', 'query', max_of_transposed=True, **GOLDEN['fmt_opts'])
    assert tasks.get_length('aa_0', 'query', max_of_transposed=True) == 2  # digits alone, either way
    ties = tasks.change_keys(['aa_1.perm0123456789', 'aa_0', 'aa_1', 'bb_0'])
    assert ties.sorted_by_len(len_name='query').keys == ['aa_1.perm0123456789', 'aa_1', 'bb_0', 'aa_0']
    assert ties.sorted_by_len(len_name='query', reverse=True).keys[1:] == ['aa_1.perm0123456789', 'aa_1', 'bb_0']


def test_tokens_of_special_tokens():
    assert count_tokens('a<|eot_id|>b</s><x>') == 5 and count_tokens('1<2') == 3


def test_max_new_tokens_options():
    assert max_new_tokens('\n</s>', '\n', max_size=2) == 4 + 1 + 2 + 1
    assert max_new_tokens('E', '', max_size=3, safety_margin=10, query_beg='I') == 9 + 1 + 10
    assert ArcDataset.max_new_tokens('E', '', safety_margin=0) == 901


def test_transform_array_without_colours():
    grid, ops = [[1, 2], [3, 4]], ['rt', 'perm1023456789']
    assert transform_array(grid, ops).tolist() == [[2, 4], [0, 3]]
    assert transform_array(grid, ops, apply_perm=False).tolist() == [[2, 4], [1, 3]]
    assert transform_array([[2, 4], [1, 3]], ops, apply_perm=False, invert=True).tolist() == grid
    assert transform_array([[2, 4], [0, 3]], ops, invert=True).tolist() == grid


def test_rand_perm():
    def drawn(**options):
        return rand_perm(10, rng=np.random.RandomState(3), **options)  # noqa: NPY002
    published = np.random.RandomState(3).permutation(10).tolist()  # noqa: NPY002
    assert drawn() == published and published[0] != 0 and drawn(sep='-') == '-'.join(map(str, published))
    assert drawn(sep='', keep_zero=True) == '0' + ''.join(str(colour) for colour in published if colour)
    assert drawn(keep_zero=True)[1:] == [colour for colour in published if colour]
    assert sorted(rand_perm(4)) == [0, 1, 2, 3]


def test_augment_keys():
    tasks = small()
    options = {'tp': True, 'rt': 'all', 'n': 2, 'perm': True, 'keep_background': True, 'shfl_ex': True}
    drawn = tasks.augment_keys(['aa_0'], rng=np.random.RandomState(4), **options)  # noqa: NPY002
    assert drawn == tasks.change_keys(['aa_0']).augment(seed=4, **options).keys and len(drawn) == 8
    assert all(re.fullmatch(r'aa_0(\.rt){0,3}(\.tp)?\.perm0\d{9}\.ex(0-1|1-0)', key) for key in drawn)
    assert tasks.augment_keys(['bb_0', 'aa_0'], tp='all') == ['bb_0', 'aa_0', 'bb_0.tp', 'aa_0.tp']
    assert tasks.augment_keys(['bb_0']) == ['bb_0'] == tasks.keys[-1:]


def test_augment_arguments_of_2025():
    tasks = small().repeat(4)
    assert tasks.augment(seed=3, perm=True, keep_bg=True).keys == tasks.augment(seed=3, perm=True,
                                                                               keep_background=True).keys
    assert all('.perm0' in key for key in tasks.augment(seed=3, perm=True, keep_bg=True).keys)
    keys = small().augment(seed=3, tp='all', rt='all', n=2, shfl_keys=True).keys
    half = len(keys) // 2
    assert half == 3 * 8 and sorted(keys[:half]) == sorted(keys[half:]) and keys[:half] != keys[half:]
    with pytest.raises(ValueError, match="rt='al'"):
        tasks.augment(seed=0, rt='al')


def test_grouped_keys():
    keys = ['bb_0.tp', 'aa_1', 'aa_0.rt', 'bb_0', 'aa_1.tp']
    groups = small().change_keys(keys).grouped_keys()
    assert groups == {'bb': [['bb_0.tp', 'bb_0']], 'aa': [['aa_0.rt'], ['aa_1', 'aa_1.tp']]} and list(groups)[0] == 'bb'
    with pytest.raises(ArcDataError, match='aa.*<task>_<i>'):
        small().change_keys(['aa']).grouped_keys()


def test_move_test_to_train_and_remove_test_data():
    moved = small().move_test_to_train()
    assert moved.keys == ['aa', 'bb'] and moved.challenge['aa']['train'][2:] == [
        {'input': [[4, 5]], 'output': [[5], [4]]}, {'input': [[6]], 'output': [[6]]}]
    removed = small().remove_test_data()
    assert removed.keys == ['aa', 'bb'] and len(removed.challenge['aa']['train']) == 2 and not removed.solutions
    with pytest.raises(ArcDataError, match='bb: no solution'):
        small(solutions={'aa': small().solutions['aa']}).move_test_to_train()


def test_decode_without_solution_or_key():
    tasks = small(solutions={})
    assert tasks.decode('12\n34', '\n')[1:] == (None, 'unknown')
    grid, correct, info = tasks.decode('12\n34', '\n', 'aa_0.rt.out1')
    assert grid.tolist() == [[3, 1], [4, 2]] and correct is None and info == 'sol_unknown'
    assert small().decode('1', '\n', 'cc_0')[1:] == (None, 'sol_unknown')
    with pytest.raises(ArcDataError, match=r"'aa_2': test input 2 \(counted from 0\) of 2"):
        small().decode('1', '\n', 'aa_2')


def test_decode_of_grids_that_are_too_large():
    rows = ['12'] * 30
    assert small().decode('\n'.join(rows), '\n')[0].shape == (30, 2)
    assert small().decode('\n'.join([*rows, '12']), '\n') == (None, False, 'cant_decode')
    assert small().decode('1' * 30, '\n')[0].shape == (1, 30)
    assert small().decode('1' * 31, '\n') == (None, False, 'cant_decode')


def test_submission():
    tasks = small()
    assert tasks.get_submission()['bb'] == [{'attempt_1': [[0]], 'attempt_2': [[0]]}]
    found = {'aa': [[{'output': np.array([[9]])}, {'output': [[5], [4]]}, {'output': [[1]]}], []],
             'bb': [[{'output': [[8]]}]]}
    submission = tasks.get_submission(found)
    assert submission['aa'][0] == {'attempt_1': [[9]], 'attempt_2': [[5], [4]]}
    assert submission['aa'][1]['attempt_1'] == [[0]]
    assert tasks.validate_submission(json.loads(json.dumps(submission))) == 0.5 + 1
    assert tasks.validate_submission({**submission, 'elsewhere': []}) == 1.5
    for broken, message in (({'aa': submission['aa']}, 'task bb: answers for 0 test inputs'),
                            ({**submission, 'bb': [{'attempt_1': [[0]]}]}, "bb, test pair 0: .'attempt_2'. missing"),
                            ({**submission, 'bb': [{'attempt_1': [[0], [1, 2]], 'attempt_2': [[0]]}]}, 'row 1'),
                            ({**submission, 'bb': [{'attempt_1': [[8]], 'attempt_2': [[0], [1, 2]]}]},
                             'bb, test pair 0, attempt_2.*row 1')):
        with pytest.raises(ArcDataError, match=message):
            tasks.validate_submission(broken)
    with pytest.raises(ArcDataError, match='task cc'):
        tasks.fill_submission({'cc': [[]]}, submission)
    with pytest.raises(ArcDataError, match='no solution'):
        small(solutions={}).validate_submission(submission)


def test_keys_that_name_nothing():
    tasks = small()
    for key, message in (('cc_0', "no task 'cc'"), ('bb_1', 'test input 1'), ('aa_0.flip', "operation 'flip'"),
                         ('aa_x', "'x' is not the number"), ('aa_0.perm01', "operation 'perm01'"),
                         ('aa_', "'' is not the number"), ('aa_²', "'²' is not the number"),
                         ('aa_0.perm1123456789', "operation 'perm1123456789'.* each once"),
                         ('aa_0.perm0123456780', "operation 'perm0123456780'")):
        with pytest.raises(ValueError, match=message):
            tasks.change_keys([key])
    with pytest.raises(ValueError, match="'ex2' asks for pair 2"):
        tasks.fmt_task('aa_0.ex2', **FORMAT)
    with pytest.raises(ValueError, match='each of the ten colours'):
        permute_array([[1]], 'perm0123456788')
    with pytest.raises(ValueError, match=r'shape \(1,\)'):
        transform_array([1], [])
