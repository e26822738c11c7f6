"""Run a command on a GPU with less memory: all but so much of it is taken while the command runs.

    python benchmarks/smaller_gpu.py --gib 24 -- python benchmarks/training_benchmark.py --base-model /tmp/Llama-random

What the command reports is that of the real GPU, apart from its memory. Its exit status is that of the command.
"""

import argparse
import subprocess
import sys

import torch

GIB = 2**30


def free_gib(device):
    """Return (GiB free, GiB in all) of the current GPU; None for another device, "cpu"."""
    return tuple(size / GIB for size in torch.cuda.mem_get_info()) if device == "cuda" else None


def take_all_but(gib):
    """Take the memory of the current GPU but for so many GiB; return the tensor that holds it.

    Raises:
        ValueError: so much is not free.
    """
    torch.zeros(1, device="cuda")  # what a process needs by itself is taken too
    free = torch.cuda.mem_get_info()[0]
    if free < gib * GIB:
        raise ValueError(f"--gib {gib}: only {free / GIB:.1f} GiB of this GPU are free")
    return torch.empty(int(free - gib * GIB), dtype=torch.uint8, device="cuda")


def main(arguments=None):
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, required=True, help="GiB that are left to the command")
    parser.add_argument("command", nargs="+", help="after --")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    try:
        taken = take_all_but(options.gib)
    except ValueError as error:
        parser.error(str(error))
    print(f"{taken.nbytes / GIB:.1f} GiB are taken, {torch.cuda.mem_get_info()[0] / GIB:.1f} left", flush=True)
    return subprocess.run(options.command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
