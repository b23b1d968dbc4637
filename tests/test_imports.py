"""Imports go downwards through the packages, and never in a circle."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.imports import TIERS, circle, forbidden, package_of, read_imports

ROOT = Path(__file__).resolve().parent.parent
IMPORTS = read_imports(ROOT)


def test_every_package_is_read() -> None:
    assert {package_of(module) for module in IMPORTS} == {package for tier in TIERS for package in tier}
    assert sum(map(len, IMPORTS.values())) > 300


def test_imports_go_downwards() -> None:
    assert forbidden(IMPORTS) == []


def test_modules_do_not_import_each_other() -> None:
    assert circle(IMPORTS) == []


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "line", "refused"),
    [
        pytest.param("bqnn/core/a.py", "from bqnn.ops import b", "bqnn.core imports bqnn.ops.b", id="upwards"),
        pytest.param("bqnn/core/a.py", "import bqnn.ops.b as b", "bqnn.core imports bqnn.ops.b", id="import-as"),
        pytest.param("bqnn/core/a.py", "from ..ops.b import x", "bqnn.core imports bqnn.ops.b", id="relative"),
        pytest.param("bqnn/core/a.py", "def f():\n  import bqnn.ops.b", "bqnn.core imports bqnn.ops.b", id="function"),
        pytest.param(
            "bqnn/core/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from bqnn.ops.b import x",
            "bqnn.core imports bqnn.ops.b",
            id="type-checking",
        ),
        pytest.param(
            "bqnn/core/a.py", "f = import_module(f'bqnn.kernels.{x}')", "bqnn.core imports bqnn.kernels", id="by-name"
        ),
        pytest.param("bqnn/ops/b.py", "import bqnn", "bqnn.ops imports bqnn", id="the-root"),
        pytest.param("bqnn/ops/b.py", "from bqnn import convert", "bqnn.ops imports bqnn", id="a-public-name"),
        pytest.param("bqnn/bayes/c.py", "from bqnn.packed.d import x", "bayes imports bqnn.packed.d", id="one-tier"),
        pytest.param("bqnn/models/e.py", "from bqnn.kernels import f", "models imports bqnn.kernels.f", id="models"),
        pytest.param("kernels/f.py", "from bqnn.ops import b", "bqnn.kernels imports bqnn.ops.b", id="kernels"),
        pytest.param("bench/g.py", "from tests import test_h", "bench imports tests.test_h", id="bench"),
        pytest.param("tests/support/i.py", "import bench.g", "tests.support imports bench.g", id="support"),
        pytest.param("tests/test_j.py", "from tests.test_h import x", "tests imports tests.test_h", id="test-files"),
        pytest.param("bqnn/attic/k.py", "", "bqnn.attic.k belongs to no package", id="no-place"),
    ],
)
def test_a_forbidden_import_is_refused(file: str, line: str, refused: str, tmp_path: Path) -> None:
    files = {
        "bqnn/__init__.py": "from bqnn.bayes.c import convert",
        "bqnn/core/a.py": "",
        "bqnn/ops/b.py": "from bqnn.core import a",
        "bqnn/bayes/c.py": "from bqnn.ops.b import x",
        "bqnn/packed/d.py": "from bqnn.ops.b import x",
        "bqnn/models/e.py": "from bqnn.core.a import x",
        "kernels/__init__.py": "",
        "kernels/f.py": "import bqnn.core.a",
        "bench/g.py": "import bqnn\nfrom tests.support.i import x",
        "tests/test_h.py": "from bench import g\nfrom tests.support import i",
        "tests/support/i.py": "import bqnn",
    }
    assert forbidden(read_imports(tree(tmp_path, files))) == []
    (found,) = forbidden(read_imports(tree(tmp_path, {file: line})))
    assert refused in found


@pytest.mark.parametrize(
    "put_back",
    [
        pytest.param("from bqnn.core.a import x", id="plain"),
        pytest.param("def f():\n    from bqnn.core import a", id="function"),
        pytest.param("if TYPE_CHECKING:\n    from bqnn.core.a import x", id="type-checking"),
    ],
)
def test_a_circle_within_a_package_is_refused(put_back: str, tmp_path: Path) -> None:
    files = {"a": "from bqnn.core.b import x", "b": "from bqnn.core.c import x\nimport bqnn.core.d", "c": "", "d": ""}
    folder = tree(tmp_path, {f"bqnn/core/{name}.py": text for name, text in files.items()})
    assert circle(read_imports(folder)) == []
    imports = read_imports(tree(tmp_path, {"bqnn/core/c.py": put_back}))
    assert forbidden(imports) == []
    assert circle(imports) == ["bqnn.core.a", "bqnn.core.b", "bqnn.core.c"]
