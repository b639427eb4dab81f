"""Hooks of mkdocs: what pages link to outside docs/ becomes part of the site, under repository/.

On GitHub ``[fill](../lmdeploy_kvq/kernels/fill.py)`` leads to the file. In the site it leads to a copy: Python files
become pages with their source, folders pages that list their files, everything else is copied as it is.
"""
from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # tests import this module where mkdocs is not installed
    from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r'(?<=\]\()\.\./([^)#\s]+)')
ALWAYS = ('CONTRIBUTING.md', )  # in the navigation


def targets(markdown: str) -> list[str]:
    """Paths from the repository's root that a page of docs/ links to, outside docs/."""
    return [match.rstrip('/') for match in LINK.findall(markdown)]


def address(target: str) -> str:
    """Where a file or folder of the repository lies among the site's sources."""
    path = ROOT / target
    if path.is_dir():
        return f'repository/{target}/index.md'
    return f'repository/{target}.md' if path.suffix == '.py' else f'repository/{target}'


def content(target: str) -> str | None:
    """Markdown that stands for a file or folder; None for a file that is copied.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = ROOT / target
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.is_file())
        return '\n'.join([f'# {target}', '', *(f'* [{name}]({name})' for name in files)])
    text = path.read_text(encoding='utf-8')
    return f'# {target}\n\n````python\n{text}````\n' if path.suffix == '.py' else None


def on_files(files: Files, config: Any) -> Files:
    """Add every linked file; a listed folder brings its files."""
    wanted = dict.fromkeys(ALWAYS)
    for page in files.documentation_pages():
        wanted.update(dict.fromkeys(targets(page.content_string)))
    for target in list(wanted):
        if (ROOT / target).is_dir():
            wanted.update(dict.fromkeys(f'{target}/{file.name}' for file in (ROOT / target).iterdir()
                                        if file.is_file()))
    for target in wanted:
        files.append(_file(target, config))
    return files


def _file(target: str, config: Any) -> File:
    from mkdocs.structure.files import File
    text = content(target)
    if text is None:
        return File.generated(config, address(target), abs_src_path=str(ROOT / target))
    return File.generated(config, address(target), content=text)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to the copies."""
    if page.file.src_uri.startswith('repository/'):
        return markdown
    return LINK.sub(lambda match: address(match[1].rstrip('/')), markdown)
