"""write_page: a page of a template of bqnn/view/templates, as one file that needs nothing else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from bqnn.core.extras import needs
from bqnn.core.files import write_content

TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_page(path: str | os.PathLike[str], template: str, **content: Any) -> None:
    """Writes what ``template`` makes of ``content`` to ``path``, whole or not at all; all text in it is escaped.

    Raises:
        ModuleNotFoundError: jinja2 is not installed; the message names the extra.
        OSError: the file can not be written.
    """
    with needs("report"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    text = environment.get_template(template).render(content)
    # Names of files may hold bytes that are no text.
    encoded = text.encode("utf-8", errors="backslashreplace")
    write_content(path, encoded)
