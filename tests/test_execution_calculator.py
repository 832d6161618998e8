"""The calculator: what it computes, and everything it must refuse in no time."""

import ast
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest

from nanochat.execution import MAX_CHARS, MAX_MAGNITUDE, calculate


@pytest.mark.parametrize(("expression", "expected"), [
    ("2+3", "5"),
    (" 12 / 4\n", "3"),                        # a whole quotient has no decimal point
    ("10/4", "2.5"),
    ("2/3", "0.666666666667"),
    ("0.1 + 0.2", "0.3"),
    ("1e-9*1", "1e-09"),
    ("7//2", "3"),
    ("-7 // 2", "-4"),
    ("-7 % 3", "2"),
    ("-(2 + 3) * -+4", "20"),
    ("0 * -1.5", "0"),                         # not -0
    ("1,234 * 2", "2468"),
    ("1,234,567.5 + 1", "1234568.5"),
    ("999999999 * 999999999", "999999998000000001"),
    ("'strawberry'.count('r')", "3"),
    ('"mississippi".count("ss") + 1', "3"),
    ("'1,234,567'.count(',')", "2"),           # commas in a string stay
    ("('café').count('é')", "1"),
    ("''.count('')", "1"),
    ("+".join("1" * 100), "100"),
    ("(" * 40 + "1" + ")" * 40, "1"),
])
def test_values(expression, expected):
    assert calculate(expression) == expected


@pytest.mark.parametrize("expression", [
    "", " ", "2 +", "(2", "1 2", "007", "1,23", "1,2345", "$5", "5%", "two", "x = 1", "1\n2",
    # numbers out of bounds
    "1/0", "1//0", "1%0", "0.0/0", "1e400", "-1e400", "1e400 - 1e400", "nan", "inf", "float('nan')", 
    str(MAX_MAGNITUDE + 1), "*".join(["999999999"] * 3), "1e18 * 2", "9" * 200,
    # operators and literals that aren't listed
    "2**3", "9**9**9", "9**9**9**9", "2 ** -1", "1 << 9999999", "5 @ 5", "1 & 1", "~1", "not 1", "1 < 2", "1 and 2",
    "True", "True + 1", "None", "...", "1j", "1j * 1j", "b'a'", "f'{1}'", "[1]", "(1, 2)", "{1}", "{}", "1 if 1 else 2",
    "lambda: 1", "[x for x in (1,)]", "(y := 1)", "*1", "'a'", "'a' + 'b'", "'a' * 3", "'%d' % 5", "'a' * 10**9",
    "('a' * 999999999).count('a')", "('a' + 'a').count('a')",
    # names, attributes, calls
    "a", "__import__('os')", "__import__('os').system('true')", "open('/etc/passwd')", "exit()", "print(1)", "abs(-1)",
    "(1).real", "(1).__class__", "''.__class__", "''.join('a')", "'a'.upper()", "'a'.count", "'a'.count()",
    "'a'.count('a', 0)", "'a'.count(*['a'])", "'a'.count(x='a')", "'a'.count(1)", "(1).count('1')", "'a'.count('a')()",
    "'a'.count('a').real", "'{0.__class__}'.format(1)", "getattr('a', 'count')('a')",
    # text that surprises parsers
    "١+١", "２+２", "1\x00", "\x00", "'\\x61'.count('a')", "'\\d'.count('d')",
    "1 # + 1\n2", "\ud800", "'\ud800'.count('a')",
    # deep or long
    "(" * 100 + "1" + ")" * 100 + "+" + "(" * 20, "-" * 200 + "1", "-" * 129 + "1", "(" * 250, "[" * 250,
    "1" + "+1" * MAX_CHARS, "'" + "a" * MAX_CHARS + "'.count('a')", " " * MAX_CHARS + "1",
])
@pytest.mark.filterwarnings("error")
def test_refused(expression):
    start = time.perf_counter()
    assert calculate(expression) is None
    assert time.perf_counter() - start < 0.5


def test_result_is_short():
    # the longest that an integer and a float within the bounds can be
    for expression in (f"-{MAX_MAGNITUDE}", "-1/3e17", "-1e17/3"):
        assert len(calculate(expression)) <= 20


def test_threads_leave_warnings_as_they_were(monkeypatch):
    """Tasks are read in threads, and what Python hides of its warnings is the whole process's: interleaved, two calls
    would hide all of them for good."""
    parse, inside, most = ast.parse, [], []

    def parse_slowly(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        inside.pop()
        return parse(*args, **kwargs)
    monkeypatch.setattr(ast, "parse", parse_slowly)
    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(calculate, ["2 + 2"] * 40)) == {"4"}
    assert max(most) == 1 and warnings.filters == before
