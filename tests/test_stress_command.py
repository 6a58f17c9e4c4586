"""`edgert stress`: what it tries, how it judges, what it prints and leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import edgert as library
from edgert.cli.disk_rate import slope
from edgert.cli.options import parse_budget
from edgert.cli.stress_baseline import Comparison, Side, baseline_rows, ratio_line
from edgert.cli.stress_cases import Case, Sweep, all_cases, choose, with_references
from edgert.cli.stress_document import Document, Part, write_document
from edgert.cli.stress_faults import FAULTS, Faults
from edgert.cli.stress_plot import Picture, svg
from edgert.cli.stress_report import GROWTH_BYTES, problems, promises, run_rows, verdict
from edgert.cli.stress_runs import Run
from tests.command import argv, edgert, environment, inside
from tests.test_stress import groups_of, orphans

MIB = 2**20
STATS = {
    "decode_tok_s": 2.0, "prefill_tok_s": 9.0, "read_bytes_per_s": 0.9e9, "stall_share": 0.5,
    "read_bytes_per_token": 450e6, "resident_bytes": 50 * MIB, "predicted_tok_s": 1.5,
    "generated_tokens": 21, "decode_passes": 20, "disk_busy_share": 0.8,
}  # fmt: skip
FOUND = {
    "tokens": [1, 2], "logits_hash": "abcdef0123", "streamed_bytes": 400 * 10**6, "experts": False,
    "first_pass_bytes": 10**9, "first_token_seconds": 3.0, "stats": STATS,
}  # fmt: skip


def case(asked: str = "50%", **changes: Any) -> Case:
    first = Case(Path("m.gguf"), asked, 100 * MIB, False, asked == "100%", 512, 4, 2, "f16", 8)
    return dataclasses.replace(first, **changes)


def run(asked: str = "50%", found: dict[str, Any] | None = None, **changes: Any) -> Run:
    """A run that kept every promise but those about speed."""
    one = Run(case(asked), "cgroup v2", 0, 90 * MIB, device_bytes_per_s=1e9)
    one.found = FOUND | (found or {})
    for name, value in changes.items():
        setattr(one, name, value)
    return one


# ----------------------------------------------------------------------------- the judge


def test_a_kept_promise_has_no_problems() -> None:
    runs = [run("100%"), run()]
    assert problems(runs) == []
    assert verdict(runs, [], 2) == "kept: 2 of 2 runs within budget, all outputs equal"


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (run(peak_bytes=100 * MIB), "the peak of 100.0 MiB reached the budget of 100.0 MiB"),
        (run(exit_code=-9, message="killed"), "exit -9, killed"),
        (run(exit_code=1), "exit 1"),
        (run(exit_code=None, message="late"), "no exit, late"),
        (run(found={"tokens": [1, 3]}), "other tokens than with 100%"),
        (run(found={"logits_hash": "cd"}), "other logits than with 100%"),
        (run(found={"others_equal": False}), "the engines of one process disagree"),
        (
            run(found={"rss": [(i, i * GROWTH_BYTES) for i in range(10)]}),
            "the resident size grew by 64.0 MiB",
        ),
        (
            run(found={"live": [{"budget_bytes": 9, "resident_bytes": 10, "seconds": 1.0}]}),
            "10 B held after a change to 9 B",
        ),
    ],
)
def test_a_broken_promise_is_named(bad: Run, words: str) -> None:
    found = problems([run("100%"), bad])
    assert any(words in line and line.startswith("m 50% c512 p4 t2: ") for line in found), found
    assert verdict([run("100%"), bad], found, 3).startswith("broken: ")
    assert verdict([run("100%"), bad], found, 3).endswith("(interrupted: 2 of 3 runs)")


def test_a_failing_disk_may_end_a_run_but_only_with_its_error() -> None:
    error = {"error": {"kind": "StorageError", "text": "read failed", "need_bytes": 0}}
    broken = run(exit_code=1, case=case(fault="eio"), found=error)
    assert problems([run("100%"), broken]) == []
    assert "1 with the error of a failing disk" in verdict([broken], [], 1)
    assert problems([run("100%"), run(exit_code=1, found=error)]), "no fault, no excuse"
    other = {"error": {"kind": "InputError", "text": "?", "need_bytes": 0}}
    assert problems([run("100%"), run(exit_code=2, case=case(fault="eio"), found=other)])
    assert problems([run("100%"), run(exit_code=-11, case=case(fault="eio"), found={})])
    unmet = run(case=case(fault="slow"), found={"faults": {"reads": 0, "done": 0}})
    assert "no read went through the faulty disk" in problems([run("100%"), unmet])[0]


def test_sampling_is_said_in_the_verdict() -> None:
    runs = [run("100%", judged_by="sampled RSS")]
    assert verdict(runs, [], 1).startswith("kept (memory sampled, not limited): 1 of 1")


def test_the_figures_of_promises() -> None:
    one = run()
    assert (one.read_share, one.roof_share) == (0.9, pytest.approx(2.0 * 0.4e9 / 1e9))
    assert one.prediction == pytest.approx(1.5 / 2.0 - 1)
    assert one.first_token == (3.0, pytest.approx(1.1 + 1))
    kept = {p.what: (p.kept, p.worst) for p in promises([one])}
    assert kept["peak / budget"] == (True, 0.9)
    assert kept["read rate / device, waiting for it"] == (False, pytest.approx(0.9))
    assert kept["predicted tok/s, error"] == (False, pytest.approx(25))
    assert not kept["first token / bound"][0] and "resident / budget, from 2 GiB" not in kept
    missing = run(found={"experts": True, "streamed_bytes": 0})  # only experts are read
    assert any("of experts" in p.what for p in promises([missing])) and missing.read_share == 0.9
    assert len(run_rows([one])[0]) == len(run_rows([run(found={}, exit_code=1)])[0])


def test_speed_is_not_judged_where_it_says_nothing() -> None:
    resident = run(found={"streamed_bytes": 0})
    for one in (run(case=case(fault="slow")), run(case=case(engines=2)), resident):
        assert one.read_share is one.roof_share is one.first_token is one.prediction is None


def test_runs_that_guess_are_judged_by_themselves() -> None:
    """Not as plain ones are; by what is promised of drafting, where the model drafted."""
    own = {"drafter": "self", "drafted_tokens": 16, "accepted_tokens": 12}
    more = {"drafted_tokens": 16, "accepted_tokens": 12, "decode_passes": 5, "drafts": [own]}
    found = {"stats": STATS | more | {"decode_tok_s": 6.0}, "first_pass_bytes": 160 * MIB}
    greedy = run(found=found, case=case(speculate=True))
    assert greedy.roof_share == pytest.approx(2.4) and greedy.tokens_per_pass == 4.0
    assert greedy.prediction is None and greedy.drafts_itself
    kept = {p.what: (p.kept, p.worst) for p in promises([greedy])}
    assert "decode / plain roof, waiting for it" not in kept
    assert kept["drafting / plain roof, greedy, from 60 %"] == (False, pytest.approx(2.4))
    assert kept["disk busy, drafting"] == (True, pytest.approx(0.9)), "by its rate"
    (row,) = run_rows([greedy])
    assert "12 of 16" in row and "4.0" in row and "0.80" in row and "guessing" in row[0]
    warm = run(found=found, case=case(speculate=True, temperature=0.8))
    small = run(found=found | {"first_pass_bytes": 200 * MIB}, case=case(speculate=True))
    (rest,) = [p for p in promises([warm, small]) if p.what == "drafting / plain roof, else"]
    assert len(rest.values) == 2 and not rest.kept
    looked_up = found["stats"] | {"drafts": [own | {"drafter": "lookup"}]}
    other = run(found=found | {"stats": looked_up}, case=case(speculate=True))
    assert not any("drafting" in p.what for p in promises([other]))


# ----------------------------------------------------------------------------- the cases


def sweep(path: Path, **changes: Any) -> Sweep:
    budgets = tuple(parse_budget(text) for text in ("1GiB", "1%"))
    return dataclasses.replace(
        Sweep((path,), budgets, (256, 128), (4, 200), (1, 2), ("f16",)), **changes
    )


def test_all_cases_are_the_product_of_what_fits(tiny_gguf: Path) -> None:
    cases = all_cases(sweep(tiny_gguf))
    assert len(cases) == 2 * 2 * (1 + 2), "200 tokens do not fit a context of 128"
    assert {c.raised for c in cases} == {False, True}
    assert choose(cases, 5) == choose(cases, 5) and len(set(choose(cases, 5))) == 5
    drawn = choose(cases, 27)
    assert len(drawn) == 27 and {drawn.count(c) for c in cases} == {2, 3}


def test_every_text_begins_with_a_resident_run(tiny_gguf: Path) -> None:
    cases = [c for c in all_cases(sweep(tiny_gguf)) if not c.resident]
    planned = with_references(cases)
    first: dict[Any, Case] = {}
    for one in planned:
        first.setdefault(one.text, one)
    assert len(planned) == len(cases) + len(first)
    assert all(c.resident and c.plain for c in first.values())
    whole = all_cases(sweep(tiny_gguf))
    assert sorted(map(hash, with_references(whole))) == sorted(map(hash, whole)), "none is added"


def test_runs_that_guess_are_compared_with_one_that_does_not(tiny_gguf: Path) -> None:
    cases = all_cases(
        sweep(tiny_gguf, contexts=(256,), prompts=(4,), threads=(1,), temperatures=(0.0, 0.8),
              seed=3, speculate=True)
    )  # fmt: skip
    assert len(cases) == 4 and all(c.speculate and c.seed == 3 for c in cases)
    planned = with_references(cases)
    assert [c.speculate for c in planned] == [False, True, True] * 2
    assert [c.temperature for c in planned] == [0.0] * 3 + [0.8] * 3
    assert len({c.text for c in planned}) == 2 and len({c.name for c in planned}) == 6


def test_live_budgets_and_engines(tiny_gguf: Path) -> None:
    (one,) = all_cases(
        sweep(tiny_gguf, budgets=(parse_budget("1%"),), contexts=(256,), prompts=(4,),
              threads=(1,), live=True, engines=3)
    )  # fmt: skip
    (alone,) = all_cases(
        sweep(tiny_gguf, budgets=(parse_budget("1%"),), contexts=(256,), prompts=(4,),
              threads=(1,))
    )  # fmt: skip
    assert one.live[0] == one.budget_bytes // 2 and one.budget_bytes == 3 * alone.budget_bytes
    assert not one.plain and alone.plain and one.text == alone.text


# ----------------------------------------------------------------------------- faults


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="needs positioned reads")
@pytest.mark.parametrize("kind", FAULTS)
def test_faults_are_under_every_read(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 64)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    faults = Faults(kind, 3)
    before = os.preadv
    faults.install()
    got: list[int] = []
    buffer = bytearray(16384)
    with path.open("rb") as file:
        try:
            for _ in range(16):
                try:
                    got.append(os.preadv(file.fileno(), [buffer], 0))
                except OSError as error:
                    assert error.errno == errno.EIO
                    got.append(-1)
        finally:
            faults.remove()
    assert os.preadv is before and faults.reads == 16
    expected = {
        "slow": ([16384] * 16, 16), "stutter": ([16384] * 16, 1),
        "eio": ([16384] * 2 + [-1] + [16384] * 13, 1),
        "eio-load": ([16384] * 2 + [-1] + [16384] * 13, 1),
        "short": (([8192, 8192, 16384] * 6)[:16], 11),
    }  # fmt: skip
    assert (got, faults.done) == expected[kind]
    assert len(slept) == {"slow": 16, "stutter": 1}.get(kind, 0)


@pytest.mark.parametrize("phase", [0.0, 0.03, 0.05, 0.09])
def test_a_rate_is_found_in_steps(phase: float) -> None:
    """Reads released every 0.1 s, looked at every 4 ms for 0.8 s."""
    times = [i * 0.004 for i in range(201)]
    assert slope([(t, (t + phase) // 0.1 * 0.1e9) for t in times]) == pytest.approx(1e9, rel=0.025)


# ----------------------------------------------------------------------------- documents


def test_reports_need_nothing_else(tmp_path: Path) -> None:
    picture = svg(Picture("<peak>", "x", "y", {"a & b": [(0.0, 0.0), (2.0, 1.0)]}, True))
    document = Document("kept: all", [Part("P", ["l < 1"], ["h"], [["1 < 2"]], [picture])])
    for name in ("r.md", "r.html"):
        write_document(tmp_path / name, document)
    text, page = ((tmp_path / name).read_text() for name in ("r.md", "r.html"))
    assert text.startswith("# edgert stress\n\n**kept: all**") and "| 1 < 2 |" in text
    assert "1 &lt; 2" in page and "&lt;peak&gt;" in page and "a &amp; b" in page
    assert page.count("<circle") == 2 and "http" not in page.replace("http://www.w3.org", "")


def test_the_baseline_gives_ratios() -> None:
    sides = {
        "edgert": Side(2.0, 30.0, 12.0, 90 * MIB, 1e9, "", [1, 2]),
        "llama.cpp": Side(0.25, 0.0, 4.0, 100 * MIB, 1e9, "it was ended", [1]),
    }
    one = Comparison(case(), sides)
    assert [*one.to_dict()["ratios"].values(), one.over] == [8, None, 3, False]
    line = "decode 8.00 to 8.00 times llama.cpp, first prefill 3.00 to 3.00 times llama.cpp"
    (row,), said = baseline_rows([one]), ratio_line([one])
    assert said == line and "1 of 1" in row and "llama.cpp: it was ended" in row


# ----------------------------------------------------------------------------- the command


def test_wrong_use(tiny_gguf: Path) -> None:
    for option, value, words in (
        ("--budgets", "much", "'much' is not a size"), ("--budgets", "200%", "share"),
        ("--budgets", "", "not a size"), ("--fault", "fire", "'fire' is none of slow"),
        ("--threads", "0.5", "not a whole number"), ("--disk-rate", "fast", "not a size"),
        ("--prompt-tokens", "0", "from 1 on"), ("-ctk", "q8", "none of f16, f32"),
        ("--prompt-tokens", "99999999", "no prompt fits"), ("--temp", "-1", "is not a number"),
        ("--temp", "hot", "is not a number"), ("--temp", "nan", "is not a number"),
    ):  # fmt: skip
        found = inside("stress", tiny_gguf, option, value)
        assert found.returncode == 2 and words in found.stderr, found.stderr
    assert inside("stress", "no.gguf").returncode == 3


@pytest.mark.timeout(600)
def test_the_command_compares_budgets(tiny_gguf: Path, tmp_path: Path) -> None:
    plot, report = tmp_path / "plot.png", tmp_path / "report.html"
    more = ["--plot", plot] if has_matplotlib() else []
    done = edgert(
        "stress", tiny_gguf, "--budgets", "1GiB,1%", "-n", 4, "--json", "--report", report, *more
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["problems"] == [] and found["verdict"].startswith("kept")
    first, second = found["runs"]
    assert (first["raised"], second["raised"]) == (False, True)
    assert first["tokens"] == second["tokens"] and len(first["tokens"]) == 4
    assert 0 < second["peak_bytes"] < second["budget_bytes"] < 2**30
    assert not more or plot.read_bytes().startswith(b"\x89PNG")
    assert found["verdict"] in report.read_text() and "[2/2]" in done.stderr
    assert orphans() == []


@pytest.mark.timeout(600)
def test_faults_budgets_on_the_move_and_company(tiny_gguf: Path) -> None:
    done = edgert(
        "stress", tiny_gguf, "--budgets", "1%", "-n", 8, "--fault", "short,eio", "--live",
        "--engines", 2, "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert [r["fault"] for r in found["runs"]] == ["", "short", "eio"]
    assert all(len(r["found"]["live"]) == 4 for r in found["runs"][1:])
    assert found["runs"][1]["found"]["faults"]["done"] > 0


LEAST_THAT_DRAFTS = """
import sys
import edgert
nbytes = edgert.plan_model(sys.argv[1], memory_budget=2**40, context_length=256).floor_bytes
while not edgert.plan_model(sys.argv[1], memory_budget=nbytes, context_length=256).can_draft:
    nbytes += 64 * 1024
print(nbytes)
"""


@pytest.mark.timeout(600)
def test_the_command_lets_a_model_draft_for_itself(tiny_gguf: Path, tmp_path: Path) -> None:
    """The same tokens as plainly, sampled or not; a slow disk makes drafting pay."""
    nested = tmp_path / "nested.edgert"
    library.pack_model(tiny_gguf, nested, nested="4+4")
    # In a process of its own: this one holds a compiler, those of stress do not.
    found = subprocess.run(
        [sys.executable, "-c", LEAST_THAT_DRAFTS, nested],
        env=environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    budget = int(found.stdout) + 256 * 1024
    done = edgert(
        "stress", nested, "--budgets", budget, "-n", 24, "-c", 256, "--speculate", "--temp",
        "0,0.8", "--seed", 1, "--fault", "slow", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [r["speculate"] for r in runs] == [False, True] * 2
    for plain, guessed in (runs[:2], runs[2:]):
        assert plain["tokens"] == guessed["tokens"] and not plain["stats"]["drafted_tokens"]
        assert any(d["drafter"] == "self" for d in guessed["stats"]["drafts"]), guessed["stats"]
    assert runs[0]["tokens"] != runs[2]["tokens"]
    wrong = inside("stress", nested, "--baseline", "llamacpp", "-n", 1)
    assert wrong.returncode == 2 and "name a GGUF with --baseline-model" in wrong.stderr


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


def test_plot_without_matplotlib_says_what_to_do(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = inside("stress", tiny_gguf, "--plot", tmp_path / "x.png")
    assert found.returncode == 2 and "pip install 'edgert[plot]'" in found.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals are a POSIX thing")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interruption_leaves_no_group_behind(number: signal.Signals, tiny_gguf: Path) -> None:
    child = subprocess.Popen(
        argv("stress", tiny_gguf, "--budgets", "1GiB", "-n", 4),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(PYTHONWARNINGS="ignore"),
    )
    end = time.monotonic() + 60
    while not groups_of(child.pid) and child.poll() is None and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(number)
    out, errors = child.communicate(timeout=60)
    assert groups_of(child.pid) == []
    assert child.returncode in (130, 0) and b"Traceback" not in errors
    assert child.returncode == 130 or b"no control group" in errors
    assert child.returncode == 0 or b"(interrupted: 0 of 1 runs)" in out
