"""The optional unsloth backend: whether it can be used here, told before anything long begins.

unsloth rewrites parts of transformers, peft and trl when it is imported, so it is imported only on request, and only
next to versions that it supports.
"""

import importlib.metadata

from packaging.requirements import Requirement

PACKAGES = ("unsloth", "unsloth_zoo")
_ADVICE = ("install what it supports by `pip install -r requirements-unsloth.txt` on a machine with a GPU, or use the "
           "backend 'transformers', which needs none of it")  # fmt: skip


def version_conflicts():
    """Return sentences about installed packages whose version the installed unsloth does not support."""
    conflicts = []
    for package in PACKAGES:
        try:
            version, needed = importlib.metadata.version(package), importlib.metadata.requires(package) or ()
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, needed):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                installed = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                continue  # its import says so, if it is needed at all
            if not requirement.specifier.contains(installed, prereleases=True):
                conflicts.append(f"{package} {version} supports {requirement.name} {requirement.specifier}, but "
                                 f"{installed} is installed")  # fmt: skip
    return conflicts


def import_unsloth():
    """Import unsloth and return its ``FastLanguageModel``.

    Raises:
        ImportError: it is not installed, finds no GPU, or does not support an installed package: says which, and what
            to do.
    """
    if conflicts := version_conflicts():
        raise ImportError(f"{'; '.join(conflicts)}: {_ADVICE}")
    try:
        from unsloth import FastLanguageModel
    except (ImportError, NotImplementedError) as error:
        raise ImportError(f"unsloth cannot be imported ({error}): {_ADVICE}") from error
    return FastLanguageModel
