"""report.html: hostile text stays text, nothing is fetched, and it works in a browser, by phone, in dark."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rlhf.decoding import Decoding
from rlhf.evaluation.compare import Scored
from rlhf.evaluation.hacking import highest
from rlhf.evaluation.origins import names_of
from rlhf.evaluation.page import PRINTED, as_text, write_page
from rlhf.evaluation.systems import Generation, System
from rlhf.evaluation.tables import printable
from tests.evaluation.test_report import HOSTILE, report_of

PHONE = (390, 844)
PACKAGES = ("chromium", "chromium-driver")


def scored_systems() -> list[Scored]:
    """Two systems with as many responses as there are hostile texts and more; ppo's gold is highest in the
    middle.
    """

    def one(name: str, shift: float) -> Scored:
        texts = [*HOSTILE, *(f"plain {i}" for i in range(12))]
        rows = [
            Generation(text, f"{name} {text}", [1, 2, 3, i + 9], True, -4.0) for i, text in enumerate(texts)
        ]
        scores = [-abs(i - 9) * shift for i in range(len(rows))]
        return Scored(System(name, name, Decoding(8)), rows, scores, scores, [shift] * len(rows))

    return [one("sft", 0.0), one("ppo", 0.5)]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    stage = folder / "run</script>" / "ppo"
    stage.mkdir(parents=True)
    (stage / "config.yaml").write_text("name: <script>alert(2)</script>\nseed: 7\n")
    lines = [{"step": i, "score": i / 2, "kl": i / 10, "length": 20.0} for i in range(5)]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "stage": "ppo",
        "parents": [{"key": "policy", "path": "<img src=x>"}],
        "checks": [{"name": "<b>score rose", "passed": False}],
        "versions": {"torch": "2.1.7"},
        "seconds": 90,
    }
    systems = scored_systems()
    report = report_of(systems) | {"commands": ["./launch.sh <script>alert(1)</script>"]}
    report["highest"] = highest(next(each for each in systems if each.system.name == "ppo"))
    write_page(folder / "report.html", report, systems, {str(stage): record})
    return folder / "report.html"


class Tags(HTMLParser):
    """The tags of a page, with their attributes, and all of its text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text += data


def test_hostile_text_stays_text_and_nothing_is_fetched(page: Path) -> None:
    found = Tags()
    found.feed(page.read_text(encoding="utf-8"))
    names = [name for name, _ in found.tags]
    assert names.count("script") == 1 and not {"img", "iframe", "object", "a", "form", "base"} & set(names)
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "srcset", "data"):
            assert (attributes.get(name) or "#").startswith(("#", "data:,")), attributes
    for text in HOSTILE:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        assert all(printable(line) in found.text for line in lines), text
    assert not [
        m for m in page.read_text(encoding="utf-8") if (m < " " and m not in "\n\t") or m in "\u202e\u2066"
    ]
    styles = re.findall(r"<style.*?</style>", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "url(" not in "".join(styles) and "@import" not in "".join(styles)


def test_the_page_says_what_the_report_says(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for part in ("ppo is WORSE than sft", "Who beats whom", "Is the reward hacked?", "Where it comes from"):
        assert part in text
    assert "Settings of script&gt;/ppo" in text and "# torch 2.1.7" in text and "seed: 7" in text
    assert text.count("<svg") >= 6 and "&lt;b&gt;score rose" in text and "it is long" in text


def test_stages_are_named_from_the_folder_that_holds_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folders = ["runs/x/seed_1/kl_0.2/ppo", str(tmp_path / "runs/x/seed_2/kl_0.2/ppo"), "runs/x/seed_1/sft"]
    assert list(names_of(folders).values()) == ["x/seed_1/kl_0.2/ppo", "x/seed_2/kl_0.2/ppo", "x/seed_1/sft"]
    assert names_of(["runs/x/sft"]) == {"runs/x/sft": "x/sft"} and names_of([]) == {}


def test_a_conversation_is_shown_with_its_roles() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert as_text(turns) == "user: a\n\nassistant: b" and as_text(turns[:1]) == "a" == as_text("a")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Headless Chromium; where the tests run as root of a Debian it is installed."""
    if shutil.which("chromedriver") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "update", "-qq"], install):
            subprocess.run(command, env=quiet, capture_output=True, check=False)
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("needs Chromium with its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for word in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync"):
        options.add_argument(f"--{word}")
    for word in ("disable-background-networking", "disable-component-update", "hide-scrollbars"):
        options.add_argument(f"--{word}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.mark.slow
def test_it_opens_without_errors_or_requests_and_can_be_searched_and_sorted(page: Path, browser: Any) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.select import Select

    browser.set_window_size(1200, 900)
    browser.get("about:blank")
    browser.get_log("performance")  # of the browser's own first page
    browser.get(page.as_uri())
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]

    def shown() -> list[str]:
        found = browser.find_elements(By.CSS_SELECTOR, "#samples > section")
        return [each.find_element(By.CSS_SELECTOR, ".text").text for each in found if each.is_displayed()]

    everything = shown()
    assert len(everything) == len(HOSTILE) + 12
    search = browser.find_element(By.ID, "search")
    search.send_keys("PPO plain 1")
    assert shown() == ["plain 1", "plain 10", "plain 11"]
    assert browser.find_element(By.ID, "count").text == f"3 of {len(everything)} prompts"
    search.send_keys("0")
    assert shown() == ["plain 10"]
    for _ in "PPO plain 10":
        search.send_keys("\b")
    Select(browser.find_element(By.ID, "sort")).select_by_value("gold")
    gains = [-abs(i - 9) * 0.5 for i in range(len(everything))]
    order = sorted(range(len(everything)), key=lambda i: -gains[i])
    assert shown() == [everything[i] for i in order]
    assert browser.execute_script("return document.title") == "a|<b>: evaluation"
    assert browser.get_log("browser") == []


@pytest.mark.slow
def test_it_fits_a_phone_and_is_dark_where_the_reader_wants_it(page: Path, browser: Any) -> None:
    size = {"width": PHONE[0], "height": PHONE[1], "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    colours = {}
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        browser.get(page.as_uri())
        script = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
        colours[scheme] = [
            sum(map(int, re.findall(r"\d+", each)[:3])) for each in browser.execute_script(script)
        ]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE[0]
    (ink, paper), (dark_ink, dark_paper) = colours["light"], colours["dark"]
    assert ink < 200 < 700 < paper and dark_ink > 600 > 150 > dark_paper
    text = browser.execute_script("return getComputedStyle(document.querySelector('svg text')).fill")
    assert sum(map(int, re.findall(r"\d+", text)[:3])) == dark_ink, "plots have the page's ink"
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.slow
def test_printed_it_is_whole_and_dark_on_white(page: Path, browser: Any) -> None:
    paper = {"width": 1032, "height": 702, "deviceScaleFactor": 1, "mobile": False}  # A4 less margins, pixels
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    dark = {"media": "print", "features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    browser.get(page.as_uri())
    style = "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    assert browser.execute_script(style) == ["rgb(0, 0, 0)", "rgb(255, 255, 255)"]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= paper["width"]
    assert not browser.find_element("css selector", ".controls").is_displayed()
    sections = browser.find_elements("css selector", "#samples > section")
    assert sum(each.is_displayed() for each in sections) == min(PRINTED, len(sections)) < len(sections)
    assert f"The first {PRINTED} of {len(sections)} prompts." in browser.find_element("tag name", "body").text
    assert len(base64.b64decode(browser.print_page())) > 20_000
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
