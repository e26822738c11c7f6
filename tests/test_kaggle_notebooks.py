"""The Kaggle notebooks: up to date, and executed as Kaggle does, without network where it has none."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest

from evaluation_tools import MINI_JOINT_TRAINING
from script_runs import CHALLENGES, REPOSITORY, TRAINING_CODE, read_submission, run_here, write_small_files

NOTEBOOKS = REPOSITORY / "kaggle_notebooks"
SUBMISSION, UPDATED, WHEELS = "arc-prize-2024_kaggle.ipynb", "arc-prize-2024_updated.ipynb", "unsloth-download.ipynb"
LACKING = ("diskcache", "tyro")  # packages that the image of these tests does not have
TASKS = {name: CHALLENGES[name] for name in ("last", "other")}
N_TEST_INPUTS = {"last": 2, "other": 1}
OPTIONS = ("--device cpu --min-prob 0.02 --joint.repeats 4 --joint.lora-rank 4 --joint.learning-rate 0.01 "
           "--joint.embedding-learning-rate 0.01")
EXECUTE = """
import sys
import nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": sys.argv[2]}}).execute()
finally:
    nbformat.write(notebook, sys.argv[1])
"""
NO_SOCKETS = """
import socket
CONNECT, LOOK_UP, HERE = socket.socket.connect, socket.getaddrinfo, ("127.0.0.1", "::1", "localhost", "", None)
def connect(self, address):
    if self.family != socket.AF_UNIX and address[0] not in HERE:
        raise OSError("no network in this test")
    return CONNECT(self, address)
def look_up(host, *arguments, **options):
    if host not in HERE:
        raise OSError("no network in this test")
    return LOOK_UP(host, *arguments, **options)
socket.socket.connect, socket.getaddrinfo = connect, look_up
"""


@pytest.fixture(scope="module")
def modules():
    """Import and return the modules build_notebooks and wheelhouse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(NOTEBOOKS)
        import build_notebooks
        import wheelhouse

        yield build_notebooks, wheelhouse


# ---- the files ----

def cells(name):
    """Return {cell id: source} of a committed notebook."""
    return {cell.id: cell.source for cell in nbformat.read(NOTEBOOKS / name, as_version=4).cells}


@pytest.mark.parametrize("name", [SUBMISSION, UPDATED, WHEELS])
def test_notebooks_are_up_to_date(modules, name):
    build_notebooks, _ = modules
    assert set(build_notebooks.NOTEBOOKS) == {path.name for path in NOTEBOOKS.glob("*.ipynb")}
    same = (NOTEBOOKS / name).read_text(encoding="utf-8") == build_notebooks.build(name)
    assert same, "run python kaggle_notebooks/build_notebooks.py"
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]


def test_a_notebook_carries_what_its_scripts_import(modules):
    build_notebooks, _ = modules
    files = [path.name for path in build_notebooks.needed_files(build_notebooks.UPDATED_SCRIPTS)]
    assert files.index("arc_views.py") < files.index("arc_loader.py") < files.index("evaluation_tools.py")
    assert {"tree_kernel.py", "unsloth_training.py"} <= set(files), "imported inside functions"
    assert not {"finetuning_tools.py", "mini_pretraining.py", "mini_documents.py"} & set(files)
    assert {"report.py", "report.js", "report.html.jinja"} <= set(files), "what the report reads"
    assert set(files[-3:]) == {f"{script}.py" for script in build_notebooks.UPDATED_SCRIPTS}


def test_a_file_that_a_cell_would_change_is_refused(modules):
    with pytest.raises(ValueError, match="a.py does not end with exactly one line end"):
        modules[0].file_cell("a.py", "a = 1\n\n")


def test_kaggle_configuration_is_the_published_one():
    config = runpy.run_path(str(TRAINING_CODE / "run_evaluation_Nemo-full_on_kaggle.py"))["CONFIG"]
    joint, kaggle_ends_after = config.joint, 12
    assert (config.max_tokens, config.joint.max_tokens, config.min_prob, config.bits) == (8192, 4224, 0.17, 4)
    assert (joint.lora_rank, joint.warmup_steps, joint.weight_decay) == (64, 100, 0.01)
    assert (joint.repeats, joint.all_symmetries) == (4, True)
    assert 0 < config.time_limit < kaggle_ends_after


# ---- executed ----

def execute(notebook, folder, python=sys.executable, network=True, **parameters):
    """Execute a notebook in a folder with changed parameters; return {cell id: its output}.

    network: False takes it away, by a network namespace where that is allowed, and by a block of sockets in Python.
    """
    notebook = nbformat.read(NOTEBOOKS / notebook, as_version=4)
    changed = []
    for cell in notebook.cells:
        for name, value in parameters.items() if cell.id in ("parameters", "gpus") else ():
            cell.source, n = re.subn(rf"(?m)^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, cell.source)
            changed += [name] * n
    assert sorted(changed) == sorted(parameters)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder.parent / f"{folder.name}.ipynb"
    nbformat.write(notebook, file)
    process = start([python, "-c", EXECUTE, file, folder], folder.parent / "home", network)
    assert process.returncode == 0, process.stdout + process.stderr
    return {cell.id: "".join(output.get("text", "") for output in cell.outputs)
            for cell in nbformat.read(file, as_version=4).cells if cell.cell_type == "code"}


def start(command, home, network):
    """Run a command with or without network, its settings in a folder of its own; return the finished process."""
    home.mkdir(exist_ok=True)
    (home / "sitecustomize.py").write_text(NO_SOCKETS)
    variables = {name: value for name, value in os.environ.items() if network or not name.startswith("PIP_")}
    variables |= {"OMP_NUM_THREADS": "1", "IPYTHONDIR": str(home), "JUPYTER_RUNTIME_DIR": str(home), "PYTHONPATH": ""}
    if not network:
        variables |= {"PYTHONPATH": str(home), "PIP_CONFIG_FILE": os.devnull, "HOME": str(home)}
        command = [*NAMESPACE, *command] if namespace_allowed() else command
    return subprocess.run([*map(str, command)], env=variables, cwd=home, capture_output=True, text=True, timeout=300)


NAMESPACE = ("unshare", "-n", "bash", "-c", 'ip link set lo up && exec "$@"', "bash")


def namespace_allowed():
    """Tell whether a process can be run without network here."""
    return shutil.which("unshare") and not subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode


@pytest.fixture(scope="module")
def kaggle(tmp_path_factory):
    """A folder laid out like Kaggle's: input with the competition and a small model, and an empty working."""
    folder = tmp_path_factory.mktemp("kaggle")
    (folder / "input" / "arc-prize-2024").mkdir(parents=True)
    write_small_files(folder / "input")
    (folder / "input" / "arc-prize-2024" / "arc-agi_test_challenges.json").write_text(json.dumps(TASKS))
    return folder


@pytest.fixture(scope="module")
def wheels(kaggle):
    """The folder of wheels that unsloth-download.ipynb makes for an image: packages of this Python, without LACKING."""
    freeze = subprocess.run([sys.executable, "-m", "pip", "freeze"], capture_output=True, text=True, check=True).stdout
    lines = [line for line in freeze.splitlines() if line.split("==")[0] not in LACKING]
    (kaggle / "image.txt").write_text("\n".join(lines) + "\n")
    folder = kaggle / "input" / "arc-prize-2024-wheels" / "wheels"
    printed = execute(WHEELS, kaggle / "wheels", WHEELS=str(folder), IMAGE=str(kaggle / "image.txt"))
    assert f"the image has {len(lines)} packages, torch 2." in printed["resolve"]
    assert "complete the image without internet" in printed["fetch"]
    return folder


@pytest.fixture(scope="module")
def image_python(tmp_path_factory):
    """The Python of the image: this one's packages without LACKING, seen from an environment that pip can write to.

    They lie outside that environment, so that pip never removes one.
    """
    folder = tmp_path_factory.mktemp("image")
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    (folder / "packages").mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(tuple(LACKING)):
            (folder / "packages" / entry.name).symlink_to(entry)
    [site_packages] = (folder / "venv").glob("lib/python*/site-packages")
    (site_packages / "image.pth").write_text(f"{folder / 'packages'}\n")
    return folder / "venv" / "bin" / "python"


def script_submission(model, challenges, folder, ttt="joint"):
    """Return the submission of the script itself, run here with OPTIONS and without a time limit."""
    training = replace(MINI_JOINT_TRAINING, repeats=4, lora_rank=4, learning_rate=0.01, embedding_learning_rate=0.01)
    run_here("run_evaluation_Mini_with_ttt", model=str(model), challenges=challenges, tasks="last,other", device="cpu",
             min_prob=0.02, ttt=ttt, joint=training, output_path=folder / "script")
    return read_submission(folder / "script", N_TEST_INPUTS)


def test_wheels_are_those_that_the_image_lacks(wheels):
    assert {path.name.split("-")[0] for path in wheels.iterdir()} == {*LACKING, "requirements.txt"}
    pinned = (wheels / "requirements.txt").read_text().splitlines()
    assert pinned[0].startswith("# for Python 3.") and "torch 2." in pinned[0]
    carried = cells(WHEELS)["requirements-txt"].splitlines()
    expected = {line.lower().replace("_", "-") for line in carried if "==" in line and not line.startswith("#")}
    assert set(pinned[1:]) == expected and "transformers==5.17.0" in expected
    assert not re.search("pytest|ruff|torch==|nvidia", "\n".join(pinned[1:]))


def test_submission_without_internet(kaggle, wheels, image_python, tmp_path):
    assert start([image_python, "-c", "import tyro"], tmp_path / "home", network=False).returncode, "not in the image"
    challenges = kaggle / "input" / "arc-prize-2024" / "arc-agi_test_challenges.json"
    options = {"SCRIPT": "run_evaluation_Mini_with_ttt", "MODEL": str(kaggle / "input" / "Mini"), "OPTIONS": OPTIONS}
    working = kaggle / "working"
    printed = execute(SUBMISSION, working, image_python, network=False, WHEELS=str(wheels), OUTPUT=str(working),
                      CHALLENGES=str(challenges), **options)
    assert "valid: 2 tasks, 3 test inputs" in printed["run"], "the script's output is in the notebook"
    assert "submission.json: 2 tasks, 3 of 3 test inputs answered" in printed["check"]
    for path in (working / "training_code").glob("*.*"):
        assert path.read_bytes() == (TRAINING_CODE / path.name).read_bytes(), path.name
    assert (working / "report.html").exists(), "the last that a run makes"
    submission = read_submission(working, N_TEST_INPUTS)
    assert submission == script_submission(kaggle / "input" / "Mini", challenges, tmp_path)


def test_there_is_no_network_without_network(tmp_path):
    for address in (("192.0.2.1", 80), ("example.org", 80)):  # reserved for documentation
        connect = f"import socket; socket.create_connection({address}, timeout=60)"
        alone = start([sys.executable, "-c", connect], tmp_path / "home", network=False)
        assert alone.returncode and "OSError" in alone.stderr
        variables = {**os.environ, "PYTHONPATH": str(tmp_path / "home")}
        blocked = subprocess.run([sys.executable, "-c", connect], env=variables, capture_output=True, text=True)
        assert "no network in this test" in blocked.stderr


def test_updated_notebook_with_two_workers(tmp_path):
    write_small_files(tmp_path)
    printed = execute(UPDATED, tmp_path, network=False, MODEL="Mini", CHALLENGES="challenges.json", N_GPUS=2,
                      SOLUTIONS="solutions.json", SCRIPT="run_evaluation_Mini_with_ttt",
                      OPTIONS=OPTIONS + " --ttt none --tasks last,other")
    assert not printed["install"].strip(), "all is there"
    assert "per test input" in printed["run"]
    output = tmp_path / "output_notebook"
    assert {path.name for path in output.glob("inference_cache*")} == {"inference_cache_0", "inference_cache_1"}
    assert f"{output / 'submission.json'}: 2 tasks" in printed["show"]
    expected = script_submission(tmp_path / "Mini", tmp_path / "challenges.json", tmp_path, ttt="none")
    assert read_submission(output, N_TEST_INPUTS) == expected


def test_a_failed_evaluation_leaves_its_last_submission(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"status": 1, "json": json, "Path": Path, "CHALLENGES": tmp_path / "tasks.json"}
    (tmp_path / "tasks.json").write_text(json.dumps(TASKS))
    empty = {"attempt_1": [[0]], "attempt_2": [[0]]}
    submission = {"last": [empty, {"attempt_1": [[1]], "attempt_2": [[0]]}], "other": [empty]}
    (tmp_path / "submission.json").write_text(json.dumps(submission))
    exec(cells(SUBMISSION)["check"], dict(names))
    printed = capsys.readouterr().out
    assert "has failed (exit status 1" in printed and "2 tasks, 1 of 3 test inputs answered" in printed
    (tmp_path / "submission.json").write_text(json.dumps({"last": submission["last"]}))
    with pytest.raises(AssertionError, match="not the tasks of the file"):
        exec(cells(SUBMISSION)["check"], dict(names))


# ---- wheelhouse.py ----

REQUIREMENT = {  # of a made-up index: (name, version): needs
    ("app", "1.0"): ["lib>=1", "torch>=2.4", "extra"], ("lib", "1.0"): [], ("lib", "2.0"): [], ("extra", "3.0"): [],
    ("torch", "2.9"): ["nvidia-blas"], ("nvidia-blas", "12.0"): [], ("markdown-it-py", "4.0"): [],
}


@pytest.fixture
def wheelhouse(modules, tmp_path, monkeypatch):
    """The module wheelhouse, pip served by the made-up index, and a requirements file that asks for app."""
    index = tmp_path / "index"
    index.mkdir()
    for (name, version), needs in REQUIREMENT.items():
        stem = f"{name.replace('-', '_')}-{version}"
        metadata = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {need}" for need in needs)]
        with zipfile.ZipFile(index / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", "Metadata-Version: 2.1\n" + "\n".join(metadata) + "\n")
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements.txt").write_text("# what is asked for\napp==1.0\n")
    return modules[1]


def test_what_the_image_has_is_left_out(wheelhouse, tmp_path):
    image = {"torch": "2.6.0+cu124", "lib": "1.0", "other": "1.0"}
    (tmp_path / "more.txt").write_text("-r requirements.txt\nlib==1.0\n")
    missing = wheelhouse.missing_packages("more.txt", image)
    assert missing == {"app": "1.0", "extra": "3.0"}
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "old-1.0-py3-none-any.whl").touch()
    wheelhouse.fetch(missing, "more.txt", image, "wheels")
    assert sorted(path.name for path in (tmp_path / "wheels").glob("*.whl")) == [
        "app-1.0-py3-none-any.whl", "extra-3.0-py3-none-any.whl"]
    listed = (tmp_path / "wheels" / "requirements.txt").read_text().splitlines()
    assert "torch 2.6.0+cu124" in listed[0] and listed[1:] == ["app==1.0", "extra==3.0", "lib==1.0"]
    wheelhouse.check("wheels", image)
    (tmp_path / "wheels" / "extra-3.0-py3-none-any.whl").unlink()
    with pytest.raises(RuntimeError, match="No matching distribution found for extra"):
        wheelhouse.check("wheels", image)


def test_another_version_than_the_pinned_one_is_missing(wheelhouse, tmp_path):
    (tmp_path / "requirements.txt").write_text("app==1.0\nlib==2.0\n")
    image = {"torch": "2.6.0+cu124", "lib": "1.0", "extra": "1.0"}
    assert wheelhouse.missing_packages("requirements.txt", image) == {"app": "1.0", "lib": "2.0"}


def test_an_image_that_has_all_needs_no_wheels(wheelhouse, tmp_path):
    image = {"torch": "2.6.0+cu124", "lib": "1.0", "extra": "1.0", "app": "1.0"}
    assert wheelhouse.missing_packages("requirements.txt", image) == {}
    wheelhouse.fetch({}, "requirements.txt", image, "wheels")
    wheelhouse.check("wheels", image)


def test_torch_is_never_fetched(wheelhouse):
    with pytest.raises(RuntimeError, match="^nvidia-blas, torch: needed, but not among the packages of the image"):
        wheelhouse.missing_packages("requirements.txt", {"lib": "1.0"})
    with pytest.raises(RuntimeError, match="(?s)pip install failed.*torch"):  # which the made-up index has, newer
        wheelhouse.missing_packages("requirements.txt", {"lib": "1.0", "torch": "2.1.0"})


def test_what_a_package_of_the_image_needs_is_known_where_it_is_installed(wheelhouse, tmp_path):
    (tmp_path / "requirements.txt").write_text("rich\n")
    installed = wheelhouse.installed_packages()
    image = {name: installed[name] for name in ("rich", "pygments", "mdurl")}
    assert wheelhouse.missing_packages("requirements.txt", image) == {"markdown-it-py": "4.0"}
    assert wheelhouse.missing_packages("requirements.txt", image | {"rich": "14.0.0"}) == {}, "taken for complete"


def test_lists_of_packages_are_read(modules, tmp_path, capsys):
    (tmp_path / "image.txt").write_text("""# a comment
Some_Package==1.2.3
torch==2.6.0+cu124
local @ file:///tmp/x/local-4.5%2Bcpu-cp311-cp311-linux_x86_64.whl#sha256=00
built @ file:///tmp/built
-e git+ssh://somewhere/checkout#egg=checkout
""")
    assert modules[1].read_freeze(tmp_path / "image.txt") == {
        "some-package": "1.2.3", "torch": "2.6.0+cu124", "local": "4.5+cpu"}
    assert "taken for absent" in (printed := capsys.readouterr().out) and "built, -e git" in printed
    with pytest.raises(FileNotFoundError, match="other.txt is not there: write it on the image"):
        modules[1].read_freeze(tmp_path / "other.txt")
