"""The figure of the best batch over the horizon, on points whose best batch is known."""

import math

import pytest

from dev import show_dial
from nanochat.common import UserError
from nanochat.scaling import get_best_batch

EXPONENT = 0.7


def write_points(path, exponent=EXPONENT, horizons=(1e6, 4e6, 1.6e7)):
    """Losses of parabolas over log2 of the batch; a rate away from 1 costs, and a second seed is as much higher as the
    first is lower."""
    lines = [",".join(show_dial.COLUMNS)]
    for tokens in horizons:
        best = 19 + exponent * math.log2(tokens / show_dial.REFERENCE_TOKENS)
        for batch in range(round(best) - 2, round(best) + 3):
            for rate in (0.5, 1.0, 2.0):
                for seed in (42, 43):
                    loss = 2 + 0.01 * (batch - best) ** 2 + 0.1 * math.log2(rate) ** 2 + 0.05 * (seed - 42.5)
                    lines.append(f"2,{tokens:g},{2 ** batch},{rate},{seed},{loss:.6f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_best_batches_and_exponent_are_found(tmp_path, capsys):
    found = show_dial.main([str(write_points(tmp_path / "points.csv")), "--out", str(tmp_path)])
    at_small = 2 ** (19 + EXPONENT * math.log2(show_dial.SMALL_TOKENS / show_dial.REFERENCE_TOKENS))
    assert found["law"] == (pytest.approx(EXPONENT, abs=1e-3), pytest.approx(at_small, rel=1e-3))
    for (depth, tokens), best in found["best"].items():
        expected = 19 + EXPONENT * math.log2(tokens / show_dial.REFERENCE_TOKENS)
        assert depth == 2 and best == pytest.approx(expected, abs=0.01)
    assert (tmp_path / "dial.png").read_bytes()[:4] == b"\x89PNG"
    rule = get_best_batch(1e6, show_dial.REFERENCE_TOKENS)
    cost = 0.01 * (math.log2(rule) - found["best"][2, 1e6]) ** 2
    assert f"{rule:,.0f}" in capsys.readouterr().out and cost < 0.02


def test_a_cell_whose_best_is_at_the_edge_has_no_best_batch(tmp_path, capsys):
    path = tmp_path / "points.csv"
    path.write_text("depth,tokens,batch,rate,seed,bpb\n4,1e6,2048,1,42,1.9\n4,1e6,4096,1,42,2.0\n4,1e6,8192,1,42,2.1\n")
    found = show_dial.main([str(path), "--out", str(tmp_path)])
    assert found["law"] is None and found["best"] == {(4, 1e6): None}
    assert "not known for two horizons" in capsys.readouterr().out


def test_a_seed_that_one_batch_alone_has_moves_nothing(tmp_path, capsys):
    path = write_points(tmp_path / "points.csv", horizons=(1e6, 4e6))
    before = show_dial.main([str(path), "--out", str(tmp_path)])
    with open(path, "a", encoding="utf-8") as file:
        file.write("2,1e+06,4096,1.0,44,9\n")
    assert show_dial.main([str(path), "--out", str(tmp_path)]) == before
    path.write_text("depth,tokens,batch,rate,seed,bpb\n4,1e6,2048,1,42,1.9\n4,1e6,4096,1,43,2.0\n")
    with pytest.raises(UserError, match="depth 4, 1e[+]06 tokens have no seed in common"):
        show_dial.main([str(path)])


def test_the_measured_points_are_near_the_rule(tmp_path):
    """Within a factor of 1.6 of the batch, so that the constant can't move away from its evidence unseen."""
    found = show_dial.main(["--out", str(tmp_path)])
    best = {cell: value for cell, value in found["best"].items() if value is not None}
    assert len(best) >= 3
    for (depth, tokens), batch in best.items():
        rule = math.log2(get_best_batch(tokens, show_dial.REFERENCE_TOKENS))
        assert abs(rule - batch) < math.log2(1.6), (depth, tokens)


@pytest.mark.parametrize("text", [
    "", "depth,tokens\n4,1\n", "depth,tokens,batch,rate,seed,bpb\n4,x,1,1,1,1\n", "depth,tokens,batch,rate,seed,bpb\n",
    "depth,tokens,batch,rate,seed,bpb\n4,1,0,1,1,1\n"])
def test_what_is_no_table_of_points_is_refused(text, tmp_path):
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(UserError, match="points.csv must"):
        show_dial.main([str(tmp_path / "points.csv")])
    with pytest.raises(UserError, match="must be a CSV file"):
        show_dial.main([str(tmp_path / "none.csv")])
