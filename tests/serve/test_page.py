"""The served page in a browser, with real drops, clicks and keys: predict, teach a class, undo."""

import base64

import pytest
from served import picture, started, write_checkpoint

pytest.importorskip("fastapi")
import browser

BLUE = [picture("blue", 200 + i) for i in range(5)]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    checkpoint = write_checkpoint(folder, classes=("red", "green"))
    process, address = started(checkpoint, "--allow_changes")
    yield address
    process.terminate()
    process.wait(30)


@pytest.fixture
def page(server, tmp_path):
    found = browser.chromium()
    if found is None:
        pytest.skip("no chromium on this machine: apt-get install chromium")
    with browser.opened(found, tmp_path / "profile") as page:
        page.look(1200, 900)
        page.go(server)
        page.until("document.querySelectorAll('#classes li').length === 2")
        yield page
    # Nothing was asked for elsewhere, and nothing has failed on the page.
    assert {address.split("/")[2] for address in page.asked if address.startswith("http")} == {
        server.split("/")[2]
    }
    assert page.log == []


def saved(folder, contents):
    paths = [folder / f"photo {i}.png" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


SAYS = "[...document.querySelectorAll('.says')].map(node => node.textContent).join()"
CLASSES = "[...document.querySelectorAll('#classes li')].map(node => node.firstChild.data).join()"
PASTE = """(() => {
  const bytes = Uint8Array.from(atob("%s"), sign => sign.charCodeAt(0)), data = new DataTransfer();
  data.items.add(new File([bytes], "pasted.png", { type: "image/png" }));
  document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, cancelable: true }));
})()"""
STATUS = "document.getElementById('status').textContent"
WIDE = "document.documentElement.scrollWidth <= innerWidth"


@pytest.mark.slow
def test_drop_predict_add_a_class_predict_again_and_undo(page, server, tmp_path):
    token = server.partition("#token=")[2]
    assert token
    # The token leaves the address, and with it the history.
    assert page.js("location.href") == server.partition("#")[0]
    page.drop(".drop", saved(tmp_path, [*BLUE[:4], picture("red", 1)]))
    said = page.until(f"document.querySelectorAll('.says').length === 5 && {SAYS}").split(",")
    assert said[4] == "red"
    assert "blue" not in said
    # Pictures of the nearest training images are there.
    page.js("document.querySelector('.near').scrollIntoView()")
    page.until("[...document.querySelectorAll('.near img')].some(image => image.naturalWidth)")
    for number in range(1, 5):
        page.click(f".cards > li:nth-child({number}) input")
    page.click("#name")
    page.write("blue")
    assert page.js("document.getElementById('add').textContent") == "Add as class (4)"
    page.click("#add")
    page.until(f"{STATUS} === 'blue is a class now.'")
    page.until(f"{SAYS} === 'blue,blue,blue,blue,red'")
    assert page.js(CLASSES) == "red,green,blue"
    # Another one that it has not seen.
    page.drop(".drop", saved(tmp_path, BLUE[4:]))
    page.until(f"{SAYS} === 'blue,blue,blue,blue,red,blue'")
    for width in (1200, 420, 320):
        for dark in (False, True):
            page.look(width, 900, dark, tmp_path / f"{width}{'-dark' * dark}.png")
            assert page.js(WIDE), width
    page.look(1200, 900)
    page.click("#undo")
    page.until(f"{STATUS} === 'The last change is undone.'")
    page.until(f"!{SAYS}.includes('blue')")
    assert page.js(CLASSES) == "red,green"


@pytest.mark.slow
def test_the_keyboard_alone_is_enough_and_a_file_that_is_no_image_says_so(page, tmp_path):
    paths = saved(tmp_path, BLUE[:2])
    bad = tmp_path / "notes.txt"
    bad.write_text("no image")
    page.choose("#files", [*paths, bad])
    page.until(f"document.querySelectorAll('.says').length === 2 && {SAYS}")
    page.until("document.getElementById('cards').innerText.includes('notes.txt: no image')")
    page.js(PASTE % base64.b64encode(picture("red", 5)).decode())
    page.until(f"document.querySelectorAll('.says').length === 3 && {SAYS}.endsWith('red')")
    page.js("document.getElementById('name').focus()")
    page.write("sky")
    # From the name by Tab to the first photograph.
    for _ in range(12):
        page.press("Tab")
        if page.js("document.activeElement.type === 'checkbox'"):
            break
    page.press(" ")
    assert page.js("document.querySelector('.cards input').checked")
    page.js("document.getElementById('name').focus()")
    page.press("Enter")
    page.until(f"{CLASSES} === 'red,green,sky'")
    page.js("document.getElementById('undo').focus()")
    page.press("Enter")
    page.until(f"{CLASSES} === 'red,green'")


@pytest.mark.slow
def test_without_the_token_the_page_asks_for_it(page, server, tmp_path):
    page.js("sessionStorage.clear()")
    page.go("about:blank")
    page.go(server.partition("#")[0])
    page.until("document.querySelectorAll('#classes li').length === 2")
    page.drop(".drop", saved(tmp_path, BLUE[:1]))
    page.until("document.querySelectorAll('.says').length === 1")
    page.click("#all")
    page.click("#name")
    page.write("blue")
    page.click("#token")
    page.write(server.partition("#token=")[2])
    page.click("#add")
    page.until(f"{CLASSES} === 'red,green,blue'")
    # Removed on the page, after a question.
    page.js("window.confirm = () => true")
    page.click("#classes li:nth-child(1) button")
    page.until(f"{CLASSES} === 'green,blue'")
    for classes in ("red,green,blue", "red,green"):
        page.click("#undo")
        page.until(f"{CLASSES} === '{classes}'")
