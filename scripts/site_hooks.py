"""What MkDocs does not read in our documents as GitHub does."""

from __future__ import annotations

import re


def on_page_markdown(markdown: str, **_: object) -> str:
    """Give blocks that are files (```` ```python NAME.py ````) their name as a title.

    What is linked outside of the documents is not on the site: its name stays, without the link.
    """
    elsewhere = r"\[([^]]+)\]\(\.\./(?:tests|scripts|pytest_gpumem)/[^)]*\)"
    markdown = re.sub(elsewhere, r"`\1`", markdown)
    return re.sub(r"^```(\w+) (\S+)$", r'```\1 title="\2"', markdown, flags=re.MULTILINE)


def on_page_content(html: str, **_: object) -> str:
    """Raise ``ValueError`` where a block was not understood: readers would see it as plain text."""
    if "```" in html:
        raise ValueError(f"not read as a block: {html[html.index('```') :][:80]!r}")
    return html
