"""The chat page in a real Chromium: each test is a person who types, clicks and looks."""

import json
import re
import threading

import pytest

from nanochat.server import PAGE_PATH
from tests.browser import BROWSER, WAIT_SEC, Browser, StandIn, content, endless, finish, split_words, tool
from tests.server_helpers import ServerProcess, save_toy

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not BROWSER, reason="there is no Chromium on this machine")]

MARKDOWN = """# Sorting

Here is **quick sort**, in *Python*, as `sort(xs)`:

```python
def sort(xs):
    return xs if not xs else sort([x for x in xs[1:] if x < xs[0]])
```

1. Pick a *pivot*
2. Split
   - smaller
   - larger

> Divide and conquer.

| input | steps |
|---|---|
| 10 | 33 |

More at https://example.org/sort(1), or [here](https://example.org/a_(b)). 2 * 3 * 4, snake_case_name."""

ATTACK = """<img src=x onerror="pwned=1"><script>pwned=2</script><svg onload=pwned=3></svg>
[click](javascript:pwned=4) [data](data:text/html,<script>pwned=5</script>)
![image](http://127.0.0.1:9/x.png)
<a href="javascript:pwned=6">x</a> <style>body{display:none}</style> </article></main> &lt;b&gt;
[bank](https://bank.com@evil.example/)
[x](JaVaScRiPt:pwned=7) [y](//evil.example) [z](vbscript:x) <javascript:pwned=8>
[t](https://ok.example "onmouseover=pwned=9")

```html"onclick=pwned=10
<script>pwned=11</script>
```

| <img src=x onerror=pwned=12> | `<b>` |
|---|---|
| [q](javascript:pwned=13) | \ue0001\ue001<script>pwned=14</script>\ue002 |

<details open ontoggle=pwned=15><iframe srcdoc="<script>parent.pwned=16</script>"></iframe>"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def stand_in():
    server = StandIn()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def page(browser, stand_in):
    """The page as a new visitor sees it; at the end nothing must have gone wrong in it."""
    stand_in.reset()
    browser.resize(1280, 860)
    browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    browser.open(stand_in.address)
    browser.run("localStorage.clear()")
    browser.open(stand_in.address)
    browser.problems.clear()
    yield browser
    assert not browser.problems


# ---------------------------------------------------------------------------------------------------------------------
# Conversations


def test_conversation_is_streamed_and_survives_a_reload(page, stand_in):
    stand_in.answer = lambda request: [content("one "), 0.4, content("two"), finish()]
    page.say("Hello")
    page.wait_for_text(".assistant .body", "one")   # before the second word is sent
    assert page.wait_for_answer() == "one two"
    page.say("And then?")
    page.wait_for_count(".assistant", 2)
    page.wait_for_answer()
    assert [message["content"] for message in stand_in.requests[1]["messages"]] == ["Hello", "one two", "And then?"]
    assert stand_in.requests[1] | {"messages": 0, "seed": 0} == {
        "model": "d4 sft", "messages": 0, "stream": True, "temperature": 0.6, "top_k": 50, "top_p": 1,
        "max_tokens": 512, "seed": 0}
    before = page.text("#log")
    page.reload()
    page.wait_for_text("#model", "d4 sft")
    assert page.text("#log") == before and page.text("#title") == "Hello"


def test_stop_in_the_middle(page, stand_in):
    stand_in.answer = endless
    page.say("Go on")
    page.wait("document.querySelector('.assistant .body').innerText.includes('word9')")
    page.press("Escape")
    assert page.wait_for_answer().startswith("word0 word1")
    assert stand_in.hung_up.wait(WAIT_SEC)  # the server need not go on
    assert "Stopped." in page.text(".assistant .extras") and page.run("document.activeElement.id") == "input"
    length = len(page.text(".assistant .body"))
    page.reload()
    page.wait_for_count(".message", 2)
    assert len(page.text(".assistant .body")) == length
    page.say("Again")
    page.wait_for_count(".message", 4)
    page.wait("document.querySelector('.assistant:last-child .body').innerText.length > 20")
    page.click("#send")
    page.wait_for_answer()
    assert stand_in.requests[1]["messages"][1]["content"].startswith("word0 word1")


def test_leaving_in_the_middle_keeps_what_came(page, stand_in):
    stand_in.answer = endless
    page.say("Go on")
    page.wait("document.querySelector('.assistant .body').innerText.includes('word5')")
    page.reload()
    page.wait_for_count(".message", 2)
    assert page.text(".assistant .body").startswith("word0") and "Stopped." in page.text(".assistant .extras")


def test_regenerate(page, stand_in):
    answers = iter(["first", "second"])
    stand_in.answer = lambda request: [content(next(answers)), finish()]
    page.say("Hello")
    assert page.wait_for_answer() == "first"
    page.click(".actions button", "Regenerate")
    page.wait_for_text(".assistant .body", "second")
    page.wait_for_answer()
    first, second = stand_in.requests
    assert first["messages"] == second["messages"] and first["seed"] != second["seed"] and page.count(".message") == 2


def test_edit_and_resend(page, stand_in):
    page.say("Helo")
    page.wait_for_answer()
    page.say("More")
    page.wait_for_count(".assistant", 2)
    page.wait_for_answer()
    page.run("document.querySelector('.user [aria-label=\"Edit and resend\"]').click()")
    page.press("Escape")
    assert page.count(".editor") == 0 and page.run("document.activeElement.ariaLabel") == "Edit and resend"
    page.run("document.querySelector('.user [aria-label=\"Edit and resend\"]').click()")
    page.run("document.querySelector('.editor textarea').select()")
    page.type("Hello")
    page.press("Enter")
    page.wait_for_text(".assistant:last-child .body", "You said: Hello")
    assert page.count(".message") == 2 and len(stand_in.requests[-1]["messages"]) == 1


def test_two_conversations_at_once_rename_delete_and_undo(page, stand_in):
    stand_in.answer = lambda request: [content("slow "), 0.6, content("answer"), finish()]
    page.say("First")
    page.wait_for_text(".assistant .body", "slow")
    page.press("o", modifiers=10)
    assert page.count(".message") == 0
    stand_in.answer = lambda request: [content("quick"), finish()]
    page.say("Second")
    assert page.wait_for_answer() == "quick"
    page.click("#list .open", "First")
    page.wait_for_text(".assistant .body", "slow answer")
    page.click("#list .current [title=Rename]")
    page.type("Slow one")
    page.press("Enter")
    assert page.text("#title") == "Slow one" and page.run("document.activeElement.innerText") == "Slow one"
    page.click("#list .current [title=Delete]")
    assert page.text("#list") == "Second" and page.count(".message") == 0
    page.click("#toast button")
    assert page.count("#list li") == 2 and page.text("#title") == "Slow one"
    page.reload()
    page.wait_for_count("#list li", 2)
    page.wait_for_count(".message", 2)


def write_elsewhere(page, chat):
    """What another tab saves, as this one sees it."""
    page.run(f"""(() => {{
        const key = "nanochat.chat." + {json.dumps(chat["id"])};
        localStorage.setItem(key, {json.dumps(json.dumps(chat))});
        dispatchEvent(new StorageEvent("storage", {{key}}));
    }})()""")


OTHER = {"id": "other", "title": "Elsewhere", "updated": 1, "messages": [{"role": "user", "text": "x"}]}


def test_another_tab_does_not_disturb(page):
    page.say("Helo")
    page.wait_for_answer()
    chat = page.run("current")
    page.run("document.querySelector('.user [aria-label=\"Edit and resend\"]').click()")
    page.type(" again")
    write_elsewhere(page, OTHER)
    write_elsewhere(page, chat | {"title": "Renamed"})
    assert page.run("document.activeElement.value") == "Helo again"
    assert page.run("[...document.querySelectorAll('#list .open')].map((node) => node.innerText)") == [
        "Renamed", "Elsewhere"]
    page.press("Escape")
    assert page.text("#title") == "Renamed" and page.run("document.activeElement.ariaLabel") == "Edit and resend"
    page.run("document.querySelector('.user [aria-label=\"Edit and resend\"]').click()")
    page.type(" you")
    write_elsewhere(page, chat | {"title": "Once more"})
    page.press("Enter")
    assert page.wait_for_answer() == "You said: Helo you" and page.text("#title") == "Once more"
    page.click("#list .current [title=Rename]")
    page.type("Half a na")
    write_elsewhere(page, OTHER | {"title": "Elsewhere again"})
    write_elsewhere(page, chat | {"messages": [*chat["messages"], {"role": "user", "text": "more"}]})
    assert page.run("document.activeElement.value") == "Half a na"
    page.type("me")
    page.press("Enter")
    assert page.text("#title") == "Half a name" and "Elsewhere again" in page.text("#list")
    page.reload()
    page.wait_for_count(".message", 3)


def test_a_conversation_that_another_tab_deletes_stays_deleted(page):
    write_elsewhere(page, OTHER)
    page.click("#list .open", "Elsewhere")
    page.click("#list .current [title=Rename]")
    page.run("""(() => {
        localStorage.removeItem("nanochat.chat.other");
        dispatchEvent(new StorageEvent("storage", {key: "nanochat.chat.other"}));
    })()""")
    page.type("New name")
    page.press("Enter")
    assert page.text("#list") == "Your conversations will be here."
    assert page.run("localStorage.getItem('nanochat.chat.other')") is None


def test_another_tab_does_not_move_the_reader(page, stand_in):
    stand_in.answer = lambda request: [content("line\n\n" * 200), finish()]
    page.say("Write")
    page.wait_for_answer()
    page.run("window.scroller = document.getElementById('scroller')")
    page.wait("lastTop > 1000")    # at the end
    page.wait("(scroller.scrollTo(0, 500), !following)")
    write_elsewhere(page, OTHER)
    write_elsewhere(page, page.run("current"))
    assert page.run("scroller.scrollTop") == 500


def test_answer_that_comes_in_another_tab(page):
    answer = {"role": "assistant", "parts": [{"type": "text", "text": "half"}], "finish": None}
    write_elsewhere(page, OTHER | {"messages": [*OTHER["messages"], answer]})
    page.click("#list .open", "Elsewhere")
    assert page.text(".assistant .body") == "half" and page.text(".assistant .extras") == ""
    answer |= {"finish": "stop", "parts": [{"type": "text", "text": "half and whole"}]}
    write_elsewhere(page, OTHER | {"messages": [*OTHER["messages"], answer]})
    assert page.text(".assistant .body") == "half and whole" and "Regenerate" in page.text(".assistant .extras")


def test_tool_calls_are_chips_in_the_text_and_go_back_in_parts(page, stand_in):
    stand_in.answer = lambda request: [content("That is "), tool("call", "34*27"), 0.3, tool("output", "918"),
                                       content(".\n\nSo **918**."), finish()]
    page.say("34 times 27?")
    page.wait("document.querySelector('.tool')?.innerText.includes('34*27 …')")
    page.wait_for_answer()
    assert page.text(".tool").endswith("34*27 = 918") and page.count(".assistant p") == 2
    assert page.run("document.querySelector('.tool').parentNode.textContent").endswith("34*27 = 918.")
    page.say("Sure?")
    page.wait_for_count(".assistant", 2)
    page.wait_for_answer()
    assert stand_in.requests[1]["messages"][1]["content"] == [
        {"type": "text", "text": "That is "}, {"type": "python", "text": "34*27"},
        {"type": "python_output", "text": "918"}, {"type": "text", "text": ".\n\nSo **918**."}]


def test_limits_are_told(page, stand_in):
    stand_in.answer = lambda request: [content("cut", dropped_messages=6), finish("length")]
    page.say("Hello")
    page.wait_for_answer()
    assert "no longer sees the oldest 6 messages" in page.text(".assistant .extras")
    assert "longest answer" in page.text(".assistant .extras")
    stand_in.answer = lambda request: [content("x" * 9000), finish()]
    for i in range(5):
        page.say(f"Question {i}")
        page.wait_for_count(".assistant", i + 2)
        page.wait_for_answer()
    sizes = [len(message["content"]) for message in stand_in.requests[-1]["messages"]]
    assert max(sizes) == 9000 and sum(sizes) <= 32000 and len(sizes) % 2  # whole turns, the question last


# ---------------------------------------------------------------------------------------------------------------------
# What the model writes


def test_markdown(page, stand_in):
    stand_in.answer = lambda request: [*split_words(MARKDOWN), finish()]
    page.say("How do I sort?")
    page.wait_for_answer()
    tags = ("h2", "strong", "em", "p code", "figcaption", "blockquote")
    assert {tag: page.text(f".assistant .body {tag}") for tag in tags} == {
        "h2": "Sorting", "strong": "quick sort", "em": "Python", "p code": "sort(xs)", "figcaption": "python\nCopy",
        "blockquote": "Divide and conquer."}
    assert page.text("pre").splitlines()[0] == "def sort(xs):" and page.count(".body ol > li") == 2
    assert page.count(".body ol ul > li") == 2 and page.count(".body td") == 2
    assert "2 * 3 * 4, snake_case_name." in page.text(".assistant")
    links = "[...document.querySelectorAll('.assistant a')].map(({href, rel, innerText}) => [href, rel, innerText])"
    assert page.run(links) == [["https://example.org/sort(1)", "noopener noreferrer", "https://example.org/sort(1)"],
                     ["https://example.org/a_(b)", "noopener noreferrer", "hereexample.org"]]


def test_wide_table_keeps_its_words(page, stand_in):
    page.resize(390, 844, is_phone=True)
    table = "| operating | temperature | explanation |\n|:-:|--:|---|\n| summer | 25 | " + "words " * 40 + "|"
    stand_in.answer = lambda request: [content(table), finish()]
    page.say("A table?")
    page.wait_for_answer()
    lines = page.run("[...document.querySelectorAll('th')].map((th) => th.getClientRects()[0].height / 24)")
    assert max(lines) < 2
    assert page.run("[...document.querySelectorAll('td')].map((td) => getComputedStyle(td).textAlign)") == [
        "center", "right", "left"]
    assert page.run("document.documentElement.scrollWidth") == 390  # the table scrolls, not the page


def test_copy(page, stand_in):
    page.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    stand_in.answer = lambda request: [*split_words(MARKDOWN), finish()]
    page.say("How do I sort?")
    page.wait_for_answer()
    page.click("figcaption button")
    page.wait_for_text("figcaption button", "Copied")
    assert page.run("navigator.clipboard.readText()") == MARKDOWN.split("```")[1].removeprefix("python\n").rstrip("\n")
    page.click(".assistant .actions button", "Copy")
    page.wait_for_text(".assistant .actions button", "Copied")
    assert page.run("navigator.clipboard.readText()") == MARKDOWN


@pytest.mark.parametrize("has_policy", [True, False])
def test_attack_stays_text(page, stand_in, has_policy):
    """With the server's policy, and without it: the page alone must be safe."""
    stand_in.has_policy = has_policy
    page.open(stand_in.address + "?again")
    page.run("document.addEventListener('securitypolicyviolation', () => { window.pwned = 'refused by the policy' })")
    stand_in.answer = lambda request: [*split_words(ATTACK), tool("call", "<script>pwned=17</script>"),
                                       tool("output", "<img src=x onerror=pwned=18>"), finish()]
    page.say(ATTACK)
    shown = page.wait_for_answer()
    page.run("new Promise((resolve) => setTimeout(resolve, 300))")
    assert page.run("window.pwned === undefined")
    allowed = "p,a,small,code,pre,figure,figcaption,button,div,table,thead,tbody,tr,th,td,span,em,strong"
    assert page.run(f"[...document.querySelectorAll('.body *')].filter((node) => !node.matches('{allowed}'))"
                    ".map((node) => node.outerHTML)") == []
    assert page.run("[...document.querySelectorAll('#log *')].filter((node) => "
                    "[...node.attributes].some(({name}) => name.startsWith('on') || name === 'style')).length") == 0
    assert page.run("[...document.querySelectorAll('#log a')].map(({href}) => href)") == [
        "http://127.0.0.1:9/x.png", "https://bank.com@evil.example/", "https://ok.example/"]
    for text in ('<img src=x onerror="pwned=1"><script>pwned=2</script>', "[click](javascript:pwned=4)",
                 "bankevil.example", "<script>pwned=11</script>", "onerror=pwned=18>",
                 '<iframe srcdoc="<script>parent.pwned=16</script>">'):
        assert text in shown
    assert page.text(".user .body") == ATTACK.strip()
    page.reload()
    page.wait_for_count(".message", 2)
    assert page.run("window.pwned === undefined")


def test_endless_nesting_and_marks_take_no_time(page):
    """Nothing that a model may write makes the page hang; each of these is as long as an answer can be."""
    stairs = "\n".join(" " * i + "- a" for i in range(170))
    for text in ("*a " * 5000, "**" * 8000, "_a*b" * 4000, "[" * 16000, "[a](" * 4000, "`" * 16000, "` `` " * 3000,
                 ">" * 16000, "- " * 8000, "> - " * 4000, "|" * 16000 + "\n" + "|-" * 8000, "#" * 16000, stairs,
                 "https://" * 2000, "~~~\n" * 4000, "- a\n" * 4000, "![](" * 4000,
                 "_" * 16000, "-" * 8000 + " x", "- " * 8000 + "x", "|-" * 8000 + "x\n" * 3):
        took_ms = page.run("(() => { const body = document.createElement('div'), start = performance.now(); "
                           f"showMarkdown(body, {json.dumps(text)}); return performance.now() - start; }})()")
        assert took_ms < 1000, text[:20]


# ---------------------------------------------------------------------------------------------------------------------
# When things go wrong


def test_errors_are_told_in_words_and_can_be_retried(page, stand_in):
    stand_in.refusals = [(429, [("Retry-After", "5")], "full"), (400, [], "messages are too long"), (500, [], None)]
    page.say("Hello")
    for expected in ("The server is busy with other conversations; try again in 5 seconds.",
                     "The server refused this: messages are too long", "The server failed with status 500."):
        page.wait_for_text(".error span", expected)
        assert page.run("document.querySelector('.error').getAttribute('role')") == "alert"
        page.click(".error button", "Try again")
    assert page.wait_for_answer() == "You said: Hello"
    assert page.count(".error") == 0 and len(stand_in.requests) == 4


def test_api_key(page, stand_in):
    stand_in.key = "secret"
    page.say("Hello")
    page.wait("document.querySelector('.error span')?.innerText.includes('API key')")
    page.click(".error button", "Open settings")
    page.run("document.querySelector('[name=key]').focus()")
    page.type("secret")
    page.press("Enter")
    page.click(".error button", "Try again")
    page.wait_for_text(".assistant .body", "You said: Hello")


def test_lost_connection_and_errors_in_the_stream(page, stand_in):
    streams = iter([[content("half")], [content("half"), {"error": {"message": "out of memory"}}], [b"nonsense"],
                    [content("whole"), finish()]])
    stand_in.answer = lambda request: next(streams)
    page.say("Hello")
    for expected in ("The connection was lost before the answer was complete.", "The server stopped: out of memory",
                     "The server's answer can't be read."):
        page.wait_for_text(".error span", expected)
        page.click(".error button", "Try again")
    page.wait_for_text(".assistant .body", "whole")


@pytest.mark.parametrize("trouble", ["setItem() { throw new DOMException('full', 'QuotaExceededError') }",
                                     "get length() { throw new DOMException('no', 'SecurityError') }, setItem: null"])
def test_storage_that_is_full_or_off(page, trouble):
    storage = f"{{getItem: () => '{{broken', removeItem() {{}}, {trouble}}}"
    added = page.call("Page.addScriptToEvaluateOnNewDocument",
                      source=f"Object.defineProperty(window, 'localStorage', {{value: {storage}}})")
    try:
        page.reload()
        page.say("Hello")
        assert page.wait_for_answer() == "You said: Hello"
        assert "storage is full or switched off" in page.text("#notice")
    finally:
        page.call("Page.removeScriptToEvaluateOnNewDocument", identifier=added["identifier"])


def test_foreign_entries_in_the_storage_are_left_alone(page):
    page.run("""['{', 'null', '[]', '{"id": "a", "messages": 3}', '{"id": "other", "title": "", "messages": []}']
                .forEach((text, i) => localStorage.setItem(`nanochat.chat.${i}`, text));
                localStorage.setItem("nanochat.settings", "7")""")
    page.reload()
    assert page.text("#list") == "Your conversations will be here."
    page.say("Hello")
    assert page.wait_for_answer() == "You said: Hello"


# ---------------------------------------------------------------------------------------------------------------------
# For everyone, on every screen


def test_settings_are_sent_and_kept(page, stand_in):
    page.click("#open-settings")
    for name, value in (("system", "Be brief."), ("temperature", "0.25"), ("top_k", "7"), ("top_p", "0.5"),
                        ("max_tokens", "9"), ("seed", "11")):
        page.run(f"document.querySelector('[name={name}]').select()")
        page.type(value)
    page.click("#settings button", "Done")
    page.reload()
    for _ in range(2):
        page.say("Hello")
        page.wait_for_answer()
    assert stand_in.requests[0] == {
        "model": "d4 sft", "stream": True, "temperature": 0.25, "top_k": 7, "top_p": 0.5, "max_tokens": 9, "seed": 11,
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]}
    page.click("#open-settings")
    page.run("document.querySelector('[name=temperature]').select()")
    page.type("99")
    page.press("Escape")  # out of range: the old value stays
    assert page.run("settings.temperature") == 0.25


def test_the_servers_defaults_hold_until_a_person_chooses(page, stand_in):
    stand_in.more = {"defaults": {"temperature": 0.0, "top_k": 5, "max_tokens": 33}}
    page.reload()
    page.wait_for_text("#model", "d4 sft")
    page.click("#open-settings")
    assert page.run("document.querySelector('[name=top_k]').value") == "5"
    page.run("document.querySelector('[name=top_k]').select()")
    page.type("50")    # which is the page's own default
    page.click("#settings button", "Done")
    stand_in.more = {"defaults": {"temperature": 1.0, "top_k": 6, "max_tokens": 44}}    # started again otherwise
    page.reload()
    page.wait_for_text("#model", "d4 sft")
    page.say("Hello")
    page.wait_for_answer()
    assert {name: stand_in.requests[0][name] for name in ("temperature", "top_k", "max_tokens")} == {
        "temperature": 1, "top_k": 50, "max_tokens": 44}


@pytest.mark.parametrize("kept", ['"foo"', "5", "[]", "null", "{"])
def test_settings_that_are_none(page, stand_in, kept):
    page.run(f"localStorage.setItem('nanochat.settings', {json.dumps(kept)})")
    page.reload()
    page.say("Hello")
    page.wait_for_answer()
    assert stand_in.requests[0]["temperature"] == 0.6


def test_server_that_was_started_again_with_another_model(page, stand_in):
    page.wait_for_text("#model", "d4 sft")
    stand_in.model, stand_in.refusals = "d6 sft", [(404, [], "this server has 'd6 sft' only")]
    page.say("Hello")
    page.wait_for_text(".error span", "The server refused this: this server has 'd6 sft' only")
    page.click(".error button", "Try again")
    assert page.wait_for_answer() == "You said: Hello"
    assert [request["model"] for request in stand_in.requests] == ["d4 sft", "d6 sft"]
    assert page.text("#model") == "d6 sft"


def test_another_tab_takes_nothing_from_the_reader(page, stand_in):
    """What an event of the storage tells: another conversation there, or this one, has changed."""
    def tell(chat_id, **changes):
        page.run(f"""(() => {{
            const chat = {{...current, ...{json.dumps({"id": chat_id, **changes})}}};
            localStorage.setItem(CHAT_PREFIX + chat.id, JSON.stringify(chat));
            dispatchEvent(new StorageEvent("storage", {{key: CHAT_PREFIX + chat.id}}));
        }})()""")
    stand_in.answer = lambda request: [*(content(f"line {i}\n\n") for i in range(100)), finish()]
    page.say("Write")
    page.wait_for_answer()
    chat_id = page.run("current.id")
    page.wait("lastTop > 1000")    # at the end
    page.wait("(document.getElementById('scroller').scrollTo(0, 200), !following)")
    tell(chat_id, title="Renamed")
    page.wait_for_text("#title", "Renamed")
    assert page.run("document.getElementById('scroller').scrollTop") == 200
    page.run("document.getElementById('scroller').scrollTop = 0")
    page.click(".user button", "Edit")
    page.type(" and more")
    tell("other", title="Other")
    page.wait("document.getElementById('list').innerText.includes('Other')")
    tell(chat_id, title="Again")
    assert page.run("document.querySelector('.editor textarea').value") == "Write and more"


def test_keyboard_alone(page, stand_in):
    page.press("?")  # the message box has the focus: it is only a character there
    page.type("a")
    page.press("Enter", modifiers=8)
    page.type("b")
    page.press("Enter")
    page.wait_for_answer()
    assert stand_in.requests[0]["messages"][0]["content"] == "?a\nb"
    page.press("ArrowUp")
    page.run("document.activeElement.select()")
    page.type("c")
    page.press("Enter")
    page.wait_for_text(".assistant .body", "You said: c")
    reached = set()
    for _ in range(20):
        page.press("Tab")
        name, outline, place = page.run("""(({innerText, ariaLabel, title, id, tagName}) =>
            [innerText || ariaLabel || title, getComputedStyle(document.activeElement).outlineStyle, id || tagName]
            )(document.activeElement)""")
        reached.add(name)
        assert outline == "solid" or place in ("input", "BODY")  # the message box shows its focus by its border
    assert {"New conversation", "?a", "Rename ?a", "Delete ?a", "Settings", "Copy", "Edit", "Regenerate"} <= reached
    page.run("document.getElementById('new').focus()")
    page.press("?")
    assert page.run("document.getElementById('shortcuts').open")
    page.press("Escape")
    page.press("/")
    assert page.run("document.activeElement.id") == "input" and page.run("document.activeElement.value") == ""
    page.run("document.querySelector('.skip').focus()")
    page.press("Enter")
    assert page.run("document.activeElement.id") == "input" and page.count(".message") == 2    # and still the same one


def test_screen_reader(page, stand_in):
    """Everything has a name, and an answer is announced once, not word by word."""
    page.run("window.said = []; new MutationObserver(() => said.push(document.getElementById('announcer').textContent))"
             ".observe(document.getElementById('announcer'), {childList: true})")
    words = [piece for word in split_words("one two three") for piece in (word, 0.1)]
    stand_in.answer = lambda request: [*words, finish()]
    page.say("Hello")
    page.wait_for_answer()
    assert page.run("said") == ["Answering", "Answer: one two three"]
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    roles = ("button", "textbox", "link", "dialog", "log", "article")
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(controls) > 10 and all(node["name"]["value"] for node in controls if not node["ignored"])
    assert page.run("document.getElementById('log').getAttribute('aria-live')") == "off"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page, stand_in, scheme):
    """Each text on what lies behind it reaches WCAG's AA, 4.5 to 1."""
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    stand_in.answer = lambda request: [content(MARKDOWN), tool("call", "1+1"), tool("output", "2"), finish("length")]
    page.say("Hello")
    page.wait_for_answer()
    stand_in.refusals = [(500, [], None)]
    page.say("Hello")
    page.wait("!!document.querySelector('.error')")
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark))) < 200) == (scheme == "dark")
    low = page.run("""(() => {
        const parse = (color) => {  // to linear light, over an opaque ground or not
            const context = new OffscreenCanvas(1, 1).getContext("2d");
            context.fillStyle = color;
            context.fillRect(0, 0, 1, 1);
            const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
            return {rgb: [r, g, b], a: a / 255};
        };
        const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
            .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
        const ground = (node) => {
            const {rgb, a} = parse(getComputedStyle(node).backgroundColor);
            if (a === 1 || !node.parentElement) return rgb;
            return ground(node.parentElement).map((c, i) => c + (rgb[i] - c) * a);
        };
        const low = [];
        for (const node of document.querySelectorAll("body *")) {
            const hasText = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
            if (!hasText || !node.checkVisibility()) continue;
            const [a, b] = [light(parse(getComputedStyle(node).color).rgb), light(ground(node))];
            const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
            if (ratio < 4.5) low.push([node.outerHTML.slice(0, 80), ratio]);
        }
        return low;
    })()""")
    assert low == []


def test_theme_can_be_chosen_and_stays(page):
    page.click("#theme")
    page.click("#theme")
    assert page.text("#theme") == "Theme: dark"
    page.reload()
    assert page.run("getComputedStyle(document.body).colorScheme") == "dark"


def test_phone(page, stand_in):
    page.resize(360, 640, is_phone=True)
    stand_in.answer = lambda request: [content(MARKDOWN + " " + "x" * 300), tool("call", "9" * 200),
                                       content(f"\n\n`{'y' * 200}`"), finish()]
    page.say("z" * 300)
    page.wait_for_answer()

    def fits():
        return page.run("['html', '#scroller'].every((name) => document.querySelector(name).scrollWidth <= 360)")

    def is_shown(name):
        return page.run(f"document.getElementById('{name}').checkVisibility()")
    assert fits() and not is_shown("sidebar")
    page.click("#menu")
    assert page.run("document.querySelector('main').inert && document.activeElement.id") == "new" and fits()
    page.click("#fold")
    assert not is_shown("sidebar") and page.run("document.activeElement.id") == "menu"
    page.click("#menu")
    page.click("#open-settings")
    assert fits() and page.run("document.getElementById('settings').getBoundingClientRect().width") <= 360
    page.press("Escape")
    page.click("#new")
    assert not is_shown("sidebar") and page.count(".examples button") == 4 and fits()
    page.click(".examples button")
    page.wait_for_answer()


def test_scrolling_does_not_fight_the_reader(page, stand_in):
    def lines(request):
        for i in range(400):
            yield content(f"line {i}\n\n")
            yield 0.01
        yield finish()
    stand_in.answer = lines
    page.say("Write")
    distance = "scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop"
    page.wait("document.getElementById('log').innerText.includes('line 60')")
    page.run("window.scroller = document.getElementById('scroller')")
    assert page.run(distance) < 48                        # it follows the text
    page.run("scroller.scrollBy(0, -300)")
    page.wait("!document.getElementById('latest').hidden")
    top = page.run("scroller.scrollTop")
    page.wait("document.getElementById('log').innerText.includes('line 150')")
    assert page.run("scroller.scrollTop") == top          # the reader stays where they are
    page.click("#latest")
    page.wait("document.getElementById('log').innerText.includes('line 200')")
    assert page.run(distance) < 48
    page.press("Escape")


def test_asks_nobody_else(page):
    """Nothing in the file is loaded from elsewhere."""
    loaded = page.run("performance.getEntriesByType('resource').map(({name}) => name)")
    assert [name for name in loaded if not name.startswith(page.run("location.origin"))] == []
    text = PAGE_PATH.read_text()
    assert "innerHTML" not in text and "eval(" not in text and len(re.findall("<(?:style|script)", text)) == 2


def test_real_server(browser, tmp_path):
    """Words of a model that knows nothing, but through the real policy, limits, errors and stream."""
    save_toy(tmp_path)
    server = ServerProcess(tmp_path, "--api-key", "secret")
    try:
        browser.open(server.url)
        browser.run("localStorage.clear()")
        browser.open(server.url)
        browser.problems.clear()
        assert "API key" in browser.text("#notice")
        browser.run("settings.key = 'secret'; settings.max_tokens = 200; greet()")
        browser.wait("document.getElementById('model').innerText.includes('toy')")
        assert browser.count("#notice[hidden]") == 1
        for i in range(4):  # the model's context is 256 tokens, so the first turns don't fit any more
            browser.say(f"Question {i}")
            browser.wait_for_count(".assistant", i + 1)
            browser.wait_for_answer()
            assert browser.count(".error") == 0
        assert "no longer sees the oldest" in browser.text(".assistant:last-child .extras")
        browser.click(".assistant:last-child .actions button", "Regenerate")
        browser.press("Escape")
        browser.wait_for_answer()
        server.wait_for(lambda stats: stats["running"] == 0)
        browser.say("x" * 9000)
        browser.wait("document.querySelector('.error span')?.innerText.includes('8000 are the most')")
        assert not browser.problems
    finally:
        server.stop()
