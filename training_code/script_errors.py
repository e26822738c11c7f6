"""How an error ends a run script: one that this project raises to say what to change is shown as its sentence alone.

Everything else, errors of libraries and mistakes of this code among them, is shown with Python's traceback.
"""

import sys
import traceback
from pathlib import Path

CODE = Path(__file__).resolve().parent


def shortened(error):
    """Return an error as text without its traceback, if a `raise` of this project made it; None for any other error.

    What it was raised from is told in a line of its own.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, Exception) or not frames:
        return None
    last = frames[-1]
    if Path(last.filename).resolve().parent != CODE or not (last.line or "").startswith("raise "):
        return None
    lines = [f"error: {error}"]
    if error.__cause__ is not None:
        lines.append(f"because of {type(error.__cause__).__name__}: {error.__cause__}")
    return "\n".join(lines)


def show_error(kind, error, trace):
    """Show the error that ends a process: a `sys.excepthook`."""
    text = shortened(error.with_traceback(trace))
    if text is None:
        sys.__excepthook__(kind, error, trace)
    else:
        print(f"\n{text}", file=sys.stderr)
