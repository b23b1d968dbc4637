"""Installs built packages into fresh environments, as a user would, and runs a packed layer there.

    python -m tests.support.installed dist python3.11=2.14.1 python3.12=2.11.0

The wheel of the folder goes into an environment of each interpreter with that release of torch, and the source package,
built by pip in isolation, into one more of the first. Takes gigabytes and, for the isolated build, many minutes.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import bqnn

CHECK = """
import sys, warnings
warnings.simplefilter("error", RuntimeWarning)
from importlib.metadata import distributions
import torch, bqnn

version, isa = sys.argv[1:]
assert torch.__version__.partition("+")[0] == version, f"torch {torch.__version__} is here, and {version} was"
assert sum(each.metadata["Name"] == "torch" for each in distributions()) == 1, "there is a second torch"
assert bqnn.cpu_isa() == isa, f"the CPU kernels are {bqnn.cpu_isa()}, the machine has {isa}"
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 10))
small, x = bqnn.pack(bqnn.convert(net, num_levels=3).eval()), torch.randn(5, 3, 8, 8)
assert bqnn.backends()["packed_linear"]["cpu"]["cpu"].usable
with torch.no_grad():
    hidden = torch.nn.functional.conv2d(x, small[0].decode(), small[0].bias).relu().flatten(1)
    expected = torch.nn.functional.linear(hidden, small[3].decode(), small[3].bias)
    torch.testing.assert_close(small(x), expected, rtol=1e-5, atol=1e-5)
print(f"Python {sys.version.split()[0]}, torch {torch.__version__}: {isa} kernels, packed layers are right")
"""


def check(package: Path, interpreter: str, version: str) -> None:
    """Installs ``package`` beside torch of this version, by pip of a fresh environment of ``interpreter``.

    Raises:
        subprocess.CalledProcessError: it can not be installed, or does not run as it should.
    """
    with tempfile.TemporaryDirectory() as folder:
        python = str(Path(folder) / "bin" / "python")
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, f"torch=={version}"], check=True)
        subprocess.run([*pip, "--no-cache-dir", str(package.resolve())], check=True)
        subprocess.run([python, "-c", CHECK, version, bqnn.cpu_isa()], cwd=folder, check=True)


def main(folder: str, *environments: str) -> None:
    (wheel,), (source,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
    first, *_ = environments
    for package, environment in [(wheel, each) for each in environments] + [(source, first)]:
        print(f"{package.name}, {environment}", flush=True)
        check(package, *environment.split("="))


if __name__ == "__main__":
    main(*sys.argv[1:])
