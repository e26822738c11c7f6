"""Build the Kaggle notebooks of this folder from training_code/ and requirements*.txt.

    python kaggle_notebooks/build_notebooks.py

A notebook carries the run scripts that it offers and every module that these import, directly or not, as cells that
write the files, byte for byte. What else it does is in the short cells below. The files depend on nothing but the
repository: cell ids are fixed and there are no outputs, so building them again changes nothing.
"""

import ast
import graphlib
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

FOLDER = Path(__file__).resolve().parent
REPOSITORY = FOLDER.parent
CODE = REPOSITORY / "training_code"
SUBMISSION_SCRIPTS = ("run_evaluation_Nemo-full_on_kaggle", "run_evaluation_Mini_with_ttt")
UPDATED_SCRIPTS = ("run_evaluation_Llama-rearc_with_ttt", *SUBMISSION_SCRIPTS)
TESTS_SECTION = "\n# tests\n"  # of requirements.txt: no notebook needs what follows

SUBMISSION_TITLE = """# ARC Prize 2024 on Kaggle, without internet

Solves the tasks of the competition with the system of the ARChitects: training at test time, search, selection. Attach
to this notebook, and set the first cell to where they are:

- the competition `arc-prize-2024`,
- the wheels that `unsloth-download.ipynb` has made,
- the model, for example `da-fr/Mistral-NeMo-Minitron-8B-ARChitects-Full-bnb-4bit` uploaded as a Kaggle model.

Take the accelerator *GPU T4 x2* and switch the internet off. For the public test set, which is a placeholder, only a
few tasks are solved, to try everything; for the hidden one all are."""

SUBMISSION_PARAMETERS = """import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch

START = time.time()
WHEELS = "/kaggle/input/arc-prize-2024-wheels/wheels"  # made by unsloth-download.ipynb
MODEL = "/kaggle/input/mistral-nemo-minitron-8b-architects-full-bnb-4bit/transformers/default/1"
CHALLENGES = "/kaggle/input/arc-prize-2024/arc-agi_test_challenges.json"
OUTPUT = "/kaggle/working"  # submission.json goes here, as the competition wants it
SCRIPT = "run_evaluation_Nemo-full_on_kaggle"
OPTIONS = ""  # more options of the script; "--backend unsloth" if the wheels have unsloth, with N_GPUS = 1 only
TIME_LIMIT = 11.5  # hours for the whole notebook; Kaggle stops it after 12
N_GPUS = torch.cuda.device_count()

for folder in (WHEELS, MODEL, CHALLENGES):
    assert os.path.exists(folder), f"{folder} is not there: attach it, or correct its path in this cell"
os.makedirs(f"{OUTPUT}/training_code", exist_ok=True)
os.chdir(OUTPUT)
os.environ["HF_HUB_OFFLINE"] = "1"  # the model is a folder, so nothing is asked from the hub
print(N_GPUS, "GPUs")"""

SUBMISSION_INSTALL_TEXT = """## Packages

Installs what the image lacks, from the attached wheels alone. The wheels' own needs are in their list, so pip is told
to look for none: it leaves torch and CUDA of the image alone."""

SUBMISSION_INSTALL = """!"{sys.executable}" -m pip install --quiet --no-index --no-deps \\
    --find-links "{WHEELS}" --requirement "{WHEELS}/requirements.txt"
assert _exit_code == 0, "the wheels are not for this image: make them again on it"  # noqa: F821"""

UPDATED_TITLE = """# ARC Prize 2024, updated: with internet, on Kaggle or on your own machine

Solves tasks with the system of the ARChitects: training at test time, search, selection. It runs on Kaggle with the
internet switched on, and in Jupyter on any machine with Python 3.11 or newer; a model of billions of parameters needs a
GPU. Without a file of tasks, the public evaluation set of ARC-AGI-1 is solved and scored."""

UPDATED_PARAMETERS = """import json
import os
import shlex
import sys
import time
from pathlib import Path

START = time.time()
MODEL = "da-fr/Llama-3.2-3B-ARChitects-ReArc-bnb-4bit"  # a folder, or a name on the Hugging Face hub
CHALLENGES = ""  # a file of tasks in Kaggle's format; "": the evaluation set
SOLUTIONS = ""  # a file with their solutions; "": nothing is scored
ON_KAGGLE = os.path.isdir("/kaggle/working")
OUTPUT = "/kaggle/working" if ON_KAGGLE else "output_notebook"  # everything is written here
# run_evaluation_Nemo-full_on_kaggle: the 8B model, which has seen the evaluation set; run_evaluation_Mini_with_ttt:
# the small model of the project, its folder is pretrained_models/Mini
SCRIPT = "run_evaluation_Llama-rearc_with_ttt"
OPTIONS = ""  # more options of the script, for example "--limit 10": the 10 tasks with the shortest prompts
TIME_LIMIT = 11.5  # hours for the whole notebook; Kaggle stops it after 12


def absolute(path):
    return os.path.abspath(path) if os.path.exists(path) else path


os.chdir(get_ipython().starting_dir)  # paths count from the notebook's folder, also when this cell is run again
MODEL, CHALLENGES, SOLUTIONS, OUTPUT = *map(absolute, (MODEL, CHALLENGES, SOLUTIONS)), os.path.abspath(OUTPUT)
os.makedirs(f"{OUTPUT}/training_code", exist_ok=True)
os.chdir(OUTPUT)"""

UPDATED_INSTALL_TEXT = """## Packages

The versions that the project is tested with. What is there already stays, torch in any version that fits."""

UPDATED_INSTALL = """!"{sys.executable}" -m pip install --quiet --requirement requirements.txt
assert _exit_code == 0, "pip has failed, see above"  # noqa: F821"""

MODULES_TEXT = """## Modules

The files of the project's `training_code`, unchanged; each stands below those that it imports."""

RUN_TEXT = """## Evaluation

A process for each GPU, or a single one. It begins with a submission of empty answers, and improves it until all is done
or the time is up. What dies is started anew, and finished tasks are taken over."""

COUNT_GPUS = """import torch  # only now: pip may have installed it

N_GPUS = torch.cuda.device_count()
print(N_GPUS, "GPUs")
"""

HOURS = """hours = TIME_LIMIT - (time.time() - START) / 3600  # that are left
assert hours > 0, f"the TIME_LIMIT of {TIME_LIMIT} hours is over since this notebook was started: raise it or restart"
"""

SUBMISSION_TASKS = """tasks = ["--challenges", CHALLENGES]
# should it hang: Kaggle scores nothing of a notebook that it has to stop
guard = ["timeout", "--foreground", "--kill-after=60", f"{hours + 0.2:.3f}h"]
"""

UPDATED_TASKS = """tasks = ["--challenges", CHALLENGES] if CHALLENGES else []
tasks += ["--solutions", SOLUTIONS] if SOLUTIONS else []
guard = []  # the time limit alone ends it
"""

RUN = """launcher = ["-m", "torch.distributed.run", "--standalone", "--max-restarts=3", f"--nproc-per-node={N_GPUS}"]
command = [*guard, sys.executable, *(launcher if N_GPUS > 1 else []), f"training_code/{SCRIPT}.py", "--model", MODEL,
           "--output-path", OUTPUT, "--time-limit", f"{hours:.3f}", *tasks, *shlex.split(OPTIONS)]
command = shlex.join(command)
os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds between two states of a progress bar
!{command}
status = _exit_code  # noqa: F821"""

CHECK_TEXT = """## Submission

A run that has failed leaves the last submission that it wrote. Kaggle scores it if this notebook ends without an error,
so only a submission that does not answer all tasks is one."""

CHECK = """if status:
    print(f"the evaluation has failed (exit status {status}, see above): this is what it had found until then")
submission = json.loads(Path("submission.json").read_text())
n_inputs = {name: len(task["test"]) for name, task in json.loads(Path(CHALLENGES).read_text()).items()}
assert {name: len(answers) for name, answers in submission.items()} == n_inputs, "not the tasks of the file"
empty = {"attempt_1": [[0]], "attempt_2": [[0]]}
n_answered = sum(answer != empty for answers in submission.values() for answer in answers)
print(f"submission.json: {len(submission)} tasks, {n_answered} of {sum(n_inputs.values())} test inputs answered")"""

SHOW_TEXT = """## Results

The scores, if solutions are given, stand at the end of the evaluation above. The folder of `OUTPUT` holds the
submission, all candidates, the record of the run and, if a task was solved, the picture of one."""

SHOW = """from IPython.display import Image

assert status == 0, f"the evaluation has failed (exit status {status}, see above)"
submission = json.loads(Path("submission.json").read_text())
print(f"{Path('submission.json').absolute()}: {len(submission)} tasks")
if Path("solved_task.png").exists():
    display(Image("solved_task.png"))"""

WHEELS_TITLE = """# Wheels for a Kaggle notebook without internet

Makes the dataset of wheels that `arc-prize-2024_kaggle.ipynb` installs from: those of the tested versions that the
image lacks, and what they need in turn. torch and CUDA always stay those of the image.

Run it on Kaggle with the internet switched on, on the same image as the notebook that will use the wheels: the same
accelerator, and *Pin to original environment*. Then make a dataset of the output (*New dataset* on the output's page).
"""

WHEELS_PARAMETERS = """WHEELS = "/kaggle/working/wheels"  # the wheels and their list go here
IMAGE = ""  # a file with the output of `pip freeze` of the image; "": the image that this notebook runs on
WITH_UNSLOTH = False  # also for the option --backend unsloth, which trains on one GPU only"""

WHEELS_FILES_TEXT = """## What is needed

The versions that the project is tested with, and the module that works out what is missing. The Python of this notebook
has to be that of the image."""

WHEELS_RESOLVE_TEXT = """## What the image lacks"""

WHEELS_RESOLVE = """import wheelhouse

requirements = "requirements-unsloth.txt" if WITH_UNSLOTH else "requirements.txt"
packages = wheelhouse.read_freeze(IMAGE) if IMAGE else wheelhouse.installed_packages()
print(f"the image has {len(packages)} packages, torch {packages.get('torch', 'not')} among them; it lacks:")
missing = wheelhouse.missing_packages(requirements, packages)"""

WHEELS_FETCH_TEXT = """## Wheels

Fetched, and checked: would pip complete the image from these alone?"""

WHEELS_FETCH = """wheelhouse.fetch(missing, requirements, packages, WHEELS)
wheelhouse.check(WHEELS, packages)"""


def imported_modules(nodes):
    """Return the names of all modules that statements import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


def needed_files(scripts):
    """Return the paths of run scripts and of all modules that they import, directly or not, inside functions too.

    Each stands behind those that it imports when it is itself imported, and behind a module stand files of other kinds
    with its name (report.py: report.js), which it reads.
    """
    graph, found = {}, [f"{script}.py" for script in reversed(scripts)]
    while found:
        file = found.pop()
        if file not in graph and (CODE / file).exists():
            tree = ast.parse((CODE / file).read_text(encoding="utf-8"))
            graph[file] = {f"{name}.py" for name in imported_modules(tree.body)}
            found += sorted(f"{name}.py" for name in imported_modules(ast.walk(tree)))
    before = {file: sorted(imported & set(graph)) for file, imported in sorted(graph.items())}
    modules = [CODE / file for file in graphlib.TopologicalSorter(before).static_order()]
    return [file for module in modules for file in (module, *sorted({*CODE.glob(f"{module.stem}.*")} - {module}))]


def run_time_requirements():
    """Return requirements.txt without the packages of the tests."""
    text = (REPOSITORY / "requirements.txt").read_text(encoding="utf-8")
    needed, heading, _ = text.partition(TESTS_SECTION)
    if not heading:
        raise ValueError(f"requirements.txt has no section {TESTS_SECTION.strip()!r}, at which the notebooks cut it")
    return needed


def file_cell(name, text):
    """Return a cell that writes a file, its id from the file's name.

    Raises ValueError for a text that such a cell would change.
    """
    if not text.endswith("\n") or text.endswith("\n\n") or "\r" in text:
        raise ValueError(f"{name} does not end with exactly one line end, or has other ones")
    return code(Path(name).name.replace(".", "-"), f"%%writefile {name}\n{text.removesuffix(chr(10))}")


def code(name, text):
    """Return a code cell with the id `name`."""
    return new_code_cell(text, id=name)


def words(name, text):
    """Return a markdown cell with the id `about-<name>`."""
    return new_markdown_cell(text.strip(), id=f"about-{name}")


def module_cells(scripts):
    """Return the cells that write run scripts and what they import."""
    return [words("modules", MODULES_TEXT),
            *(file_cell(f"training_code/{path.name}", path.read_text(encoding="utf-8"))
              for path in needed_files(scripts))]


def submission_notebook():
    """Return the cells of the notebook that makes the submission, without internet."""
    return [words("notebook", SUBMISSION_TITLE), code("parameters", SUBMISSION_PARAMETERS),
            words("install", SUBMISSION_INSTALL_TEXT), code("install", SUBMISSION_INSTALL),
            *module_cells(SUBMISSION_SCRIPTS),
            words("run", RUN_TEXT), code("run", HOURS + SUBMISSION_TASKS + RUN),
            words("check", CHECK_TEXT), code("check", CHECK)]


def updated_notebook():
    """Return the cells of the notebook that runs with internet, on Kaggle or elsewhere."""
    return [words("notebook", UPDATED_TITLE), code("parameters", UPDATED_PARAMETERS),
            words("install", UPDATED_INSTALL_TEXT), file_cell("requirements.txt", run_time_requirements()),
            code("install", UPDATED_INSTALL),
            *module_cells(UPDATED_SCRIPTS),
            words("run", RUN_TEXT), code("gpus", COUNT_GPUS.strip()), code("run", HOURS + UPDATED_TASKS + RUN),
            words("show", SHOW_TEXT), code("show", SHOW)]


def wheels_notebook():
    """Return the cells of the notebook that makes the wheels."""
    unsloth = (REPOSITORY / "requirements-unsloth.txt").read_text(encoding="utf-8")
    wheelhouse = (FOLDER / "wheelhouse.py").read_text(encoding="utf-8")
    return [words("notebook", WHEELS_TITLE), code("parameters", WHEELS_PARAMETERS),
            words("files", WHEELS_FILES_TEXT), file_cell("requirements.txt", run_time_requirements()),
            file_cell("requirements-unsloth.txt", unsloth), file_cell("wheelhouse.py", wheelhouse),
            words("resolve", WHEELS_RESOLVE_TEXT), code("resolve", WHEELS_RESOLVE),
            words("fetch", WHEELS_FETCH_TEXT), code("fetch", WHEELS_FETCH)]


NOTEBOOKS = {  # file: (cells, whether Kaggle gives it the internet)
    "arc-prize-2024_kaggle.ipynb": (submission_notebook, False),
    "arc-prize-2024_updated.ipynb": (updated_notebook, True),
    "unsloth-download.ipynb": (wheels_notebook, True),
}


def build(name):
    """Return the text of a notebook's file."""
    cells, internet = NOTEBOOKS[name]
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "kaggle": {"accelerator": "nvidiaTeslaT4", "dataSources": [], "isGpuEnabled": True,
                   "isInternetEnabled": internet, "language": "python", "sourceType": "notebook"},
    }
    notebook = new_notebook(cells=cells(), metadata=metadata)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


if __name__ == "__main__":
    for name in NOTEBOOKS:
        (FOLDER / name).write_text(build(name), encoding="utf-8")
        print(FOLDER / name)
