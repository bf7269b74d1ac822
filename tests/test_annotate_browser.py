"""The page in a real browser: headless Chromium (make browser), driven by its keys. Skipped where there is no Chromium."""

import json
import shutil
import time

import pytest

pytest.importorskip("fastapi", reason="the page needs the extra [loop]")
pytest.importorskip("selenium", reason="the browser is driven by selenium (extra [test])")

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from dpo_fast.loop.server import PageOptions, PageServer
from dpo_fast.loop.store import LabelStore

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver: make browser"),
]

SCRIPT = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\"><b>bold</b>"
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage", "--window-size=1280,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def pairs(texts):
    return [
        {"id": f"p{i}", "prompt": f"question {i}", "split": "train", "completions": [{"text": a}, {"text": b}]}
        for i, (a, b) in enumerate(texts)
    ]


@pytest.fixture
def serve(tmp_path):
    """serve(rows, **options) -> (store, server), stopped after the test."""
    opened = []

    def start(rows, **options):
        path = tmp_path / "candidates.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        store = LabelStore(tmp_path / "labels.sqlite", path)
        server = PageServer(store, PageOptions(**options)).start()
        opened.extend((server.stop, store.close))
        return store, server

    yield start
    for close in opened:
        close()


def until(condition, what):
    for _ in range(400):
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"waited 20 s for {what}")


def text(browser, name):
    return browser.find_element(By.ID, name).text


def open_page(browser, link):
    browser.get(link)
    until(lambda: text(browser, "left") or browser.find_element(By.ID, "done").is_displayed(), "the first pair")


def press(browser, key, said):
    browser.find_element(By.TAG_NAME, "body").send_keys(key)
    until(lambda: said in text(browser, "message"), f"the message {said!r}")


def test_keys_save_labels_and_undo_takes_one_back(browser, serve):
    store, server = serve(pairs((f"one {i}", f"two {i}") for i in range(6)))
    open_page(browser, server.link("ann"))
    for key, choice in (
        (Keys.ARROW_LEFT, "left"),
        (Keys.ARROW_RIGHT, "right"),
        ("t", "tie"),
        ("b", "bad"),
        ("s", "skip"),
    ):
        left, right = text(browser, "left"), text(browser, "right")
        press(browser, key, f"saved: {choice}")
        label = store.labels()[-1]
        item = store.item(label.item)
        chosen = {"left": left, "right": right}.get(choice)
        assert label.choice == choice if chosen is None else getattr(item, label.choice) == chosen
        assert 0 < label.seconds < 60
        until(lambda left=left: text(browser, "left") != left, "the next pair")
    press(browser, "u", "taken back")
    assert [label.choice for label in store.labels()][2:] == ["tie", "bad"]
    assert {text(browser, "left"), text(browser, "right")} == {item.a, item.b}
    assert "4 by you, 4 of 6 labels" in text(browser, "progress")


def test_a_reload_in_the_middle_keeps_the_pair(browser, serve):
    store, server = serve(pairs((f"one {i}", f"two {i}") for i in range(3)))
    open_page(browser, server.link("ann"))
    press(browser, "t", "saved")
    shown = {text(browser, "left"), text(browser, "right")}
    browser.refresh()
    until(lambda: text(browser, "left"), "the pair after the reload")
    assert {text(browser, "left"), text(browser, "right")} == shown
    press(browser, "t", "saved")
    assert len(store.labels()) == 2


def test_two_people_at_once_and_one_link_twice(browser, serve):
    store, server = serve(pairs((f"one {i}", f"two {i}") for i in range(2)), labels_per_pair=2)
    open_page(browser, server.link("ann"))
    first = browser.current_window_handle
    ann = {text(browser, "left"), text(browser, "right")}
    browser.switch_to.new_window("tab")
    open_page(browser, server.link("bob"))
    assert {text(browser, "left"), text(browser, "right")} != ann
    press(browser, Keys.ARROW_LEFT, "saved")
    # Ann's link again, in this tab: the first tab's pair is no longer open there.
    open_page(browser, server.link("ann"))
    second = browser.current_window_handle
    browser.switch_to.window(first)
    press(browser, Keys.ARROW_LEFT, "another window")
    assert [label.annotator for label in store.labels()] == ["bob"]
    browser.refresh()
    until(lambda: text(browser, "left"), "the pair after the reload")
    press(browser, Keys.ARROW_LEFT, "saved")
    assert [label.annotator for label in store.labels()] == ["bob", "ann"]
    browser.switch_to.window(second)
    browser.close()
    browser.switch_to.window(first)


def test_a_completion_cannot_run_a_script(browser, serve):
    rows = pairs([(SCRIPT, "plain")])
    rows[0]["prompt"] = [{"role": "system", "content": SCRIPT}, {"role": "user", "content": "hello"}]
    _, server = serve(rows, guidelines=SCRIPT)
    open_page(browser, server.link("<script>alert(1)</script>"))
    assert SCRIPT in (text(browser, "left"), text(browser, "right"))
    press_differences(browser)
    assert SCRIPT in (text(browser, "left"), text(browser, "right"))
    assert browser.title == "Which answer is better?"
    assert not browser.find_elements(By.CSS_SELECTOR, "main script, main img, main b, details script, header script")


def press_differences(browser):
    browser.find_element(By.TAG_NAME, "body").send_keys("d")
    until(lambda: browser.find_elements(By.CSS_SELECTOR, "mark"), "marked differences")


def test_differences_are_marked_and_unmarked(browser, serve):
    _, server = serve(pairs([("the cat sat on the mat", "the dog sat on the mat")]))
    open_page(browser, server.link("ann"))
    press_differences(browser)
    marked = [(m.text) for m in browser.find_elements(By.CSS_SELECTOR, "#sides mark")]
    assert sorted(marked) == ["cat", "dog"]
    browser.find_element(By.TAG_NAME, "body").send_keys("d")
    until(lambda: not browser.find_elements(By.CSS_SELECTOR, "mark"), "no marks")


def test_a_narrow_window_has_everything_below_each_other(browser, serve):
    _, server = serve(pairs([("word " * 400, "x" * 3000)]), guidelines="Be fair.")
    browser.set_window_size(500, 800)
    try:
        open_page(browser, server.link("ann"))
        left, right = (browser.find_element(By.ID, side).rect for side in ("left", "right"))
        assert right["y"] >= left["y"] + left["height"]
        width = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        assert width <= 0, "the page scrolls sideways"
        for button in browser.find_elements(By.CSS_SELECTOR, "nav button"):
            assert button.is_displayed()
    finally:
        browser.set_window_size(1280, 900)


def test_the_end_is_said_and_the_console_is_clean(browser, serve):
    browser.get_log("browser")
    store, server = serve(pairs([("one", "two")]), token="open sesame")
    open_page(browser, server.link("ann"))
    browser.find_element(By.CSS_SELECTOR, "[data-choice=tie]").click()
    until(lambda: "Nothing is left for you" in text(browser, "done"), "the end")
    assert not browser.find_element(By.ID, "sides").is_displayed()
    assert store.counts()["done"] == 1
    assert [entry for entry in browser.get_log("browser") if "favicon" not in entry["message"]] == []
