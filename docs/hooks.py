"""What mkdocs does to the pages of the site beside making HTML of them; mkdocs.yml names this file.

- ``changelog.md`` is the CHANGELOG.md of the root.
- A page of the navigation that is not there is left out of it.
- Tables between ``<!-- table: NAME -->`` and ``<!-- end -->`` are made of bench/results, as README's are.
- Formulas become MathML, which browsers show without a script.
- Roles of docstrings, such as ``:func:``, are left out before what they stand in front of.
"""

from __future__ import annotations

import html
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
CHANGELOG = "changelog.md"
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):(?=<code>)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.nav = _present(config.nav, Path(config.docs_dir))
    return config


def _present(nav: Any, folder: Path) -> Any:
    """``nav`` without the pages that are not in ``folder``."""
    if isinstance(nav, list):
        return [each for entry in nav if (each := _present(entry, folder))]
    if isinstance(nav, dict):
        return {title: each for title, entry in nav.items() if (each := _present(entry, folder))}
    return nav if nav == CHANGELOG or (folder / nav).exists() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, CHANGELOG, content=(ROOT / "CHANGELOG.md").read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    if "<!-- table: " not in markdown:
        return markdown
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # where `bench` is, however mkdocs was called
    from bench.tables import README, machines_of, render

    return render(markdown, machines_of(README.read_text(encoding="utf-8")))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    def in_mathml(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]), display="block" if found[1] == "div" else "inline")

    return ROLE.sub("", FORMULA.sub(in_mathml, content))
