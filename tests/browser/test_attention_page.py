"""The page of `tfinfer attention` in a real chromium: what it draws, how pointer and keys work, that it stays alone."""

import json
import shutil

import numpy as np
import pytest

from tfinfer.attention.maps import AttentionMap
from tfinfer.attention.page import render

pytestmark = pytest.mark.browser
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: make browser")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)", allow_module_level=True)

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

FLAGS = (
    "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking "
    "disable-component-update disable-sync window-size=1280,900"
)
HOSTILE = ("</script><img src=x onerror='window.hit=1'>", " a\n", "<svg onload=window.hit=1>", "\u202e", "")
DRAWN = "return [...document.querySelectorAll('.cell canvas')].map(c => c.width * c.height)"
CORNERS = """const c = document.querySelectorAll('.cell canvas')[arguments[0]];
const row = c.getContext('2d').getImageData(0, 0, c.width, 1).data;
return [row.slice(0, 3).join(), row.slice(-4, -1).join()]"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def a_map(name, layers, heads, queries, keys, tokens=None):
    """Causal where it can be, different in each head."""
    words = tokens or tuple(f" w{number}" for number in range(max(queries, keys)))
    scores = np.random.default_rng(7).normal(size=(layers, heads, queries, keys)) * 2
    scores[..., np.arange(keys) > np.arange(queries)[:, None] + keys - queries] = -np.inf
    weights = np.exp(scores)
    weights = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return AttentionMap(name, words[:queries], words[:keys], tuple(weights))


@pytest.fixture
def opened(browser, tmp_path):
    """Opens maps as a page; afterwards there was no error, and no request but for the page itself."""

    def start(*maps):
        path = tmp_path / "map.html"
        path.write_text(render(maps, "a title"), "utf-8")
        browser.get(path.as_uri())
        ready = "return document.getElementById('maps').ariaBusy === 'false'"
        WebDriverWait(browser, 20).until(lambda driver: driver.execute_script(ready))
        return browser

    browser.get("about:blank")
    browser.get_log("browser"), browser.get_log("performance")
    yield start
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert set(asked) == {(tmp_path / "map.html").as_uri()}


def find(driver, selector):
    return driver.find_element("css selector", selector)


def cells(driver):
    return driver.find_elements("css selector", ".cell")


def text(driver, selector):
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def point(driver, i, j):
    """Move to a cell of the enlarged map, by where the page says that it drew it."""
    place = (
        "const b = document.getElementById('stage').getBoundingClientRect(); return [b.x + view.x + (arguments[1] + .5)"
    )
    place += " * view.wide, b.y + view.y + (arguments[0] + .5) * view.high]"
    x, y = driver.execute_script(place, i, j)
    actions = ActionChains(driver)
    actions.w3c_actions.pointer_action.move_to_location(int(x), int(y))
    actions.perform()


def press(driver, *keys):
    ActionChains(driver).send_keys(*keys).perform()


@pytest.mark.parametrize("tokens, i, j", [(5, 3, 1), (200, 120, 77)])
def test_the_overview_enlarges_and_the_pointer_reads_weights(opened, tokens, i, j):
    item = a_map("self", 6, 12, tokens, tokens)
    driver = opened(item)
    assert len(cells(driver)) == 72
    assert all(driver.execute_script(DRAWN))
    first, masked = driver.execute_script(CORNERS, 14)
    assert first != masked
    cells(driver)[14].click()
    assert text(driver, "#where") == "Layer 1, head 2"
    point(driver, i, j)
    weight = float(item.weights[1][2, i, j])
    for place in ("#tip", "#pair"):
        pair, shown = find(driver, place).text.replace("\n", " ").rsplit(" ", 1)
        assert pair == f"␣w{i} {i} → ␣w{j} {j}"
        assert float(shown) == pytest.approx(weight, rel=1e-2 if weight < 1e-3 else 1e-3)
    likeliest = int(item.weights[1][2, i].argmax())
    assert find(driver, "#lists li bdi").text == f"␣w{likeliest}"


def test_keys_go_through_heads_layers_and_cells(opened):
    driver = opened(a_map("self", 2, 3, 5, 5))
    cells(driver)[0].send_keys(Keys.ARROW_RIGHT)
    press(driver, Keys.ARROW_DOWN, Keys.ENTER)
    assert text(driver, "#where") == "Layer 1, head 1"
    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_UP)  # there is no head 3
    assert text(driver, "#where") == "Layer 0, head 2"
    ActionChains(driver).key_down(Keys.SHIFT).send_keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN).key_up(Keys.SHIFT).perform()
    assert text(driver, "#pair").startswith("␣w1")
    press(driver, Keys.ESCAPE)
    assert not find(driver, "#zoom").get_property("open")
    assert driver.switch_to.active_element == cells(driver)[2]


def test_a_click_closes_and_the_zoom_shows_every_label(opened):
    driver = opened(a_map("self", 1, 2, 200, 200))
    cells(driver)[0].click()
    fitting = driver.execute_script("return view.wide")
    for _ in range(5):
        find(driver, "#plus").click()
    assert driver.execute_script("return view.wide") > 4 * fitting
    find(driver, "#fit").click()
    assert driver.execute_script("return view.wide") == fitting
    point(driver, 50, 20)
    ActionChains(driver).click().perform()
    assert not find(driver, "#zoom").get_property("open")
    assert not find(driver, "#tip").is_displayed()


def test_groups_of_an_encoder_decoder_and_the_scale_of_each_map(opened):
    driver = opened(a_map("encoder", 2, 2, 9, 9), a_map("decoder", 3, 2, 4, 4), a_map("cross", 3, 2, 4, 9))
    titles = [element.text for element in driver.find_elements("css selector", "main h2")]
    assert titles == ["Encoder: self-attention", "Decoder: self-attention", "Decoder to encoder: cross-attention"]
    assert len(cells(driver)) == 4 + 6 + 6
    assert cells(driver)[-1].accessible_name == "Decoder to encoder: cross-attention, layer 2, head 1: enlarge"
    assert "100" not in text(driver, "#scale")
    find(driver, "input[value=own]").click()
    assert "100 %" in text(driver, "#scale")
    cells(driver)[-1].click()
    point(driver, 3, 8)
    assert [element.text for element in driver.find_elements("css selector", "#pair bdi")] == ["␣w3", "␣w8"]


def test_hostile_tokens_stay_text(opened):
    driver = opened(a_map(HOSTILE[0], 1, 1, 5, 5, HOSTILE))  # one map alone opens by itself
    assert text(driver, "#where") == "Layer 0, head 0"
    point(driver, 1, 0)
    assert text(driver, "#pair bdi") == "␣a↵"
    tokens = [element.text for element in driver.find_elements("css selector", ".tokens bdi")]
    assert tokens[2:] == [HOSTILE[2].replace(" ", "␣"), "⟨202E⟩", "⟨empty⟩"]
    assert driver.execute_script("return [window.hit, document.images.length]") == [None, 0]
    blocked = "const s = document.createElement('script'); s.textContent = 'window.hit = 1'; document.body.append(s)"
    driver.execute_script(blocked)
    assert driver.execute_script("return window.hit") is None
    assert "Content Security Policy" in driver.get_log("browser")[0]["message"]
