"""How an error ends a run script: one that this project raises to say what to change is shown as its sentence alone.
So is a Ctrl-C.

Everything else, errors of libraries and mistakes of this code among them, is shown with Python's traceback; with
`ARC_TRACEBACK=1` in the environment all are.
"""

import dis
import os
import sys
from pathlib import Path

import torch

CODE = Path(__file__).resolve().parent
TOLD = (ValueError, OSError, ImportError, FloatingPointError)  # about options, files, packages, and rates
WANT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)  # told with advice, as an error of another kind
STOPPED = "stopped; the same command goes on from what is finished, a training from its last checkpoint"
shown_before = sys.excepthook  # how Python, or a debugger, shows errors


def shortened(error):
    """Return an error as text without its traceback, if a `raise` of this project made it to be read; else None.

    What it was raised from is told in lines of its own. Of a Ctrl-C it says how to go on.
    """
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    wanted = isinstance(error, TOLD) or isinstance(error.__cause__, WANT_OF_MEMORY)
    if not wanted or not str(error) or hasattr(error, "__notes__") or not _raised_here(error.__traceback__):
        return None
    lines, cause = [f"error: {error}"], error.__cause__
    while cause is not None:
        lines.append(f"because of {type(cause).__name__}: {cause}")
        cause = cause.__cause__
    return "\n".join(lines)


def _raised_here(trace):
    """Tell whether an error comes from a `raise` of this folder, not from making its message or from another line."""
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return (Path(code.co_filename).resolve().parent == CODE
            and dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS")


def show_error(kind, error, trace):
    """Show the error that ends a process: a `sys.excepthook`."""
    text = None if os.environ.get("ARC_TRACEBACK", "0") != "0" else shortened(error.with_traceback(trace))
    if text is None:
        shown_before(kind, error, trace)
    else:
        print(f"\n{text}", file=sys.stderr)
