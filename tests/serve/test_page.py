"""The page in a real browser: asking, marks, votes, history, adapters, errors, a phone's width."""

import re
from collections.abc import Iterator

import httpx
import pytest
from browser import browser, needs_chromium
from playwright.sync_api import expect
from server_process import running_server
from tiny_models import write_random_adapter, write_tiny_model

from qlora_serve.serve.keys import add_key


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    base = write_tiny_model(folder / "tiny")
    for number, name in enumerate(("tagging", "tickets")):
        write_random_adapter(folder / "adapters" / name, base, seed=number)
    with running_server(base, "--adapters-dir", folder / "adapters", "--adapters-poll", "0") as url:
        yield url


def test_the_page_loads_nothing_from_elsewhere(url) -> None:
    page = httpx.get(url)
    assert page.status_code == 200
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    names = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert len(names) == 2
    scripts = {name: httpx.get(f"{url}/{name}") for name in names}
    for name in re.findall(r'from "\./([^"]+)"', scripts["page/app.js"].text):
        scripts[name] = httpx.get(f"{url}/page/{name}")
    for name, answer in scripts.items():
        assert answer.status_code == 200, name
        kind = "text/css" if name.endswith("css") else "text/javascript"
        assert answer.headers["content-type"].startswith(kind)
        assert "http://" not in answer.text
        assert "https://" not in answer.text
    for name in ("index.html", "nothing.js", "../app.py", "%2e%2e%2fconfig.py"):
        assert httpx.get(f"{url}/page/{name}").status_code == 404


@pytest.fixture(scope="module")
def chromium():
    with browser() as started:
        yield started


@needs_chromium
def test_the_page_of_the_api_shows_it_and_loads_nothing_from_elsewhere(chromium, url) -> None:
    page = chromium.new_page()
    page.set_default_timeout(60_000)
    elsewhere: list[str] = []
    page.on(
        "request",
        lambda one: None if one.url.startswith((url, "data:")) else elsewhere.append(one.url),
    )
    page.goto(f"{url}/docs")
    expect(page.get_by_text("/v1/chat/completions", exact=True)).to_be_visible()
    page.close()
    assert not elsewhere


@pytest.fixture
def page(chromium, url):
    """A fresh visitor; whatever the console complains of, or comes from elsewhere, is a failure."""
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else 0)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda one: None if one.url.startswith((url, "data:")) else wrong.append(one.url)
    )
    page.wrong = wrong
    page.goto(url)
    page.wait_for_selector(".variant")
    yield page
    context.close()
    assert not wrong


def _ask(page, text: str = "hello fox", tokens: int = 16) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#max_tokens", str(tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Control+Enter")


def _asked(page, text: str = "hello fox") -> None:
    _ask(page, text)
    page.wait_for_selector("#send:enabled")
    page.wait_for_selector(".answer .figures:has-text('tokens in')")


@needs_chromium
def test_answers_stand_side_by_side_as_the_server_gives_them(page, url) -> None:
    assert page.locator("#empty").is_visible()
    _asked(page)
    body = {
        "messages": [{"role": "user", "content": "hello fox"}],
        "variants": ["base", "tagging", "tickets"], "temperature": 0, "max_tokens": 16,
    }  # fmt: skip
    expected = httpx.post(f"{url}/v1/compare", json=body, timeout=60).json()["answers"]
    cards = page.locator(".answer")
    assert cards.locator("h3").all_text_contents() == ["base", "tagging", "tickets"]
    page.check("input[value=none]")
    said = page.eval_on_selector_all(".said", "all => all.map(one => one.textContent)")
    assert said == [one["text"] for one in expected]
    lefts = page.eval_on_selector_all(".answer", "all => all.map(one => one.offsetLeft)")
    assert lefts == sorted(set(lefts)), "side by side"
    assert "nats from the base" not in cards.nth(0).inner_text()
    mean = expected[1]["divergence"]["mean"]
    assert f"{mean:.3f} nats from the base" in cards.nth(1).inner_text()
    page.check("input[value=divergence]")
    shades = cards.nth(1).locator(".said span")
    assert shades.count() == len(expected[1]["tokens"])
    for number, found in enumerate(expected[1]["divergence"]["tokens"]):
        level = sum(found["divergence"] >= least for least in (0.05, 0.25, 1, 3))
        assert shades.nth(number).get_attribute("class") == (f"d{level}" if level else None)
    assert cards.nth(0).locator(".said span").count() == 0
    page.check("input[value=difference]")
    assert cards.nth(0).locator("mark").count() == 0
    assert cards.nth(1).locator("mark").count() > 0


@needs_chromium
@pytest.mark.parametrize(
    ("text", "other", "new"),
    [
        ("a b c", "a b c", ""),
        ("a x c", "a b c", "x "),
        ("b c", "a b c", ""),
        ("a b c d", "b c", "a d"),
        ("你好 🙂", "你好 🚀", "🙂"),
        ("", "a", ""),
    ],
)
def test_differences_are_the_words_that_the_other_lacks(page, text, other, new) -> None:
    found = page.evaluate(
        "async ([text, other]) => (await import('/page/text.js')).differences(text, other)",
        [text, other],
    )
    assert "".join(word["text"] for word in found) == text
    assert "".join(word["text"] for word in found if word["isNew"]) == new


@needs_chromium
def test_the_server_keeps_votes_and_the_browser_the_history(page, chromium, url) -> None:
    _asked(page, "hello fox")
    page.locator("h1").click()
    page.keyboard.press("2")
    expect(page.locator(".answer.chosen h3")).to_have_text("tagging")
    _asked(page, "second <b>question</b>")
    page.locator(".answer").nth(0).get_by_role("button", name="Best").click()
    standings = [
        ["base", "1", "2", "50 % (9 % to 91 %)"], ["tagging", "1", "2", "50 % (9 % to 91 %)"],
        ["tickets", "0", "2", "0 % (0 % to 66 %)"],
    ]  # fmt: skip
    rows = page.locator("#ranks tbody tr")
    expect(rows.locator("td").first).to_have_text("base")
    assert [row.locator("td").all_inner_texts() for row in rows.all()] == standings
    served = httpx.get(f"{url}/v1/feedback/standings").json()["data"]
    assert [(one["variant"], one["best"], one["of"]) for one in served] == [
        ("base", 1, 2), ("tagging", 1, 2), ("tickets", 0, 2)
    ]  # fmt: skip
    page.reload()
    page.wait_for_selector(".variant")
    entries = page.locator("#past li")
    expect(entries).to_have_count(2)
    assert "second <b>question</b>" in entries.nth(0).inner_text(), "text stays text"
    entries.nth(1).get_by_role("button").click()
    assert page.input_value("#prompt") == "hello fox"
    assert page.locator(".answer.chosen h3").inner_text() == "tagging"
    page.locator(".answer.chosen").get_by_role("button", name="Best").click()  # taken back
    expect(page.locator(".answer.chosen")).to_have_count(0)
    expect(rows.nth(0).locator("td")).to_have_text(["base", "1", "1", "100 % (21 % to 100 %)"])
    page.click("#forget")
    expect(entries).to_have_count(0)
    visitor = chromium.new_context()
    other = visitor.new_page()
    other.goto(url)
    expect(other.locator("#ranks tbody tr").nth(0).locator("td").nth(0)).to_have_text("base")
    expect(other.locator("#past li")).to_have_count(0)
    visitor.close()


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """A server that asks for keys, with an experiment; its URL, and keys by name."""
    folder = tmp_path_factory.mktemp("guarded")
    base = write_tiny_model(folder / "tiny")
    for number, name in enumerate(("tagging", "tickets")):
        write_random_adapter(folder / "adapters" / name, base, seed=number)
    keys = {
        name: add_key(folder / "keys.json", name=name, **fields)[0]
        for name, fields in {
            "asker": {"adapters": ("tag*",)}, "admin": {"scopes": ("infer", "admin")}
        }.items()
    }  # fmt: skip
    with running_server(
        base, "--adapters-dir", folder / "adapters", "--adapters-poll", "0",
        "--keys", folder / "keys.json", "--feedback", folder / "feedback.sqlite",
        "--experiment", "tone=base:1,tickets:3",
    ) as url:  # fmt: skip
        yield url, keys


@needs_chromium
def test_a_key_is_asked_for_and_opens_what_it_may(chromium, guarded) -> None:
    url, keys = guarded
    context = chromium.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.goto(url)
    expect(page.locator("#server")).to_have_text("a key is needed")
    expect(page.locator("#problem")).to_be_hidden()
    page.fill("#key", "qls-wrong")
    page.press("#key", "Enter")
    expect(page.locator("#problem")).to_contain_text("this server wants a key")
    page.fill("#key", keys["asker"])
    page.get_by_role("button", name="Use").click()
    expect(page.locator(".variant")).to_have_count(2)
    expect(page.locator("#server")).to_have_text("tiny, 1 adapter")
    _asked(page)
    page.locator(".answer").nth(1).get_by_role("button", name="Best").click()
    expect(page.locator("#ranks tbody tr")).to_have_count(2)
    expect(page.locator("#adapterlist tbody tr")).to_have_count(1)
    assert page.get_by_role("button", name="Unload tagging").count() == 0
    expect(page.locator("#load")).to_be_hidden()
    expect(page.locator("#experiments")).to_be_hidden()
    assert page.evaluate("localStorage.getItem('key')") is None
    page.reload()
    expect(page.locator(".variant")).to_have_count(2)
    page.get_by_role("button", name="Forget", exact=True).click()
    expect(page.locator("#server")).to_have_text("a key is needed")
    page.fill("#key", keys["admin"])
    page.press("#key", "Enter")
    expect(page.locator("#adapterlist tbody tr")).to_have_count(2)
    expect(page.get_by_role("button", name="Unload tagging")).to_be_visible()
    expect(page.locator("#load")).to_be_visible()
    cells = page.locator("#experimentlist tbody tr").nth(1).locator("td")
    expect(cells).to_have_text(["tickets", "75 %", "0", "0", "–", "–"])
    page.set_viewport_size({"width": 360, "height": 740})
    expect(cells.nth(5)).to_be_visible()
    tables = page.locator(".scroll:visible")
    assert tables.count() == 3
    for fits in tables.evaluate_all("all => all.map(one => one.scrollWidth <= one.clientWidth)"):
        assert fits, "no column is cut"
    context.close()


@needs_chromium
def test_scales_repeats_and_choices_reach_the_server(page) -> None:
    page.uncheck(".variant input[value=base]")
    page.uncheck(".variant input[value=tickets]")
    page.fill("[aria-label='Scale of tagging']", "0")
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("#repeats", "2")
    _asked(page)
    assert page.locator(".answer h3").all_inner_texts() == ["tagging@0", "tagging@0 #2"]
    assert "0.000 nats from the base" in page.locator(".answer").nth(0).inner_text()
    page.uncheck(".variant input[value=tagging]")
    with page.expect_response("**/v1/adapters"):
        page.click("#refresh")
    page.click("#send")
    expect(page.locator("#problem")).to_have_text("Choose at least one who answers.")


@needs_chromium
def test_stop_keeps_what_was_said(page) -> None:
    _ask(page, tokens=400)
    page.wait_for_selector("#stop:enabled")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:enabled")
    assert page.locator(".answer.running").count() == 0
    assert page.locator("#problem").is_hidden()


@needs_chromium
def test_a_refusal_is_readable(page) -> None:
    _ask(page, tokens=100000)
    page.wait_for_selector("#problem:visible")
    assert "this server takes at most" in page.locator("#problem").inner_text()
    assert page.locator("#send").is_enabled()
    page.wrong[:] = [text for text in page.wrong if "status of 400" not in text]


@needs_chromium
def test_adapters_are_loaded_and_unloaded(page) -> None:
    rows = page.locator("#adapterlist tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.nth(0)).to_contain_text("ready")
    page.get_by_role("button", name="Unload tickets").click()
    expect(rows).to_have_count(1)
    expect(page.locator(".variant")).to_have_count(2)
    page.fill("#loadname", "tickets")
    page.fill("#loadpath", "/etc")
    page.get_by_role("button", name="Load", exact=True).click()
    page.wait_for_selector("#adapterproblem:visible")
    assert "outside the folders" in page.locator("#adapterproblem").inner_text()
    page.fill("#loadpath", "")
    page.get_by_role("button", name="Load", exact=True).click()
    expect(rows).to_have_count(2)
    assert page.locator("#adapterproblem").is_hidden()
    page.wrong[:] = [text for text in page.wrong if "status of 403" not in text]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_follows_the_colour_scheme(chromium, url, scheme) -> None:
    context = chromium.new_context(
        viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True
    )
    page = context.new_page()
    page.goto(url)
    page.wait_for_selector(".variant")
    _asked(page)
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 360, "nothing sticks out"
    tops = page.eval_on_selector_all(".answer", "all => all.map(one => one.offsetTop)")
    assert tops == sorted(set(tops)), "one below the other"
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == (scheme == "dark")
    context.close()
