"""The browser that HTML is tested in: it must see what goes wrong, or a test of a page proves nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import browser
from tests.conftest import REPOSITORY

BROKEN = """<!doctype html><meta charset="utf-8"><title>broken</title>
<script>console.error("a word of complaint"); console.log("chatter");</script>
<script>throw new Error("nobody caught this");</script>
<img src="missing.png"><script src="http://127.0.0.1:9/far.js"></script>
<img src="data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw==">"""

SOUND = """<!doctype html><meta charset="utf-8"><title>sound</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="look.css"><button id="more">more</button><p id="count">0</p>
<script>
let count = 0;
document.getElementById("more").onclick = () => { count += 1; document.getElementById("count").textContent = count; };
</script>"""
LOOK = "body { background: rgb(255, 255, 255); } @media (prefers-color-scheme: dark) { body { background: rgb(1, 2, 3); } }"


def write(folder: Path, html: str) -> Path:
    (folder / "look.css").write_text(LOOK)
    (folder / "page.html").write_text(html, encoding="utf-8")
    return folder / "page.html"


def test_no_browser_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(browser.VARIABLE, str(tmp_path / "chrome"))
    with pytest.raises(browser.BrowserError, match=r"PCD_BROWSER=.*chrome is not a program"):
        browser.find_browser()
    assert browser.main() == 1
    monkeypatch.delenv(browser.VARIABLE)
    monkeypatch.setattr(browser, "NAMES", ("no-such-chromium",))
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path))
    with pytest.raises(browser.BrowserError, match="make browser"), browser.page():
        pass


def test_a_browser_that_does_not_start_is_no_browser(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "chromium"
    broken.write_text("#!/bin/sh\necho 'libnss3.so is missing' >&2\nexit 127\n")
    broken.chmod(0o755)
    monkeypatch.setenv(browser.VARIABLE, str(broken))
    assert browser.main() == 1
    assert "does not start: libnss3.so is missing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pages() -> Iterator[browser.Pages]:
    with browser.browsing() as opened:
        yield opened


def test_everything_that_goes_wrong_is_seen(pages: browser.Pages, tmp_path: Path) -> None:
    with pages() as watched:
        watched.open(write(tmp_path, BROKEN))
    assert "a word of complaint" in watched.console
    assert not any("chatter" in text for text in watched.console)
    assert watched.errors == ["nobody caught this"]
    assert watched.network == ["http://127.0.0.1:9/far.js"]
    assert set(watched.failed) == {(tmp_path / "missing.png").as_uri(), "http://127.0.0.1:9/far.js"}
    assert len(watched.complaints) == sum(map(len, (watched.console, watched.errors, watched.network, watched.failed)))


@pytest.mark.parametrize(("dark", "colour"), [(True, "rgb(1, 2, 3)"), (False, "rgb(255, 255, 255)")])
def test_a_sound_page_is_clicked_through_without_a_complaint(
    pages: browser.Pages, tmp_path: Path, dark: bool, colour: str
) -> None:
    with pages(640, 480, dark) as watched:
        page = watched.open(write(tmp_path, SOUND))
        for _ in range(3):
            page.click("#more")
        assert page.inner_text("#count") == "3"
        assert page.evaluate("[innerWidth, innerHeight]") == [640, 480]
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colour
        page.evaluate("localStorage.setItem('seen', 'yes')")
    assert watched.complaints == []
    with pages() as other:
        assert other.open(write(tmp_path, SOUND)).evaluate("localStorage.getItem('seen')") is None


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose path leaves room for Chromium's sockets, which take 107 letters at most."""
    with tempfile.TemporaryDirectory(prefix="pcd-") as folder:
        yield Path(folder)


def test_a_browser_of_its_own_ends_with_a_failing_test_and_leaves_nothing(short: Path) -> None:
    """In a process of its own: no event loop, no warning, no browser and no profile may be left behind."""
    script = f"""
import asyncio, gc, pathlib, psutil, tempfile
from tests.browser import page
tempfile.tempdir = {str(short)!r}
for _ in range(2):
    try:
        with page() as watched:
            watched.open(pathlib.Path({str(write(short, SOUND))!r}))
            children = psutil.Process().children(recursive=True)
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert watched.page.is_closed() and len(children) > 1
    assert psutil.wait_procs(children, timeout=10)[1] == []
    gc.collect()
    asyncio.run(asyncio.sleep(0))
"""
    environment = {**os.environ, "TMPDIR": str(short)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert {file.name for file in short.iterdir()} == {"page.html", "look.css"}
