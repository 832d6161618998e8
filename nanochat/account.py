"""The account of a person's data: what was read, what was left out and why. It is printed, and kept in the manifest."""

import os
from dataclasses import dataclass, field

UNEXPECTED_FRAC = 0.05    # of the files, bytes, documents or characters: more left out is a warning of its own
MAX_NAMES = 1000          # of files kept for each reason; all are counted
MAX_PRINTED_NAMES = 20


def printable(path: str | os.PathLike) -> str:
    """A path as one line of UTF-8 in any locale: bytes that aren't UTF-8, and control characters, as escapes."""
    return escape(os.fsencode(path).decode("utf-8", "backslashreplace"))


def escape(text: str) -> str:
    """Text as one line, with escapes for control characters and for what UTF-8 can't hold."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


@dataclass
class Account:
    """Every file is read, left out or skipped; every document of the files read is kept or left out.

    A document without text counts as one, and a long text as several. The characters of files that were left out are
    unknown; their bytes stand for them.
    """
    files:      dict[str, int] = field(default_factory=lambda: {"read": 0, "left out": 0, "skipped": 0})
    bytes:      dict[str, int] = field(default_factory=lambda: {"read": 0, "left out": 0})
    documents:  dict[str, int] = field(default_factory=lambda: {"kept": 0})    # and for each reason those left out
    characters: dict[str, int] = field(default_factory=lambda: {"kept": 0})
    formats:    dict[str, int] = field(default_factory=dict)                   # files read, by the end of their names
    reasons:    dict[str, dict] = field(default_factory=dict)    # {reason: {"outcome", "files": number, "names"}}

    def add_file(self, suffix: str, num_bytes: int) -> None:
        """Count a file that was read to its end."""
        self.files["read"] += 1
        self.bytes["read"] += num_bytes
        self.formats[suffix] = self.formats.get(suffix, 0) + 1

    def leave_out(self, name: str, reason: str, num_bytes: int = 0, outcome: str = "left out") -> None:
        """Count a file that was left out, or a folder that can't be looked into.

        outcome: "skipped" where a person expects it, as for hidden files; that never warns
        """
        self.files[outcome] += 1
        if outcome == "left out":
            self.bytes[outcome] += num_bytes
        entry = self.reasons.setdefault(reason, {"outcome": outcome, "files": 0, "names": []})
        entry["files"] += 1
        entry["names"] += [name] if len(entry["names"]) < MAX_NAMES else []

    def count(self, outcome: str, num_chars: int = 0, num_docs: int = 1) -> None:
        """Count documents of a file that is read: "kept", or why they were left out."""
        self.documents[outcome] = self.documents.get(outcome, 0) + num_docs
        self.characters[outcome] = self.characters.get(outcome, 0) + num_chars

    def describe(self) -> list[str]:
        """Lines for a person; the warnings come last."""
        formats = ", ".join(f"{number:,} {suffix}" for suffix, number in sorted(self.formats.items()))
        num_files = self.files["read"] + self.files["left out"]
        lines = [f"read {self.files['read']:,} of {num_files:,} files ({formats or 'none'})", *self.describe_files()]
        why = [f"{number:,} {reason}" for reason, number in self.documents.items() if reason != "kept" and number]
        num_docs, kept = sum(self.documents.values()), self.documents["kept"]
        lines.append(f"left out {num_docs - kept:,} of {num_docs:,} documents" + (f": {', '.join(why)}" if why else ""))
        lines.append(f"kept {kept:,} documents of {self.characters['kept']:,} characters")
        return lines + self.get_warnings()

    def describe_files(self) -> list[str]:
        """A line for each reason, with the files' names."""
        lines = []
        for reason, entry in self.reasons.items():
            names = entry["names"][:MAX_PRINTED_NAMES]
            more = f", and {entry['files'] - len(names):,} more" if entry["files"] > len(names) else ""
            lines.append(f"{entry['outcome']} {', '.join(names)}{more}: {reason}")
        return lines

    def get_warnings(self) -> list[str]:
        """A sentence for each share left out that a person would not expect."""
        warnings = []
        for unit, counts in (("files", self.files), ("bytes", self.bytes), ("documents", self.documents),
                             ("characters", self.characters)):
            counts = {outcome: number for outcome, number in counts.items() if outcome != "skipped"}
            total = sum(counts.values())
            left_out = total - counts.get("read", 0) - counts.get("kept", 0)
            if left_out > UNEXPECTED_FRAC * total:
                warnings.append(f"WARNING: {100 * left_out / total:.3g}% of the {unit} were left out "
                                f"({left_out:,} of {total:,})")
        return warnings
