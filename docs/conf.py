"""The site of README, docs/ and the other pages of the root: `make docs`, which needs no network.

Sphinx with MyST: pages stay Markdown that any forge shows, the API comes from the docstrings, all links are checked,
those to files of the repo too, and the search works from a folder. It has been maintained since 2008.
"""

from __future__ import annotations

import re
from importlib import metadata

from sphinx.application import Sphinx

project = "raysq"
release = metadata.version("raysq")
root_doc = "docs/index"
include_patterns = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md"]
exclude_patterns = [".*", "build", "raysq_runs", "benchmarks", "tests", "mutants"]  # folders not to look into

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4  # as a forge makes them: the text in lower case, with hyphens
default_role = "code"  # docstrings have Markdown's single backticks
autodoc_typehints = "none"  # docstrings say types in words; signatures would be twice as long
python_maximum_signature_line_length = 100

html_theme = "furo"  # asks no other host for fonts or scripts
html_title = f"raysq {release}"
templates_path = ["_templates"]
html_additional_pages = {"index": "redirect.html"}  # sources lie at the root, so pages of docs/ are in docs/ here too
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False


def navigation(app: Sphinx, name: str, source: list[str]) -> None:
    """Make the lists of docs/index.md the navigation: the links of each section, in that order."""
    if name != root_doc:
        return
    for section in re.split(r"^## ", source[0], flags=re.M)[1:]:
        links = re.findall(r"^- \[(.*?)\]\((.+?)\.md\)", section, re.M)
        pages = "".join(f"{text} <{page}>\n" for text, page in links)
        caption = section.partition("\n")[0]
        source[0] += f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n{pages}```\n"


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", navigation)
