"""The results of the GPU checks on disk, whole after each check, and which options win by them."""

import json
import time
from dataclasses import asdict
from pathlib import Path

from dev.gpu_setup import STATUSES, Check
from dev.timing import print_table
from nanochat.common import write_json

MIN_GAIN = 0.02    # of the time: an option that gains less than the noise of a measurement doesn't replace the default


class Record:
    """The file of results. Sections that ran before on the same machine, code and sizes stay in it, so that commands
    of some sections each end in one table of all."""

    def __init__(self, path: Path, header: dict, sections: list[str], earlier: list[Path]):
        self.path, self.header, self.start = path, json.loads(json.dumps(header)), time.perf_counter()
        self.checks: list[dict] = []     # of this command
        self.kept: list[dict] = []       # of others
        self.running: str | None = None
        for file in [*earlier, path]:
            results = read_results(file)
            if all(results.get(key) == self.header[key] for key in ("machine", "sizes")):
                again = {*sections, *(check["section"] for check in results["checks"])}
                self.kept = [check for check in self.kept if check["section"] not in again]
                self.kept += [check for check in results["checks"] if check["section"] not in sections]
        self.save()

    def begin(self, section: str) -> None:
        """A command that is killed leaves the name of the section in the file."""
        self.running = section
        self.save()

    def add(self, section: str, check: Check, sec: float) -> None:
        self.checks.append({"section": section, "sec": sec, **asdict(check)})
        self.save()

    def finish(self) -> dict:
        self.running = None
        return self.save()

    def save(self) -> dict:
        """Write all that is known; returns it. `passed` and `counts` are those of this command."""
        counts = {status: sum(check["status"] == status for check in self.checks) for status in STATUSES}
        checks = self.kept + self.checks
        results = {"passed": not self.running and not counts["FAIL"] and not counts["skipped"] and counts["ok"] > 0,
                   "running": self.running, "counts": counts, "wall_sec": time.perf_counter() - self.start,
                   **self.header, "checks": checks, "choices": list_choices(checks)}
        write_json(self.path, results)
        return results


def read_results(path: Path) -> dict:
    """What a command wrote; nothing where there is no such file, or another one."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return results if isinstance(results, dict) else {}


def list_choices(checks: list[dict]) -> list[dict]:
    """Of each choice the winner among the options that passed, and whether it is to replace today's default."""
    options: dict[str, dict[str, tuple[float, bool]]] = {}
    for check in checks:
        if check["candidate"] and check["status"] == "ok":
            candidate = check["candidate"]
            options.setdefault(candidate["choice"], {})[candidate["option"]] = (candidate["cost"],
                                                                               candidate["is_default"])
    choices = []
    for choice, costs in options.items():
        winner = min(costs, key=lambda option: costs[option][0])
        default = next((option for option, (_, is_default) in costs.items() if is_default), None)
        gain = None if default is None else 1 - costs[winner][0] / costs[default][0]
        is_new = default != winner and (gain is None or gain > MIN_GAIN)
        choices.append({"choice": choice, "costs": {option: cost for option, (cost, _) in costs.items()},
                        "default": default, "winner": winner, "gain_pct": gain and 100 * gain,
                        "proposed": winner if is_new else default})
    return choices


def print_results(results: dict, path: Path) -> None:
    """All checks, then the choices; the proposed defaults also go to a file."""
    print()
    print_table(["section", "check", "result", "s", "measured"],
                [[check["section"], check["name"], check["status"], check["sec"], check["detail"]]
                 for check in results["checks"]])
    if results["choices"]:
        print("\nWhat wins here (less is better; ms, or us a token):")
        print_table(["choice", "today", "", "winner", "", "gain %", "proposed"], [
            [line["choice"], line["default"] or "-", line["costs"].get(line["default"], "-"), line["winner"],
             line["costs"][line["winner"]], "-" if line["gain_pct"] is None else line["gain_pct"],
             "as it is" if line["proposed"] == line["default"] else line["proposed"]] for line in results["choices"]])
        write_json(path.with_name("gpu_check_defaults.json"), {
            "machine": results["machine"], "min_gain_pct": 100 * MIN_GAIN,
            "defaults": {line["choice"]: line["proposed"] for line in results["choices"]},
            "changed": [line["choice"] for line in results["choices"] if line["proposed"] != line["default"]]})
        print(f"proposed defaults in {path.with_name('gpu_check_defaults.json')}")
    counts = ", ".join(f"{num} {status}" for status, num in results["counts"].items())
    print(f"\n{counts} in {results['wall_sec']:.0f} s; figures in {path}"
          + (f"; cut off in section {results['running']}" if results["running"] else ""))
