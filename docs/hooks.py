"""What MkDocs does not do by itself: pages from outside of docs/, and links of the repository as links of the site.

Pages are written for readers of the repository, so their links are paths in it. In the site, a link to a page leads to
that page, a link to another file becomes its name, and a link to nothing stays as it is: `mkdocs build --strict`
reports it. A paragraph that is only a link to a section of README.md becomes that section.
"""

import os
import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
# Pages of the repository that are not in docs/: they have the same path in the site.
OUTSIDE = ["SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"]
RESULTS = "benchmarks/results"
# Where a link to README.md or to one of its sections leads.
README = {"": "index.md", "install": "install.md", "train": "training.md", "export": "export.md", "embed": "embed.md"}
README |= {"evaluate-and-search": "evaluate.md", "where-things-are": "CONTRIBUTING.md"}
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\[\]]*\])*)\]\(([^()\s]+)\)")
_SECTION = re.compile(r"^\[[^\]\n]*\]\((?:\.\./)*README\.md#([a-z-]+)\)$", re.MULTILINE)
_FENCE = re.compile(r"(^ *```.*?^ *```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


def on_config(config):
    """Lists the results of benchmarks in the navigation."""
    results = [f"{RESULTS}/{path.name}" for path in sorted((ROOT / RESULTS).glob("*.md"))]
    for section in config.nav:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else []:
                if entry.get("Measured") == RESULTS:
                    entry["Measured"] = results
    return config


def on_files(files, config):
    """Adds the pages from outside of docs/."""
    for path in [*OUTSIDE, *(f"{RESULTS}/{file.name}" for file in sorted((ROOT / RESULTS).glob("*.md")))]:
        files.append(File.generated(config, path, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    uri = page.file.src_uri
    source = uri if _is_outside(uri) else f"docs/{uri}"
    markdown = _SECTION.sub(lambda found: _section(found[1], source, uri, files), markdown)
    return _links(markdown, source, uri, files)


def _is_outside(uri: str) -> bool:
    return uri in OUTSIDE or uri.startswith(f"{RESULTS}/")


def _section(anchor: str, source: str, uri: str, files) -> str:
    """Returns a section of README.md without its heading."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.partition("\n")
        if re.sub(r"[^a-z]+", "-", title.lower()).strip("-") == anchor:
            return _links(body.strip(), "README.md", uri, files)
    raise PluginError(f"{source}: README.md has no section #{anchor}")


def _links(markdown: str, source: str, uri: str, files) -> str:
    """Rewrites links outside of code.

    Args:
      source: path of the text in the repository.
      uri: path of the page in the site.
    """
    parts = _FENCE.split(markdown)
    parts[::2] = [_LINK.sub(lambda found: _link(found, source, uri, files), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match, source: str, uri: str, files) -> str:
    mark, text, target = found.groups()
    if re.match(r"[a-z]+:|#", target):
        return found[0]
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    anchor = f"#{anchor}" if anchor else ""
    if path == "README.md":
        if anchor[1:] not in README:
            return found[0]
        path, anchor = README[anchor[1:]], ""
    else:
        path = path.removeprefix("docs/")
    if files.get_file_from_path(path) is not None:
        return f"{mark}[{text}]({os.path.relpath(path, posixpath.dirname(uri) or '.')}{anchor})"
    exists = (ROOT / path).exists() or (ROOT / "docs" / path).exists()
    return text if exists and not mark else found[0]
