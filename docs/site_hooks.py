"""Hooks of mkdocs: on the site the examples are pages, in a checkout the docs link to their files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def on_files(files: Files, config: Any) -> Files:
    """Adds a page with the source of each example."""
    for path in _EXAMPLES:
        text = f"# {path.name}\n\n```python\n{path.read_text()}```\n"
        files.append(File.generated(config, f"examples/{path.stem}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to an example's file lead to its page."""
    return re.sub(r"\]\(\.\./examples/(\w+)\.py\)", r"](examples/\1.md)", markdown)
