"""Make a folder of wheels from which a Kaggle notebook without internet installs what its image lacks.

An *image* is the set of packages that Kaggle gives a notebook, as {name: version}. What is missing there is worked out
by pip: it is shown an empty environment that says to have the packages of the image, and whatever it would install
there is fetched. What the image has in a version that fits is left alone.

The image's torch, CUDA and Triton (*protected* packages) fit its driver and weigh gigabytes: they are never fetched,
and count as complete. Where other versions of them were needed, that is an error.

    <folder>/*.whl
    <folder>/requirements.txt   exact version of everything that the notebook needs, the wheels' among them

Every function runs pip of the Python that it is called with, so that Python's version has to be the image's: call them
in a notebook on the image itself. unsloth-download.ipynb does.
"""

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packaging.utils import canonicalize_name, parse_wheel_filename

PROTECTED = re.compile(r"(pytorch-)?triton|torch|torchvision|torchaudio|(nvidia|cuda|cupy)-.*")
PIN = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;#]+)")


def installed_packages():
    """Return the packages that are installed here, as {name: version}."""
    packages = importlib.metadata.distributions()
    return {canonicalize_name(package.name): package.version for package in packages if package.name}


def read_freeze(file):
    """Return what `pip freeze` (or `pip list --format=freeze`) has written to a file, as {name: version}.

    A package from a wheel (`name @ file:///...whl`) has its version from the wheel's name. Others that are named
    without a version count as absent; they are printed.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is not there: write it on the image, with pip list --format=freeze > {file}")
    packages, unknown = {}, []
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        name, _, url = line.partition(" @ ")
        wheel = unquote(urlsplit(url).path).rpartition("/")[2]
        if pin := PIN.match(line):
            packages[canonicalize_name(pin[1])] = pin[2]
        elif wheel.endswith(".whl"):
            packages[canonicalize_name(name)] = str(parse_wheel_filename(wheel)[1])
        elif line.strip() and not line.startswith("#"):
            unknown.append(name)
    if unknown:
        print(f"no version, so taken for absent (`pip list --format=freeze` has versions): {', '.join(unknown)}")
    return packages


@contextlib.contextmanager
def simulated_image(packages):
    """Give the path of an environment that says to have the packages of an image, until the end of the with-block.

    A package that is installed here in the same version says what it needs, as its metadata do; others, and protected
    ones, need nothing, as the image is taken to be complete.
    """
    here = installed_packages()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, symlinks=True, with_pip=False)
        [site_packages] = Path(folder).glob("lib/python*/site-packages")
        for name, version in packages.items():
            metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            if here.get(name) == version and not PROTECTED.fullmatch(name):
                metadata = importlib.metadata.distribution(name).read_text("METADATA") or metadata
            info = site_packages / f"{name.replace('-', '_')}-{version}.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(metadata, encoding="utf-8")
        yield folder


def _pip(*arguments, environment=None, only_from=None):
    """Run pip and return its output.

    environment: path of the environment that it works on, instead of this one; only_from: folder of wheels that serves
    it, instead of the index and whatever is set for it.

    Raises RuntimeError with the end of its output if it fails.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    command += ["--python", environment] if environment else []
    command += [*map(str, arguments)]
    variables = dict(os.environ)
    if only_from:
        command += ["--no-index", "--find-links", str(only_from)]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        variables["PIP_CONFIG_FILE"] = os.devnull
    process = subprocess.run(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             check=False)
    if process.returncode:
        raise RuntimeError(f"pip {arguments[0]} failed:\n{process.stdout[-4000:]}")
    return process.stdout


def missing_packages(requirements, packages):
    """Return what an image lacks to fulfil requirements, and what that needs in turn, as {name: version}.

    requirements: file for pip; packages: those of the image. Raises RuntimeError where no versions fit together, or
    none with the protected packages of the image.
    """
    protected = [f"{name}=={version}\n" for name, version in packages.items() if PROTECTED.fullmatch(name)]
    with simulated_image(packages) as image, tempfile.TemporaryDirectory() as folder:
        constraints, report = Path(folder) / "constraints.txt", Path(folder) / "report.json"
        constraints.write_text("".join(protected))
        _pip("install", "--dry-run", "--report", report, "--requirement", requirements, "--constraint", constraints,
             environment=image)
        metadata = [entry["metadata"] for entry in json.loads(report.read_text(encoding="utf-8"))["install"]]
    missing = {canonicalize_name(entry["name"]): entry["version"] for entry in metadata}
    if too_large := sorted(name for name in missing if PROTECTED.fullmatch(name)):
        raise RuntimeError(f"{', '.join(too_large)}: needed, but not among the packages of the image. Take an image "
                           "for GPUs (accelerator T4 x2), or its complete list of packages")
    for name, version in sorted(missing.items()):
        print(f"{name} {version}  (image: {packages.get(name, 'none')})")
    return missing


def fetch(missing, requirements, packages, folder):
    """Fetch the missing packages as wheels into a folder, and write its requirements.txt; wheels of before go.

    Arguments as of `missing_packages`, and what that returned.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.glob("*.whl"):
        file.unlink()
    wanted = [f"{name}=={version}" for name, version in sorted(missing.items())]
    if wanted:
        _pip("wheel", "--no-deps", "--wheel-dir", folder, *wanted)
    pins = _pins(requirements) | missing
    lines = [f"# for Python {platform.python_version()} and torch {packages.get('torch', '(none)')}",
             *(f"{name}=={version}" for name, version in sorted(pins.items()))]
    (folder / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    megabytes = sum(file.stat().st_size for file in folder.glob("*.whl")) / 1e6
    print(f"{len(wanted)} wheels, {megabytes:.0f} MB, in {folder}")


def _pins(requirements):
    """Return the exact versions in a requirements file and in those that it takes in by `-r`, as {name: version}."""
    pins = {}
    for line in Path(requirements).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            pins |= _pins(Path(requirements).with_name(line.removeprefix("-r ").strip()))
        elif pin := PIN.match(line):
            pins[canonicalize_name(pin[1])] = pin[2]
    return pins


def check(folder, packages):
    """Check that pip, without an index, would complete an image from a folder of wheels alone.

    packages: those of the image. Raises RuntimeError with pip's words if something is missing.
    """
    with simulated_image(packages) as image:
        _pip("install", "--dry-run", "--requirement", Path(folder) / "requirements.txt", environment=image,
             only_from=folder)
    print(f"the wheels in {folder} complete the image without internet")
