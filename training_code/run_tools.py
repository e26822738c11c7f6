"""Shared ground of all run scripts: places of files, folders written whole, and the record that every run leaves.

The *record* (`record.json` in a run's output folder; of a finished run on request also a file in `results/`) holds all
that is needed to judge a result: configuration, commit, versions, hardware, seconds per stage, tokens, scores and peak
memory. The README's table and pictures are made from these records, so they cannot disagree with what was run.

Importing this module quietens the libraries (a message of bitsandbytes, progress bars of transformers), shows errors
as `script_errors` does, and leaves a worker of torchrun its own GPU: import it before any module that imports peft,
which looks for GPUs.
"""

import contextlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from urllib.parse import quote

import huggingface_hub.utils
import torch
import transformers
from packaging.specifiers import SpecifierSet

from arc_downloader import download_arc_data
from arc_files import write_json
from arc_loader import ArcDataset
from script_errors import show_error
from torchrun_tools import this_worker

sys.excepthook = show_error
this_worker()  # leaves it its own GPU
# bitsandbytes warns, when peft imports it, that a CPU could have one more kernel
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
transformers.utils.logging.disable_progress_bar()  # of reading and writing weights, shorter than the bars' own text
huggingface_hub.utils.enable_progress_bars()  # those of downloads stay

REPOSITORY = Path(__file__).resolve().parent.parent
# others have other interfaces or were not tried; requirements.txt has the versions that are tested
SUPPORTED = {"torch": ">=2.6,<3", "transformers": ">=5,<6", "peft": ">=0.19,<1", "datasets": ">=4,<5",
             "accelerate": ">=1,<2"}
RECORDED_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "numpy")

# the published prompt format; <eos> stands for the end token of the model's tokenizer
PUBLISHED_FORMAT = {
    "preprompt": "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghjklmnpqrstuvwxyz",
    "query_beg": "I",
    "reply_beg": "\n+/-=O",
    "reply_end": "\n<eos>",
    "lines_sep": "\n",
    "max_tokens": 128000,
}


def check_versions():
    """Raise ImportError naming each installed package whose version this project does not support."""
    conflicts = []
    for package, supported in SUPPORTED.items():
        try:
            installed = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # its import says so
        if not SpecifierSet(supported).contains(installed, prereleases=True):
            conflicts.append(f"{package} {installed} is installed, supported is {supported}")
    if conflicts:
        raise ImportError(f"{'; '.join(conflicts)}: install the tested versions with `pip install -r requirements.txt`")


check_versions()


def format_options(fmt_opts, tokenizer=None, max_tokens=None):
    """Return a prompt format with the tokenizer's end token for `<eos>` and another token limit, where they are given.

    fmt_opts: format options as `PUBLISHED_FORMAT`.
    """
    options = dict(fmt_opts)
    if tokenizer is not None:
        options["reply_end"] = options["reply_end"].replace("<eos>", tokenizer.eos_token)
    if max_tokens is not None:
        options["max_tokens"] = max_tokens
    return options


def load_evaluation_set():
    """Return the public ARC-AGI-1 evaluation set with its solutions, writing it to `input/` first if need be."""
    return _load_public_set("evaluation")


def load_training_set():
    """Return the ARC-AGI-1 training set with its solutions, as `load_evaluation_set` does."""
    return _load_public_set("training")


def _load_public_set(name):
    folder = REPOSITORY / "input" / "arc-prize-2024"
    download_arc_data(folder)
    tasks = ArcDataset.load_from_json(str(folder / f"arc-agi_{name}_challenges.json"))
    return tasks.load_solutions(str(folder / f"arc-agi_{name}_solutions.json"))


def _now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


class RunRecord:
    """The record of one run, saved anew after every stage; under torchrun by the first worker alone."""

    def __init__(self, config, script, output_path, copy_to_results=False):
        """Start a record.

        config: frozen dataclass of the run; script: name of the run script, without `.py`; copy_to_results: write the
        finished record to `results/` too.
        """
        self.worker = this_worker()
        self.files = [Path(output_path) / "record.json"]  # written so far
        self.copy_to_results = copy_to_results
        self.values = {
            "script": script,
            "started": _now(),
            "config": {name: shown_path(value) for name, value in asdict(config).items()},
            "commit": current_commit(), "versions": package_versions(), "hardware": hardware(),
            "workers": self.worker.count, "seconds": {}, "tokens": {},
        }

    @contextlib.contextmanager
    def stage(self, name):
        """Time a stage of the run; a stage entered again is added up."""
        print(f"\n== {name}", flush=True)
        start = time.perf_counter()
        yield
        self.values["seconds"][name] = self.values["seconds"].get(name, 0.0) + time.perf_counter() - start
        self.save()

    def save(self, results_name=None, **values):
        """Add values to the record and write it; with `finished=True` also to `results/`, if that was asked for.

        results_name: name of the file in `results/`, without `.json`; None: the script's. Runs of one script that are
        to stand side by side need names of their own.
        """
        self.values.update(values, peak_memory_gb=peak_memory_gb())
        if not self.worker.first:
            return
        if values.get("finished"):
            self.values["ended"] = _now()  # of this start
        if values.get("finished") and self.copy_to_results:
            self.files.append(REPOSITORY / "results" / f"{results_name or self.values['script']}.json")
        for file in self.files:
            here = file == self.files[0]
            write_json(file, self.values if here else without_places(self.values), indent=2)

    def save_training(self, stage, stats, **values):
        """Add what a training took, over all its starts, and write the record.

        stage: name of the training among the run's stages; stats: dict with steps, tokens, loss, seconds and more.
        """
        self.values["seconds"][stage] = stats["seconds"]
        self.values["tokens"]["training"] = stats["tokens"]
        self.save(training=stats, **values)


def shown_path(value):
    """Return a path as text, from the repository's root if it lies below; any other value as it is."""
    if isinstance(value, Path):
        path = value.absolute()
        return str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path)
    return value


def without_places(values):
    """Return a record's values for other people: of a path outside the repository only its last part."""
    if isinstance(values, dict):
        return {name: without_places(value) for name, value in values.items()}
    return Path(values).name if isinstance(values, str) and Path(values).is_absolute() else values


def model_location(model):
    """Return the path of a model's folder; a relative one counts from the repository, else from the current folder.

    What is no folder is taken for a name on the hub and returned as it is.

    Raises FileNotFoundError for a folder under `pretrained_models` that is not there.
    """
    folder = REPOSITORY / model
    for place in (folder, Path(model).absolute()):
        if place.is_dir():
            return place
    if Path(model).is_absolute() or Path(model).parts[0] == "pretrained_models":
        raise FileNotFoundError(f"there is no model in {folder}: run the fine-tuning script that makes it, or name "
                                "another folder or a model on the hub (option --model or --base-model)")
    return model


def pick_device(device):
    """Return the device to run on: the one asked for, else a GPU if there is one, else the CPU.

    Raises ValueError for a GPU asked for where there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def full_bits(device):
    """Return in how many bits a small model, whose size is no matter, is fastest: 16 on a GPU with bf16, else 32."""
    return 16 if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else 32


@contextlib.contextmanager
def memory_advice(doing, advice):
    """Turn a lack of memory in the with-block into a RuntimeError that says what was being done and what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise RuntimeError(f"out of memory in {doing}: {advice}") from error


def task_file(folder, task, suffix=""):
    """Return the path of a task's file or folder; characters that no file name can have are escaped."""
    return Path(folder) / (quote(task, safe=" +,=@()[]") + suffix)


@contextlib.contextmanager
def folder_written_whole(folder):
    """Give a temporary folder to write to, which takes the place of `folder` at the end of the with-block."""
    folder = Path(folder)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(partial, folder)


def set_aside(path):
    """Rename a folder or file to the first free `<name>_<number>`, before its suffix, and return that path."""
    path = Path(path)
    stem, suffix = (path.stem, path.suffix) if path.is_file() else (path.name, "")
    number = 1
    while path.with_name(f"{stem}_{number}{suffix}").exists():
        number += 1
    return path.rename(path.with_name(f"{stem}_{number}{suffix}"))


def make_folder(folder):
    """Make the folder that a run writes to, unless it is there.

    Raises:
        OSError: it cannot be made.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output-path: the folder {folder} cannot be made ({error.strerror})") from None


def lock_folder(folder):
    """Keep other processes from writing their run into a folder, as long as the file that is returned is open.

    Raises:
        OSError: another run is writing there, or the folder cannot be made.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    make_folder(folder)
    file = (Path(folder) / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.close()
        raise OSError(f"another run is writing to {folder}: wait for its end or choose another --output-path") from None
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


def current_commit():
    """Return the repository's commit, marked if files were changed since; 'unknown' outside a git checkout."""
    def git(*arguments):
        command = ["git", "-C", str(REPOSITORY), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    if not (REPOSITORY / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    try:
        commit = git("rev-parse", "HEAD").strip()
        return commit + (" with changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except subprocess.CalledProcessError:  # a repository without any commit, or of another user
        return "unknown"


def package_versions():
    """Return the versions of Python and of the packages that can change a result."""
    versions = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def hardware():
    """Return what the run has to work with."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def peak_memory_gb():
    """Return the peak memory of this process in GB (10**9 bytes): main memory, and the GPU's where there is one."""
    peak = {}
    with contextlib.suppress(ImportError):  # on Windows
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        peak["main"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 2)
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return peak
