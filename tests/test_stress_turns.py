"""`edgert stress --turns`: the order of the rounds, medians, ratios within a round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgert.cli.stress_cases import with_references
from edgert.cli.stress_turns import TURNS_HEADER, by_turns, in_turns, turns_rows
from tests.command import edgert
from tests.test_stress_command import case, run

GGUF, PACK = case(model=Path("m.gguf")), case(model=Path("m.edgert"))


def timed(which: object, speed: float, load: float = 1.0, **changes: object) -> object:
    stats = {"stats": run().stats | {"decode_tok_s": speed}}
    return run(case=which, found=stats | {"load_seconds": load}, **changes)


def test_every_second_round_is_made_backwards() -> None:
    assert in_turns([GGUF, PACK], 3) == [GGUF, PACK, PACK, GGUF, GGUF, PACK]
    assert in_turns([GGUF, PACK], 1) == [GGUF, PACK]


def test_what_runs_are_compared_with_is_made_as_often_as_it_was_asked_for() -> None:
    whole = case("100%")
    assert with_references(in_turns([GGUF, whole], 2)) == [whole, GGUF, whole, GGUF]


def test_medians_and_ratios_of_one_round_each() -> None:
    """The machine is twice as fast in the second round: the ratio is that of each round."""
    runs = [timed(GGUF, 2.0, 4.0), timed(PACK, 3.0, 2.0), timed(PACK, 6.0, 1.0),
            timed(GGUF, 4.0, 2.0), timed(GGUF, 2.0, 4.0), timed(PACK, 3.0, 2.0)]  # fmt: skip
    first, second = by_turns([GGUF, PACK], runs)
    assert (first["runs"], first["decode_tok_s"], second["decode_tok_s"]) == (3, 2.0, 3.0)
    assert first["ratios"]["decode_tok_s"] == 1
    assert second["ratios"]["decode_tok_s"] == pytest.approx(1.5)
    assert second["ratios"]["load_seconds"] == pytest.approx(0.5)
    assert (second["decode_tok_s_least"], second["decode_tok_s_most"]) == (3.0, 6.0)
    rows = turns_rows([first, second])
    assert all(len(row) == len(TURNS_HEADER) for row in rows)
    assert rows[1][rows[0].index("4.00 s") + 1] == "0.50"


def test_a_run_that_failed_leaves_the_others_in_their_rounds() -> None:
    runs = [timed(GGUF, 2.0), timed(PACK, 9.0, exit_code=1), timed(PACK, 6.0), timed(GGUF, 4.0)]
    second = by_turns([GGUF, PACK], runs)[1]
    assert (second["runs"], second["ratios"]["decode_tok_s"]) == (1, pytest.approx(1.5))


def test_nothing_tried_says_nothing() -> None:
    assert by_turns([], [run()]) == []
    (none,) = by_turns([GGUF], [])
    assert turns_rows([none])[0][3:] == ["-"] * (len(TURNS_HEADER) - 3)


def test_the_command_prints_medians_of_both_budgets() -> None:
    done = edgert("stress", "--budgets", "60%,50%", "--turns", "2", "-n", "4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 5, "two rounds of two, and the run in memory"
    assert [one["runs"] for one in found["turns"]] == [2, 2]
    assert found["turns"][0]["ratios"]["decode_tok_s"] == 1
    assert len({h for one in found["turns"] for h in one["logits_hashes"]}) == 1
    assert all(one["load_seconds"] > 0 for one in found["turns"])
