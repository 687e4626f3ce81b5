"""Opens a page in Chromium and tells what is to be seen: page, picture, profile."""
import base64, json, sys
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

page, picture, profile = sys.argv[1:]
options = webdriver.ChromeOptions()
options.binary_location = "/usr/bin/chromium"
for option in [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--window-size=1200,1000", "--user-data-dir=" + profile,
]:
    options.add_argument(option)
browser = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
try:
    browser.get("file://" + page)
    number = lambda text: int(text.replace(",", "").split("\n")[0])
    run = browser.execute_script
    background = "return getComputedStyle(document.body).backgroundColor"
    media = lambda **features: browser.execute_cdp_cmd("Emulation.setEmulatedMedia", features)
    scheme = lambda name: [{"name": "prefers-color-scheme", "value": name}]
    said = {
        "numbers": {it.get_attribute("id"): number(it.text) for it in browser.find_elements("css selector", "dd")},
        "rows": [number(it.text) for it in browser.find_elements("css selector", "#callers .count")],
        "charts": len(browser.find_elements("css selector", "svg")),
        "scripts": len(browser.find_elements("css selector", "script")),
        "requests": 1 + run("return performance.getEntriesByType('resource').length"),
        "overflow": run("return document.documentElement.scrollWidth > innerWidth"),
    }
    media(features=scheme("light"))
    said["day"] = run(background)
    height = run("return document.documentElement.scrollHeight")
    browser.set_window_size(1200, height + 40)
    with open(picture, "wb") as file:
        file.write(browser.get_screenshot_as_png())
    media(features=scheme("dark"))
    said["night"] = run(background)
    media(media="print", features=scheme("dark"))
    said["paper"] = run(background)
    media()
    pdf = base64.b64decode(browser.print_page())
    said["pages"] = pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") + pdf.count(b"/Type/Page")
    print(json.dumps(said))
finally:
    browser.quit()
