"""The order of tasks: held back, shared, set aside, stopped; the time limit; what inference does with "none now"."""

import os
import signal
import time
from types import SimpleNamespace

import pytest

import task_queue
import torchrun_tools
from arc_loader import ArcDataset
from inference_tools import inference_run
from mini_model import MINI_FORMAT
from script_runs import CHALLENGES
from small_models import CopyModel, serve_scripted_models
from task_queue import STOP_FILE, RunClock, TaskQueue, TimeIsUp, task_order, tasks_at_once


@pytest.fixture
def workers(monkeypatch):
    """Two queues' worth of torchrun: one counter for all, tries are kept."""
    numbers = iter(range(10**6))
    monkeypatch.setattr(task_queue, "this_worker", lambda: torchrun_tools.Worker(0, 2, 0, 0))
    monkeypatch.setattr(task_queue, "Counter", lambda name: type("Shared", (), {"next": lambda self: next(numbers)})())


def tries(folder):
    return sorted(path.name for path in (folder / "tries").glob("*"))


def a_run(device="cpu", workers=1, **config):
    values = {"ttt": "joint", "time_limit": None, "tasks_at_once": None} | config
    return SimpleNamespace(config=SimpleNamespace(**values), device=device,
                           worker=torchrun_tools.Worker(0, workers, 0, 0))  # fmt: skip


@pytest.mark.parametrize(("options", "expected"), [
    ({}, "abc"), ({"ttt": "per-task"}, "bca"), ({"time_limit": 1.0}, "bca"), ({"workers": 2}, "acb"),
    ({"workers": 2, "ttt": "per-task"}, "acb"), ({"workers": 2, "time_limit": 1.0}, "bca"),
])  # fmt: skip
def test_tasks_are_begun_in_the_order_that_suits_the_run(options, expected):
    tasks = SimpleNamespace(challenge=dict.fromkeys("abc"))
    tokens = {"a_0": 20, "b_0": 9, "c_0": 6, "c_1": 6}
    assert task_order(a_run(**options), tasks, tokens) == list(expected)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, 80), ({"device": "cuda"}, 80), ({"tasks_at_once": 3}, 3), ({"time_limit": 1.0}, 1), ({"workers": 2}, 1),
    ({"device": "cuda", "time_limit": 1.0}, 10), ({"device": "cuda", "workers": 2}, 5),
    ({"device": "cuda", "workers": 40}, 1),
])  # fmt: skip
def test_a_worker_has_all_tasks_under_way_only_if_it_is_alone_and_has_time(options, expected):
    assert tasks_at_once(a_run(**options), range(80)) == expected


def test_a_lone_worker_gets_all_tasks_and_keeps_no_tries(tmp_path):
    queue = TaskQueue(tmp_path, ["a", "b", "c"], at_once=3)
    queue.finished("b")
    assert list(queue) == ["a", "c"] and not tries(tmp_path)


def test_tasks_are_held_back_until_one_is_finished(tmp_path):
    queue = TaskQueue(tmp_path, ["a", "b", "c"], at_once=2)
    tasks = iter(queue)
    assert [next(tasks) for _ in range(4)] == ["a", "b", None, None]
    queue.finished("a")
    assert [next(tasks) for _ in range(2)] == ["c", None]
    queue.finished("c")
    assert list(tasks) == []


def test_workers_share_the_tasks_and_leave_tries_until_they_are_finished(tmp_path, workers):
    first, second = (TaskQueue(tmp_path, ["a", "b/c", "d"]) for _ in range(2))
    assert [next(iter(first)), next(iter(second))] == ["a", "b/c"]
    assert tries(tmp_path) == ["a.1", "b%2Fc.1"]
    first.finished("a")
    assert tries(tmp_path) == ["b%2Fc.1"]
    second.forget()
    assert tries(tmp_path) == []


def test_a_task_that_was_left_once_runs_alone_and_one_left_twice_is_set_aside(tmp_path, workers):
    (tmp_path / "tries").mkdir()
    for name in ("b.1", "c.1", "c.2"):
        (tmp_path / "tries" / name).touch()
    queue = TaskQueue(tmp_path, ["a", "b", "c", "d"], at_once=9)
    tasks = iter(queue)
    assert [next(tasks) for _ in range(2)] == ["a", None], "b waits until it is alone"
    queue.finished("a")
    assert [next(tasks) for _ in range(2)] == ["b", None], "and nothing begins beside it"
    assert tries(tmp_path) == ["b.1", "b.2", "c.1", "c.2"]
    queue.finished("b")
    assert next(tasks) == "d" and queue.set_aside() == ["c"]
    queue.finished("d")
    assert tries(tmp_path) == ["c.1", "c.2"] and list(tasks) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_is_asked_to_end_takes_its_tries_back(tmp_path, workers, number):
    tasks = iter(TaskQueue(tmp_path, ["a", "b"], at_once=2))
    assert [next(tasks), next(tasks)] == ["a", "b"]
    with pytest.raises(SystemExit) as end:
        os.kill(os.getpid(), number)
    assert end.value.code == 128 + number and tries(tmp_path) == []
    with pytest.raises(SystemExit):
        os.kill(os.getpid(), number)  # torchrun and SLURM may both send one
    tasks.close()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_stop_file_lets_no_task_begin(tmp_path):
    queue = TaskQueue(tmp_path, ["a", "b"])
    tasks = iter(queue)
    assert next(tasks) == "a"
    (tmp_path / STOP_FILE).touch()
    queue.finished("a")
    assert list(tasks) == [] and queue.stopped


def test_the_clock_interrupts_whatever_is_running(monkeypatch):
    clock = RunClock(hours=1)
    assert 3560 < clock.left() <= 3564, "36 seconds are kept for writing"
    before = signal.getsignal(signal.SIGALRM)
    clock.seconds = time.time() - clock.begin + 0.2
    begin = time.perf_counter()
    with pytest.raises(TimeIsUp), clock.running():
        time.sleep(30)
    assert time.perf_counter() - begin < 5 and signal.getsignal(signal.SIGALRM) == before
    with pytest.raises(TimeIsUp), clock.running():
        raise AssertionError("nothing begins after the time")
    without = RunClock()
    with without.running():
        assert without.left() is None


@pytest.mark.parametrize("search", ["tree", "plain"])
def test_inference_asks_for_tasks_one_after_the_other(search, monkeypatch):
    serve_scripted_models(monkeypatch)
    model, under_way, order = CopyModel(), [], []
    dataset = ArcDataset({name: CHALLENGES[name] for name in ("last", "other")}, is_orig=True)

    def one_at_a_time():
        for name in ("other", "last"):
            while under_way:
                yield None
            under_way.append(name)
            yield name

    def callback(candidates, name, value, print_func):
        order.append(name)
        if name in ("other_0", "last_1"):
            under_way.clear()

    found = inference_run(dataset, MINI_FORMAT, (model, model.tokenizer), 0.2, callback=callback, max_new_tokens=20,
                          print_func=None, progress=False, search=search, order=one_at_a_time())  # fmt: skip
    assert order == ["other_0", "last_0", "last_1"] and set(found) == {"other", "last"}
    alone = inference_run(dataset, MINI_FORMAT, (model, model.tokenizer), 0.2, max_new_tokens=20, print_func=None,
                          progress=False, search=search, order=["last"])  # fmt: skip
    assert set(alone) == {"last"}
    assert [[c["scores_inf"] for c in answer] for answer in alone["last"]] == [
        [c["scores_inf"] for c in answer] for answer in found["last"]]
