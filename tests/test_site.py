"""The site that `make docs` builds: every link holds, nothing comes from elsewhere, the search works from a folder."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, browsing
from pages import ROOT
from test_api import documented

pytestmark = pytest.mark.slow
pytest.importorskip("sphinx", reason="needs the extra docs")

# what a browser fetches by itself; a link that a reader follows may lead anywhere
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]*\ssrc=["']https?:|<link[^>]*\shref=["']https?:|@import|url\(["']?https?:"""
)


def build(target: Path, source: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run what the Makefile runs."""
    command = [sys.executable, "-m", "sphinx", "--quiet", "--fail-on-warning", "-c", str(ROOT / "docs")]
    command += ["-d", str(target / "doctrees"), str(source), str(target / "site")]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("docs")
    built = build(target)
    assert built.returncode == 0, built.stderr
    return target / "site"


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    pages = [path for path in site.rglob("*") if path.suffix in {".html", ".css"}]
    assert len(pages) > 25
    assert {str(page): found for page in pages if (found := FETCHED.findall(page.read_text()))} == {}


def test_every_public_name_can_be_linked_to(site: Path) -> None:
    page = (site / "docs" / "api.html").read_text()
    for name, members in documented().items():
        whole = name if name.startswith("raysq.") else f"raysq.{name}"
        assert f'id="{whole}"' in page
        assert all(f'id="{whole}.{member}"' in page for member in members)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_search_works_from_a_folder(site: Path, tmp_path: Path) -> None:
    with browsing(tmp_path) as browser:
        browser.open(f"file://{site}/search.html?q=equalization")
        found = browser.until("[...document.querySelectorAll('ul.search li a')].map(a => a.href).join(' ')")
        assert "docs/smoothquant.html" in found
        browser.open(f"file://{site}/index.html")
        assert browser.until("document.title.includes('raysq') && location.pathname.endsWith('docs/index.html')")


@pytest.mark.parametrize("link", ["[gone](gone.md)", "[gone](../raysq/gone.py)", "[gone](speed.md#gone)"])
def test_a_broken_link_fails(link: str, tmp_path: Path) -> None:
    folder = tmp_path / "source" / "docs"
    folder.mkdir(parents=True)
    (folder / "index.md").write_text("# Index\n\n## All\n\n- [Speed](speed.md)\n")
    (folder / "speed.md").write_text(f"# Speed\n\n{link}\n")
    broken = build(tmp_path, folder.parent)
    assert broken.returncode != 0 and "gone" in broken.stderr
