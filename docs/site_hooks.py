"""Hooks of MkDocs: pages from the top of the repository, and links out of docs/, which work where the repository is browsed."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"SECURITY.md": "security.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files at the top of the repository that are pages of the site."""

_LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<path>(?:\.\./)+)(?P<target>[^)#\s]*)(?P<anchor>#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the top of the repository."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text().replace("](docs/", "](").replace("](CONTRIBUTING.md", "](contributing.md")
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to other files of the repository by their paths.

    Raises:
        PluginError: A file does not exist.
    """

    def replace(found: re.Match[str]) -> str:
        target = found["target"].rstrip("/")
        if target in PAGES:
            levels = found["path"].count("../") - 1
            return f"[{found['text']}]({'../' * levels}{PAGES[target]}{found['anchor'] or ''})"
        if not (ROOT / target).exists():
            raise PluginError(f"{page.file.src_uri} links to {target}, which does not exist")
        path = f"`{target}`"
        return path if found["text"].strip("`") == target else f"{found['text']} ({path})"

    return _LINK.sub(replace, markdown)
