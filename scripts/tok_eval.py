"""Compression by the tokenizer, per domain, against the vocabularies of GPT-2 and GPT-4.

python -m scripts.tok_eval
python -m scripts.tok_eval --name default --tables FOLDER     FOLDER holds gpt2_encoder.json, cl100k_base.tiktoken
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from nanochat.command_line import Parser, run_script
from nanochat.common import UserError, now, print0, write_json
from nanochat.report import write_section
from nanochat.shards import iter_documents, load_shards
from nanochat.tokenizer import RustBPETokenizer, get_tokenizer, get_tokenizer_dir

REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}

NEWS = """
The harbour town of Eastmere reopened its covered market on Saturday, four years after a storm tore away most of the \
roof. More than two thousand people queued along the quay before the doors were unlocked at eight, and by noon several \
bakers had sold everything they had brought. "We were told it couldn't be saved," said Ruth Adeyemi, who has kept a \
flower stall there since 1987. The council paid for roughly a third of the work; the rest, about £3.4 million, came \
from a regional fund and from small donations. Opponents of the plan had argued that the money belonged in schools and \
roads. The mayor, Daniel Price, called the criticism fair but said the building "earns its keep": it will house a \
library branch and a clinic on its upper floor from next spring.
"""

CODE = '''
class RingBuffer:
    """Keeps the last `capacity` readings of a sensor."""

    def __init__(self, capacity: int) -> None:
        if capacity <= 0:
            raise ValueError(f"capacity must be positive, got {capacity}")
        self._items = [0.0] * capacity
        self._next = 0
        self._count = 0

    def push(self, value: float) -> None:
        self._items[self._next] = value
        self._next = (self._next + 1) % len(self._items)
        self._count = min(self._count + 1, len(self._items))

    def mean(self) -> float:
        return sum(self._items[:self._count]) / max(self._count, 1)


for (let i = 0; i < rows.length; i++) {
    const { id, name, price } = rows[i];
    if (price !== null && price > limit) total += price * 1.19;  // with tax
}
'''

MATHS = r"""
Claim. For every integer $n \ge 1$ we have $\sum_{k=1}^{n} k^3 = \left(\frac{n(n+1)}{2}\right)^2$.
Proof. For $n = 1$ both sides are $1$. Assume that it holds for $n$. Then
\begin{align*}
\sum_{k=1}^{n+1} k^3 &= \frac{n^2 (n+1)^2}{4} + (n+1)^3 = \frac{(n+1)^2 \left(n^2 + 4n + 4\right)}{4} \\
                     &= \left(\frac{(n+1)(n+2)}{2}\right)^2,
\end{align*}
which is the claim for $n + 1$. As a check, $1 + 8 + 27 + 64 + 125 = 225 = 15^2$, and $37 \times 48 = 1776$, while
$3.14159 < 22/7 \approx 3.142857$ and $2^{20} = 1048576$.
"""

KOREAN = """
바닷가 작은 마을에 오래된 도서관이 하나 있었다. 겨울이면 손님이 거의 없었지만, 사서인 민정은 매일 아침 일곱 시에 \
문을 열고 난로에 불을 피웠다. 어느 눈 오는 날, 한 아이가 젖은 책 한 권을 품에 안고 들어왔다. \
"이 책을 고칠 수 있을까요?" 아이가 물었다. 민정은 웃으며 책장을 한 장씩 말리기 시작했고, \
저녁이 될 무렵에는 둘 다 그 이야기의 끝을 알게 되었다.
"""

HINDI = """
समुद्र के किनारे एक छोटे से गाँव में एक पुराना पुस्तकालय था। सर्दियों में वहाँ बहुत कम लोग आते थे, फिर भी मीरा हर सुबह सात बजे \
दरवाज़ा खोलती और अँगीठी जलाती थी। एक दिन बर्फ़ गिर रही थी, तभी एक बच्चा भीगी हुई किताब लेकर अंदर आया। \
"क्या यह किताब ठीक हो सकती है?" बच्चे ने पूछा। मीरा मुस्कुराई और एक-एक पन्ना सुखाने लगी, \
और शाम होते-होते दोनों को उस कहानी का अंत पता चल गया।
"""

THAI = """
ในหมู่บ้านเล็ก ๆ ริมทะเลมีห้องสมุดเก่าแก่อยู่แห่งหนึ่ง ฤดูหนาวแทบไม่มีคนมา แต่มินดาบรรณารักษ์ก็เปิดประตูตอนเจ็ดโมงเช้าทุกวัน\
และจุดไฟในเตาผิง วันหนึ่งที่ฝนตกหนัก เด็กคนหนึ่งเดินเข้ามาพร้อมหนังสือที่เปียกโชก "หนังสือเล่มนี้ซ่อมได้ไหมคะ" เด็กถาม \
มินดายิ้มแล้วเริ่มผึ่งหน้าหนังสือให้แห้งทีละหน้า พอตกเย็นทั้งสองก็รู้ตอนจบของเรื่องนั้น
"""

SCIENCE = """
Enzymes lower the activation energy of a reaction by binding its transition state more tightly than its substrate. \
In the Michaelis-Menten model the initial rate is v = Vmax[S] / (Km + [S]), where Km equals the substrate \
concentration at half the maximal rate. A competitive inhibitor raises the apparent Km but leaves Vmax unchanged, \
because enough substrate displaces it; a non-competitive one lowers Vmax. Measurements at 25 °C and pH 7.4 gave \
Km = 0.52 ± 0.03 mmol/L for the wild type and 1.9 mmol/L for the H57A mutant, whose catalytic triad lacks the \
histidine that acts as a general base. Mitochondria, chloroplasts and phosphorylated intermediates were removed by \
centrifugation beforehand.
"""

TEXTS = {"news": NEWS, "code": CODE, "maths": MATHS, "Korean": KOREAN, "Hindi": HINDI, "Thai": THAI, "science": SCIENCE}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    tables_dir = Path(tempfile.gettempdir()) / "data-gym-cache"     # where tiktoken keeps what it has downloaded
    parser = Parser(description=__doc__)
    parser.add_argument("--name", default="default", help="folder under <base dir>/tokenizer")
    parser.add_argument("--data", help="dataset by name or folder (default: what the tokenizer was trained on)")
    parser.add_argument("--max-chars", type=int, default=1_000_000, help="characters of train and of val")
    parser.add_argument("--tables", type=Path, default=tables_dir, help="folder of the reference tables")
    args = parser.parse_args(argv)
    if args.max_chars < 1:
        raise UserError(f"--max-chars {args.max_chars} leaves no text to measure; give at least 1")
    return args


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    start_time, directory = time.perf_counter(), get_tokenizer_dir(args.name)
    tokenizers = {"ours": get_tokenizer(args.name)}
    for label, table in REFERENCES.items():
        try:
            tokenizers[label] = RustBPETokenizer.from_pretrained(table, args.tables)
        except UserError as error:
            print0(f"not compared with {label}: {error}")
    texts = {domain: [text.strip()] for domain, text in TEXTS.items()} | \
        read_data(args.data or find_data_folder(directory), args.max_chars)
    results = {domain: measure(documents, tokenizers) for domain, documents in texts.items()}
    print0(format_table(results, tokenizers))
    result = {"tokenizer_hash": tokenizers["ours"].hash,
              "vocab_sizes": {label: tokenizer.get_vocab_size() for label, tokenizer in tokenizers.items()},
              "domains": results}
    write_json(directory / "tok_eval.json", result)
    report_compression(results, list(tokenizers), sys.argv if argv is None else argv, time.perf_counter() - start_time)
    print0(f"written to {directory / 'tok_eval.json'}")
    return result


def report_compression(results: dict, labels: list[str], argv: list[str], wall_sec: float) -> None:
    """Write the section of the report card."""
    tables = [{"title": f"{unit.capitalize()} per token", "columns": ["text", unit, *labels],
               "rows": [[domain, result[f"num_{short}"], *(round(result["tokenizers"][label][f"{short}_per_token"], 2)
                                                           for label in labels)] for domain, result in results.items()]}
              for unit, short in (("bytes", "bytes"), ("characters", "chars"))]
    write_section("tok_eval", {"title": "Tokenizer: compression", "created": now(), "argv": argv, "wall_sec": wall_sec,
                               "tables": tables})


def find_data_folder(directory: Path) -> str | None:
    """The folder of the tokenizer's training text by its training.json; None if it doesn't exist now."""
    try:
        folder = json.loads((directory / "training.json").read_text(encoding="utf-8"))["data_folder"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return folder if Path(folder).is_dir() else None


def read_data(name_or_folder: str | None, max_chars: int) -> dict[str, list[str]]:
    """The first documents of the training and the validation text; without data {} and a printed line."""
    if name_or_folder is None:
        print0("train and val are not measured: the text that it was trained on isn't there; name another with --data")
        return {}
    shards = load_shards(name_or_folder)
    return {"train": take_documents(shards.train, max_chars), "val": take_documents([shards.val], max_chars)}


def take_documents(paths: list[Path], max_chars: int) -> list[str]:
    """The first documents, `max_chars` characters in all; the last one is cut."""
    *documents, last = iter_documents(paths, max_chars)
    return [*documents, last[:max_chars - sum(map(len, documents))]]


def measure(documents: list[str], tokenizers: dict[str, RustBPETokenizer]) -> dict:
    """Size of the documents, and for each tokenizer its tokens, bytes per token and characters per token."""
    num_bytes, num_chars = sum(len(document.encode()) for document in documents), sum(map(len, documents))
    result = {"num_bytes": num_bytes, "num_chars": num_chars, "tokenizers": {}}
    for label, tokenizer in tokenizers.items():
        num_tokens = sum(map(len, tokenizer.encode(documents, num_threads=1)))
        result["tokenizers"][label] = {"num_tokens": num_tokens, "bytes_per_token": num_bytes / num_tokens,
                                       "chars_per_token": num_chars / num_tokens}
    return result


def format_table(results: dict, tokenizers: dict[str, RustBPETokenizer]) -> str:
    """One line per domain, one group of columns per tokenizer; characters too, of which scripts take 1 to 4 bytes."""
    references = [label for label in tokenizers if label != "ours"]
    sizes = [f"{label}: {tokenizer.get_vocab_size():,} tokens" for label, tokenizer in tokenizers.items()]
    header = f"{'':8} {'bytes':>10} {'chars':>10} | {'ours':>9} {'bytes/tok':>9} {'chars/tok':>9}"
    header += "".join(f" | {label:>9} {'bytes/tok':>9} {'ours %':>7}" for label in references)
    lines = ["   ".join(sizes) + "   (ours %: tokens that ours needs more or fewer)", header, "-" * len(header)]
    for domain, result in results.items():
        ours = result["tokenizers"]["ours"]
        line = f"{domain:8} {result['num_bytes']:>10,} {result['num_chars']:>10,} | {ours['num_tokens']:>9,} "
        line += f"{ours['bytes_per_token']:>9.2f} {ours['chars_per_token']:>9.2f}"
        for label in references:
            theirs = result["tokenizers"][label]
            extra_pct = 100 * (ours["num_tokens"] / theirs["num_tokens"] - 1)
            line += f" | {theirs['num_tokens']:>9,} {theirs['bytes_per_token']:>9.2f} {extra_pct:>+7.1f}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main)
