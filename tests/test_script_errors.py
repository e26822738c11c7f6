"""Errors that end a script: sentences where this project raised them, tracebacks elsewhere."""

import subprocess
import sys

import pytest

import run_tools
from arc_files import write_json
from script_errors import show_error, shortened
from script_runs import TRAINING_CODE, start


def raised(function, *arguments):
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        function(*arguments)
    return caught.value


def test_an_error_raised_to_be_read_is_its_sentence(capsys):
    error = raised(run_tools.model_location, "pretrained_models/nothing")
    assert shortened(error).startswith("error: there is no model in ")
    show_error(type(error), error, error.__traceback__)
    printed = capsys.readouterr().err
    assert "run the fine-tuning script that makes it" in printed and "Traceback" not in printed


def test_ctrl_c_is_a_sentence_wherever_it_strikes(capsys):
    error = raised(lambda: (_ for _ in ()).throw(KeyboardInterrupt()).__next__())
    show_error(type(error), error, error.__traceback__)
    assert capsys.readouterr().err == ("\nstopped; the same command goes on from what is finished, a training from its "
                                       "last checkpoint\n")


def test_its_cause_is_told_too():
    def run_out():
        with run_tools.memory_advice("merging", "use --device cpu"):
            raise MemoryError("4 GiB asked for")

    assert shortened(raised(run_out)) == ("error: out of memory in merging: use --device cpu\n"
                                          "because of MemoryError: 4 GiB asked for")


def test_errors_of_others_have_their_traceback(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for error in (raised(write_json, tmp_path / "file" / "record.json", {}),  # of a library
                  raised(int, "x"), raised(run_tools.format_options, None)):  # mistakes of whoever called
        assert shortened(error) is None
        show_error(type(error), error, error.__traceback__)
        assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("code", "told"), [
    ("raise ValueError('one\\nline')", "error: one\nline"), ("if True: raise OSError('told')", "error: told"),
    ("try:\n    int('x')\nexcept ValueError as error:\n    raise ImportError('told') from error",
     "error: told\nbecause of ValueError: invalid literal for int() with base 10: 'x'"),
    ("raise ValueError(f'{None.name} is wrong')", None),  # its message could not be made
    ("raise ValueError(int('x'))", None), ("raise ValueError", None), ("raise KeyError('a')", None),
    ("raise RuntimeError('this cannot be')", None), ("raise SystemExit('x')", None), ("int('x')", None),
    ("error = ValueError('a')\nerror.add_note('b')\nraise error", None),
    ("raise ExceptionGroup('several', [ValueError('a')])", None),
])  # fmt: skip
def test_what_is_told_without_a_traceback(code, told):
    """Code as if it stood in a file of training_code/."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        exec(compile(code, str(TRAINING_CODE / "some_module.py"), "exec"), {})
    assert shortened(caught.value) == told
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        exec(compile(code, "/somewhere/else/some_module.py", "exec"), {})
    assert shortened(caught.value) is None


def test_a_traceback_can_be_asked_for(monkeypatch, capsys):
    error = raised(run_tools.model_location, "pretrained_models/nothing")
    for value, asked in (("0", False), ("1", True)):
        monkeypatch.setenv("ARC_TRACEBACK", value)
        show_error(type(error), error, error.__traceback__)
        assert ("Traceback" in capsys.readouterr().err) == asked


def test_a_script_with_wrong_options_ends_in_a_sentence(tmp_path):
    process = start("run_evaluation_Mini_without_ttt", "--output-path", tmp_path / "output", "--tasks", "nonsense")
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert process.stderr.endswith("error: --tasks: nonsense not in the ARC-AGI-1 evaluation set\n")


def test_unsupported_versions_are_told_when_a_script_starts(tmp_path):
    (tmp_path / "peft-0.1.dist-info").mkdir()
    (tmp_path / "peft-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: peft\nVersion: 0.1\n")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(TRAINING_CODE)!r}]; import run_tools"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "error: peft 0.1 is installed, supported is >=0.19" in process.stderr
