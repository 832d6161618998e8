"""A real Chromium, and a stand-in for the server that the page talks to, for tests/test_page.py.

The browser is driven by its DevTools protocol over two pipes, so no package is needed for it. The stand-in streams what
a test wants, under the content security policy of the real server.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nanochat.server import load_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT_SEC = 15
KEYS = {"Enter": 13, "Escape": 27, "ArrowUp": 38, "Tab": 9, "/": 191, "?": 191, "o": 79}


class StandIn(ThreadingHTTPServer):
    """Serves the page and answers as a test says: `answer` maps a request to chunks, numbers among them are pauses."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), StandInHandler)
        self.address = f"http://127.0.0.1:{self.server_port}/"
        self.reset()

    def reset(self):
        self.requests, self.hung_up = [], threading.Event()
        self.refusals = []  # (status, headers, message) of the next requests
        self.key, self.has_policy = None, True
        self.model, self.more = "d4 sft", {}    # what is served, and the rest of its description
        self.answer = lambda request: [*split_words(f"You said: {request['messages'][-1]['content']}"), finish()]


class StandInHandler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def reply(self, content, kind, status=200, headers=()):
        self.send_response(status)
        for name, value in (("Content-Type", kind), *headers):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def reply_json(self, value, status=200, headers=()):
        self.reply(json.dumps(value).encode(), "application/json", status, headers)

    def do_GET(self):
        if self.path == "/v1/models":
            model = {"id": self.server.model, "object": "model", **self.server.more}
            self.reply_json({"object": "list", "data": [model]})
        else:
            page = load_page()
            policy = ("Content-Security-Policy", page.headers["Content-Security-Policy"])
            self.reply(page.body, "text/html; charset=utf-8", headers=[policy] if self.server.has_policy else [])

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(request)
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.server.refusals.insert(0, (401, [], "no key"))
        if self.server.refusals:
            status, headers, message = self.server.refusals.pop(0)
            return self.reply_json({"error": {"message": message}}, status, headers)
        self.reply(b"", "text/event-stream")
        chunks = self.server.answer(request)
        try:
            for chunk in chunks:
                if isinstance(chunk, float):
                    time.sleep(chunk)
                else:
                    data = chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()
                    self.wfile.write(b"data: " + data + b"\n\n")
        except OSError:
            self.server.hung_up.set()


def content(text, **more):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}], **more}


def tool(kind, text):
    return {"choices": [{"index": 0, "delta": {"tool": {"type": kind, "text": text}}, "finish_reason": None}]}


def finish(reason="stop"):
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}


def split_words(text):
    return [content(piece) for piece in re.findall(r"\s*\S+|\s+$", text)]


def endless(request):
    for i in range(2000):
        yield content(f"word{i} ")
        yield 0.01


class Browser:
    """One tab of a headless Chromium."""

    def __init__(self, profile_dir):
        commands, self.commands = os.pipe()
        self.replies, replies = os.pipe()
        # The protocol's pipes must be 3 and 4; a root user has no sandbox, and all pages here are our own
        self.process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{commands} 4>&{replies}', "-", BROWSER, "--headless=new", "--no-sandbox",
             "--remote-debugging-pipe", f"--user-data-dir={profile_dir}", "--no-first-run", "--disable-gpu",
             "--disable-dev-shm-usage", "--disable-background-networking", "--force-color-profile=srgb", "about:blank"],
            pass_fds=(commands, replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(commands)
        os.close(replies)
        self.buffer, self.num_calls, self.session = b"", 0, None
        self.problems = []  # exceptions and complaints of the page
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.num_calls += 1
        message = {"id": self.num_calls, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while (reply := self.read()).get("id") != self.num_calls:
            if reply.get("method") == "Runtime.exceptionThrown" or (
                    reply.get("method") == "Log.entryAdded" and reply["params"]["entry"]["source"] != "network"):
                self.problems.append(reply["params"])
        assert "error" not in reply, reply
        return reply["result"]

    def read(self):
        while b"\0" not in self.buffer:
            data = os.read(self.replies, 2**20)
            assert data, "the browser has ended"
            self.buffer += data
        message, _, self.buffer = self.buffer.partition(b"\0")
        return json.loads(message)

    def open(self, address):
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=address)
        self.wait_for_page()

    def reload(self):
        self.call("Page.reload")
        self.wait_for_page()

    def wait_for_page(self):
        self.wait("document.readyState === 'complete' && document.getElementById('list')?.children.length > 0")

    def run(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True,
                           userGesture=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, condition):
        deadline = time.monotonic() + WAIT_SEC
        while not self.run(condition):
            assert time.monotonic() < deadline, f"{condition} did not come true; the page says:\n{self.text('body')}"
            time.sleep(0.02)

    def wait_for_count(self, selector, number):
        self.wait(f"document.querySelectorAll({json.dumps(selector)}).length === {number}")

    def wait_for_text(self, selector, text):
        self.wait(f"document.querySelector({json.dumps(selector)})?.innerText.trim() === {json.dumps(text)}")

    def text(self, selector):
        return self.run(f"document.querySelector({json.dumps(selector)})?.innerText ?? ''")

    def count(self, selector):
        return self.run(f"document.querySelectorAll({json.dumps(selector)}).length")

    def click(self, selector, words=""):
        """A mouse click in the middle of the first visible element that matches, and whose text is `words`."""
        box = self.run(f"""(() => {{
            const found = [...document.querySelectorAll({json.dumps(selector)})].find((node) =>
                node.checkVisibility() && (!{json.dumps(words)} || node.innerText === {json.dumps(words)}));
            found?.scrollIntoView({{block: "nearest"}});
            const {{x, y, width, height}} = found?.getBoundingClientRect() ?? {{}};
            return found && {{x: x + width / 2, y: y + height / 2}};
        }})()""")
        assert box, f"nothing to click: {selector} {words}"
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **box)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, modifiers=0):
        """modifiers: 2 control, 8 shift"""
        text = "\r" if key == "Enter" else key if len(key) == 1 and not modifiers & 2 else None
        options = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown", **options, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **options)

    def say(self, text):
        self.run("document.getElementById('input').focus()")
        self.type(text)
        self.press("Enter")

    def wait_for_answer(self):
        self.wait("document.querySelector('.assistant:last-child .extras').children.length > 0"
                  " && !document.querySelector('#send.stopping')")
        return self.text(".assistant:last-child .body")

    def resize(self, width, height, is_phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=is_phone)

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(WAIT_SEC)
        os.close(self.commands)
        os.close(self.replies)
