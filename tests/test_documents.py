"""README and the pages of docs/: their Python runs, page by page, and their calls of the command are understood.

What a page takes for granted, its networks and data, is made before it by :data:`PREPARED`, tiny.
"""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bqnn
from bench import tables
from bqnn import models
from bqnn.cli.main import make_parser
from bqnn.lab.recipe import Recipe
from bqnn.lab.recipes import NAMES, load_recipe
from bqnn.lab.sweep import load_sweep
from bqnn.lab.train import Trainer
from tests.support.documents import Block, blocks, commands

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = {str(path.relative_to(ROOT)): path for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}

images, labels = torch.rand(32, 1, 8, 8), torch.randint(10, (32,))


def dataset() -> DataLoader[Any]:
    return DataLoader(TensorDataset(images, labels), batch_size=16)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return models.lenet5(image_size=8)


def bayes() -> nn.Module:
    return bqnn.convert(plain(), 3).eval()


def packed() -> nn.Module:
    return bqnn.pack(bayes())


def layers() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))


def readme() -> dict[str, Any]:
    return {"net": plain(), "loader": dataset(), "held_out": [(images, labels)], "x": images, "y": labels} | {
        "batches": [images],
        "other": packed(),
    }


def fit() -> dict[str, Any]:
    x = torch.rand(32, 3)
    return {"net": plain(), "loader": dataset(), "held_out": [(images, labels)], "x": x} | {
        "regression": nn.Linear(3, 1),
        "measured": DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16),
    }


def pack() -> dict[str, Any]:
    mine = bqnn.convert(layers(), 3)
    return {
        "net": bayes(),
        "images": images,
        "mine": mine,
        "skeleton": layers(),
        "other": nn.Sequential(nn.Linear(2, 2)),
    }


def command() -> dict[str, Any]:
    recipe = Recipe(pretrain_epochs=0, deterministic_epochs=0, epochs=1, validation=1400)
    Trainer(recipe, Path("run")).run(progress=False, log=lambda line: None)
    return {"folder": Path("run")}


def training() -> dict[str, Any]:
    return {"net": plain(), "loader": dataset(), "x": images, "y": labels, "torch": torch, "epoch": 0, "step": 1}


def ops() -> dict[str, Any]:
    layer = bqnn.BayesLinear(6, 4, num_levels=3)
    names = {name: getattr(layer, name).detach() for name in ("weight", "log_sigma2", "levels", "thresholds")}
    return {"x": torch.rand(5, 6), "torch": torch, **names}


PREPARED: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": readme,
    "docs/api/training.md": training,
    "docs/api/inference.md": lambda: {"net": bayes(), "x": images},
    "docs/api/reports.md": lambda: {"net": bayes(), "x": images},
    "docs/api/ops.md": ops,
    "docs/guide/fit.md": fit,
    "docs/guide/pack.md": pack,
    "docs/guide/compile.md": lambda: {"small": packed(), "images": images},
    "docs/guide/uncertainty.md": lambda: (
        {"net": bayes(), "small": packed(), "other": packed(), "images": images} | {"plain": plain()}
    ),
    "docs/guide/command.md": command,
    "docs/guide/torch.md": lambda: (
        {"small": packed(), "images": images, "rows": torch.rand(20, 4).numpy(), "classes": [0, 1] * 10}
    ),
}
"""What the pages take for granted, by name; made in the folder that the page's code runs in."""

AGAIN: dict[tuple[str, int], Callable[[], dict[str, Any]]] = {
    # README's second block begins with a network of the user's again, in the middle of its training.
    ("README.md", 1): lambda: {"net": plain(), "step": 3, "steps_an_epoch": 2},
}
"""The same before a single block of a page: the number of the block, from 0."""


def code_of(page: str, language: str) -> list[Block]:
    return [block for block in blocks(PAGES[page].read_text(encoding="utf-8")) if block.language == language]


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page, "python")])
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"bqnn": bqnn} | PREPARED.get(page, dict)()
    for number, block in enumerate(code_of(page, "python")):
        names |= AGAIN.get((page, number), dict)()
        # Line by line of the page: a traceback names the place.
        tree = ast.increment_lineno(ast.parse(block.code), block.line - 1)
        exec(compile(tree, str(PAGES[page]), "exec"), names)


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page, "sh")])
def test_the_calls_of_the_command_are_understood(page: str) -> None:
    parser, found = make_parser(), []
    for block in code_of(page, "sh"):
        found += list(commands(block.code))
    for arguments in found:
        options = parser.parse_args(arguments)
        if getattr(options, "recipe", None) is not None:
            assert load_recipe(options.recipe)
    assert found or page == "docs/index.md"


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page, "toml")])
def test_the_files_of_a_page_are_sweeps(page: str, tmp_path: Path) -> None:
    for block in code_of(page, "toml"):
        (tmp_path / "sweep.toml").write_text(block.code)
        assert load_sweep(tmp_path / "sweep.toml").search


def test_pages_have_code_and_what_is_prepared_is_of_a_page() -> None:
    with_python = {page for page in PAGES if code_of(page, "python")}
    assert set(PREPARED) <= with_python and {page for page, _ in AGAIN} <= with_python
    assert {page for page in PAGES if page.startswith("docs/guide/")} <= with_python
    languages = {block.language for path in PAGES.values() for block in blocks(path.read_text(encoding="utf-8"))}
    assert languages == {"python", "sh", "toml", ""}


def test_every_public_name_is_in_the_reference() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "api").glob("*.md"))
    named = re.findall(r"^::: bqnn\.(.*)$", text, re.MULTILINE)
    assert sorted(named) == sorted({*bqnn.__all__, *(f"ops.{name}" for name in bqnn.ops.__all__)} - {"__version__"})


def test_every_page_of_the_reference_has_examples() -> None:
    assert all(code_of(page, "python") for page in PAGES if page.startswith("docs/api/"))


def test_every_recipe_is_described() -> None:
    text = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert [name for name in NAMES if f"| {name} |" not in text] == []


@pytest.fixture(scope="module")
def hooks() -> dict[str, Any]:
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    return runpy.run_path(str(DOCS / "hooks.py"))


def test_formulas_become_mathml_and_roles_go(hooks: dict[str, Any]) -> None:
    page = '<span class="arithmatex">\\(a &lt; b\\)</span> <div class="arithmatex">\\[\n\\sum_m c_m\n\\]</div> '
    found = hooks["on_page_content"](page + ":func:<code>bqnn.fit</code>", None, None, None)
    assert found.count("<math") == 2 and "arithmatex" not in found
    assert 'display="inline"' in found and 'display="block"' in found and "<mo>&#x0003C;</mo>" in found
    assert found.endswith(" <code>bqnn.fit</code>")


def test_every_page_of_docs_has_a_place_in_the_navigation(hooks: dict[str, Any]) -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    named = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    assert {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} <= named
    nav = [{"A": "method.md"}, {"B": [{"C": "no.md"}]}, {"D": "changelog.md"}]
    assert hooks["_present"](nav, DOCS) == [{"A": "method.md"}, {"D": "changelog.md"}]


def test_tables_are_made_of_the_results(hooks: dict[str, Any]) -> None:
    text = "".join((DOCS / f"{name}.md").read_text(encoding="utf-8") for name in ("results", "speed"))
    assert sorted(found[2] for found in tables.TABLE.finditer(text)) == sorted(
        {*tables.OF_A_MACHINE, *tables.OF_A_FILE}
    )
    made = hooks["on_page_markdown"]("<!-- table: accuracy -->\n<!-- end -->", None, None, None)
    assert made in tables.README.read_text(encoding="utf-8"), "as README has it"


TEXT = """Text.

    net = bqnn.convert(net)

    more = 1

Text
    that goes on.

```sh
bqnn info "a b" && bqnn pack x  # bqnn eval
pip install .
```

- an item

    bqnn recipes
"""


def test_blocks_of_a_page() -> None:
    assert blocks(TEXT) == [
        Block("python", "net = bqnn.convert(net)\n\nmore = 1\n", 3),
        Block("sh", 'bqnn info "a b" && bqnn pack x  # bqnn eval\npip install .\n', 11),
        Block("sh", "bqnn recipes\n", 17),
    ]
    assert list(commands(blocks(TEXT)[1].code)) == [["info", "a b"], ["pack", "x"]]
