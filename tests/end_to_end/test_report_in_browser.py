"""The report in a real browser, headless Chromium, opened from disk: it works, asks nobody, and can be read anywhere.

Skipped where there is no Chromium or no driver of it; Debian has both as `chromium` and `chromium-driver`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_opdlm.config.load import save_config
from megatron_opdlm.config.schema import Config
from megatron_opdlm.observability.report import write_report
from megatron_opdlm.observability.trajectories import TrajectoryWriter
from megatron_opdlm.observability.writers import JsonlWriter
from tests.kept_sequences import HOSTILE, SEQUENCE, kept, replay

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with a driver")
WORDS = [f"word{i}" for i in range(40)]
LONG = kept(
    step=75,
    prompt_ids=[96, 97, 98, 99],
    token_ids=list(range(100, 140)),
    step_map=[1, 2, 3, 4] * 10,
    log_probs=[-0.1] * 40,
    divergence=[0.1] * 40,
    teacher_log_probs=[-0.2] * 40,
    alternatives=[[(100, -0.2)]] * 40,
    response_length=40,
    texts={str(i): f"prompt {i} " for i in range(96, 100)} | {str(100 + i): word for i, word in enumerate(WORDS)},
)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "a-run-with-a-name-that-is-much-too-long-for-one-line-of-a-telephone"
    run.mkdir()
    save_config(Config(), run / "config.yaml")
    writer = JsonlWriter(run / "metrics.jsonl")
    for step in range(40):
        metrics = {
            "train/loss": 8 / (step + 1),
            "rollout/tokens_per_step": 1 + step / 40,
            "rollout/not_finite": step == 3,
        }
        writer.write(step, metrics | {"perf/seconds_rollout": 1.5, "perf/seconds_student": 0.5 + step / 80})
    writer.close()
    TrajectoryWriter(run / "trajectories.jsonl", 0).write([SEQUENCE, LONG])
    return write_report(run, {"Accuracy": {"teacher": {"a task with a long name": 0.91}, "student": {"another": 0.88}}})


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # a container has neither a user namespace for Chromium's sandbox nor much shared memory
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, page):
    """The browser with the page just opened, 1280 pixels wide, and the logs of before taken away."""
    emulate(browser, scheme="light")
    for log in ("browser", "performance"):
        browser.get_log(log)
    browser.get(page.as_uri())
    return browser


def emulate(browser, *, scheme: str, width: int = 1280) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def click(browser, selector: str, place: int = 0) -> None:
    """Where the element is for a person: in view, and nothing in front of it."""
    element = browser.find_elements("css selector", selector)[place]
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
    element.click()


def press(browser, selector: str, key: str, place: int = 0) -> None:
    browser.find_elements("css selector", selector)[place].send_keys(key)


def shown(browser) -> list[str | None]:
    """The text of each token of the response, None for one that is masked."""
    script = "return [...document.querySelectorAll('.token')].map(token => [token.dataset.state, token.textContent])"
    tokens = browser.execute_script(script)
    assert {state for state, text in tokens if not text} <= {"masked", "later"}
    return [text or None for _, text in tokens]


def expected(sequence, step: int) -> list[str | None]:
    texts = {token_id: text.replace("\n", "↵") for token_id, text in sequence.texts.items()}
    return [None if token_id is None else texts[str(token_id)] for token_id in replay(sequence)[step]]


def text_of(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def test_it_opens_without_an_error_and_without_a_request_to_anybody(opened, page):
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requested = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert requested == [page.as_uri()]
    assert opened.get_log("browser") == []
    assert page.stat().st_size < 2e6


def test_its_policy_stops_whatever_would_ask_for_something(opened):
    script = """
        const done = arguments[0];
        document.addEventListener("securitypolicyviolation", (event) => done(event.effectiveDirective));
        new Image().src = "http://127.0.0.1:9/picture";
    """
    assert opened.execute_async_script(script) == "img-src"


def test_text_of_a_run_stays_text(opened):
    assert HOSTILE in text_of(opened, "#prompt")
    assert opened.title == "a-run-with-a-name-that-is-much-too-long-for-one-line-of-a-telephone"
    click(opened, "#last")
    assert opened.execute_script("return document.querySelectorAll('#viewer i i, #viewer b').length") == 0
    assert shown(opened)[3] == "<i>x</i>" and shown(opened)[5] == "&amp;"


def test_each_step_shows_what_a_literal_replay_has(opened):
    for step in range(len(replay(SEQUENCE))):
        assert shown(opened) == expected(SEQUENCE, step)
        click(opened, "#forth")
    assert text_of(opened, "#moment") == "step 9 of 9 · all written"


def test_a_click_on_a_step_changes_the_shown_state(opened):
    before = shown(opened)
    click(opened, "#strip i", 4)
    assert shown(opened) == expected(SEQUENCE, 5) != before
    click(opened, "#strip i", 1)
    assert shown(opened) == expected(SEQUENCE, 2)
    click(opened, "#back")
    assert shown(opened) == expected(SEQUENCE, 1)


def test_the_keys_step_and_jump(opened):
    left, right, home, end = "\ue012", "\ue014", "\ue011", "\ue010"
    for key, step in ((right, 1), (right, 2), (left, 1), (end, 9), (home, 0)):
        press(opened, "#viewer", key)
        assert shown(opened) == expected(SEQUENCE, step)
    press(opened, "#time", right)
    assert shown(opened) == expected(SEQUENCE, 1), "the slider by its own keys, once"


def test_it_plays_to_the_end(opened):
    from selenium.webdriver.support.wait import WebDriverWait

    press(opened, "#viewer", " ")
    assert opened.find_element("id", "play").get_attribute("aria-label") == "Pause"
    WebDriverWait(opened, 20).until(lambda browser: shown(browser) == expected(SEQUENCE, 9))
    assert opened.find_element("id", "play").get_attribute("aria-label") == "Play"


def test_a_token_tells_its_figures_and_what_the_teacher_would_write(opened):
    click(opened, ".token", 2)
    words = opened.find_element("id", "detail").text
    assert "Token 3, id 12" in words and "Masked; it will be committed in step 3, the 1st of block 2" in words
    # exp(-1.2), exp(-4) and 1.5; the alternatives exp(-0.3) and exp(-1.5)
    assert all(figure in words for figure in ("30.1 %", "1.8 %", "1.5 nats", "74.1 %", "22.3 %"))
    assert opened.execute_script("return document.querySelector('#detail li.taken code').textContent") == "↵"
    press(opened, ".token", "\ue014", 2)
    assert "Token 4, id 13" in opened.find_element("id", "detail").text
    press(opened, ".token", "\ue014", 8)
    assert "nobody looks at it" in opened.find_element("id", "detail").text


def test_colours_follow_what_they_stand_for(opened):
    amounts = (
        "return [...document.querySelectorAll('.token')].map(t => parseFloat(t.style.getPropertyValue('--amount')))"
    )
    for place, values in ((1, [-value for value in SEQUENCE.log_probs]), (2, SEQUENCE.divergence)):
        click(opened, ".segments span", place)
        painted = opened.execute_script(amounts)
        counted = range(SEQUENCE.response_length)
        assert sorted(counted, key=lambda i: painted[i]) == sorted(counted, key=lambda i: values[i])
        assert painted[SEQUENCE.response_length :] == [0, 0], "what does not count has no colour"
    click(opened, ".segments span", 0)
    assert opened.execute_script(amounts)[:4] == pytest.approx([8 + 50 / 3, 8, 8, 58], abs=0.1)


def test_another_sequence_can_be_chosen(opened):
    click(opened, "#sequence option", 1)
    click(opened, "#last")
    assert shown(opened) == WORDS
    assert opened.find_element("css selector", "#sequence option:checked").text.startswith("step 75")


def test_a_curve_tells_its_numbers(opened):
    chart = "figure:has(svg[aria-label^='Loss'])"
    press(opened, f"{chart} svg", "\ue014")
    press(opened, f"{chart} svg", "\ue014")
    assert text_of(opened, f"{chart} .readout") == "training step 1: 4"


# --- looks


def luminance(color: str) -> float:
    """Of `rgb(r, g, b)`, as WCAG 2.2 defines it: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance."""
    channels = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def style(browser, selector: str, name: str) -> str:
    script = "return getComputedStyle(document.querySelector(arguments[0]))[arguments[1]]"
    return browser.execute_script(script, selector, name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_follow_the_system_and_the_button_with_enough_contrast(opened, scheme):
    emulate(opened, scheme=scheme)
    for theme in (scheme, {"light": "dark", "dark": "light"}[scheme]):
        page = style(opened, "body", "backgroundColor")
        assert (luminance(page) < 0.2) == (theme == "dark")
        assert contrast(style(opened, "body", "color"), page) >= 7
        for text, ground in (
            (".facts", "body"),
            (".readout", ".card"),
            ("#detail p", "#detail"),
            (".warnings h2", ".warnings"),
        ):
            assert contrast(style(opened, text, "color"), style(opened, ground, "backgroundColor")) >= 4.5, (
                theme,
                text,
            )
        assert contrast(style(opened, "#play", "color"), style(opened, "#play", "backgroundColor")) >= 4.5
        click(opened, "#theme")


@pytest.mark.parametrize("width", [320, 390, 768])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened, width):
    emulate(opened, scheme="light", width=width)
    opened.refresh()
    for place in (0, 1):
        click(opened, "#sequence option", place)
        click(opened, "#last")
        click(opened, ".token", 3)
        assert opened.execute_script("return document.documentElement.scrollWidth") <= width
        for selector in ("#detail", "#play", "#tokens", ".segments", "#theme"):
            box = opened.find_element("css selector", selector).rect
            assert box["x"] >= 0 and box["x"] + box["width"] <= width, selector
    assert opened.find_element("id", "play").rect["height"] >= 44, "large enough for a finger"


def test_every_control_has_a_name_and_can_be_reached_by_the_keyboard(opened):
    script = """
        const named = (e) => e.getAttribute("aria-label") || e.textContent.trim() || e.closest("label");
        const all = [...document.querySelectorAll("button, input, select, summary, svg.chart")];
        const inOrder = document.querySelectorAll(".token[tabindex='0']");
        return [all.filter((e) => !named(e)).length, inOrder.length, all.length];
    """
    unnamed, tokens_in_order, num_controls = opened.execute_script(script)
    assert (unnamed, tokens_in_order) == (0, 1) and num_controls > 10
