"""The report of an ablation: what the page holds, and how it behaves in a real browser."""

import io
import json
import re
import shutil

import pytest
from lowmem.bench.lab.page import page
from lowmem.bench.lab.picture import front, style, write_picture
from lowmem.bench.lab.report import cells, edge_text, json_text, summary
from lowmem.bench.tables import terminal_table
from rich.console import Console

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1200,1400",
)
NASTY = "</script><script>document.title='taken'</script> {script} <b>&amp;"
STATES = {"adamw": 72_400_000, "galore": 24_500_000, "flora": 9_800_000}


def row(series, optimizer, lr, losses, best=False, diverged=0):
    finished = [loss for loss in losses if loss is not None]
    head = {
        "label": f"{optimizer} lr={lr}",
        "series": series,
        "optimizer": optimizer,
        "options": f"lr={lr}",
        "lr": float(lr),
        "paper": 12.5 if optimizer == "galore" else None,
        "planned": len(losses),
        "diverged": diverged,
        "best": best,
        "edge": optimizer == "flora" and best,
        "runs": [{"folder": "f", "options": {}, "seed": seed, "val_loss": loss} for seed, loss in enumerate(losses)],
    }
    if not finished:
        return {**head, "val_loss": None}
    mean = sum(finished) / len(finished)
    curve = [mean + 2, mean + 0.5, mean]
    return {
        **head,
        "val_loss": mean,
        "val_std": (max(finished) - min(finished)) / 2**0.5 if len(finished) > 1 else None,
        "train_loss": mean - 0.1,
        "state_bytes": STATES[optimizer],
        "peak_bytes": 765_000_000,
        "optimizer_s": 0.005,
        "step_s": 0.31,
        "tokens_per_s": 1638.4,
        "curve": {
            "tokens": [1000, 2000, 3000],
            "loss": curve,
            "low": [loss - 0.1 for loss in curve],
            "high": [loss + 0.1 for loss in curve],
            "train_tokens": [500, 1500, 2500],
            "train_loss": [5.0, 3.0, 2.6],
        },
    }


FIGURES = {
    "title": f"Three methods {NASTY}",
    "command": "lowmem ablate --file lab.yaml",
    "notes": [NASTY],
    "seeds": [0, 1],
    "shared": {"model": "9m", "steps": 100, "tokenizer": ""},
    "versions": [{"python": "3.11", "torch": "2.13"}],
    "devices": ["a processor"],
    "paper": {"source": "a paper", "loss": "val"},
    "series": list(STATES),
    "rows": [
        row(0, "adamw", "1e-3", [2.68, 2.70], best=True),
        row(0, "adamw", "4e-3", [2.80, 2.80]),
        row(1, "galore", "5e-3", [2.51, 2.53], best=True),
        row(1, "galore", "1e38", [None, None], diverged=2),
        row(2, "flora", "3e-2", [2.60, None], best=True),
    ],
    "failures": [
        {"run": "galore lr=1e38", "seed": 0, "kind": "diverged", "error": "the loss is nan"},
        {"run": "flora lr=3e-2", "seed": 1, "kind": "failed", "error": NASTY},
    ],
}


def many(count):
    """Return the figures of many series."""
    rows = [{**FIGURES["rows"][0], "series": index, "state_bytes": 10**6 * (index + 1)} for index in range(count)]
    return {**FIGURES, "series": [f"galore rank={index} carry=rotate" for index in range(count)], "rows": rows}


def test_the_page_needs_nothing_from_elsewhere_and_texts_cannot_leave_their_place():
    text = page(FIGURES)
    assert text.count("<script") == text.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="figures">(.*?)</script>', text, re.DOTALL)
    assert json.loads(data[1]) == FIGURES
    assert set(re.findall(r"https?://[^\"'\s]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, no address
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]
    assert "url(" not in text.replace("url(#${clip})", "")
    assert '<meta name="viewport" content="width=device-width' in text


def test_the_table_has_the_best_points_by_loss_and_the_summary_what_failed():
    lines = cells(FIGURES)
    assert [line[0] for line in lines] == ["galore", "flora", "adamw"]
    assert lines[0][3:6] == ("2.5200 ± 0.0141", "12.43", "12.50")
    assert lines[1][3] == "2.6000 (1 of 2 seeds)"
    text = summary(FIGURES, lines)
    assert "| galore | lr=5e-3 | 24.5 MB | 2.5200 ± 0.0141 | 12.43 | 12.50 | 5.0 ms | 310.0 ms |" in text
    assert "1 diverged: galore lr=1e38 seed 0." in text
    assert "model 9m, steps 100; 5 points, 2 seeds; a processor." in text
    plain = {**FIGURES, "paper": None}
    text = summary(plain, cells(plain))
    assert "| galore | lr=5e-3 | 24.5 MB | 2.5200 ± 0.0141 | 12.43 | 5.0 ms | 310.0 ms |" in text
    assert "| perplexity | optimizer step |" in text
    assert edge_text(FIGURES) == "Best at an edge of the rates that were tried: flora.\n"


def test_the_json_has_lists_of_numbers_on_one_line():
    text = json_text(FIGURES)
    assert json.loads(text) == FIGURES
    assert '        "tokens": [1000, 2000, 3000],\n' in text


def test_the_front_has_what_nothing_beats_in_both():
    rows = [
        {"state_bytes": size, "val_loss": loss} for size, loss in ((3, 1.0), (1, 2.0), (2, 2.5), (4, 1.5), (1, 3.0))
    ]
    assert front(rows) == [rows[1], rows[0]]


def test_texts_are_neither_markup_nor_mathematics(tmp_path):
    names = ["frugal targets=[attn]", "galore exclude=.*q$,.*k$ x=\\[/b]"]
    console = Console(width=120, file=io.StringIO())
    console.print(terminal_table(("a", "b"), [names]))
    assert all(name in console.file.getvalue() for name in names)
    rows = [{**FIGURES["rows"][0], "series": index} for index in range(2)]
    write_picture(tmp_path / "a.png", {**FIGURES, "rows": rows, "series": names})


def test_many_series_no_state_and_losses_without_a_number_can_be_drawn(tmp_path):
    write_picture(tmp_path / "many.png", many(30))
    odd = json.loads(json.dumps(FIGURES))
    odd["rows"][0]["state_bytes"] = 0
    odd["rows"][2].update(train_loss=None)
    odd["rows"][2]["curve"].update(loss=[None, 3.0, 2.5], low=[None, 3.0, 2.5], high=[None, 3.0, 2.5])
    odd["paper"]["loss"] = "train"
    write_picture(tmp_path / "odd.png", odd)
    assert cells(odd)[0][4] == "-"


def test_every_series_looks_different():
    looks = [tuple(sorted(style(index).items())) for index in range(24)]
    assert len(set(looks)) == 24


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "ablate.html"
    path.write_text(page(FIGURES), encoding="utf-8")
    return path.as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("selenium", reason='selenium is not installed: pip install "lowmem[test]"')
    if not CHROMIUM or not DRIVER:
        pytest.skip("no Chromium with its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser, address):
    browser.get(address)
    return browser


def column(browser, key):
    """Return the texts of a column, by the key of its header."""
    script = """
        const table = document.getElementById("points");
        const index = [...table.tHead.rows[0].cells].findIndex((cell) => cell.dataset.key === arguments[0]);
        return [...table.tBodies[0].rows].map((row) => row.cells[index].innerText.trim());
    """
    return browser.execute_script(script, key)


def header(browser, key):
    return browser.find_element("css selector", f'th[data-key="{key}"]')


def test_the_page_opens_without_errors_or_requests_and_shows_texts_as_they_are(opened):
    assert opened.get_log("browser") == []
    assert opened.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert opened.find_element("id", "title").text == FIGURES["title"]
    assert opened.title == FIGURES["title"]
    failed = [line.text for line in opened.find_elements("css selector", "#failures tbody tr")]
    assert failed[0].startswith("flora lr=3e-2 1 failed")
    assert "lowmem ablate --file lab.yaml" in opened.find_element("id", "provenance").text
    assert NASTY in opened.find_element("id", "notes").text


def test_headers_sort_by_pointer_and_by_keyboard_and_say_so(opened):
    from selenium.webdriver.common.keys import Keys

    assert header(opened, "loss").get_attribute("aria-sort") == "ascending"
    assert column(opened, "label") == ["galore", "flora", "adamw"]
    header(opened, "state").find_element("tag name", "button").click()
    assert header(opened, "state").get_attribute("aria-sort") == "ascending"
    assert header(opened, "loss").get_attribute("aria-sort") == "none"
    assert column(opened, "state") == ["9.8 MB", "24.5 MB", "72.4 MB"]
    header(opened, "state").find_element("tag name", "button").send_keys(Keys.ENTER)
    assert header(opened, "state").get_attribute("aria-sort") == "descending"
    assert column(opened, "state") == ["72.4 MB", "24.5 MB", "9.8 MB"]
    opened.find_element("id", "every").click()
    header(opened, "loss").find_element("tag name", "button").click()
    assert column(opened, "loss")[-1] == "diverged"
    header(opened, "loss").find_element("tag name", "button").click()
    assert column(opened, "loss")[-1] == "diverged"  # what has no value is last, whichever way
    assert column(opened, "paper")[1:3] == ["\N{EN DASH}"] * 2


def test_a_curve_tells_its_values_to_the_pointer_and_to_the_keyboard(opened):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    box = opened.find_element("id", "tip")
    assert not box.is_displayed()
    marks = opened.find_elements("css selector", "#curves path[fill='var(--c1)'][transform]")
    ActionChains(opened).move_to_element(marks[-1]).perform()
    assert box.text.splitlines() == ["galore lr=5e-3", "3 k tokens", "loss 2.5200", "seeds 2.4200 to 2.6200"]
    chart = opened.find_element("css selector", "#curves svg")
    chart.send_keys(Keys.ARROW_RIGHT)
    assert box.text.splitlines()[0] == "flora lr=3e-2"
    chart.send_keys(Keys.ESCAPE)
    assert not box.is_displayed()
    ActionChains(opened).move_to_element(opened.find_elements("css selector", "#rates text")[-1]).perform()
    assert "2 of 2 seeds diverged" in box.text


def test_methods_can_be_left_out_everywhere(opened):
    chip = opened.find_elements("css selector", "#chips button")[1]
    assert chip.get_attribute("aria-pressed") == "true"
    chip.click()
    assert chip.get_attribute("aria-pressed") == "false"
    assert column(opened, "label") == ["flora", "adamw"]
    for name in ("curves", "rates", "states"):
        assert not opened.find_elements("css selector", f"#{name} path[fill='var(--c1)']")
    opened.find_element("id", "none").click()
    assert column(opened, "label") == []
    assert opened.find_element("id", "curves").text == "Nothing to show."
    opened.find_element("id", "all").click()
    assert len(column(opened, "label")) == 3


def test_the_page_fits_a_phone_and_follows_the_colour_scheme(opened):
    ground = "return getComputedStyle(document.body).backgroundColor"
    light = opened.execute_script(ground)
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 1, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    dark = [{"name": "prefers-color-scheme", "value": "dark"}]
    opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": dark})
    try:
        opened.refresh()
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 360
        assert opened.execute_script(ground) != light
    finally:
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_many_methods_leave_room_for_the_charts_and_no_state_stands_at_the_edge(browser, tmp_path):
    figures = many(30)
    figures["rows"][0]["state_bytes"] = 0
    figures["rows"][1]["curve"] = {**figures["rows"][1]["curve"], "loss": [None, 3.0, 2.5]}
    path = tmp_path / "many.html"
    path.write_text(page(figures), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    style = "return getComputedStyle(document.querySelector('.controls')).position"
    assert browser.execute_script(style) == "static"
    assert browser.find_element("id", "chips").size["height"] <= 0.3 * 1400
    assert not browser.find_elements("css selector", "#states text.name")
    assert len(browser.find_elements("css selector", "#states path[transform]")) == 30
    broken = "return [...document.querySelectorAll('svg *')].filter((e) => /NaN|Infinity/.test(e.outerHTML)).length"
    assert browser.execute_script(broken) == 0


def test_rows_are_headed_by_their_series_and_tables_have_captions(opened):
    heads = opened.find_elements("css selector", "#points tbody th[scope=row]:first-child")
    assert [head.text for head in heads] == ["galore", "flora", "adamw"]
    assert len(opened.find_elements("css selector", "table > caption")) == 2
    assert {svg.get_attribute("role") for svg in opened.find_elements("css selector", ".chart svg")} == {"group"}
