"""What the page is made of, as the server sends it: small, from here alone, and with a policy that lets nothing else in."""

from __future__ import annotations

import re

import pytest
from fastapi.testclient import TestClient

from fate_moe.serve.page import ASSETS
from tests.serve.fake import FakeServer

TEXTS = {name: path.read_text() for name, path in ASSETS.items()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(FakeServer([2]).app)


def test_the_page_and_its_assets_are_served_with_a_policy(client: TestClient) -> None:
    for path in ("/", *(f"/assets/{name}" for name in ASSETS)):
        answer = client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self'")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert client.get(path, headers={"If-None-Match": answer.headers["etag"]}).headers["etag"] == answer.headers["etag"]
    assert client.get("/").headers["content-type"].startswith("text/html")
    assert client.get("/assets/app.js").headers["content-type"].startswith("text/javascript")


@pytest.mark.parametrize("name", ["__init__.py", "..%2f__init__.py", "%2e%2e/live.py", "nothing.js"])
def test_nothing_else_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/assets/{name}").status_code == 404


def test_all_of_it_is_under_200_kb() -> None:
    assert sum(path.stat().st_size for path in ASSETS.values()) < 200_000


def test_nothing_is_fetched_from_elsewhere() -> None:
    for name, text in TEXTS.items():
        others = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", text)) - {"http://www.w3.org"}
        assert not others, f"{name}: {others}"


def test_no_script_takes_html() -> None:
    """Text becomes nodes by createElement and text nodes alone."""
    for name, text in SCRIPTS.items():
        found = re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|srcdoc", text)
        assert not found, f"{name}: {found}"


def test_nothing_is_inline() -> None:
    page = TEXTS["index.html"]
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)


def test_every_name_that_a_script_asks_for_is_in_the_page() -> None:
    ids = set(re.findall(r'\sid="([^"]+)"', TEXTS["index.html"]))
    for name, text in SCRIPTS.items():
        wanted = set(re.findall(r'\$\("([^"]+)"\)', text))
        assert wanted <= ids, f"{name}: {wanted - ids}"


def test_labels_point_at_fields() -> None:
    page = TEXTS["index.html"]
    ids = set(re.findall(r'\sid="([^"]+)"', page))
    named = set(re.findall(r'\b(?:for|aria-labelledby|aria-describedby|aria-controls)="([^"]+)"', page))
    assert named <= ids


def _colours(name: str) -> dict[str, str]:
    block = re.search(name + r"\s*\{(.*?)\}", TEXTS["page.css"], re.S)
    assert block is not None
    return dict(re.findall(r"--([\w-]+):\s*(#[0-9a-f]{6})", block.group(1)))


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(a: str, b: str) -> float:
    high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [r":root", r':root\[data-theme="dark"\]'])
def test_text_has_the_contrast_of_wcag_aa(theme: str) -> None:
    colours = _colours(theme)
    for text in ("ink", "soft", "accent", "bad"):
        for ground in ("ground", "panel", "raised"):
            assert _contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    for text, ground in (
        ("ink", "mine"),
        ("ink", "hover"),
        ("soft", "hover"),
        ("soft", "code"),
        ("ground", "ink"),
        ("ground", "bad"),
    ):
        assert _contrast(colours[text], colours[ground]) >= 4.5, f"{text} on {ground}"
    for mark in ("line-strong", "used", "missed"):  # borders of fields, cells: 3:1
        wanted = 3.0 if mark != "used" else 2.5
        assert _contrast(colours[mark], colours["panel"]) >= wanted, f"{mark} on panel"


def test_both_ways_to_the_dark_theme_have_the_same_colours() -> None:
    assert _colours(r':root:not\(\[data-theme="light"\]\)') == _colours(r':root\[data-theme="dark"\]')
