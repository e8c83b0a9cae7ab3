"""The built site in a real browser; skipped unless ``make docs`` has made it.

Needs selenium (extra ``docs``), and Chromium with its driver. With the environment variable
``SCREENSHOTS``, a folder, the pictures of some pages are kept there.
"""

import functools
import os
import shutil
import threading
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

SITE = Path(__file__).parents[2] / "docs" / "_build" / "html"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (SITE / "index.html").exists(), reason="the site is not built: make docs"
)

PAGES = [
    "index.html",
    "guide/index.html",
    "guide/accuracy.html",
    "guide/keeping_states.html",
    "guide/pictures.html",
    "api.html",
    "api/sklearn_relish.RelishRegressor.html",
    "gallery/index.html",
    "gallery/plot_refinement.html",
    "lab_book.html",
    "whats_new.html",
]
SHOWN = ["index.html", "guide/accuracy.html", "api/sklearn_relish.RelishRegressor.html"]
SHOWN += ["gallery/plot_refinement.html", "guide/pictures.html", "gallery/index.html"]
DESKTOP, PHONE = (1280, 900), (390, 844)

# The smallest contrast (WCAG) between a text and what is behind it, with that text.
CONTRAST = """
const colour = css => css.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const behind = element => {
  for (; element; element = element.parentElement) {
    const found = colour(getComputedStyle(element).backgroundColor);
    if (found.length < 4 || found[3] > 0.99) return found;
  }
  return [255, 255, 255];
};
let worst = [21, ""];
for (const element of document.querySelectorAll("main p, main li, main td, main code, main h1, \\
main h2, main a, main pre span, nav a, dt, dd")) {
  const own = [...element.childNodes].filter(node => node.nodeType == 3).map(n => n.data).join("");
  const style = getComputedStyle(element);
  if (!own.trim() || !element.offsetParent || style.visibility == "hidden") continue;
  const a = luminance(colour(style.color)), b = luminance(behind(element));
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < worst[0]) worst = [contrast, own.trim() + " " + element.outerHTML.slice(0, 200)];
}
return worst;
"""

# The address and the width of each picture, loaded even if it is far below the screen.
PICTURES = """
const pictures = [...document.images], done = arguments[0];
pictures.forEach(picture => picture.loading = "eager");
Promise.all(pictures.map(picture => picture.decode().catch(() => 0)))
  .then(() => done(pictures.map(picture => [picture.src, picture.naturalWidth])));
"""

# Texts that end beyond the screen, where nothing scrolls.
CUT = """
const ends = element => {
  const range = document.createRange();
  range.selectNodeContents(element);
  return range.getBoundingClientRect().right;
};
return [...document.querySelectorAll("main h1, main h2, main h3, main p, main li, main dt")]
  .filter(element => element.offsetParent && !element.closest("table, pre"))
  .filter(element => ends(element) > document.documentElement.clientWidth)
  .map(element => element.textContent.slice(0, 100));
"""


class Page(HTMLParser):
    """Addresses that a page links to, and the names that it can be linked by."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.names |= {attributes.get("id"), attributes.get("name")}
        for name in ("href", "src"):
            if attributes.get(name) and tag != "link":
                self.links.append(attributes[name])


def test_links_resolve():
    pages = {path: Page(path) for path in SITE.rglob("*.html") if "_static" not in path.parts}
    assert len(pages) > 30
    broken = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or address.netloc:
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            fragment = unquote(address.fragment)
            is_named = not fragment or target not in pages or fragment in pages[target].names
            if not (target.exists() and is_named):
                broken.append(f"{path.relative_to(SITE)}: {link}")
    assert broken == []


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def browser(address):
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install -e '.[docs]'")
    if not (CHROMIUM and DRIVER):
        pytest.skip("apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    service = webdriver.ChromeService(executable_path=DRIVER)
    driver = webdriver.Chrome(options=options, service=service)
    driver.set_page_load_timeout(60)
    driver.implicitly_wait(20)
    yield driver
    driver.quit()


@pytest.fixture
def show(browser, address):
    """Open a page of the site at a size, light or dark."""

    def show(page, size=DESKTOP, mode="light"):
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1}
        metrics["mobile"] = size == PHONE
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        if not browser.current_url.startswith(address):
            browser.get(address)
        browser.execute_script(f"localStorage.mode = localStorage.theme = '{mode}'")
        browser.get(address + page)
        assert browser.execute_script("return document.documentElement.dataset.theme") == mode
        return browser

    return show


def keep_screenshot(browser, page, kind):
    folder = os.environ.get("SCREENSHOTS")
    if folder and page in SHOWN:
        name = page.removesuffix(".html").replace("/", "-")
        browser.save_screenshot(str(Path(folder, f"{name}-{kind}.png")))


@pytest.mark.parametrize("page", PAGES)
def test_pictures_show_and_nothing_comes_from_elsewhere(page, show, address):
    browser = show(page)
    pictures = browser.execute_async_script(PICTURES)
    assert [source for source, width in pictures if not width] == []
    assert pictures or page not in ("index.html", "guide/pictures.html")
    loaded = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    elsewhere = [url for url in browser.execute_script(loaded) if not url.startswith(address)]
    assert elsewhere == []


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("predict_interval", "sklearn_relish.RelishRegressor.html"),
        ("long texts", "guide/long_texts.html"),
        ("max_memory", "guide/keeping_states.html"),
    ],
)
def test_search(words, found, show):
    browser = show("search.html?q=" + words.replace(" ", "+"))
    browser.find_element("css selector", "ul.search a")  # waits for the first result
    links = "return [...document.querySelectorAll('ul.search a')].map(link => link.href)"
    for _ in range(100):
        if any(found in link for link in browser.execute_script(links)):
            break
        browser.execute_async_script("setTimeout(arguments[0], 100)")
    assert any(found in link for link in browser.execute_script(links))


@pytest.mark.parametrize("mode", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_texts_can_be_read_on_a_desktop(page, mode, show):
    browser = show(page, mode=mode)
    keep_screenshot(browser, page, mode)
    contrast, text = browser.execute_script(CONTRAST)
    assert contrast >= 4.5, text


@pytest.mark.parametrize("page", PAGES)
def test_pages_fit_a_phone(page, show):
    browser = show(page, PHONE)
    keep_screenshot(browser, page, "phone")
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= PHONE[0]
    assert browser.execute_script(CUT) == []
    size = "return parseFloat(getComputedStyle(document.querySelector('main p')).fontSize)"
    assert browser.execute_script(size) >= 14
