"""A report card as values, and its two renderings: markdown, and one HTML page without other files or scripts.

Samples are text that a model wrote, labels may be anything: both renderings escape everything.
"""

import html
import math
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from nanochat.common import UserError, write_atomic

MAX_SAMPLE_CHARS, MAX_CELL_CHARS, MAX_CURVE_POINTS = 4000, 300, 400
BYTE_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))
COUNT_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"), (1, ""))


@dataclass
class Table:
    title:   str
    columns: list[str]
    rows:    list[list]
    folded:  bool = False    # closed in the page until it is clicked


@dataclass
class Curve:
    train:  list[tuple[int, float]]    # (step, value) of each step
    val:    list[tuple[int, float]]    # (step, value) of each evaluation
    labels: tuple[str, str] = ("train loss (nats per token)", "validation bits per byte")
    has_one_scale: bool = False        # both have the same unit


@dataclass
class Section:
    title:   str
    values:  dict = field(default_factory=dict)
    tables:  list[Table] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)    # {"prompt", "text"}: model-written, untrusted
    notes:   list[str] = field(default_factory=list)
    curve:   Curve | None = None
    code:    str = ""


@dataclass
class Card:
    subtitle: str
    tiles:    dict
    sections: list[Section]
    title:    str = "nanochat report card"


def format_value(label: str, value: object) -> str:
    """A value with the unit that ends its label, such as _bytes or _pct."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, dict):
        value = ", ".join(f"{key} {format_value('', item)}" for key, item in value.items())
    if not isinstance(value, int | float) or not math.isfinite(value):
        return cut(str(value), MAX_CELL_CHARS)
    if label.endswith("_bytes"):
        return scale_value(value, BYTE_UNITS, 4)
    if label.endswith("_dollars"):
        return f"${value:,.2f}"
    if label.endswith("_sec") and not label.endswith("_per_sec"):
        minutes, seconds = divmod(round(value), 60)
        if minutes >= 60:
            return f"{minutes // 60} h {minutes % 60} m"
        return f"{minutes} m {seconds} s" if minutes else f"{value:.3g} s"
    for suffix, scale, unit in (("_ms", 1, " ms"), ("_pct", 1, "%"), ("_frac", 100, "%")):
        if label.endswith(suffix):
            return f"{value * scale:,.4g}{unit}"
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.3e}"
    return f"{value:.4f}" if 0.01 <= abs(value) < 100 else f"{value:.4g}"


def format_label(label: object) -> str:
    """A label without its unit, which format_value writes after the value."""
    return re.sub(r"(?<!_per)_(bytes|sec|ms|pct|frac|dollars)$", "", str(label)).replace("_", " ")


def format_count(count: float) -> str:
    """1.2 K, 3.4 M, 5.6 B."""
    return scale_value(count, COUNT_UNITS, 3)


def format_command(argv: list) -> str:
    """A command line that works in any checkout: `python -m scripts.x` instead of a script's path."""
    words = [str(word) for word in argv]
    path = Path(words[0])
    if path.suffix == ".py":
        words[:1] = ["python", "-m", f"{path.parent.name}.{path.stem}"]
    return shlex.join(words)


def scale_value(value: float, units: tuple[tuple[float, str], ...], digits: int) -> str:
    """A value in the largest unit that it reaches, rounded to these digits, else in the smallest."""
    size, unit = next((pair for pair in units if float(f"{abs(value):.{digits}g}") >= pair[0]), units[-1])
    return f"{value / size:,.{digits}g} {unit}".rstrip()


def format_rows(columns: Sequence[str], rows: Iterable[Sequence]) -> list[list[str]]:
    """A table's cells as text; a table without columns is a list of (label, value)."""
    if not columns:
        return [[format_label(label), format_value(str(label), value)] for label, value in rows]
    return [[format_value(str(column), cell) for column, cell in zip(columns, row, strict=False)] for row in rows]


def cut(text: str, max_chars: int) -> str:
    """Text of bounded length, without control characters and lone surrogates, which terminals or files refuse."""
    text = text if len(text) <= max_chars else text[:max_chars] + " …"
    text = text.encode("utf-8", "replace").decode().replace("\r\n", "\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", "\N{REPLACEMENT CHARACTER}", text)


def write_card(card: Card, out: Path) -> tuple[Path, Path]:
    """Write the card to the folder `out` as report.md and report.html."""
    page = html_values(card.tiles, "tiles") + "".join(map(html_section, card.sections))
    write_files(out, {"report.md": render_markdown(card), "report.html": html_page(card.title, card.subtitle, page)})
    return out / "report.md", out / "report.html"


def write_files(out: Path, texts: dict[str, str]) -> None:
    """Write the texts, by their files' names, to the folder `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(out / name, text)
    except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"the report can't be written to {out} ({error.strerror}); "
                        "choose a folder with --out") from None


def render_markdown(card: Card) -> str:
    """The card as GitHub-flavoured markdown."""
    lines = [f"# {card.title}", "", escape_markdown(card.subtitle), ""]
    for section in (Section("", card.tiles), *card.sections):
        lines += [f"## {escape_markdown(section.title)}", ""] if section.title else []
        values = [Table("", [], list(section.values.items()))] if section.values else []
        for table in values + section.tables:
            lines += [f"### {escape_markdown(table.title)}", ""] if table.title else []
            head = [format_label(column) for column in table.columns] or ["", ""]
            rows = [head, *format_rows(table.columns, table.rows)]
            rows = [f"| {' | '.join(map(escape_markdown, row))} |" for row in rows]
            lines += [rows[0], "|" + " --- |" * len(head), *rows[1:], ""]
        for prompt, text in map(split_sample, section.samples):
            lines += [f"**Prompt:** {escape_markdown(prompt) or '(none)'}", "", *fence(text), ""]
        lines += [f"- {escape_markdown(cut(note, MAX_SAMPLE_CHARS))}" for note in section.notes]
        lines += ["", *(fence(section.code) if section.code else ()), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def escape_markdown(text: str) -> str:
    """Text in one line that renders as itself, in a table cell too."""
    return re.sub(r"([\\`*_\[\]<>|&~!#])", r"\\\1", " ".join(cut(text, MAX_SAMPLE_CHARS).split()))


def fence(text: str) -> list[str]:
    """A code block that no run of backticks in `text` can end."""
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return [f"{ticks}text", text, ticks]


def split_sample(sample: dict) -> tuple[str, str]:
    """(prompt, continuation); a prompt repeated at the start of the text is removed from it."""
    prompt, text = (cut(str(sample.get(key) or ""), MAX_SAMPLE_CHARS) for key in ("prompt", "text"))
    return prompt, text.removeprefix(prompt)


# ---------------------------------------------------------------------------------------------------------------------
# HTML

STYLE = """
:root { color-scheme: light dark; --page: #f6f5f2; --paper: #fff; --ink: #1d2129; --faint: #687080; --line: #e4e2dc;
  --train: #3566c9; --val: #c8541b; --tint: #f3f5fa }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --paper: #1c1f25; --ink: #e7e9ee; --faint: #98a0ae;
  --line: #30353e; --train: #7ba4f7; --val: #f0945c; --tint: #242932 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 2.5rem 1rem 4rem; max-width: 56rem; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums }
h1 { margin: 0; font-size: 1.9rem; letter-spacing: -.02em; line-height: 1.2 }
h2 { margin: 0 0 .9rem; font-size: 1.2rem }
h3 { margin: 1.5rem 0 .5rem; font-size: .95rem } header p, .note { color: var(--faint); margin: .35rem 0 0 }
section, .tiles div { background: var(--paper); border: 1px solid var(--line); border-radius: 14px }
section { margin-top: 1.1rem; padding: 1.3rem 1.4rem } .tiles div { padding: .8rem 1.1rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem; margin: 1.5rem 0 0 }
dt { color: var(--faint); font-size: .82rem } dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
.tiles dd { font-size: 1.5rem; letter-spacing: -.01em } .scroll { overflow-x: auto }
.values { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .7rem 1.2rem; margin: 0 }
svg { display: block; width: 100%; min-width: 34rem; margin-top: 1.1rem }
table { border-collapse: collapse; width: 100%; font-size: .9rem } tr:last-child td { border-bottom: 0 }
th, td { padding: .4rem .9rem .4rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--faint); font-weight: 500; white-space: nowrap }
td.number, th.number { text-align: right; white-space: nowrap }
summary { cursor: pointer; margin-top: .9rem; color: var(--faint); font-size: .92rem }
summary:hover { color: var(--ink) }
pre { margin: .8rem 0 0; padding: .8rem 1rem; background: var(--tint); border-radius: 10px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: .84rem/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
pre b { color: var(--train) } img { display: block; width: 100%; border-radius: 8px }
body:has(img) { max-width: 72rem }
svg text { fill: var(--faint); font-size: 12px } svg path { fill: none; stroke-width: 2.2; stroke-linejoin: round }
svg .grid { stroke: var(--line); stroke-width: 1 } svg .raw { opacity: .4; stroke-width: 1 }
svg .train { stroke: var(--train) } svg .val { stroke: var(--val) } svg circle { fill: var(--val) }
svg .trainText { fill: var(--train) } svg .valText { fill: var(--val) }
@media (max-width: 30rem) { body { padding-top: 1.2rem } section { padding: 1rem } .tiles dd { font-size: 1.25rem } }
"""


def html_page(title: str, subtitle: str, body: str) -> str:
    """A page that needs no other file; the policy in its head forbids the browser to load or run anything."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title><style>{STYLE}</style></head>
<body><header><h1>{title}</h1><p>{escape_html(subtitle)}</p></header>
{body}</body></html>
"""


def html_section(section: Section) -> str:
    """A heading and everything below it."""
    parts = [f"<h2>{escape_html(section.title)}</h2>"]
    parts += [html_values(section.values, "values")] if section.values else []
    parts += [f'<div class="scroll">{draw_curve(section.curve)}</div>'] if section.curve else []
    for table in section.tables:
        title, cells = escape_html(table.title), html_table(table)
        if table.folded:
            parts.append(f"<details><summary>{title}</summary>{cells}</details>")
        else:
            parts += [f"<h3>{title}</h3>", cells] if title else [cells]
    for prompt, text in map(split_sample, section.samples):
        parts.append(f"<pre><b>{escape_html(prompt)}</b>{escape_html(text)}</pre>")
    parts += [f'<p class="note">{escape_html(cut(note, MAX_SAMPLE_CHARS))}</p>' for note in section.notes]
    parts += [f"<pre>{escape_html(section.code)}</pre>"] if section.code else []
    return "<section>" + "\n".join(parts) + "</section>\n"


def html_values(values: dict, css_class: str) -> str:
    """A list of labels and values."""
    items = "".join(f"<div><dt>{escape_html(label)}</dt><dd>{escape_html(value)}</dd></div>"
                    for label, value in format_rows([], values.items()))
    return f'<dl class="{css_class}">{items}</dl>'


def html_table(table: Table) -> str:
    """A table that scrolls by itself on a narrow screen; columns of numbers are aligned right."""
    classes = [' class="number"' if all(isinstance(cell, int | float | None) for cell in cells[1:]) else ""
               for cells in zip_longest(table.columns, *table.rows)] if table.columns else ["", ""]

    def line(tag: str, cells: list[str]) -> str:
        return "<tr>" + "".join(f"<{tag}{css_class}>{escape_html(cell)}</{tag}>"
                                for css_class, cell in zip(classes, cells, strict=False)) + "</tr>"

    head = line("th", [format_label(column) for column in table.columns]) if table.columns else ""
    body = "".join(line("td", cells) for cells in format_rows(table.columns, table.rows))
    return f'<div class="scroll"><table>{head}{body}</table></div>'


def escape_html(text: object) -> str:
    return html.escape(cut(str(text), 4 * MAX_SAMPLE_CHARS))


# ---------------------------------------------------------------------------------------------------------------------
# The curve of loss, or of reward

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 820, 340, 52, 768, 40, 292    # of the drawing, and of the frame inside it


def draw_curve(curve: Curve) -> str:
    """An SVG of the train values (left scale) and the validation values (right scale) against steps."""
    last_step = max(1, *(step for step, _ in curve.train + curve.val))
    parts = [f'<text x="{place(tick, 0, last_step, LEFT, RIGHT)}" y="{BOTTOM + 20}" text-anchor="middle">'
             f"{tick:,.0f}</text>" for tick in make_ticks(0, last_step, 6) if tick <= last_step]
    parts.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}" text-anchor="middle">step</text>')
    for name, label, points, line in (("train", curve.labels[0], curve.train, smooth(curve.train)),
                                      ("val", curve.labels[1], curve.val, curve.val)):
        if points:
            values = [value for _, value in (smooth(curve.train) + curve.val if curve.has_one_scale else line)]
            parts += draw_series(name, label, points, line, last_step, make_ticks(min(values), max(values), 5))
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{curve.labels[0]}">{"".join(parts)}</svg>'


def draw_series(name: str, label: str, points: list, line: list, last_step: int, ticks: list[float]) -> list[str]:
    """One series, its scale and its legend: train as a line over its faint raw values, val as a line with dots.

    The scale spans `line`; raw values beyond it, the spikes, are drawn at the frame.
    """
    def locate(step: int, value: float) -> tuple[float, float]:
        return place(step, 0, last_step, LEFT, RIGHT), place(value, ticks[0], ticks[-1], BOTTOM, TOP)

    def trace(css_class: str, points: list) -> str:
        return f'<path class="{css_class}" d="M{"L".join("{} {}".format(*locate(*point)) for point in thin(points))}"/>'

    axis_x, anchor, legend_x = (LEFT - 8, "end", LEFT) if name == "train" else (RIGHT + 8, "start", LEFT + 225)
    heights = [locate(0, tick)[1] for tick in ticks]
    parts = [f'<text class="{name}Text" x="{axis_x}" y="{y + 4}" text-anchor="{anchor}">{tick:.10g}</text>'
             for tick, y in zip(ticks, heights, strict=True)]
    if name == "train":
        parts += [f'<path class="grid" d="M{LEFT} {y}H{RIGHT}"/>' for y in heights]
        parts += [trace("train raw", points), trace(name, line)]
    else:
        dot = '<circle cx="{}" cy="{}" r="3.5"><title>step {:,}: {:.4f}</title></circle>'
        parts += [trace(name, line), *(dot.format(*locate(*point), *point) for point in thin(points))]
    return parts + [f'<path class="{name}" d="M{legend_x} 14h22"/><text x="{legend_x + 29}" y="18">{label}</text>']


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """The pixel between `start` and `end` of a value in [low, high]; values outside are clamped."""
    return round(start + (end - start) * (min(max(value, low), high) - low) / (high - low), 1)


def make_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers that span [low, high]."""
    span = max(high - low, 1e-3 * max(1.0, abs(high)))
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span)
    first, last = math.floor(low / step), max(math.ceil(high / step), math.floor(low / step) + 1)
    return [round(i * step, 10) for i in range(first, last + 1)]


def smooth(points: list[tuple[int, float]], decay: float = 0.9) -> list[tuple[int, float]]:
    """An exponential moving average, debiased as Adam's moments are."""
    smoothed, average, weight = [], 0.0, 0.0
    for step, value in points:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append((step, average / weight))
    return smoothed


def thin(items: list, max_items: int = MAX_CURVE_POINTS) -> list:
    """At most that many of the items, evenly spaced, the first and the last included."""
    if len(items) <= max_items:
        return items
    return [items[round(i * (len(items) - 1) / (max_items - 1))] for i in range(max_items)]
