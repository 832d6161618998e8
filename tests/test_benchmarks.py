"""The benchmarks of dev/ run: their figures are for a person to read, so only their form is checked."""

import json

import pytest
import torch

from dev import bench_checkpoint, bench_kernels, bench_loader, bench_server, bench_split, bench_step
from dev.timing import print_table, time_in_turn
from nanochat.tokenizer import SPLIT_PATTERNS


@pytest.mark.parametrize("module", [bench_checkpoint, bench_kernels, bench_loader, bench_server, bench_split,
                                    bench_step])
def test_help(module, capsys):
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    assert ended.value.code == 0 and "python -m dev." in capsys.readouterr().out


def test_whole_step(capsys):
    argv = ["--depth", "1", "--vocab-size", "128", "--max-seq-len", "32", "--rows", "2", "--rounds", "2"]
    (row,) = bench_step.main([*argv, "--compile", "off", "--dtype", "float32", "--device-type", "cpu"])["rows"]
    assert row["step ms"] > 0 and row["tokens/s"] == pytest.approx(64 / row["step ms"] * 1e3)
    assert "of matmul %" in capsys.readouterr().out


def test_checkpoint(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    argv = ["--depth", "1", "--vocab-size", "128", "--max-seq-len", "32", "--rows", "2", "--steps", "1", "--compile",
            "off", "--dtype", "float32", "--device-type", "cpu", "--json", str(tmp_path / "table.json")]
    rows = bench_checkpoint.main(argv)["rows"]
    assert [row["save"] for row in rows] == ["first", "later"] and all(row["load s"] > 0 for row in rows)
    assert json.loads((tmp_path / "table.json").read_text()) == rows
    assert list(tmp_path.iterdir()) == [tmp_path / "table.json"]    # no checkpoint is left behind


def test_split_patterns(capsys):
    rows = bench_split.main(["--vocab-size", "300", "--num-chars", "2000", "--rounds", "1"])["rows"]
    assert [row["pattern"] for row in rows] == list(SPLIT_PATTERNS) and all(row["Hindi"] > 0.3 for row in rows)
    assert "Hebrew with points" in capsys.readouterr().out


def test_table(capsys):
    print_table(["name", "ms"], [["a", 1.5], ["long", 1234.0]])
    print_table([], [["a", "b"]])
    assert capsys.readouterr().out == "name  ms\na         1.50\nlong  1,234.00\na  b\n"


def test_variants_take_turns():
    order = []
    ms = time_in_turn({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, torch.device("cpu"), rounds=3)
    assert order == ["a", "b"] * 5 and set(ms) == {"a", "b"}  # two rounds of warm-up
