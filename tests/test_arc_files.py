"""Reading data: faults are named where they are; RE-ARC, neoneye's collection, Sudoku; all real data loads."""
import json
import re
from pathlib import Path

import pytest

from arc_downloader import download_arc_agi_2
from arc_loader import (
    ArcDataError,
    ArcDataset,
)

DATA = Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'arc_loader_evaluation.json').read_text())
MORE = json.loads((DATA / 'arc_loader_more.json').read_text())
FORMAT = {name: value for name, value in GOLDEN['fmt_opts'].items() if name != 'max_tokens'}


def small(**changes):
    """A data set of two tasks, one of them with two test inputs."""
    challenge = {'aa': {'train': [{'input': [[1, 2]], 'output': [[2], [1]]}, {'input': [[3]], 'output': [[3]]}],
                        'test': [{'input': [[4, 5]]}, {'input': [[6]]}]},
                 'bb': {'train': [{'input': [[7, 7, 7]], 'output': [[7]]}], 'test': [{'input': [[8]]}]}}
    solutions = {'aa': [[[5], [4]], [[6]]], 'bb': [[[8]]]}
    return ArcDataset(challenge, **{'solutions': solutions, 'is_orig': True, **changes})


# --- faults in files

PAIR = '{"input": [[1, 2], [3, 4]], "output": [[1]]}'
TASK = f'{{"train": [{PAIR}, {PAIR}], "test": [{{"input": [[5]]}}]}}'


def load_challenges(path, text):
    file = path / 'some_challenges.json'
    file.write_text(text)
    return ArcDataset.load_from_json(file)


@pytest.mark.parametrize('old, new, places', [
    ('[[1, 2], [3, 4]]', '[[1, 2], [3]]', 'train pair 0, input, row 1'),
    ('[[1, 2], [3, 4]]', '[[1, 2], [3, 10]]', 'train pair 0, input, row 1, column 1'),
    ('[[1, 2], [3, 4]]', '[[1, 2], [-1, 4]]', 'train pair 0, input, row 1, column 0'),
    ('[[1, 2], [3, 4]]', '[[1, 2], [3.0, 4]]', 'train pair 0, input, row 1, column 0'),
    ('[[1, 2], [3, 4]]', '[[1, true], [3, 4]]', 'train pair 0, input, row 0, column 1'),
    ('[[1, 2], [3, 4]]', '[[1, 2], []]', 'train pair 0, input, row 1'),
    ('[[1, 2], [3, 4]]', '[]', 'train pair 0, input'),
    ('[[1, 2], [3, 4]]', 'null', 'train pair 0, input'),
    ('[[1, 2], [3, 4]]', json.dumps([[0] * 31]), 'train pair 0, input, row 0'),
    ('[[1, 2], [3, 4]]', json.dumps([[0]] * 31), 'train pair 0, input'),
    ('[[5]]', '[["5"]]', 'test pair 0, input, row 0, column 0'),
    ('[[5]]', '[[5], [5, 5]]', 'test pair 0, input, row 1'),
    ('"input": [[5]]', '"input": [[5]], "output": [[5]]', 'test pair 0: .*`output`.*remove'),
    (', "output": [[1]]', '', 'train pair 0: .*`output`.*add'),
    (f'[{PAIR}, {PAIR}]', '[]', 'train pairs'),
    ('"train"', '"trian"', '`trian`'),
    ('"test"', '"name": "other", "test"', "'other'"),
])
def test_faults_of_a_challenges_file(tmp_path, old, new, places):
    assert old in TASK
    with pytest.raises(ArcDataError, match=f'some_challenges.json, task aa.*{places}') as caught:
        load_challenges(tmp_path, f'{{"zz": {TASK}, "aa": {TASK.replace(old, new, 1)}}}')
    assert re.search('; (a grid|remove|add|correct)', str(caught.value))


def test_faults_of_the_second_pair_are_counted(tmp_path):
    with pytest.raises(ArcDataError, match='train pair 1, output, row 0, column 0'):
        load_challenges(tmp_path, '{"aa": %s}' % TASK.replace(f'{PAIR}]', PAIR.replace('[[1]]', '[[12]]') + ']'))


@pytest.mark.parametrize('text, message', [
    ('{"aa": ', 'some_challenges.json: not JSON'),
    ('\udce4', 'not JSON'),
    ('[1]', 'some_challenges.json: expected an object'),
    ('{}', 'some_challenges.json: no tasks'),
    (f'{{"aa": {TASK}, "aa": {TASK}}}', "'aa' appears twice"),
    (f'{{"a_a": {TASK}, "a.a": {TASK}}}', "'a_a' and 'a.a' both get the name 'a-a'"),
])
def test_faults_of_a_whole_file(tmp_path, text, message):
    (tmp_path / 'some_challenges.json').write_bytes(text.encode(errors='surrogateescape'))
    with pytest.raises(ArcDataError, match=message):
        ArcDataset.load_from_json(tmp_path / 'some_challenges.json')


def test_names_and_name_fields(tmp_path):
    named = TASK.replace('"test"', '"name": "a_b.c", "test"')
    tasks = load_challenges(tmp_path, f'{{"a_b.c": {named}}}')
    assert tasks.keys == ['a-b-c_0'] and set(tasks.challenge['a-b-c']) == {'train', 'test'}
    with pytest.raises(ArcDataError, match="'a_b'"):
        ArcDataset({'a_b': tasks.challenge['a-b-c']})


@pytest.mark.parametrize('solutions, message', [
    ({'bb': [[[1]]]}, 'solutions.json, task aa: no solution for its test pair 0'),
    ({'aa': [[[1]], [[2]]]}, 'solutions.json, task aa: 2 solutions for 1 test inputs'),
    ({'aa': [[[1], [2, 3]]]}, 'solutions.json, task aa, test pair 0, output, row 1'),
    ({'aa': [[[1], [False]]]}, 'solutions.json, task aa, test pair 0, output, row 1, column 0'),
    ({'aa': [{'output': [[1]]}]}, 'solutions.json, task aa, test pair 0: Expected `array`'),
    ([], 'expected an object'),
])
def test_faults_of_a_solutions_file(tmp_path, solutions, message):
    file = tmp_path / 'solutions.json'
    file.write_text(json.dumps(solutions))
    with pytest.raises(ArcDataError, match=message):
        load_challenges(tmp_path, f'{{"aa": {TASK}}}').load_solutions(file)


def test_a_solutions_file_may_hold_more_tasks(tmp_path):
    (tmp_path / 'solutions.json').write_text(json.dumps({'aa': [[[1]]], 'more': [[[1]], [[2]]]}))
    tasks = load_challenges(tmp_path, f'{{"aa": {TASK}}}').load_solutions(tmp_path / 'solutions.json')
    assert tasks.solutions == {'aa': [[[1]]]}
    with pytest.raises(ArcDataError, match='2 solutions for 1'):
        ArcDataset(tasks.challenge, {'aa': [[[1]], [[1]]]})


# --- the other sources

def test_rearc_faults(rearc_folder, tmp_path):
    with pytest.raises(ArcDataError, match='aaaa0000: 5 examples are missing: 30 of 35'):
        ArcDataset.load_from_rearc(rearc_folder, n=5, sizes=[6], seed=0)
    with pytest.raises(ArcDataError, match='aaaa0000.*pso_difficulties'):
        ArcDataset.load_from_rearc(rearc_folder, n=1, sizes=[6], seed=0, remove_easiest=0.5)
    with pytest.raises(ArcDataError, match=r'metadata.json: missing.*arc_downloader.py re_arc'):
        ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[1], seed=0)
    (tmp_path / 'metadata.json').write_text('{"aa": {}}')
    with pytest.raises(ArcDataError, match=r'aa.json: missing'):
        ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[1], seed=0)
    (tmp_path / 'tasks').mkdir()
    for text, message in (('[{"input": [[1]], "output": [[1], [1, 2]]}]', 'aa.json, task aa, example 0, output, row 1'),
                          ('[{"input": [[1.5]], "output": [[1]]}]', 'example 0, input, row 0, column 0'),
                          ('[{"input": [[1]]}]', 'example 0: .*`output`'), ('[{', 'not JSON')):
        (tmp_path / 'tasks' / 'aa.json').write_text(text)
        with pytest.raises(ArcDataError, match=message):
            ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[1], seed=0)


def test_rearc_remove_easiest(tmp_path):
    (tmp_path / 'tasks').mkdir()
    examples = [{'input': [[i]], 'output': [[i]]} for i in range(8)]
    (tmp_path / 'tasks' / 'aa.json').write_text(json.dumps(examples))
    (tmp_path / 'metadata.json').write_text(json.dumps({'aa': {'pso_difficulties': [.1, .9, .2, .8, .3, .7, .4, .6]}}))
    tasks = ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[3], seed=0, remove_easiest=0.5)
    task = tasks.challenge['rearc-aa00']
    assert sorted(pair['input'][0][0] for pair in task['train'] + task['test']) == [1, 3, 5, 7]
    with pytest.raises(ArcDataError, match='1 examples are missing'):
        ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[3], seed=0, remove_easiest=0.7)
    with pytest.raises(ArcDataError, match='rearc-aa00'):
        ArcDataset.load_from_rearc(tmp_path, n=1, sizes=[3], seed=0, mix_datasets={
            'rearc': ArcDataset({'aa00': small().challenge['bb']})})


def test_rearc_epochs_beyond_255(tmp_path):
    (tmp_path / 'tasks').mkdir()
    (tmp_path / 'metadata.json').write_text('{"aa": {}}')
    (tmp_path / 'tasks' / 'aa.json').write_text(json.dumps([{'input': [[1]], 'output': [[2]]}] * 514))
    keys = ArcDataset.load_from_rearc(tmp_path, n=257, sizes=[1], seed=0).keys
    assert len(set(keys)) == 257 and keys[:2] == ['rearc-aa00_0', 'rearc-aa01_0']
    assert keys[255:] == ['rearc-aaff_0', 'rearc-aa100_0']


def solved(colour):
    return json.dumps({'train': [{'input': [[1]], 'output': [[2]]}], 'test': [{'input': [[3]], 'output': [[colour]]}]})


def test_neoneye(tmp_path):
    names = ('one/x', 'one/x_v2', 'one/y', 'two/z_v2', 'two/z_v10', 'two/w.a')
    for colour, name in enumerate(names, start=1):
        file = tmp_path / 'data' / f'{name}.json'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(solved(colour))
    tasks = ArcDataset.load_from_neoneye(tmp_path)
    assert tasks.solutions == {'x-v2': [[[2]]], 'y': [[[3]]], 'z-v10': [[[5]]], 'w-a': [[[6]]]} and tasks.is_orig
    assert tasks.challenge['y']['test'] == [{'input': [[3]]}]
    (tmp_path / 'data' / 'two' / 'y.json').write_text(solved(1))
    with pytest.raises(ArcDataError, match=r"two/y.json: its task gets the name 'y', which .*one/y.json"):
        ArcDataset.load_from_neoneye(tmp_path)
    (tmp_path / 'data' / 'two' / 'y.json').write_text('{"train": [], "test": []}')
    (tmp_path / 'data' / 'one' / 'y.json').unlink()
    with pytest.raises(ArcDataError, match='y.json, task y, train pairs'):
        ArcDataset.load_from_neoneye(tmp_path)
    with pytest.raises(ArcDataError, match='no task files'):
        ArcDataset.load_from_neoneye(tmp_path / 'nowhere')


def test_sudoku(tmp_path):
    file = tmp_path / 'sudoku.csv'
    rows = [f'{number},{"." * 80}{number % 10},{str(1 + number % 9) * 81},{number / 10}' for number in range(1, 30)]
    file.write_text('\n'.join(['id,puzzle,solution,difficulty', *rows]))
    tasks = ArcDataset.load_sudoku_csv(file, examples_per_challenge=2, num_challenges=3)
    assert sorted(tasks.challenge) == ['sudoku3', 'sudoku6', 'sudoku9'] and tasks.is_orig and not tasks.is_fake
    file.write_text('\ufeff' + file.read_text())  # as spreadsheets write it
    assert ArcDataset.load_sudoku_csv(file, 2, 3).challenge == tasks.challenge
    task = tasks.challenge['sudoku3']
    assert task['train'][1]['input'][8] == [0] * 8 + [2] and tasks.solutions['sudoku3'] == [[[4] * 9] * 9]
    tasks = ArcDataset.load_sudoku_csv(file, 1, 2, diff_lim=1.4, diff_lim_lower=0.9, min_indx=8, max_indx=13)
    assert sorted(tasks.challenge) == ['sudoku11', 'sudoku13']  # rows 10..13 of 9..13
    with pytest.raises(ArcDataError, match='rows for 7 tasks only'):
        ArcDataset.load_sudoku_csv(file)
    file.write_text('id,puzzle,solution,difficulty\n7,12,3,0')
    with pytest.raises(ArcDataError, match='row 0, task sudoku7, puzzle'):
        ArcDataset.load_sudoku_csv(file)
    file.write_text('id,puzzle\n')
    with pytest.raises(ArcDataError, match="no column .'solution', 'difficulty'."):
        ArcDataset.load_sudoku_csv(file)


# --- the real data

def round_trips(tasks):
    views = tasks.augment(seed=1, tp=True, rt=True, perm=True, shfl_ex=True)
    for key, fmt in zip(views.keys, views.as_list(**FORMAT), strict=True):
        assert tasks.decode(fmt['reply'], '\n', key)[2] == 'ALL_CORRECT'
    return len(tasks.challenge)


def test_all_of_arc_agi_loads_and_round_trips(arc_folder, tmp_path):
    download_arc_agi_2(tmp_path)
    counts = []
    for folder, prefix in ((arc_folder, 'arc-agi'), (tmp_path, 'arc-agi-2')):
        for part in ('training', 'evaluation'):
            tasks = ArcDataset.load_from_json(folder / f'{prefix}_{part}_challenges.json')
            counts.append(round_trips(tasks.load_solutions(folder / f'{prefix}_{part}_solutions.json')))
    assert counts == [400, 400, 1000, 120]
