"""Make RE-ARC examples: reasoning-gym's generators propose, its verifiers check, worker processes share the tasks.

Owns the RE-ARC folder: `metadata.json` = {task: {...}} and `tasks/<task>.json` = [{'input', 'output'}, ...], the layout
of the published data. metadata.json describes finished tasks only: number of examples, why a task stopped, attempts,
seed, the sha256 of its file, and per example its difficulty `pso_difficulties` (pixels, symbols, objects).

Each attempt has a random generator of its own, seeded by seed, task and number of the attempt. So the files do not
depend on the number of processes, and a longer run's examples begin with a shorter run's.

Source: RE-ARC (Hodel, 2024, "Addressing the Abstraction and Reasoning Corpus via Procedural Example Generation"),
its loop over generator, verifier and distinct inputs, with difficulties over the full range 0..1. differs: an example
whose output equals its input is left out, as it shows nothing of the rule.
"""
import functools
import hashlib
import importlib
import importlib.util
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from arc_files import ArcDataError, read_rearc_metadata, write_atomically, write_json

PATIENCE = 1000  # attempts without a new example after which a task has no more to give
SECONDS_PER_ATTEMPT = 120  # a generator that takes longer is stuck
SLOWEST = ('f9012d9b', '0e206a2e', '447fd412', 'c3f564a4', '150deff5', '6aa20dc0')  # begun first, so as not to end last
SECONDS_PER_SAVE = 20  # of metadata.json; a killed run loses at most so much


class _TooSlow(Exception):
    """An attempt ran into its time limit."""


@dataclass(frozen=True)
class Job:
    """What a worker is asked for: one task's file."""
    path: Path
    task: str
    examples: int
    seed: int
    seconds: float


@functools.cache
def _rearc():
    """Return (generators, verifiers, utils) of reasoning-gym, without importing the rest of that package.

    Its `__init__` imports every kind of puzzle with their dependencies, of which RE-ARC needs none.
    """
    package = importlib.util.find_spec('reasoning_gym')
    if package is None:
        raise ArcDataError('reasoning-gym is not installed: `pip install --no-deps reasoning-gym` (or `make`)')
    folder = Path(package.origin).parent / 'arc' / 'rearc_utils'
    spec = importlib.util.spec_from_file_location('_rearc', folder / '__init__.py',
                                                  submodule_search_locations=[str(folder)])
    sys.modules['_rearc'] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    generators, verifiers, utils = (importlib.import_module(f'_rearc.{name}')
                                    for name in ('generators', 'verifiers', 'utils'))
    return utils.get_generators(generators), utils.get_verifiers(verifiers), utils


def rearc_tasks():
    """Return the names of the 400 tasks, sorted."""
    return sorted(_rearc()[0])


def _attempt(job, number, seen):
    """Return (example with its difficulty, None) or (None, what was wrong); (None, None) for an input already seen."""
    generators, verifiers, utils = _rearc()
    try:
        example = generators[job.task](random.Random(f'{job.seed}/{job.task}/{number}'), 0, 1)
        if not (utils.is_grid(example['input']) and utils.is_grid(example['output'])):
            return None, 'not a grid'
        if verifiers[job.task](example['input']) != example['output']:
            return None, 'the verifier disagrees'
        if example['input'] == example['output']:
            return None, 'output equals input'
        if example['input'] in seen:
            return None, None
        difficulty = round(utils.get_pso_difficulty(example), 4)
    except _TooSlow:
        return None, f'stuck for {SECONDS_PER_ATTEMPT} s'
    except Exception as error:  # whatever goes wrong inside a generator costs one attempt and is counted
        return None, f'{type(error).__name__}: {error}'
    return {'input': example['input'], 'output': example['output'], 'difficulty': difficulty}, None


def _with_limit(job, number, seen):
    """Run an attempt under an alarm (a worker runs its jobs in its main thread, where alarms arrive)."""
    def stop(*_):
        raise _TooSlow
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_ATTEMPT)
    try:
        return _attempt(job, number, seen)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _generate_task(job):
    """Make and write the file of one task (in a worker process); return its entry of metadata.json."""
    examples, difficulties, seen = [], [], set()
    rejected, last_fault, attempts, idle, started = 0, None, 0, 0, time.monotonic()
    stopped = 'enough'
    while len(examples) < job.examples:
        if idle >= PATIENCE:
            stopped = f'nothing new in {PATIENCE} attempts'
            break
        if time.monotonic() - started > job.seconds:
            stopped = 'time limit'
            break
        example, fault = _with_limit(job, attempts, seen)
        attempts, idle = attempts + 1, idle + 1
        if fault is not None:
            rejected, last_fault = rejected + 1, fault
        elif example is not None:
            seen.add(example['input'])
            difficulties.append(example.pop('difficulty'))
            examples.append(example)
            idle = 0
    data = json.dumps(examples, separators=(',', ':')).encode()
    write_atomically(job.path / 'tasks' / f'{job.task}.json', data)
    return {'n_examples': len(examples), 'stopped': stopped, 'attempts': attempts, 'rejected': rejected,
            'last_fault': last_fault, 'seed': job.seed, 'sha256': hashlib.sha256(data).hexdigest(),
            'pso_difficulties': difficulties}


def _is_finished(job, entry):
    """Say whether an earlier run's file serves: the same seed, enough examples or no more to be had, intact."""
    if entry is None or entry['seed'] != job.seed:
        return False
    if entry['n_examples'] < job.examples and not entry['stopped'].startswith('nothing new'):
        return False
    file = job.path / 'tasks' / f'{job.task}.json'
    return file.exists() and hashlib.sha256(file.read_bytes()).hexdigest() == entry['sha256']


def _earlier_metadata(path):
    metadata = read_rearc_metadata(path) if (path / 'metadata.json').exists() else {}
    foreign = [task for task, entry in metadata.items() if 'sha256' not in entry]
    if foreign:
        raise ArcDataError(f'{path}: RE-ARC data that was not made here (task {foreign[0]}); name another folder')
    return metadata


def _save_metadata(path, metadata):
    write_json(path / 'metadata.json', dict(sorted(metadata.items())))


def _take_over(futures, metadata):
    """Enter the results that there are into `metadata`; return {task: what went wrong} of the jobs that failed."""
    failures = {}
    for task, future in futures.items():
        if future.done() and not future.cancelled():
            if (error := future.exception()) is None:
                metadata[task] = future.result()
            else:
                failures[task] = f'{type(error).__name__}: {error}'
    return failures


def _run_jobs(jobs, path, metadata, processes):
    """Run jobs in worker processes, adding to `metadata` (and to its file) as they finish.

    A job that fails stops no other. If the run is stopped, what is done by then is kept.

    Returns: {task: what went wrong}.
    """
    workers = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=multiprocessing.get_context('spawn'))
    futures, saved = {}, time.monotonic()
    try:
        for job in jobs:
            futures[job.task] = workers.submit(_generate_task, job)
        for _ in tqdm(as_completed(futures.values()), total=len(jobs), desc='RE-ARC', unit='task'):
            if time.monotonic() - saved > SECONDS_PER_SAVE:
                _take_over(futures, metadata)
                _save_metadata(path, metadata)
                saved = time.monotonic()
    except BrokenProcessPool:
        pass  # while jobs were handed out: those with a future say so themselves, the others are added below
    finally:
        workers.shutdown(cancel_futures=True)
        failures = _take_over(futures, metadata)
        _save_metadata(path, metadata)
    return failures | {job.task: 'the workers had ended before it' for job in jobs if job.task not in futures}


def _failure_report(path, failures):
    groups = {}
    for task, reason in failures.items():
        groups.setdefault(reason, []).append(task)
    return (f'{path}: {len(failures)} tasks failed, those that are done are kept. Run the command again, with fewer '
            'processes if memory ran out:\n' +
            '\n'.join(f'  {", ".join(tasks)}: {reason}' for reason, tasks in groups.items()))


def generate_rearc(path, examples, processes=None, seed=42, seconds_per_task=7200, tasks=None):  # noqa: PLR0913
    """Fill a RE-ARC folder; tasks that an earlier run has finished are kept.

    Args:
        path: folder to write; it may hold an earlier run's tasks.
        examples: distinct examples per task. Some generators have fewer to give: such a task stops after `PATIENCE`
            attempts without a new one.
        processes: worker processes, all cores by default; the files do not depend on it.
        seed: changes all examples.
        seconds_per_task: safety limit; a task that runs into it keeps what it has and is tried again by another run.
        tasks: names, all 400 by default.

    Returns: {task: entry of metadata.json} of the tasks asked for.

    Raises: ArcDataError for an unknown task, a folder with RE-ARC data from elsewhere or, once the others are done,
        tasks whose job failed.
    """
    path = Path(path)
    names = rearc_tasks()
    wanted = names if tasks is None else sorted(set(tasks))
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ArcDataError(f'RE-ARC has no task {unknown[0]!r}; the names are those of the ARC-AGI-1 training set')
    metadata = _earlier_metadata(path)
    jobs = [Job(path, task, examples, seed, seconds_per_task) for task in wanted]
    jobs = [job for job in jobs if not _is_finished(job, metadata.get(job.task))]
    jobs.sort(key=lambda job: job.task not in SLOWEST)
    if jobs:
        print(f'RE-ARC: {len(wanted) - len(jobs)} of {len(wanted)} tasks are there, making {len(jobs)}')
        failures = _run_jobs(jobs, path, metadata, processes or os.cpu_count())
        if failures:
            raise ArcDataError(_failure_report(path, failures))
    return {task: metadata[task] for task in wanted}
