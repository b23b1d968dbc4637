"""Who imports whom: read from the source, and held to an order of packages in which imports go downwards only."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

FOLDERS = {"bqnn": "bqnn", "kernels": "bqnn.kernels", "bench": "bench", "tests": "tests"}
"""The name under which the modules of each folder are imported."""

TIERS = (
    ("bqnn._version",),
    ("bqnn.core",),
    ("bqnn.kernels", "bqnn.models", "bqnn.data"),
    ("bqnn.ops",),
    ("bqnn.bayes", "bqnn.packed"),
    ("bqnn.engine", "bqnn.training"),
    ("bqnn.reports", "bqnn.lightning", "bqnn.sklearn"),
    ("bqnn.files",),
    ("bqnn.lab",),
    ("bqnn.view",),
    ("bqnn.cli",),
    ("bqnn",),
    ("tests.support",),
    ("bench",),
    ("tests",),
)
"""Packages from the lowest to the highest; those of one tier do not know each other: kernels, models and data
sets know bqnn.core alone."""

ALONE = "tests"
"""The package whose modules do not import each other either."""

Imports = Mapping[str, Mapping[str, int]]
"""By module, the modules that it imports, and the line of each import."""


def read_imports(root: Path) -> Imports:
    """All imports among the modules of FOLDERS under ``root``: also those within functions, those for type checkers,
    and those by a name in quotes."""
    paths = {}
    for folder, prefix in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            paths[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    imports = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        named = _named(ast.parse(path.read_text(), str(path)), package)
        found: dict[str, int] = {}
        for base, name, line in named:
            target = next((target for target in (f"{base}.{name}", base) if target in paths), None)
            if target is not None and target != module:
                found.setdefault(target, line)
        imports[module] = found
    return imports


def _named(tree: ast.Module, package: str) -> Iterator[tuple[str, str, int]]:
    """What each import names: a module, what is taken from it, which may be a module too, and the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, "", node.lineno
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield base, alias.name, node.lineno
        elif isinstance(node, ast.Call) and node.args:
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            name = node.args[0].values[0] if isinstance(node.args[0], ast.JoinedStr) else node.args[0]
            if function in ("import_module", "importorskip") and isinstance(name, ast.Constant):
                yield str(name.value).rstrip("."), "", node.lineno


def package_of(module: str) -> str | None:
    """The package of TIERS that ``module`` belongs to; None where it has no place."""
    if module in ("bqnn", "bqnn.__main__"):
        return "bqnn"
    packages = [package for tier in TIERS for package in tier if package != "bqnn"]
    inside = [package for package in packages if module == package or module.startswith(package + ".")]
    return max(inside, key=len, default=None)


def forbidden(imports: Imports) -> list[str]:
    """A line for each import that does not go downwards, and for each module that has no place."""
    tier_of = {package: tier for tier, packages in enumerate(TIERS) for package in packages}
    lines = [f"{module} belongs to no package of TIERS" for module in imports if package_of(module) is None]
    for module, targets in imports.items():
        for target, line in targets.items():
            importer, imported = package_of(module), package_of(target)
            if importer is None or imported is None or (importer == imported != ALONE):
                continue
            if not tier_of[imported] < tier_of[importer]:
                lines.append(f"{module}, line {line}: {importer} imports {target}")
    return lines


def circle(imports: Imports) -> list[str]:
    """Modules of which each imports the next and the last the first; empty where there is no such circle."""
    finished: set[str] = set()

    def visit(module: str, above: list[str]) -> list[str]:
        if module in above:
            return above[above.index(module) :]
        if module in finished:
            return []
        for target in imports[module]:
            if found := visit(target, [*above, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in imports if (found := visit(module, []))), [])
