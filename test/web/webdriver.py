"""A browser, driven by the W3C's WebDriver protocol: JSON over HTTP to chromedriver."""
import json
import re
import subprocess
import time
import urllib.error
import urllib.request

SECONDS = 60  # for what must happen at some time


def until(happens, what):
    """Asks until the answer is true; returns it."""
    end = time.monotonic() + SECONDS
    while not (answer := happens()):
        if time.monotonic() > end:
            raise AssertionError(f"never: {what}")
    return answer


class Browser:
    def __init__(self):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(found[1] for line in self.driver.stdout if (found := re.search(r"on port (\d+)\.", line)))
        self.url = f"http://127.0.0.1:{port}/session"
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                            "--window-size=1360,850"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        self.url += "/" + self.call("POST", "", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]

    def call(self, method, path, body=None):
        request = urllib.request.Request(self.url + path, method=method, headers={"Content-Type": "application/json"},
                                         data=None if body is None else json.dumps(body).encode())
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise AssertionError(json.load(error)["value"]["message"]) from None

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        """What a function body returns; its arguments are those given."""
        return self.call("POST", "/execute/sync", {"script": script, "args": arguments})

    def until(self, script, *arguments):
        return until(lambda: self.run("return " + script, *arguments), f"{script} {arguments or ''}")

    def element(self, css):
        return "/element/" + self.call("POST", "/element", {"using": "css selector", "value": css}).popitem()[1]

    def type(self, css, text):
        self.call("POST", self.element(css) + "/value", {"text": text})

    def click(self, css):
        self.call("POST", self.element(css) + "/click", {})

    def log(self):
        return [entry["message"] for entry in self.call("POST", "/se/log", {"type": "browser"})]

    def close(self):
        self.call("DELETE", "")
        self.driver.terminate()
        self.driver.wait()
