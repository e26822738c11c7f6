"""Training by two workers of torchrun: the result of one process, also after a worker died. And time limits."""

import json
import os
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import finetuning_tools
import training_callbacks
import training_tools
import unsloth_backend
from conftest import make_bpe_tokenizer, make_tiny_llama
from mini_model import MINI_FORMAT, MiniSize, make_model, make_tokenizer
from model_tools import create_lora, load_model, save_model_and_tokenizer
from run_tools import PUBLISHED_FORMAT, format_options
from script_runs import PAIRS, TRAINING_CODE, run_here
from small_models import small_pair
from test_training_tools import SETTINGS, make_texts, trainable_weights
from torchrun_tools import Worker, largest_over_workers, process_group, this_worker
from trainers import SharedBatches, batches_of_worker
from training_callbacks import TimeLimit
from training_tools import complete_checkpoints, train_lora

COUNTS = ("texts", "tokens", "loss_tokens", "steps")
# name: (model, number of texts, changed settings, seconds); a step has 4 texts unless the settings say otherwise
JOBS = {
    "even": ("Mini", 8, {"epochs": 2}, None),
    "odd number of texts": ("Mini", 11, {"epochs": 2, "warmup_ratio": 0.5}, None),
    "a last step of one text": ("Llama", 9, {"gradient_checkpointing": True}, None),
    "four bits": ("NF4", 6, {}, None),
    "not packed": ("Mini", 11, {"packing": False}, None),
    "batches split and accumulated": ("Mini", 23, {"batch_size": 4, "gradient_accumulation": 3}, None),
    "uneven shares": ("Mini", 7, {"batch_size": 3, "gradient_accumulation": 1}, None),
    "one text in a step": ("Mini", 3, {"batch_size": 1, "gradient_accumulation": 1}, None),
    "no time": ("Mini", 8, {}, 0),
    "little time": ("Mini", 40, {"epochs": 1000}, 1.0),
}
# the program of another torchrun: a script whose worker 1 dies in step 4 of the first start
DIES = """
import os, runpy, sys
import run_tools
from torchrun_tools import this_worker
from training_callbacks import Progress
step_ended = Progress.on_step_end
def die_in_step_4(self, args, state, control, **rest):
    if (this_worker().rank, this_worker().start, state.global_step) == (1, 0, 4):
        os.kill(os.getpid(), 9)
    step_ended(self, args, state, control, **rest)
Progress.on_step_end = die_in_step_4
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(*command, restarts=0):
    """Run a program by two workers on CPUs, which have to succeed; return the finished torchrun."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts",
             restarts, *command]
    places = os.pathsep.join([str(TRAINING_CODE), str(Path(__file__).parent)])
    process = subprocess.run(list(map(str, start)), env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": places},
                             cwd="/", capture_output=True, text=True, timeout=120, check=False)  # fmt: skip
    assert process.returncode == 0, process.stdout + process.stderr
    return process


# ---- the same training by one and by two ----

def do(name, folder):
    """Train what a job says; return (statistics, trained weights, losses and learning rates)."""
    kind, n_texts, changes, seconds = JOBS[name]
    texts, fmt_opts = make_texts(n=20)[-n_texts:], MINI_FORMAT
    if kind == "Mini":
        model, tokenizer = make_model(MiniSize(1, 32, 2, 48), seed=1).eval(), make_tokenizer()
    else:
        model, tokenizer = small_pair()
        if kind == "NF4":
            base = folder.with_name(f"{folder.name} base {this_worker().rank}")
            save_model_and_tokenizer(base, model, tokenizer)
            model, tokenizer = load_model(base, bits=4, device="cpu")
        fmt_opts = format_options(PUBLISHED_FORMAT, tokenizer)
        texts = [text | {"text": as_published(text["text"], fmt_opts)} for text in texts]
    model = create_lora(model, r=4, alpha=4, seed=3 + this_worker().rank)  # the first worker's is the one that counts
    stats = train_lora(model, tokenizer, texts, fmt_opts, replace(SETTINGS, **changes), folder, seconds=seconds)
    file = folder / "training_loss.json"
    return stats, trainable_weights(model), json.loads(file.read_text()) if file.exists() else []


def as_published(text, fmt_opts):
    """Return a text of Mini's format in the published one."""
    for own, published in (("\nO", fmt_opts["reply_beg"]), ("\n</s>", fmt_opts["reply_end"])):
        text = text.replace(own, published)
    return text


def main(folder):
    """Do all jobs, as a worker, and leave its results."""
    torch.set_num_threads(1)
    wrapper, end_group = torch.nn.parallel.DistributedDataParallel, torch.distributed.destroy_process_group
    wrap, wrapped = wrapper.__init__, []

    def noted(self, *args, **options):
        wrapped.append(weakref.ref(self))
        wrap(self, *args, **options)

    def end_alone():  # one left would hold the group, and end it later with Python's lock, for which its threads wait
        assert not [model for model in wrapped if model() is not None]
        end_group()

    torch.distributed.destroy_process_group = end_alone
    with process_group("cpu"):
        assert [largest_over_workers(number) for number in (this_worker().rank, -this_worker().rank)] == [1, 0]
    for name in JOBS:
        wrapper.__init__ = noted if name == "not packed" else None  # packed passes do without, and without its memory
        stats, weights, history = do(name, folder / name)
        torch.save({"stats": stats, "weights": weights, "history": history}, folder / name / f"{this_worker().rank}.pt")
    assert len(wrapped) == 1


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A function of a job's name that returns what each of two workers has left; and what they printed."""
    folder = tmp_path_factory.mktemp("workers")
    process = torchrun(__file__, folder)
    return lambda name: [torch.load(folder / name / f"{rank}.pt") for rank in (0, 1)], process.stdout


@pytest.mark.parametrize("name", [name for name, job in JOBS.items() if job[3] is None])
def test_two_workers_train_as_one(results, tmp_path, name):
    first, second = results[0](name)
    stats, weights, history = do(name, tmp_path)
    assert first["stats"] == second["stats"]
    assert [first["stats"][count] for count in COUNTS] == [stats[count] for count in COUNTS]
    assert len(first["history"]) == len(history)
    for step, expected in zip(first["history"], history, strict=True):
        assert step["learning_rate"] == pytest.approx(expected["learning_rate"], rel=1e-9)
        assert step["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    for parameter, value in weights.items():
        assert torch.equal(first["weights"][parameter], second["weights"][parameter]), parameter
        torch.testing.assert_close(first["weights"][parameter], value, rtol=1e-4, atol=1e-6)


def test_workers_agree_on_a_time_limit(results):
    first, second = results[0]("little time")
    assert first["stats"] == second["stats"] and first["history"] == second["history"]
    assert first["stats"]["steps"] < first["stats"]["steps_planned"] == 10_000
    assert all(torch.equal(value, second["weights"][name]) for name, value in first["weights"].items())
    without = [worker["stats"] for worker in results[0]("no time")]
    assert without[0] == without[1] and without[0]["steps"] == 0 and without[0]["loss"] is None
    assert results[1].count("shortened the training from 2 to 0 steps") == 1, "the first worker says it"
    assert results[1].count("accumulation is 3: in every step 1 of 2 workers get one text less and wait") == 1


@pytest.mark.parametrize(("batch_size", "accumulation", "n_workers", "expected"), [
    (4, 2, 1, (4, 2)), (4, 2, 2, (4, 1)), (4, 2, 4, (2, 1)), (4, 2, 3, (3, 1)), (4, 2, 16, (1, 1)), (4, 5, 3, (4, 2)),
    (4, 4, 3, (3, 2))])
def test_workers_divide_a_step(batch_size, accumulation, n_workers, expected):
    settings = replace(SETTINGS, batch_size=batch_size, gradient_accumulation=accumulation)
    assert batches_of_worker(settings, n_workers) == expected


@pytest.mark.parametrize("n_workers", [1, 2, 3])
@pytest.mark.parametrize("longest_at_once", [None, 2])
def test_batches_hold_every_text_once(n_workers, longest_at_once):
    lengths = np.random.default_rng(0).integers(1, 100, 50).tolist()
    settings = replace(SETTINGS, batch_size=2, gradient_accumulation=4)
    most_tokens = longest_at_once and longest_at_once * max(lengths)
    seen, steps, n_filled = [], [], 0
    for rank in range(n_workers):
        batches = SharedBatches(lengths, settings, Worker(rank, n_workers), lambda: 0, most_tokens)
        own = list(batches)
        assert len(own) == len(batches) == 7 * batches.n_passes
        steps.append([{text for batch in own[i : i + batches.n_passes] for text in batch}
                      for i in range(0, len(own), batches.n_passes)])  # fmt: skip
        seen += [text for batch in own for text in batch]
        n_filled += sum(map(bool, own))
        for batch in own:
            assert most_tokens is None or sum(lengths[text] for text in batch) <= most_tokens
            assert most_tokens is not None or len(batch) <= batches.batch_size
    assert sorted(seen) == list(range(50))
    alone = list(SharedBatches(lengths, settings, Worker(), lambda: 0))
    assert [set().union(*parts) for parts in zip(*steps, strict=True)] == [
        {text for batch in alone[i : i + 4] for text in batch} for i in range(0, len(alone), 4)]
    if longest_at_once and n_workers < 3:
        assert n_filled < 25, "texts shorter than the longest share passes"


# ---- fine-tuning scripts ----

@pytest.fixture
def options(tmp_path):
    """Configuration of a fine-tuning of a tiny Llama with 6 steps, and its data."""
    tokenizer = make_bpe_tokenizer()
    save_model_and_tokenizer(tmp_path / "Llama", make_tiny_llama(tokenizer, hidden_size=16), tokenizer)
    (tmp_path / "re_arc" / "tasks").mkdir(parents=True)
    (tmp_path / "re_arc" / "metadata.json").write_text(json.dumps({"aaa": {}, "bbb": {}}))
    for name in ("aaa", "bbb"):
        (tmp_path / "re_arc" / "tasks" / f"{name}.json").write_text(json.dumps(PAIRS))
    return {"base_model": str(tmp_path / "Llama"), "rearc_path": tmp_path / "re_arc", "bits": 32, "device": "cpu",
            "rearc_epochs": 2, "rearc_size": 1, "lora_rank": 4, "learning_rate": 0.01, "batch_size": 3,
            "gradient_accumulation": 1, "epochs": 3, "save_every": 3}


def test_a_fine_tuning_with_a_killed_worker_gives_the_model_of_one_process(options, tmp_path, monkeypatch):
    run_here("run_finetuning_SmolLM2-rearc", **options, output_path=tmp_path / "one")
    (tmp_path / "dies.py").write_text(DIES)
    arguments = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    process = torchrun(tmp_path / "dies.py", TRAINING_CODE / "run_finetuning_SmolLM2-rearc.py", *arguments,
                       "--output-path", tmp_path / "two", restarts=1)
    assert process.stdout.count("== train\n") == 2, "once in each start, by the first worker"
    records = [json.loads((tmp_path / f"{name}-training" / "record.json").read_text()) for name in ("one", "two")]
    assert [record["workers"] for record in records] == [1, 2]
    assert all(record["finished"] for record in records)
    for count in COUNTS:
        assert records[0]["training"][count] == records[1]["training"][count], count
    assert records[1]["training"]["loss"] == pytest.approx(records[0]["training"]["loss"], rel=1e-5)
    for name in ("training", "lora", "merged"):
        files = [sorted(file.name for file in (tmp_path / f"{run}-{name}").iterdir()) for run in ("one", "two")]
        assert files[0] == files[1]
    for name in ("lora/adapter_model", "merged/model"):
        one, two = (load_file(tmp_path / f"{run}-{name}.safetensors") for run in ("one", "two"))
        for parameter, value in one.items():
            torch.testing.assert_close(two[parameter], value, rtol=1e-4, atol=1e-5)

    shutil.rmtree(tmp_path / "two-merged")  # what is left to do is the first worker's
    monkeypatch.setattr(finetuning_tools, "this_worker", lambda: Worker(1, 2))
    monkeypatch.setattr(finetuning_tools, "load_model", None)
    run_here("run_finetuning_SmolLM2-rearc", **options, output_path=tmp_path / "two")
    assert not (tmp_path / "two-merged").exists()


def test_a_worker_has_its_own_gpu_before_any_library_looks_for_gpus():
    code = """if True:
        import importlib, os, sys, torch
        seen = []
        for name in ("is_available", "device_count"):
            def look(found=getattr(torch.cuda, name)):
                seen.append((os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ["LOCAL_RANK"]))
                return found()
            setattr(torch.cuda, name, look)
        importlib.import_module(sys.argv[1])
        assert seen and set(seen) == {("5", "0")}, seen
        """
    place = {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1",
             "TORCHELASTIC_RESTART_COUNT": "0", "CUDA_VISIBLE_DEVICES": "3,5", "PYTHONPATH": str(TRAINING_CODE)}
    processes = [subprocess.Popen([sys.executable, "-c", code, module], env=os.environ | place)
                 for module in ("finetuning_tools", "evaluation_tools")]
    assert [process.wait() for process in processes] == [0, 0]


def test_unsloth_is_refused_beside_other_workers(monkeypatch):
    monkeypatch.setattr("torchrun_tools.this_worker", lambda: Worker(0, 2))
    with pytest.raises(ValueError, match="in one process, on one GPU: start the run without torchrun"):
        unsloth_backend.check_unsloth("cuda", 4)


# ---- time limits ----

class Clock:
    """A clock that goes on in every forward pass of a model."""

    def __init__(self, monkeypatch, model, seconds_of_pass):
        self.now, self.passes = 1000.0, 0
        monkeypatch.setattr(training_callbacks, "time", SimpleNamespace(perf_counter=lambda: self.now))

        def go_on(*_):
            self.passes += 1
            self.now += seconds_of_pass(self.passes)

        model.register_forward_pre_hook(go_on)


def train(monkeypatch, folder, seconds, seconds_of_pass=lambda i: 12 if i == 1 else 2, **changes):
    """Train 100 steps of one pass each, or fewer; return (statistics, learning rates, clock, model)."""
    model, tokenizer = create_lora(make_model(MiniSize(1, 32, 2, 48), seed=1), r=4, alpha=4, seed=3), make_tokenizer()
    clock = Clock(monkeypatch, model, seconds_of_pass)
    settings = replace(SETTINGS, **{"batch_size": 2, "gradient_accumulation": 1, "epochs": 25} | changes)
    stats = train_lora(model, tokenizer, make_texts(n=4), MINI_FORMAT, settings, folder, seconds=seconds)
    file = folder / "training_loss.json"
    rates = [step["learning_rate"] for step in json.loads(file.read_text())] if file.exists() else []
    return stats, rates, clock, model


def test_a_time_limit_shortens_the_training_with_its_learning_rates(monkeypatch, tmp_path, capsys):
    stats, rates, clock, _ = train(monkeypatch, tmp_path / "limited", 100)
    assert (stats["steps"], stats["steps_planned"]) == (45, 100)  # 12 seconds, then 44 times 2
    assert clock.now == 1100 and stats["seconds"] == 100
    assert "the time limit shortened the training from 100 to 45 steps" in capsys.readouterr().out
    short = train(monkeypatch, tmp_path / "short", None, max_steps=45)
    assert "steps_planned" not in short[0]
    assert rates[4:] == pytest.approx(short[1][4:]) and max(rates) == SETTINGS.learning_rate
    enough = train(monkeypatch, tmp_path / "enough", 210)
    assert enough[0]["steps"] == 100 and "steps_planned" not in enough[0]


@pytest.mark.parametrize(("seconds", "seconds_of_pass", "steps"), [
    (100, lambda i: 2 if i < 20 else 4, 34),  # grows slow: noticed after step 24 and 34
    (100, lambda i: 2 if i < 8 else 1, 50),  # grows fast: not lengthened again
    (100, lambda i: 60, 2),  # too slow to be measured
])
def test_a_time_limit_looks_again(monkeypatch, tmp_path, seconds, seconds_of_pass, steps):
    stats, _, clock, _ = train(monkeypatch, tmp_path, seconds, seconds_of_pass)
    assert stats["steps"] == steps
    assert clock.now - 1000 < seconds + seconds_of_pass(steps)


@pytest.mark.parametrize("others", [0.0, 4.0])
def test_a_time_limit_does_not_count_preparations_as_slow_steps(monkeypatch, tmp_path, others):
    """Neither its own, of 10 s, nor shorter ones that other workers have in the same steps."""
    limits = []
    monkeypatch.setattr(training_callbacks, "largest_over_workers", lambda own: max(own, others if own else 0.0))

    class Noted(TimeLimit):
        def __init__(self, *args):
            super().__init__(*args)
            limits.append(self)

    def seconds_of_pass(i):
        if i in (2, 3, 5):
            limits[0].exclude(4)
            limits[0].exclude(6)
            return 12
        return 2

    monkeypatch.setattr(training_tools, "TimeLimit", Noted)
    stats, _, clock, _ = train(monkeypatch, tmp_path, 100, seconds_of_pass)
    assert (stats["steps"], clock.now) == (35, 1100)  # 30 of 100 seconds for preparations, 2 for each step


def test_without_time_the_adapter_stays_as_it_is(monkeypatch, tmp_path):
    stats, rates, _, model = train(monkeypatch, tmp_path, -3)
    assert [stats[name] for name in (*COUNTS, "loss", "steps_planned")] == [0, 0, 0, 0, None, 100]
    assert not rates and not list(tmp_path.iterdir())
    expected = create_lora(make_model(MiniSize(1, 32, 2, 48), seed=1), r=4, alpha=4, seed=3)
    for name, value in trainable_weights(expected).items():
        assert torch.equal(value, trainable_weights(model)[name]), name


def test_a_shortened_training_that_was_killed_goes_on_as_short(monkeypatch, tmp_path):
    expected = train(monkeypatch, tmp_path / "whole", 100, save_every=10)

    def killed(i):
        if i == 25:
            raise KeyboardInterrupt
        return 12 if i == 1 else 2

    with pytest.raises(KeyboardInterrupt):
        train(monkeypatch, tmp_path / "killed", 100, killed, save_every=10)
    found = train(monkeypatch, tmp_path / "killed", 0, save_every=10)  # no time: what the checkpoint holds
    assert found[0]["steps"] == 20 and found[0]["loss"] > 0 and found[2].passes == 0
    checkpoint = load_file(complete_checkpoints(tmp_path / "killed")[-1] / "adapter_model.safetensors")
    adapters = {name.replace(".default", ""): value for name, value in trainable_weights(found[3]).items()}
    assert all(torch.equal(checkpoint[name], value) for name, value in adapters.items() if "lora" in name)
    found = train(monkeypatch, tmp_path / "killed", None, save_every=10)
    assert (found[0]["steps"], found[0]["steps_planned"]) == (45, 100)
    assert found[1] == expected[1]
    for name, value in trainable_weights(expected[3]).items():
        assert torch.equal(trainable_weights(found[3])[name], value), name
    again = train(monkeypatch, tmp_path / "killed", None, save_every=10)
    assert again[0]["steps"] == 45 and again[2].passes == 0, "finished, though in the middle of an epoch"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
