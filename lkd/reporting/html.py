"""Pieces of a self-contained page. Whatever comes from a run is escaped here."""

import base64
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def html_table(header: Iterable[str], rows: Sequence[Sequence[str]], classes: Sequence[str] | None = None) -> str:
    """An HTML table; every cell is escaped.

    Args:
        header: Titles of the columns.
        rows: The cells.
        classes: A class for each row.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{escape(kind)}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row, kind in zip(rows, classes or [""] * len(rows), strict=True)
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def embed_picture(path: Path, description: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'


def embed_data(content: Any, identifier: str) -> str:
    """JSON inside the page, for its scripts to read. No text in it can end the element or open a comment.

    Raises:
        ValueError: If a number is not finite, which JSON has no word for.
    """
    text = json.dumps(content, allow_nan=False, ensure_ascii=True, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(identifier)}">{text}</script>'
