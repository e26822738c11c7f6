"""ArcDataset equals the published system: keys, texts, cuts, decoding, splits and RE-ARC draws."""
import hashlib
import json
from pathlib import Path

import pytest

from arc_loader import (
    ArcDataset,
    TaskTooLongError,
    count_tokens,
    max_new_tokens,
)

DATA = Path(__file__).parent / 'data'
GOLDEN = json.loads((DATA / 'arc_loader_evaluation.json').read_text())
MORE = json.loads((DATA / 'arc_loader_more.json').read_text())
FORMAT = {name: value for name, value in GOLDEN['fmt_opts'].items() if name != 'max_tokens'}


def sha(texts, separator):
    return hashlib.sha256(separator.join(texts).encode()).hexdigest()


# --- the published values

def by_recipe(tasks, recipe, seed):
    drawn = {'tp': True, 'rt': True, 'perm': True, 'shfl_ex': True, 'seed': seed}
    if recipe == 'infer':
        return tasks.repeat(2).augment(**{**drawn, 'tp': 'all', 'rt': 'all'})
    if recipe == 'train':
        return tasks.remove_test_data().repeat(3, seed=seed).augment(**drawn)
    if recipe == 'keep_background':
        return tasks.augment(tp=True, rt='all', n=2, perm=True, keep_background=True, seed=seed)
    assert recipe == 'test_to_train'
    return tasks.move_test_to_train().repeat(2).augment(**drawn)


def test_golden_keys(evaluation):
    assert len(evaluation.keys) == GOLDEN['n_keys'] and sha(evaluation.keys, '\n') == GOLDEN['keys_sha256']
    assert len(GOLDEN['augment']) == 8
    for case in GOLDEN['augment']:
        keys = by_recipe(evaluation, case['recipe'], case['seed']).keys
        assert all(type(key) is str for key in keys)
        assert len(keys) == case['n'] and keys[:len(case['first'])] == case['first']
        assert keys[-len(case['last']):] == case['last'] and sha(keys, '\n') == case['sha256']


@pytest.mark.parametrize('case', GOLDEN['format'], ids=lambda case: f"{case['recipe']}-{case['seed']}")
def test_golden_texts(evaluation, case):
    tasks = by_recipe(evaluation, case['recipe'], case['seed'])
    part = 'input' if case['recipe'] == 'infer' else 'text'
    texts = tasks.as_list(len_name=part, **GOLDEN['fmt_opts'])
    assert sha([fmt['text'] for fmt in texts], '\0') == case['text_sha256']
    assert sha([fmt['input'] for fmt in texts], '\0') == case['input_sha256']
    assert sum(count_tokens(fmt['text']) for fmt in texts) == case['tokens']
    assert all(sample in texts for sample in case.get('samples', ()))


def test_golden_decode(evaluation):
    assert GOLDEN['decode']
    for case in GOLDEN['decode']:
        grid, correct, info = evaluation.decode(case['text'], '\n', case['key'])
        assert (None if grid is None else grid.tolist(), correct, info) == (case['grid'], case['correct'], case['info'])


def test_golden_split_and_sort(evaluation):
    for case in GOLDEN['split']:
        options = {'len_name': case['len_name']} if 'len_name' in case else {}
        parts = evaluation.split(case['n'], case['split_seed'], **options)
        assert [len(part.keys) for part in parts] == case['sizes']
        assert [part.keys[0] for part in parts] == case['first']
        assert [sha(part.keys, '\n') for part in parts] == case['sha256']
    for case in GOLDEN['sort']:
        keys = evaluation.sorted_by_len(len_name=case['len_name'], reverse=case['reverse']).keys
        assert keys[:len(case['first'])] == case['first'] and sha(keys, '\n') == case['sha256']


def test_golden_cut(evaluation):
    case = GOLDEN['cut']
    views = evaluation.augment(tp='all', rt=True, perm=True, shfl_ex=True, seed=case['seed'])
    cut = {}
    for key in views.keys:
        try:
            cut[key] = views.get_task(key, max_tokens=case['max_tokens'], len_name=case['len_name'], **FORMAT)[0]
        except TaskTooLongError as error:
            assert key.split('_')[0] in str(error) and str(error.length) in str(error) and '1500' in str(error)
            cut[key] = f'too long: {key}'
    assert sum(new != key for key, new in cut.items()) == case['n_cut']
    assert sum(new.startswith('too long') for new in cut.values()) == case['n_too_long']
    assert [[key, cut[key]] for key, _ in case['examples']] == case['examples']
    assert sha(cut.values(), '\n') == case['sha256']


@pytest.mark.parametrize('case, options', [
    ('rearc_plain', {'n': 5, 'sizes': [3, 6], 'seed': 42}),
    ('rearc_in_order', {'n': 5, 'sizes': [3, 6], 'seed': 42, 'shuffle': False}),
    ('rearc_mixed', {'n': 4, 'sizes': [3, 6], 'seed': 7}),
])
def test_golden_rearc(rearc_folder, evaluation, case, options):
    expected = MORE[case]
    if case == 'rearc_mixed':
        first = sorted(evaluation.challenge)[:5]
        five = ArcDataset({name: evaluation.challenge[name] for name in first},
                          {name: evaluation.solutions[name] for name in first}, is_orig=True)
        options = {**options, 'mix_datasets': {'arc_eval': five.move_test_to_train().repeat(2)}}
    tasks = ArcDataset.load_from_rearc(rearc_folder, **options)
    texts = [fmt['text'] for fmt in tasks.as_list(**FORMAT)]
    assert tasks.keys == expected['keys'] and tasks.is_orig
    assert texts[0] == expected['first_text'] and sha(texts, '\0') == expected['texts_sha256']


def test_golden_idle_draws(evaluation):
    first = MORE['augment_idle_draws']['first']
    assert evaluation.augment(seed=5, perm=True).keys[:len(first)] == first


def test_published_format_needs_932_tokens():
    assert max_new_tokens(**GOLDEN['fmt_opts']) == 932
