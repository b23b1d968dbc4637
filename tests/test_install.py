"""What installing gives: what is built or why not, which packages it takes, and that the source package is whole."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import bqnn
from bqnn.core import native
from bqnn.data.splits import load_dataset
from bqnn.engine import compiled
from bqnn.lab.progress import progress_bar
from bqnn.ops import dispatch
from bqnn.ops.assign_codes import assign_codes
from bqnn.view.figures import _Drawing
from bqnn.view.page import write_page

ROOT = Path(__file__).resolve().parent.parent
OPTIONAL = ("PIL", "jinja2", "lightning", "matplotlib", "pytorch_lightning", "sklearn", "torchvision", "tqdm")
TOUCHES_ITS_OUTPUT = 'while [ "$1" != -o ]; do shift; done; touch "$2"'


def run_setup(folder: Path, *arguments: str, **environment: str) -> None:
    environment = {**os.environ, "BQNN_CPU": "", "BQNN_CUDA": "0", "MAX_JOBS": "1", **environment}
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.fixture
def source_tree(tmp_path: Path) -> Path:
    """All that setup.py reads, a package of one module with an extension that an earlier build has left, and a torch
    that is imported in no time."""
    folder = tmp_path / "source"
    (folder / "bqnn").mkdir(parents=True)
    (folder / "kernels").mkdir()
    scripts = ("setup.py", "cuda_toolkit.py", "bqnn_command.py")
    for name in (*scripts, "pyproject.toml", "README.md", "LICENSE", "bqnn/_version.py"):
        shutil.copy(ROOT / name, folder / name)
    (folder / "bqnn" / "__init__.py").touch()
    (folder / "csrc").symlink_to(ROOT / "csrc")
    torch = folder / "stub" / "torch"
    (torch / "utils").mkdir(parents=True)
    (torch / "__init__.py").write_text("__version__ = '2.98'")
    (torch / "utils" / "cpp_extension.py").write_text("include_paths = library_paths = lambda: []")
    (folder / "bqnn" / "_C.abi3.so").touch()
    return folder


def build(source_tree: Path, script: str, switch: str = "") -> tuple[str, dict[str, str]]:
    """The tag of the wheel and what the record says was skipped, of a build whose C++ compiler is a shell script."""
    compiler = source_tree / "compiler"
    if script:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o755)
    tools = dict.fromkeys(("CC", "CXX"), str(compiler))
    tools["PYTHONPATH"] = str(source_tree / "stub")
    run_setup(source_tree, "build_ext", "--inplace", "bdist_wheel", BQNN_CPU=switch, **tools)
    (wheel,) = (source_tree / "dist").glob("*.whl")
    record = json.loads((source_tree / "bqnn" / "_build.json").read_text())
    assert record["torch"] == ("" if switch == "0" else "2.98")
    return wheel.stem.partition(f"-{bqnn.__version__}-")[2], record["skipped"]


@pytest.mark.parametrize(
    ("script", "switch", "reason"),
    [
        pytest.param("", "", r"no C\+\+ compiler was found \(.*/compiler\)", id="no-compiler"),
        pytest.param("exit 3", "", "they did not compile, and .* -v shows why", id="does-not-compile"),
        pytest.param(TOUCHES_ITS_OUTPUT, "0", "BQNN_CPU=0", id="switched-off"),
    ],
)
def test_a_wheel_without_extensions_is_pure_and_the_reason_on_record(
    source_tree: Path, script: str, switch: str, reason: str
) -> None:
    tag, skipped = build(source_tree, script, switch)
    assert tag == "py3-none-any"
    assert re.fullmatch(reason, skipped["bqnn._C"])
    assert skipped["bqnn._CUDA"] == "BQNN_CUDA=0"
    assert not list((source_tree / "bqnn").glob("_C*")), "the extension of an earlier build would be imported"


def test_a_wheel_with_an_extension_serves_one_platform_and_every_python(source_tree: Path) -> None:
    tag, skipped = build(source_tree, TOUCHES_ITS_OUTPUT)
    assert re.fullmatch("cp310-abi3-(?!any).*", tag)
    assert skipped == {"bqnn._C": "", "bqnn._CUDA": "BQNN_CUDA=0"}
    assert [path.name for path in (source_tree / "bqnn").glob("_C*")] == ["_C.abi3.so"]


@pytest.mark.parametrize(
    ("record", "told"),
    [
        pytest.param(
            {"skipped": {"bqnn._C": "no C++ compiler was found (c++)"}, "torch": "2.14.1"},
            r"not built when bqnn was installed: no C\+\+ compiler was found \(c\+\+\)\. .*--no-cache-dir",
            id="skipped",
        ),
        pytest.param(
            {"skipped": {"bqnn._C": ""}, "torch": "2.98"},
            r"built with torch 2\.98, and this is torch .*\(libcudart\.so\.13: cannot open\).*--force-reinstall",
            id="does-not-load",
        ),
        pytest.param(None, "not built: .* is a source tree", id="no-record"),
    ],
)
def test_what_is_missing_is_told_from_the_record(
    record: object, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "_build.json"
    if record is not None:
        path.write_text(json.dumps(record))
    monkeypatch.setattr(native, "RECORD", path)
    error = ImportError("libcudart.so.13: cannot open")
    assert re.match(told, native.why_missing("bqnn._C", error))


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The reason for which there are no CPU kernels, in an installation without any."""
    reason = "the CPU kernels were not built: it is a test"
    monkeypatch.setattr(native, "MISSING", reason)
    native.warn_of_missing.cache_clear()
    dispatch._candidates.cache_clear()
    yield reason
    native.warn_of_missing.cache_clear()
    dispatch._candidates.cache_clear()


def test_without_kernels_the_first_use_warns(no_kernels: str) -> None:
    weight, thresholds = torch.zeros(2, 3), torch.zeros(1, 1)
    with pytest.warns(RuntimeWarning, match=f"plain PyTorch.*{no_kernels}"):
        assign_codes(weight, thresholds)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign_codes(weight, thresholds)
        bqnn.BayesLinear(3, 2)(torch.ones(1, 3))
    on_the_cpu = [devices["cpu"]["cpu"].reason for devices in bqnn.backends().values()]
    assert no_kernels in on_the_cpu and set(on_the_cpu) <= {no_kernels, "not installed"}


def test_who_asks_for_the_reference_is_not_warned(no_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BQNN_BACKEND", "reference")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assign_codes(torch.zeros(2, 3), torch.zeros(1, 1))


def test_without_kernels_a_compiled_network_warns(no_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "cpu_isa", lambda: "none")
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.ones(2, 4)
    fast = bqnn.compile(net, x)
    with pytest.warns(RuntimeWarning, match=no_kernels):
        y = fast(x)
    torch.testing.assert_close(y, net(x))


@pytest.mark.parametrize(
    ("package", "use", "extra"),
    [
        pytest.param("sklearn", lambda: load_dataset("digits"), "train", id="digits"),
        pytest.param("torchvision", lambda: load_dataset("mnist"), "train", id="mnist"),
        pytest.param("tqdm", lambda: progress_bar([1], "epoch", 1), "train", id="training"),
        pytest.param("matplotlib", lambda: _Drawing("key", "title", "x", "y"), "report", id="figures"),
        pytest.param("jinja2", lambda: write_page("page.html", "page.html", title=""), "report", id="page"),
    ],
)
def test_a_package_that_is_missing_names_its_extra(
    package: str, use: Callable[[], object], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name == package or name.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    message = f"{package} is not installed: pip install 'bqnn[{extra}]'"
    with pytest.raises(ModuleNotFoundError, match=re.escape(message)):
        use()


def test_networks_and_the_command_need_no_extra() -> None:
    program = f"""
import sys
for name in {OPTIONAL!r}:
    sys.modules[name] = None
import torch, bqnn, bqnn.cli.main
net = bqnn.pack(bqnn.convert(torch.nn.Sequential(torch.nn.Linear(4, 3)), 3).eval())
print(tuple(net(torch.ones(2, 4)).shape))
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "(2, 3)", run.stderr


def test_the_citation_is_of_this_version_and_of_the_paper() -> None:
    yaml = pytest.importorskip("yaml")
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(found), "what the format demands"
    assert (found["version"], found["license"]) == (bqnn.__version__, "Apache-2.0")
    paper = found["preferred-citation"]
    assert {"type", "title", "authors", "journal", "year", "doi"} <= set(paper)
    assert all({"family-names", "given-names"} == set(author) for author in paper["authors"])
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["urls"]["Paper"] == f"https://doi.org/{paper['doi']}"


def test_every_package_that_is_asked_for_has_a_pin() -> None:
    pins = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in project["optional-dependencies"].values() for each in extra)]
    names = {re.split(r"[\[>;]", each)[0].lower() for each in asked}
    assert names - pins == {"bqnn", "tomli"}, "tomli is for Python 3.10 alone"


def tracked() -> set[str]:
    """The files of the project that are there."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return {name for name in names if (ROOT / name).exists()}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="nothing tells which files belong to the project")
def test_the_packages_have_every_file_of_the_project(tmp_path: Path) -> None:
    commands = ["egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(tmp_path / "lib")]
    run_setup(ROOT, *commands, BQNN_CPU="0")
    packed = set((tmp_path / "bqnn.egg-info" / "SOURCES.txt").read_text().splitlines())
    assert tracked() - packed == {".gitignore"}, "of the source package"
    assert not {name for name in packed if name.endswith((".so", ".pyc", "_build.json"))}
    installed = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*")}
    assert {name for name in tracked() if name.startswith("bqnn/")} <= installed, "templates and recipes, too"
