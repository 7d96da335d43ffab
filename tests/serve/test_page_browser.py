"""The page in a real browser: Debian's Chromium, against a server without a model (fake.py).

Screenshots go to build/screenshots.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import uvicorn

from tests.serve.fake import ATTACK, FakeServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt-get install chromium"),
]


class Running:
    """A fake server that listens."""

    def __init__(self, fake: FakeServer) -> None:
        self.fake = fake
        self.port = 0
        self._start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _start(self) -> None:
        config = uvicorn.Config(self.fake.app, port=self.port, log_level="error", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
        started = threading.Event()

        async def serve() -> None:
            serving = asyncio.ensure_future(self._server.serve())
            while not self._server.started and not serving.done():
                await asyncio.sleep(0.01)
            started.set()
            await serving

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert started.wait(20)
        self.port = self._server.servers[0].sockets[0].getsockname()[1]

    def stop(self) -> None:
        """Cuts every connection."""
        self._server.should_exit = True
        self._thread.join(10)

    def restart(self) -> None:
        """On the same port."""
        self._start()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    running = Running(FakeServer([32] * 24, delay=0.004))
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        flags = ["--disable-dev-shm-usage"]  # containers have little of it
        if os.geteuid() == 0:
            flags.append("--no-sandbox")  # root may not have one
        launched = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield launched
        launched.close()


@pytest.fixture
def start() -> Iterator[Callable[[FakeServer], Running]]:
    """Starts servers that are stopped when the pages are closed."""
    started: list[Running] = []

    def start_it(fake: FakeServer) -> Running:
        started.append(Running(fake))
        return started[-1]

    yield start_it
    for running in started:
        running.stop()


@pytest.fixture
def open_page(browser: Browser, server: Running, start: Callable[[FakeServer], Running]) -> Iterator[Callable[..., Page]]:
    """Opens the page in a fresh profile. At the end of a test nothing may have been said on the console, nor any rule broken."""
    contexts: list[Any] = []
    said: list[str] = []

    def open_it(url: str | None = None, size: dict[str, int] = DESKTOP, expect: str = "", **options: Any) -> Page:
        context = browser.new_context(viewport=size, **{"color_scheme": "light", **options})  # type: ignore[arg-type]
        contexts.append(context)
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        context.set_default_timeout(15_000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if not (expect and expect in message.text) else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => console.error('policy: ' + e.violatedDirective + e.blockedURI))"
        )
        page.goto(url or server.url)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert said == []


def until(page: Page, expression: str) -> None:
    """``page.wait_for_function`` evaluates in the page, which its policy forbids."""
    for _ in range(600):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(25)
    raise AssertionError(f"never: {expression}")


def send(page: Page, text: str) -> None:
    page.fill("#message", text)
    page.press("#message", "Enter")


def wait_for_end(page: Page) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector(".message.theirs:last-child .actions:not([hidden])")


def last_answer(page: Page) -> str:
    return page.inner_text(".message.theirs:last-child .text")


def connected(page: Page) -> None:
    page.wait_for_selector('#status-dot[data-state="ready"]')
    until(page, "document.getElementById('map').dataset.ticks > 0")


def pixels(page: Page) -> str:
    return str(page.evaluate("document.getElementById('map').toDataURL()"))


def shoot(page: Page, name: str) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png")


def fits(page: Page) -> bool:
    """Whether nothing makes the page wider than the screen."""
    return bool(page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth) <= innerWidth"))


def test_an_answer_streams_and_the_map_lights_up(open_page: Callable[..., Page]) -> None:
    page = open_page()
    connected(page)
    resting = pixels(page)
    send(page, "a tour, think first, for ever")
    page.wait_for_selector(".message.theirs .text p")
    lengths = set()
    for _ in range(40):
        lengths.add(len(last_answer(page)))
        page.wait_for_timeout(25)
        if len(lengths) > 3:
            break
    assert len(lengths) > 3, "the text grows while it is written"
    until(page, "document.getElementById('map').dataset.lit > 20")
    assert pixels(page) != resting
    assert float(page.inner_text('[data-chart="tokens_per_second"] b')) > 0
    assert page.inner_text(".thoughts summary").startswith("Thought for")
    assert not page.is_visible(".thought"), "reasoning is folded"
    page.click("#stop")
    wait_for_end(page)
    assert "Stopped" in page.inner_text(".message.theirs:last-child .note")


def test_a_real_model_answers_and_its_experts_are_seen(open_page: Callable[..., Page], url: str) -> None:
    """The embedded model behind the real server: the page and the server agree on every name."""
    page = open_page(url)
    connected(page)
    assert "embedded" in page.inner_text("#status")
    assert "was not taught to converse" in page.inner_text("#empty-text")
    page.click("#tune")
    page.fill("#s-max_tokens", "24")
    page.fill("#s-seed", "1")
    page.fill("#s-top_k", "20")
    page.fill("#s-min_p", "0.01")
    page.fill("#s-repetition_penalty", "1.05")
    page.fill("#s-presence_penalty", "0.1")
    page.fill("#s-frequency_penalty", "0.1")
    page.click("#settings .primary")
    send(page, "Once upon a time there was a little girl")
    until(page, "Number(document.getElementById('map').dataset.seen) > 40")
    wait_for_end(page)
    assert last_answer(page)
    assert re.search(r"\d+ tokens . [\d.]+ a second . \d+ % of experts ready on time . [\d.]+ MB read", page.inner_text(".stats"))
    until(page, "document.querySelector('[data-chart=ready_on_time] b').textContent !== '\u2013'")
    text = last_answer(page)
    page.click("[aria-label='Answer again']")
    wait_for_end(page)
    assert last_answer(page) == text, "the same seed"


def test_stopping_ends_the_work_on_the_server(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page()
    before = server.fake.cancelled
    send(page, "for ever")
    page.wait_for_selector(".message.theirs .text p")
    page.keyboard.press("Escape")
    wait_for_end(page)
    text = last_answer(page)
    for _ in range(100):
        if server.fake.cancelled > before:
            break
        page.wait_for_timeout(20)
    assert server.fake.cancelled == before + 1
    assert last_answer(page) == text
    page.reload()
    assert last_answer(page) == text, "what was written is kept"


def test_markdown_becomes_what_it_says(open_page: Callable[..., Page]) -> None:
    page = open_page()
    send(page, "tour")
    wait_for_end(page)
    text = page.locator(".message.theirs .text")
    assert text.locator("strong").inner_text() == "experts"
    assert text.locator("em").inner_text() == "router"
    assert text.locator("h4").inner_text() == "Why that helps"
    assert text.locator("ol > li").count() == 2
    assert text.locator("ol > li > ul > li").count() == 2
    assert text.locator("td").all_inner_texts() == ["resident", "52 %", "34 GB/s", "on disk", "48 %", "1.2 GB/s"]
    assert text.locator("blockquote").inner_text() == "The text does not depend on how much fits into memory."
    assert text.locator("a").get_attribute("href") == "https://example.com/docs"
    assert "noopener" in (text.locator("a").get_attribute("rel") or "")
    text.locator(".copy-code").click()
    code = page.evaluate("navigator.clipboard.readText()")
    assert code.startswith("def route(logits, k=8):\n    best =")
    page.click(".message.theirs [aria-label=Copy]")
    assert "| :--- |" in page.evaluate("navigator.clipboard.readText()"), "the text as the model wrote it"
    assert "tokens" in page.inner_text(".stats")


CASES = [
    ("a_b_c and __init__ *x*", "<p>a_b_c and <strong>init</strong> <em>x</em></p>"),
    ("**bold *both* bold**", "<p><strong>bold <em>both</em> bold</strong></p>"),
    ("1 * 2 * 3 ** 4", "<p>1 * 2 * 3 ** 4</p>"),
    ("`a*b*` ``c`d`` \\*e\\*", "<p><code>a*b*</code> <code>c`d</code> *e*</p>"),
    ("- a\n- b\n\n  c\n- d", "<ul><li>a</li><li>b<p>c</p></li><li>d</li></ul>"),
    ("3. x\n4. y", '<ol start="3"><li>x</li><li>y</li></ol>'),
    ("a\n# b", "<p>a</p><h3>b</h3>"),
    ("~~~\n<b>\n~~~\n---", None),
    ("- [ ] a\n- [x] b", "<ul><li>☐ a</li><li>☑ b</li></ul>"),
    ("~~no~~ &amp; <b>", "<p><del>no</del> &amp;amp; &lt;b&gt;</p>"),
    ("> > deep\n> one", "<blockquote><blockquote><p>deep</p></blockquote><p>one</p></blockquote>"),
]


def test_markdown_by_cases(open_page: Callable[..., Page]) -> None:
    page = open_page()
    render = """async (text) => {
      const { render } = await import("/assets/markdown.js");
      const box = document.createElement("div");
      box.append(render(text));
      return box.innerHTML;
    }"""
    for text, wanted in CASES:
        got = page.evaluate(render, text)
        if wanted is not None:
            assert got == wanted
    assert "&lt;b&gt;" in page.evaluate(render, CASES[7][0])
    links = page.evaluate(render, "[a](https://e.org/x_(y)) https://e.org/z. <http://e.org> [b](javascript:alert(1)) [c](/d)")
    assert re.findall('href="([^"]+)"', links) == ["https://e.org/x_(y)", "https://e.org/z", "http://e.org/"]


def test_long_and_hostile_markdown_takes_no_time(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for text in (
        "*a " * 4000,
        "[" * 20000,
        "> " * 5000,
        "`" * 9999 + "a",
        "|" * 9999 + "\n|-|-|",
        "- " * 3000,
        "<http" * 5000,
        "_*~~" * 4000,
    ):
        seconds = page.evaluate(
            """async (text) => {
              const { render } = await import("/assets/markdown.js");
              const began = performance.now();
              render(text);
              return (performance.now() - began) / 1000;
            }""",
            text,
        )
        assert seconds < 5, f"{text[:8]!r}: {seconds:.1f} s"


def test_html_in_a_text_does_nothing(open_page: Callable[..., Page]) -> None:
    page = open_page()
    send(page, "attack <img src=x onerror=window.attacked=20>")
    wait_for_end(page)
    page.wait_for_timeout(200)
    for link in page.locator(".text a").all():
        assert (link.get_attribute("href") or "").startswith("https://")
    assert page.evaluate("window.attacked") is None
    for name in ("script", "img", "iframe", "svg", "b"):
        assert page.locator(f"#messages .text {name}, #messages .said {name}").count() == 0, name
    text = last_answer(page)
    assert '<img src=x onerror="window.attacked = 2">' in text
    assert "javascript:" in text
    page.reload()
    page.wait_for_selector(".message.theirs")
    assert page.evaluate("window.attacked") is None
    assert (
        json.loads(page.evaluate("localStorage[Object.keys(localStorage).find(k => k.startsWith('fate.conversation.'))]"))[
            "messages"
        ][1]["content"]
        == ATTACK
    )


def test_editing_and_answering_again(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page()
    send(page, "short one")
    wait_for_end(page)
    send(page, "short two")
    wait_for_end(page)
    assert [m["role"] for m in server.fake.requests[-1]["messages"]] == ["user", "assistant", "user"]
    page.click(".message.theirs:last-child [aria-label='Answer again']")
    wait_for_end(page)
    assert [m["content"] for m in server.fake.requests[-1]["messages"]][::2] == ["short one", "short two"]
    assert page.locator(".message").count() == 4
    page.click(".message.mine:first-child [data-edit]")
    page.fill(".edit textarea", "short three")
    page.press(".edit textarea", "Enter")
    wait_for_end(page)
    assert [m["content"] for m in server.fake.requests[-1]["messages"]] == ["short three"]
    assert page.locator(".message").count() == 2, "what came after the edited message is gone"
    assert page.inner_text("#title") == "short three"


def test_settings_are_sent_and_kept(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page()
    connected(page)
    send(page, "short")
    wait_for_end(page)
    body = server.fake.requests[-1]
    assert set(body) == {"messages", "stream", "stream_options"}, "nothing is sent that was not set"
    page.click("#tune")
    assert page.get_attribute("#s-temperature", "placeholder") == "0.7", "the server's own"
    page.fill("#system", "Be brief.")
    for name, value in (("temperature", "0"), ("top_k", "7"), ("seed", "42"), ("max_tokens", "99"), ("min_p", "0.05")):
        page.fill(f"#s-{name}", value)
    page.click("#settings .primary")
    page.reload()
    connected(page)
    send(page, "short")
    wait_for_end(page)
    body = server.fake.requests[-1]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    sampling = {name: body[name] for name in ("temperature", "top_k", "seed", "max_tokens", "min_p")}
    assert sampling == {"temperature": 0, "top_k": 7, "seed": 42, "max_tokens": 99, "min_p": 0.05}


def has_conversations(page: Page, titles: list[str]) -> None:
    """Waits for it: what a dialog asked for is done when it has closed."""
    from playwright.sync_api import expect

    expect(page.locator("#conversations .go")).to_have_text(titles)


def test_conversations_persist_and_can_be_renamed_deleted_and_exported(open_page: Callable[..., Page]) -> None:
    page = open_page()
    for text in ("short first", "short second"):
        page.click("#new")
        send(page, text)
        wait_for_end(page)
    page.reload()
    has_conversations(page, ["short second", "short first"])
    assert page.inner_text(".said") == "short second"
    page.click("#conversations li:nth-child(2) .go")
    assert page.inner_text(".said") == "short first"
    page.hover("#conversations li.chosen")
    page.click("#conversations li.chosen [aria-label^=Rename]")
    page.fill("#conversations input", "A new name")
    page.press("#conversations input", "Enter")
    assert page.inner_text("#title") == "A new name"
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(Path(download.value.path()).read_text())
    assert {one["title"] for one in exported["conversations"]} == {"A new name", "short second"}
    page.hover("#conversations li.chosen")
    page.click("#conversations li.chosen [aria-label^=Delete]")
    page.click("#confirm [value=yes]")
    has_conversations(page, ["short second"])
    page.reload()
    has_conversations(page, ["short second"])


def test_the_theme_follows_the_system_until_one_is_chosen(open_page: Callable[..., Page]) -> None:
    page = open_page(color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert dark != light
    connected(page)
    before = pixels(page)
    page.click("#theme")
    assert page.evaluate(ground) == dark
    page.wait_for_timeout(100)
    assert pixels(page) != before
    page.reload()
    assert page.evaluate(ground) == dark, "kept"


def test_the_map_tells_about_a_cell_and_has_a_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    connected(page)
    page.hover("#map", position={"x": 4, "y": 4})
    assert re.match(r"Layer 0, expert 0: (resident|on disk), (used \d|used once|not used yet)", page.inner_text("#cell"))
    page.mouse.move(0, 0)
    page.focus("#map")
    for key in ("ArrowDown", "ArrowDown", "ArrowRight", "End"):
        page.keyboard.press(key)
    assert page.inner_text("#cell").startswith("Layer 2, expert 31: ")
    page.click("#as-text summary")
    page.wait_for_selector("#as-text tbody tr")
    rows = page.locator("#as-text tbody tr")
    assert rows.count() == 24
    assert re.match(r"0\s+\d+ of 32\s+\d", rows.first.inner_text())
    assert page.inner_text("#shape-line") == "24 layers \u00d7 32 experts, room for 384 of 768"


@pytest.mark.parametrize("sizes", [[128] * 94, [512] * 48, [2, 60, 7, 33], [8, 8]], ids=["94x128", "48x512", "uneven", "2x8"])
def test_the_map_has_room_for_every_shape(
    start: Callable[[FakeServer], Running], open_page: Callable[..., Page], sizes: list[int]
) -> None:
    page = open_page(start(FakeServer(sizes)).url)
    connected(page)
    for size in (DESKTOP, PHONE):
        page.set_viewport_size(size)  # type: ignore[arg-type]
        if size is PHONE:
            page.click("#view-experts")
        page.wait_for_timeout(100)
        box = page.locator("#map").bounding_box()
        assert box is not None
        assert 20 < box["width"] <= size["width"]
        assert box["height"] >= 3 * len(sizes)
        assert fits(page)
        page.focus("#map")
        page.keyboard.press("End")
        for _ in sizes:
            page.keyboard.press("ArrowDown")
        page.keyboard.press("End")
        assert page.inner_text("#cell").startswith(f"Layer {len(sizes) - 1}, expert {sizes[-1] - 1}: ")
        page.hover("#map", position={"x": 1, "y": box["height"] - 2})
        assert page.inner_text("#cell").startswith(f"Layer {len(sizes) - 1}, expert ")


def test_a_model_on_a_gpu_shows_rates_and_says_why_there_is_no_map(
    start: Callable[[FakeServer], Running], open_page: Callable[..., Page]
) -> None:
    running = start(FakeServer([8] * 4, observable=False))
    page = open_page(running.url)
    page.wait_for_selector("#map-none:not([hidden])")
    assert not page.is_visible("#map")
    until(page, "document.querySelector('[data-chart=memory_bytes] b').textContent !== '\u2013'")


def test_the_queue_and_the_reading_of_the_prompt_are_shown(open_page: Callable[..., Page]) -> None:
    page = open_page()
    send(page, "queue this tour")
    until(page, "document.querySelector('.waiting')?.textContent.startsWith('In the queue, 2 before')")
    until(page, r"/Reading the prompt, \d+ of 512 tokens/.test(document.querySelector('.waiting')?.textContent)")
    assert page.locator("progress").get_attribute("max") == "512"
    wait_for_end(page)
    assert page.locator(".waiting").count() == 0


def test_an_error_is_told_in_the_words_of_the_server(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page(expect="400 (Bad Request)")
    send(page, "this is too long")
    page.wait_for_selector(".note.error")
    assert page.inner_text(".note.error") == "This model's maximum context length is 4096 tokens, and the prompt has 5000."
    send(page, "tour")
    wait_for_end(page)
    assert [m["content"] for m in server.fake.requests[-1]["messages"]] == ["tour"], "what failed is not sent again"


def test_a_key_is_asked_for_and_used(start: Callable[[FakeServer], Running], open_page: Callable[..., Page]) -> None:
    running = start(FakeServer([4] * 4, api_key="secret", delay=0.001))
    page = open_page(running.url, expect="401 (Unauthorized)")
    page.wait_for_selector("#ask-key[open]")
    page.fill("#key", "wrong")
    page.press("#key", "Enter")
    until(page, "document.getElementById('ask-key').open && document.getElementById('key').value === ''")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    connected(page)
    send(page, "tour")
    wait_for_end(page)
    assert "router" in last_answer(page)
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


def test_a_lost_connection_is_said_and_found_again(start: Callable[[FakeServer], Running], open_page: Callable[..., Page]) -> None:
    running = start(FakeServer([4] * 4))
    page = open_page(running.url, expect="net::ERR_")
    connected(page)
    send(page, "for ever")
    page.wait_for_selector(".message.theirs .text p")
    running.stop()
    page.wait_for_selector("#banner:not([hidden])")
    assert "cannot be reached" in page.inner_text("#banner-text")
    page.wait_for_selector(".note.error")
    assert "connection was lost" in page.inner_text(".note.error")
    running.restart()
    page.click("#banner-retry")
    page.wait_for_selector("#banner", state="hidden")
    connected(page)


def test_a_model_that_is_loading_is_waited_for(start: Callable[[FakeServer], Running], open_page: Callable[..., Page]) -> None:
    running = start(FakeServer([4] * 4, delay=0.001))
    running.fake.loading = 12.0
    page = open_page(running.url, expect="503 (Service Unavailable)")
    until(page, "document.getElementById('status').textContent === 'Loading the model, 12 s'")
    send(page, "tour")
    until(page, "document.querySelector('.waiting')?.textContent.includes('to be loaded')")
    running.fake.loading = None
    connected(page)
    wait_for_end(page)
    assert "router" in last_answer(page)


def test_everything_can_be_done_with_the_keyboard(open_page: Callable[..., Page]) -> None:
    page = open_page()
    connected(page)

    def tab_to(selector: str, most: int = 40) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("(selector) => document.activeElement?.matches(selector)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline != "none" or selector == "#message", f"the focus of {selector} is not seen"
                return
        raise AssertionError(f"{selector} is not reached")

    assert page.evaluate("document.querySelector('a[href], button, input, textarea').className") == "skip", "the first stop"
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "message"
    page.keyboard.type("tour")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("for ever")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.theirs .text p")
    page.keyboard.press("Escape")
    wait_for_end(page)
    assert page.inner_text(".said") == "tour\nfor ever"
    page.focus("#new")
    tab_to("#conversations .go")
    tab_to("[aria-label^=Rename]")
    page.keyboard.press("Enter")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert page.inner_text("#title") == "Renamed"
    tab_to("#tune")
    page.keyboard.press("Enter")
    page.wait_for_selector("#settings[open]")
    page.keyboard.press("Escape")
    page.wait_for_selector("#settings[open]", state="detached")
    tab_to("#theme")
    page.keyboard.press("Enter")
    assert page.get_attribute("html", "data-theme") == "dark"
    tab_to("[data-edit]")
    tab_to("[aria-label='Answer again']")
    tab_to("#message", 60)
    tab_to("#map")
    tab_to("#as-text summary")


def test_streamed_text_is_announced_by_sentences(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.evaluate(
        "window.said = 0; new MutationObserver(() => window.said++).observe(document.getElementById('announce'), {childList: true})"
    )
    send(page, "tour")
    wait_for_end(page)
    assert page.get_attribute("#announce", "aria-live") == "polite"
    assert "The answer is complete." in (page.text_content("#announce") or "")
    assert 0 < page.evaluate("window.said") < 8, "not for each token"
    assert not page.locator("#messages [aria-live]").count()


def test_reduced_motion_is_respected(open_page: Callable[..., Page]) -> None:
    page = open_page(reduced_motion="reduce")
    connected(page)
    send(page, "tour for ever")
    until(page, "document.getElementById('map').dataset.lit > 20")
    assert page.evaluate("document.getAnimations().filter((a) => a.playState === 'running').length") == 0
    page.keyboard.press("Escape")


def test_a_phone_has_all_of_it_without_scrolling_sideways(open_page: Callable[..., Page]) -> None:
    page = open_page(size=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2)
    connected(page)
    assert fits(page)
    send(page, "attack")  # wide tables and code
    wait_for_end(page)
    assert fits(page)
    page.tap("#view-experts")
    page.wait_for_selector("#map")
    assert fits(page)
    page.tap("#map")
    assert page.inner_text("#cell").startswith("Layer ")
    page.tap("#view-chat")
    page.tap("#menu")
    page.wait_for_selector("#side", state="visible")
    page.tap("#theme-side")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.tap("#new")
    page.wait_for_selector("#side", state="hidden")
    page.tap("#tune")
    assert fits(page)
    page.tap("#settings .primary")
    small = page.evaluate(
        """[...document.querySelectorAll('#top button, #composer button')].filter((b) => b.offsetParent)
           .filter((b) => b.offsetHeight < 30 || b.offsetWidth < 30).map((b) => b.id)"""
    )
    assert small == [], "large enough for a finger"


def test_what_is_sent_for_the_page_is_under_200_kb(open_page: Callable[..., Page], server: Running) -> None:
    page = open_page("about:blank")
    sent: list[int] = []
    urls: list[str] = []
    page.on("response", lambda response: urls.append(response.url))
    page.on(
        "requestfinished",
        lambda request: sent.append(sum(request.sizes()[part] for part in ("responseBodySize", "responseHeadersSize"))),
    )
    page.goto(server.url)
    connected(page)
    assert 20_000 < sum(sent) < 200_000
    assert all(url.startswith(server.url) for url in urls)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("device", ["desktop", "phone"])
def test_screenshots(open_page: Callable[..., Page], scheme: str, device: str) -> None:
    """For eyes; what can be checked is that they are of different pages."""
    phone = device == "phone"
    options = {"is_mobile": True, "has_touch": True, "device_scale_factor": 2} if phone else {}
    page = open_page(size=PHONE if phone else DESKTOP, color_scheme=scheme, **options)
    connected(page)
    shoot(page, f"{device}-{scheme}-empty")
    send(page, "Give me a tour of the experts, think first")
    page.wait_for_selector(".message.theirs .text table")
    shoot(page, f"{device}-{scheme}-chat")
    if phone:
        page.click("#view-experts")
        shoot(page, f"{device}-{scheme}-experts")
        page.click("#view-chat")
    wait_for_end(page)
    page.click("#tune")
    shoot(page, f"{device}-{scheme}-settings")
    names = [path.name for path in SCREENSHOTS.glob(f"{device}-{scheme}-*.png")]
    assert len(names) == 3 + phone
