"""The optional unsloth backend: whether it can be used here, its adapter, its trainer, and the entrance of its process.

unsloth rewrites parts of transformers, peft and trl when it is imported, so it is imported only on request, before any
of these, next to versions that it supports, and by the run scripts only in a process of its own (``unsloth_training``):

    python unsloth_backend.py          # can it be imported? The answer is the exit status and one sentence
    python unsloth_backend.py FOLDER   # train what ``unsloth_training`` has written there
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

PACKAGES = ("unsloth", "unsloth_zoo")
# those that it rewrites or computes with; versions of others (TLS certificates...) decide nothing here
DECISIVE = ("accelerate", "bitsandbytes", "cut_cross_entropy", "datasets", "numpy", "peft", "tokenizers", "torch",
            "torchao", "torchvision", "transformers", "triton", "trl", "unsloth_zoo", "xformers")  # fmt: skip
ADVICE = ("install what it supports by `pip install -r requirements-unsloth.txt` on a machine with a GPU, or use the "
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
            decisive = requirement.name.replace("-", "_").lower() in DECISIVE
            if not decisive or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
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
        raise ImportError(f"{'; '.join(conflicts)}: {ADVICE}")
    try:
        from unsloth import FastLanguageModel
    except Exception as error:  # whatever a foreign package meets in libraries that it rewrites
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"unsloth cannot be imported ({reason}): {ADVICE}") from error
    return FastLanguageModel


def check_unsloth(device, bits):
    """Make sure that a run can train by unsloth, before it begins; this takes as long as unsloth's import.

    Raises:
        ValueError: a device, a number of bits or of workers that it does not work with. ImportError: as of
            ``import_unsloth``.
    """
    from torchrun_tools import this_worker  # not in unsloth's own process, where nothing comes before unsloth

    if this_worker().count > 1:
        raise ValueError("--backend unsloth trains in one process, on one GPU: start the run without torchrun, or use "
                         "the backend 'transformers'")  # fmt: skip
    if device != "cuda" or bits == 32:
        raise ValueError(f"--backend unsloth: it needs a GPU and --bits 4 or 16, not --device {device} and --bits "
                         f"{bits}; the backend 'transformers' takes all of these")  # fmt: skip
    print("unsloth is imported to see whether it works here", flush=True)
    run = subprocess.run([sys.executable, __file__], capture_output=True, text=True, check=False)
    if run.returncode:
        raise ImportError((run.stdout.strip() or run.stderr.strip() or "unsloth cannot be imported").splitlines()[-1])


def create_unsloth_lora(model, r, alpha, target_modules, train_embeddings=True, rank_stabilised=True,  # noqa: PLR0913
                        gradient_checkpointing=True):  # fmt: skip
    """Put an adapter of the same form as ``adapter_tools.create_lora`` on a model that unsloth has loaded.

    gradient_checkpointing: recompute activations in unsloth's way, which moves some of them to main memory.
    Other arguments as there; the LoRA matrices are unsloth's own drawing, all trained weights fp32.
    """
    from adapter_tools import EMBEDDING_LAYERS, untie

    if train_embeddings:
        untie(model)
    model = import_unsloth().get_peft_model(
        model, r=r, lora_alpha=alpha, target_modules=list(target_modules), lora_dropout=0, bias="none",
        modules_to_save=list(EMBEDDING_LAYERS) if train_embeddings else None, use_rslora=rank_stabilised,
        use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
        ensure_weight_tying=False)  # fmt: skip
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def unsloth_trainer_classes():
    """Return unsloth's trainer, which is built on trl's, and the class of its arguments."""
    import_unsloth()
    from unsloth import UnslothTrainer, UnslothTrainingArguments

    return UnslothTrainer, UnslothTrainingArguments


def main(arguments):
    """Import unsloth, then train if a folder is given; return the exit status."""
    try:
        import_unsloth()
    except ImportError as error:
        print(error)
        return 1
    if arguments:
        from unsloth_training import train_here

        train_here(Path(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
