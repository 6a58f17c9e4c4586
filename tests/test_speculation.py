"""Guessed tokens: drafts against their slow twin, what passes cost, and when guessing pays.

Clocks are made up. That guesses change nothing is in test_speculation_session.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise

import pytest

from edgert.prompt_lookup import LONGEST, PromptLookup, lookup_ref
from edgert.speculation import Acceptance, Drafter, PassCosts, Speculator


def first(drafter: Drafter, tokens: Sequence[int], most: int) -> tuple[list[int], list[int]]:
    """The first guesses of a drafter: tokens and kinds."""
    found = list(islice(drafter.guesses(tokens), most))
    return [token for token, _ in found], [kind for _, kind in found]


# ------------------------------------------------------------------------ prompt lookup


@pytest.mark.parametrize("alphabet", [1, 2, 3, 10, 600])
def test_lookup_is_its_twin(alphabet: int) -> None:
    rng = random.Random(alphabet)
    for length, most in [(0, 3), (1, 3), (2, 1), (3, 3), (40, 15), (150, 7), (150, 0)]:
        lookup, tokens = PromptLookup(walk=10**6), list[int]()
        for _ in range(length):
            tokens.append(rng.randrange(alphabet))
            assert first(lookup, tokens, most)[0] == lookup_ref(tokens, most), tokens


def test_lookup_takes_the_longest_match_then_the_latest() -> None:
    lookup = PromptLookup()
    found = first(lookup, [9, 1, 2, 3, 50, 2, 3, 60, 2, 3, 70, 1, 2, 3], 2)
    assert found == ([50, 2], [3, 4])
    assert first(PromptLookup(), [2, 3, 60, 2, 3, 70, 2, 3], 1) == ([70], [2])
    assert first(PromptLookup(), [1, 2, 3], 4) == ([], [])


def test_lookup_runs_into_its_own_copy() -> None:
    assert first(PromptLookup(), [5, 6, 7, 5, 6], 7)[0] == [7, 5, 6, 7, 5, 6, 7]
    assert first(PromptLookup(), [8] * 40, 3) == ([8] * 3, [LONGEST] * 3)


def test_lookup_looks_at_a_bounded_number_of_places_in_bounded_memory() -> None:
    """The latest two of many matches are not those with a long one."""
    long = [1, 2, 3, 4, 5, 6, 7]
    tokens = [*long, 40, 6, 7, 41, 6, 7, 42, *long]
    assert first(PromptLookup(walk=3), tokens, 1)[0] == [40]
    assert first(PromptLookup(walk=2), tokens, 1)[0] == [42]
    lookup, tokens = PromptLookup(), list(range(10_000)) * 2
    assert first(lookup, tokens, 2)[0] == [0, 1]
    held = [value for value in vars(lookup).values() if hasattr(value, "itemsize")]
    assert sum(len(a) * a.itemsize for a in held) == 4 * len(tokens) + 64 * 1024


# ------------------------------------------------------------------------ what passes cost


def test_a_pass_of_one_is_timed_first() -> None:
    costs = PassCosts(0.5)
    costs.add(3, 4.0)
    assert costs.table(4) == []
    costs.add(1, 2.0)
    assert costs.table(2) == [0, 2, 3]


def test_a_pass_over_a_prompt_tells_what_one_of_one_costs() -> None:
    """Where a disk sets the pace; and until one was timed."""
    costs = PassCosts(0.02)
    costs.expect(17, 9.0)  # too long to say something
    assert costs.table(1) == []
    costs.expect(11, 6.0)
    assert costs.table(2) == pytest.approx([0, 5, 5.1])
    costs.add(4, 8.0)
    costs.expect(1, 9.0)  # too late
    assert costs.table(4) == pytest.approx([0, 5, 6, 7, 8])
    costs.add(6, 8.2)
    assert costs.line(6)[1:5] == pytest.approx([7.7, 7.8, 7.9, 8]), "only what was timed"
    costs.add(1, 4.0)
    assert costs.table(1) == [0, 4]
    costs.expect(1, 6.0)
    costs.forget(0.02)
    assert costs.table(1) == []
    resident = PassCosts(0.1)
    resident.expect(1, 6.0)
    assert resident.table(1) == []


def test_costs_are_medians_and_others_follow_from_them() -> None:
    costs = PassCosts(0.5)
    for seconds in (2.0, 90.0, 2.0):
        costs.add(1, seconds)
    assert costs.table(3) == pytest.approx([0, 2, 3, 4])
    costs.add(3, 2.2)
    costs.add(5, 8.2)
    assert costs.table(6) == pytest.approx([0, 2, 2.1, 2.2, 5.2, 8.2, 9.75])
    costs.add(4, 99.0)  # a stutter: a shorter pass never costs more
    costs.add(1000, 50.0)  # a prefill
    assert costs.table(5) == pytest.approx([0, 2, 2.1, 2.2, 8.2, 8.2])


def test_costs_are_forgotten() -> None:
    costs = PassCosts(0.0)
    costs.add(1, 1.0)
    costs.add(2, 9.0)
    assert costs.table(2) == [0, 1, 9]
    for _ in range(200):
        costs.add(1, 1.0)
    assert costs.table(2) == [0, 1, 1]
    for _ in range(200):
        costs.add(3, 1.0)
    assert costs.table(2) == []


# ------------------------------------------------------------------------ when it pays


def simulate(text: Sequence[int], start: int, seconds: Callable[[int], float]) -> tuple[float, int]:
    """Says `text` from `start` on with guesses, on a clock of its own: seconds, tokens guessed."""
    costs = PassCosts(0.1)
    speculator = Speculator([PromptLookup()], costs, 15)
    at, clock, drafted = start, 0.0, 0
    while at < len(text):
        draft = speculator.draft(text[:at], len(text) - at - 1)
        right = 0
        while right < len(draft) and draft[right] == text[at + right]:
            right += 1
        clock += seconds(1 + len(draft))
        costs.add(1 + len(draft), seconds(1 + len(draft)))
        speculator.learn(text[at : at + right + 1])
        at, drafted = at + right + 1, drafted + len(draft)
    return clock, drafted


def streamed(n: int) -> float:
    return 1.0 + 0.01 * n


def in_memory(n: int) -> float:
    return 0.02 * max(1.0, 0.7 + 0.16 * n)


def serial(n: int) -> float:
    return 0.02 * n


COSTS = [streamed, in_memory, serial]


@pytest.mark.parametrize("seconds", COSTS)
@pytest.mark.parametrize("alphabet", [4, 30, 500])
def test_nothing_is_lost_where_nothing_repeats(
    seconds: Callable[[int], float], alphabet: int
) -> None:
    """Random tokens; of four letters, every second guess of one token is wrong by chance."""
    rng = random.Random(alphabet)
    text = [rng.randrange(alphabet) for _ in range(800)]
    clock, _ = simulate(text, 200, seconds)
    assert clock <= 1.03 * 600 * seconds(1)


def test_a_copy_is_as_fast_as_its_cost_allows() -> None:
    rng = random.Random(5)
    story = [rng.randrange(500) for _ in range(200)]
    text = story * 3
    plain = 400 * streamed(1)
    assert plain / simulate(text, 200, streamed)[0] > 8
    assert 400 * in_memory(1) / simulate(text, 200, in_memory)[0] > 2.5
    clock, drafted = simulate(text, 200, serial)
    assert drafted <= 60 and clock <= 1.03 * 400 * serial(1)


def test_guessing_begins_again_when_the_text_repeats_again() -> None:
    """While nothing is verified, what would have been right is still seen."""
    rng = random.Random(6)
    misleading = [x for _ in range(150) for x in (1, 2, 3, 4, 5, rng.randrange(10, 500))]
    story = [rng.randrange(500, 900) for _ in range(100)]
    text = [*misleading, *story, *story]
    first = len(misleading) + len(story)
    whole, _ = simulate(text, 100, in_memory)
    before, _ = simulate(text[:first], 100, in_memory)
    assert 100 * in_memory(1) / (whole - before) > 2


def test_passes_too_short_to_be_worth_a_guess() -> None:
    costs = PassCosts(0.1)
    speculator = Speculator([PromptLookup()], costs, 15)
    text = [1, 2, 3] * 30
    assert speculator.draft(text, 8) == []  # a pass of one is timed first
    costs.add(1, 1e-2)
    assert speculator.draft(text, 8)
    costs.add(1, 1e-4)
    assert speculator.draft(text, 8) == []


# ------------------------------------------------------------------------ drafters that take time


class Oracle:
    """Knows a text, but says something else at some places; each guess takes `seconds`."""

    name = "oracle"
    is_free = False
    can_go_on = False

    def __init__(self, text: Sequence[int], wrong: set[int], seconds: float) -> None:
        self.acceptance = Acceptance([0.5, 0.5])
        self.clock = 0.0
        self._text, self._wrong, self._seconds = text, wrong, seconds

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        for at in range(len(tokens), len(self._text)):
            self.clock += self._seconds
            yield self._text[at] + (at in self._wrong), int(at not in self._wrong)

    def ready(self, tokens: Sequence[int]) -> int:
        return 0

    def ahead(self, text: list[int], chance: float, most: int) -> None:
        raise AssertionError("it cannot go on")


def race(
    text: Sequence[int], drafter: Oracle, seconds: Callable[[int], float], *others: Drafter
) -> tuple[float, list[tuple[str, int]]]:
    """Seconds for all but the first 10 tokens, and who guessed how many for each pass."""
    costs = PassCosts(0.02)
    speculator = Speculator([*others, drafter], costs, 15, lambda: drafter.clock)
    at, drafts = 10, list[tuple[str, int]]()
    while at < len(text):
        draft = speculator.draft(text[:at], len(text) - at - 1)
        right = 0
        while right < len(draft) and draft[right] == text[at + right]:
            right += 1
        drafter.clock += seconds(1 + len(draft))
        costs.add(1 + len(draft), seconds(1 + len(draft)))
        speculator.learn(text[at : at + right + 1])
        at += right + 1
        drafts.append((speculator.drafter, len(draft)))
    return drafter.clock, drafts


def some_text(length: int) -> list[int]:
    rng = random.Random(3)
    return [rng.randrange(100_000) for _ in range(length)]


@pytest.mark.parametrize(("each", "gain"), [(0.01, 6.0), (0.04, 4.5), (0.1, 2.7)])
def test_a_drafter_that_takes_time_is_worth_it(each: float, gain: float) -> None:
    """One guess in ten is wrong. No fixed length would do much better."""
    text = some_text(1000)
    wrong = {i for i in range(1000) if random.Random(i).random() < 0.1}
    clock, drafts = race(text, Oracle(text, wrong, each), streamed)
    assert 990 * streamed(1) / clock > gain
    fixed = []
    for length in range(1, 16):
        at, passes = 10, 0
        while at < len(text):
            at += 1 + next((i for i in range(length) if at + i in wrong), length)
            passes += 1
        fixed.append(passes * (streamed(1 + length) + length * each))
    assert clock < 1.1 * min(fixed)
    alone = [name for name, _ in drafts[1:-1] if name != "oracle"]
    assert len(alone) <= len(drafts) // 100  # to time a pass of one again


class Onward(Oracle):
    """Goes on beside a pass: so many guesses are ready where all before them were right."""

    can_go_on = True
    beside = 10

    def __init__(self, text: Sequence[int], wrong: set[int], seconds: float) -> None:
        super().__init__(text, wrong, seconds)
        self.made = 0  # up to where

    def guesses(self, tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
        for at in range(len(tokens), len(self._text)):
            if at >= self.made:
                self.clock += self._seconds
            yield self._text[at] + (at in self._wrong), 0

    def ready(self, tokens: Sequence[int]) -> int:
        return max(self.made - len(tokens), 0)

    def ahead(self, text: list[int], chance: float, most: int) -> bool:  # type: ignore[override]
        return True

    def verified(self, start: int, drafted: int, goes_on: bool) -> int:
        """Behind `start`: where the text is then."""
        end = start + drafted
        wrong = [at for at in range(start, end + 1) if at in self._wrong]
        all_right = goes_on and not wrong
        self.made = end + self.beside if all_right else 0
        return min(wrong[0] if wrong else end, end) + 1


def test_what_is_guessed_beside_a_pass_is_not_put_at_risk() -> None:
    """A draft is shorter where the next ones would be ready; no fixed length does much better."""
    text = some_text(3000)
    wrong = {i for i in range(3000) if random.Random(i).random() < 0.1}
    drafter, costs, at = Onward(text, wrong, 0.07), PassCosts(0.02), 10
    speculator = Speculator([drafter], costs, 15, lambda: drafter.clock)
    while at < 2980:
        draft = speculator.draft(text[:at], 15)
        goes_on = speculator.ahead([*text[:at], *draft], 15) is not None
        drafter.clock += streamed(1 + len(draft))
        costs.add(1 + len(draft), streamed(1 + len(draft)))
        end = drafter.verified(at, len(draft), goes_on)
        speculator.learn(text[at:end])
        at = end
    fixed = []
    for length in range(1, 16):
        twin, at = Onward(text, wrong, 0.07), 10
        while at < 2980:
            ready = min(twin.ready(text[:at]), 15)
            twin.clock += 0.0 if ready else 0.07 * length
            twin.clock += streamed(1 + (ready or length))
            at = twin.verified(at, ready or length, True)
        fixed.append(twin.clock)
    assert drafter.clock < 1.02 * min(fixed)


def test_a_draft_ends_with_a_guess_that_is_doubtful() -> None:
    """The kind tells right from wrong: nothing is guessed behind a token that will be refused."""
    text = some_text(600)
    wrong = {i for i in range(600) if i % 4 == 0}
    _, drafts = race(text, Oracle(text, wrong, 0.05), streamed)
    assert {n for _, n in drafts[40:-1] if n} <= {3, 4}


@pytest.mark.parametrize("each", [1.2, 5.0])
def test_a_drafter_that_costs_what_it_saves_is_left_alone(each: float) -> None:
    text = some_text(900)
    clock, drafts = race(text, Oracle(text, set(), each), streamed)
    tries = [n for _, n in drafts if n]
    assert len(tries) <= 9 and max(tries) <= 3  # some to see what it costs, again after 128 passes
    assert clock < 1.03 * 890 * streamed(1) + each * sum(tries)


def test_no_drafter_helps_a_model_in_memory() -> None:
    text = some_text(600)
    drafter = Oracle(text, set(), 0.02)
    clock, drafts = race(text, drafter, serial)
    assert sum(n for _, n in drafts) <= 15


def test_free_guesses_are_taken_where_they_are_as_sure() -> None:
    """A text that repeats itself: once the lookup is known to be right it takes over."""
    text = some_text(60) * 10
    _, drafts = race(text, Oracle(text, set(), 0.05), streamed, PromptLookup())
    assert drafts[1][0] == "oracle"
    assert {name for name, _ in drafts[-8:]} == {"lookup"}
    assert drafts[-2][1] == 15


def test_a_drafter_may_have_nothing_to_say() -> None:
    text = some_text(100)
    drafter = Oracle(text[:50], set(), 0.05)
    _, drafts = race(text, drafter, streamed)
    assert [n for _, n in drafts[-49:]] == [0] * 49  # behind the end of what it knows


def test_one_slow_pass_does_not_change_what_a_token_costs() -> None:
    costs = PassCosts(0.02)
    for n in (1, 4, 6, 9, 12):
        costs.add(n, 1.0 + 0.03 * (n - 1))
    exact = costs.line(15)
    assert exact[1:] == pytest.approx([1.0 + 0.03 * i for i in range(15)])
    costs.add(8, 2.0)  # a disk that stuttered
    assert costs.line(15)[1:] == pytest.approx(exact[1:], rel=0.02)
    assert max(b - a for a, b in pairwise(costs.table(15)[1:])) > 0.08
    assert PassCosts(0.02).line(4) == []


def test_a_line_never_falls() -> None:
    costs = PassCosts(0.02)
    for n, seconds in ((1, 2.0), (3, 1.0), (5, 0.5)):
        costs.add(n, seconds)
    line = costs.line(6)
    assert len(line) == 7 and min(line[1:]) > 0 and line[1:] == sorted(line[1:])
