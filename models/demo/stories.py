"""The texts of the demo model: read, cleaned, put back in upper case, and given requests.

Owns everything between the raw files and clean stories: which part is trained on, how the lower
case file gets its capitals back, how names are exchanged and how a request such as "Tell me a
story about a dog and a red ball." is derived from a story's own words. It must not know tokens,
networks or devices.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "CaseRestorer",
    "Lexicon",
    "NAMES",
    "THINGS",
    "Texts",
    "chat_request",
    "clean",
    "exchange",
    "load_texts",
]

SEPARATOR = "<|endoftext|>"
CASED = "tinystories_sample_2MB.txt"
LOWER = "tinystories_train_lower_4MB.txt"
VALIDATION = "tinystories_val_0.8MB.txt"

# UTF-8 read as Windows-1252 once too often, as the corpus has it, and typographic marks.
_MARKS = {
    "â€œ": '"', "â€\u009d": '"', "â€™": "'", "â€˜": "'", "â€”": " - ", "â€“": " - ", "â€¦": "...",
    "â€": '"', "“": '"', "”": '"', "‘": "'", "’": "'", "–": " - ", "—": " - ", "…": "...",
}  # fmt: skip
_OPENING = re.compile(
    r"(once|one|there|long ago|in an? |it was|the sun|on an? |every|today|two|mom|mum|sara|tom|"
    r"lily|tim|ben|anna|mia|jack|sam|lucy|max|an? |as |when |\w+ (was|loved|liked|had|and|were)\b)"
)
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|\d+|\n+|[^\sA-Za-z\d]")

_GIRLS = (
    "Lily Lucy Mia Anna Sue Sara Emma Amy Jane Molly Daisy Sally Sarah Jenny Lisa Kitty Ella Rose "
    "Mary Bella Annie Lola Grace Zoe Nora Ruby Maria Ann Kate Susie Penny Sophie Mandy Lizzie"
).split()
_BOYS = (
    "Tim Tom Ben Max Jack Sam Bob Timmy Tommy John Billy Joe Leo Jim Mike Peter Fred Benny Johnny "
    "Jimmy James Bobby Sammy Joey Charlie Dan Harry George Jake Danny Luke Oscar Adam Henry"
).split()

NAMES = (_GIRLS, _BOYS)
# Words that may stand for each other; the stories stay sensible enough for a four-year-old.
THINGS = tuple(
    tuple(line.split())
    for line in (
        "dog cat rabbit bunny bear mouse fox puppy kitten squirrel lion monkey horse pig cow "
        "elephant frog duck turtle tiger goat sheep dinosaur dragon",
        "bird butterfly bee owl bug parrot",
        "ball doll kite balloon robot puzzle drum",
        "car truck boat train bus plane bike",
        "apple cake cookie sandwich banana carrot pizza lemon pie pancake",
        "hat dress shirt coat scarf crown ring necklace",
        "box basket bag jar bucket bowl pot cup bottle",
        "flower rose leaf plant seed feather",
        "rock stone stick shell coin key button",
        "park garden forest beach farm zoo playground meadow field market",
        "pond lake river sea ocean",
        "kitchen bedroom bathroom garage",
        "table chair bed bench couch sofa desk shelf",
        "farmer doctor driver teacher shopkeeper neighbor",
        "princess queen lady fairy woman",
        "book letter map card",
        "blanket pillow towel",
        "house castle cave tower tent",
        "red blue green yellow pink purple white black orange brown",
        "shiny pretty beautiful colorful lovely special magical",
    )
)


def clean(text: str) -> str:
    """Return `text` with typographic marks in ASCII and paragraphs parted by one empty line."""
    for bad, good in _MARKS.items():
        text = text.replace(bad, good)
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r" ?\n[ \n]*", "\n\n", text).strip()


class CaseRestorer:
    """Puts capitals back into lower case text by counts learned from cased stories.

    The rule: a word is capitalised at the start of a story, paragraph, sentence or quotation;
    elsewhere, and behind a quotation that ends in "!" or "?", when the cased text capitalises it,
    after the same previous word or marks, in most cases (at least 3 seen), else when it
    capitalises the word in most cases whatever comes before. A word never seen is capitalised
    when somewhere in the story it follows "named" or "called".
    """

    def __init__(self, stories: list[str]) -> None:
        """Learn from cased `stories`."""
        self.alone: dict[str, list[int]] = {}
        self.after: dict[tuple[str, str], list[int]] = {}
        for story in stories:
            for match, previous in _in_context(story):
                word, upper = match.group().lower(), int(match.group()[0].isupper())
                if not _starts(previous):
                    self.after.setdefault((previous, word), [0, 0])[upper] += 1
                    if previous not in _ENDED:
                        self.alone.setdefault(word, [0, 0])[upper] += 1

    def _capital(self, previous: str, word: str, named: set[str]) -> bool:
        low, up = self.after.get((previous, word), (0, 0))
        if low + up < 3:
            low, up = self.alone.get(word, (0, 0))
        if low + up == 0:
            return word in named
        return up > low

    def restore(self, story: str) -> str:
        """Return lower case `story` with its capitals."""
        named = set(re.findall(r"(?:named|called) ([a-z]+)", story))
        out, last = [], 0
        for match, previous in _in_context(story):
            word = match.group()
            if _starts(previous) or self._capital(previous, word, named):
                out += [story[last : match.start()], word[0].upper() + word[1:]]
                last = match.end()
        return "".join(out) + story[last:]


_ENDED = {'!"', '?"'}


def _in_context(story: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield each word's match and what stands before it: a word, marks, or a line break.

    An opening quotation mark counts as a line break; a closing one is added to the mark before.
    """
    previous = "\n"
    for match in _WORD.finditer(story):
        word = match.group()
        if word[0].isalpha():
            yield match, previous
        if word != '"':
            previous = word.lower()
        elif story[match.end() : match.end() + 1].isalpha():
            previous = "\n"
        else:
            previous += word


def _starts(previous: str) -> bool:
    return previous in {".", "!", "?", '."'} or previous.startswith("\n")


@dataclass
class Texts:
    """Stories to train on and to validate on, disjoint, and the words requests are made of."""

    train: list[str]
    validation: list[str]
    validation_text: str
    lexicon: Lexicon
    notes: dict[str, float] = field(default_factory=dict)


def _split_lower(text: str) -> list[str]:
    """Part the lower case file: single line breaks part stories, or paragraphs in some stories."""
    stories: list[str] = []
    for block in re.split(r"(?<!\n)\n(?!\n)", text):
        if stories and (len(block) < 250 or not _OPENING.match(block)):
            stories[-1] += "\n\n" + block
        else:
            stories.append(block)
    return stories


def _key(story: str) -> str:
    return re.sub(r"[^a-z]", "", story.lower())[:160]


def load_texts(folder: Path, limit: int | None = None) -> Texts:
    """Read the three TinyStories files of `folder`; `limit` keeps that many stories of each.

    Stories outside ASCII, under 150 characters, twice there, or also in the validation file are
    left out. Raises FileNotFoundError when a file is missing.
    """
    cased = [clean(s) for s in (folder / CASED).read_text("utf-8").split(SEPARATOR)]
    cased = [s for s in cased if len(s) >= 150 and s.isascii()][:-1]
    restorer = CaseRestorer(cased)
    raw = (folder / LOWER).read_text("utf-8")
    lower = [clean(s) for s in _split_lower(raw)]
    lower = [s for s in lower if 150 <= len(s) <= 5000 and s.isascii()]
    known = {_key(s): s for s in cased}
    twins = [(known[_key(s)], restorer.restore(s)) for s in lower if _key(s) in known]
    notes = {"case_agreement": _case_agreement(twins)}
    held = clean((folder / VALIDATION).read_text("utf-8"))
    held_key = re.sub(r"[^a-z]", "", held.lower())
    train, seen = [], set()
    for story in cased + [restorer.restore(s) for s in lower if _key(s) not in known]:
        key = _key(story)
        if key not in seen and key not in held_key:
            seen.add(key)
            train.append(story)
    validation = re.split(r"\n\n(?=Once upon a time|Once there was)", held)[1:-1]
    validation = [s for s in validation if s.isascii() and len(s) >= 150]
    notes |= {"train_characters": sum(map(len, train)), "train_stories": len(train)}
    lexicon = Lexicon(train)
    return Texts(train[:limit], validation[:limit], held, lexicon, notes)


def _case_agreement(twins: list[tuple[str, str]]) -> float:
    """Share of the letters' cases that the rule gets right where the cased text is known."""
    same = total = 0
    for truth, guess in twins:
        if truth.lower() == guess.lower():
            starts = [i for i in range(len(truth)) if truth[i].isalpha() and (
                i == 0 or not truth[i - 1].isalpha())]  # fmt: skip
            same += sum(truth[i] == guess[i] for i in starts)
            total += len(starts)
    return same / max(1, total)


def exchange(story: str, groups: tuple[tuple[str, ...], ...], rng: random.Random) -> str:
    """Return `story` with the words of each group exchanged for others of the same group.

    A story has one word in place of another throughout, so it stays whole while the network
    meets many more combinations than the corpus has, and learns to take such words from the
    request instead of from memory. Plurals in "s" and the articles before a word follow it.
    """
    words = set(re.findall(r"[A-Za-z]+", story))
    words |= {w[:-1] for w in words if w.endswith("s")}
    swap: dict[str, str] = {}
    for group in groups:
        here = [w for w in group if w in words]
        free = sorted(set(group) - words)
        swap.update(zip(here, rng.sample(free, min(len(here), len(free))), strict=False))
    if not swap:
        return story

    def new(match: re.Match[str]) -> str:
        word = swap[match["word"]]
        article = match["article"] or ""
        if article:
            article = article[0] + ("n " if word[0] in "aeiou" else " ")
        return article + word + match["plural"]

    # A teddy bear is no bear, and the sky stays blue.
    pattern = (
        rf"\b(?P<article>[Aa]n? )?(?<!teddy )(?P<word>{'|'.join(swap)})(?P<plural>s?)\b(?! sky)"
    )
    return re.sub(pattern, new, story)


_DETERMINERS = set("a an the his her their my your our its some this that".split())
_AFTER = set(
    "and was in on to that with at for of is had from were named called who , . ! ? \n\n : ; so "
    "but or when as said because up into by under near outside inside together".split(" ")
)
_VAGUE = set(
    "time day moment end way thing things idea lot bit side top morning night name story stories "
    "moral lesson middle place while one other next same most more rest first second best world "
    "it him them all he she they then afternoon evening days times hour minute right left look "
    "something someone everyone anything everything nothing help fun much well home life kind "
    "part front back inside outside of little big new very another few many such good own last "
    "whole only turn try ground air whisper question answer word words sight reason noise sound "
    "problem voice face hands hand eyes head mouth feet arms middle edge bottom piece pieces "
    "anymore both two three replied lying tightly belonged lit faces minutes knee".split()
)
_PHRASES = (
    ("Tell me a story about {}.", 8), ("Please tell me a story about {}.", 2),
    ("Can you tell me a story about {}?", 2), ("Write a story about {}.", 3),
    ("Tell me a short story about {}.", 1), ("I want a story about {}.", 1),
    ("Could you write a little story about {}?", 1), ("A story about {}, please.", 1),
    ("Make up a story with {}.", 1), ("Write me a story with {} in it.", 1), ("{}", 1),
    ("Tell me about {}.", 1), ("I would like to hear a story about {}.", 1),
)  # fmt: skip
_OPEN = (
    "Tell me a story.", "Please tell me a story.", "Can you tell me a story?", "Write a story.",
    "Tell me another story.", "I want to hear a story.", "Another one, please!", "A story, please.",
    "Hello! Tell me a story.", "Tell me a bedtime story.", "Make up a story.",
)  # fmt: skip


class Lexicon:
    """Nouns and adjectives that stories are about, found by where they stand.

    A noun follows a determiner (or a determiner and one word) and comes before a function word
    or a mark in at least a third of its uses; an adjective stands between a determiner and a noun
    in at least a fifth of its uses. No list of words is given but the vague ones left out.
    """

    def __init__(self, stories: list[str]) -> None:
        """Count over `stories`."""
        self.count: Counter[str] = Counter()
        noun: Counter[str] = Counter()
        middle: Counter[tuple[str, str]] = Counter()
        self.stories: Counter[str] = Counter()
        for story in stories:
            words = ["\n\n", "\n\n", *(_WORD.findall(story)), "\n\n"]
            self.stories.update({w for w in words if w.islower()})
            for before, previous, word, following in zip(
                words, words[1:], words[2:], words[3:], strict=False
            ):
                self.count[word] += 1
                if following.lower() in _AFTER and word.islower():
                    if previous.lower() in _DETERMINERS:
                        noun[word] += 1
                    elif before.lower() in _DETERMINERS and previous.islower():
                        noun[word] += 1
                        middle[previous, word] += 1
        self.nouns = {
            w for w, n in noun.items()
            if n >= 4 and 3 * n >= self.count[w] and len(w) > 2 and w.isalpha() and w not in _VAGUE
        }  # fmt: skip
        inside: Counter[str] = Counter()
        for (adjective, word), n in middle.items():
            if word in self.nouns:
                inside[adjective] += n
        self.adjectives = {
            w for w, n in inside.items()
            if n >= 3 and 5 * n >= self.count[w] and w not in self.nouns and w.isalpha()
        } | {"little", "big", "new"}  # fmt: skip

    def asked(self, request: str) -> list[str]:
        """Return the nouns and adjectives of `request` that its story is to take up."""
        return [w for w in re.findall(r"[a-z]+", request) if w in self.nouns | self.adjectives]

    def topics(self, story: str) -> dict[str, tuple[float, set[str]]]:
        """Return {noun: (weight, its adjectives in this story)} of `story`."""
        found: dict[str, tuple[float, set[str]]] = {}
        previous = ""
        for match in _WORD.finditer(story):
            word = match.group()
            if word in self.nouns:
                weight, adjectives = found.get(word, (0.0, set()))
                if previous in self.adjectives:
                    adjectives.add(previous)
                # Rare in the corpus, often here and early: what this story is about.
                share = 4.0 if match.start() < 250 else 1.0
                found[word] = (weight + share / (20 + self.stories[word]) ** 0.5, adjectives)
            previous = word
        return found


def _article(phrase: str) -> str:
    head = phrase.split()[-1]
    if head.endswith("s") and not head.endswith("ss"):
        return phrase
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _topic_list(story: str, lexicon: Lexicon, rng: random.Random) -> list[str]:
    """Return one to three topics of `story`, such as ["a dog", "a red ball"]."""
    found = lexicon.topics(story)
    nouns = sorted(found, key=lambda w: -found[w][0])[:8]
    topics: list[str] = []
    person = re.search(r"\b[Aa]n? ((?:[a-z]+ ){0,2}[a-z]+) (named|called) ([A-Z][a-z]+)", story)
    if person and rng.random() < 0.2:
        topics.append(_article(f"{person[1]}") + f" {person[2]} {person[3]}")
        nouns = [n for n in nouns if n not in person[1]]
    while nouns and len(topics) < rng.choice((1, 2, 2, 2, 3)):
        word = rng.choices(nouns, [found[n][0] for n in nouns])[0]
        nouns.remove(word)
        adjectives = sorted(found[word][1])
        if adjectives and rng.random() < 0.6:
            word = f"{rng.choice(adjectives)} {word}"
        topics.append(_article(word))
    rng.shuffle(topics)
    return topics


def chat_request(story: str, lexicon: Lexicon, rng: random.Random) -> str:
    """Return a request line that `story` answers, drawn anew at each call."""
    topics = _topic_list(story, lexicon, rng)
    if not topics or rng.random() < 0.06:
        line = rng.choice(_OPEN)
    else:
        joined = topics[0] if len(topics) == 1 else ", ".join(topics[:-1]) + " and " + topics[-1]
        line = rng.choices([p for p, _ in _PHRASES], [n for _, n in _PHRASES])[0].format(joined)
    if rng.random() < 0.4:
        line = line[0].lower() + line[1:]
    if rng.random() < 0.4:
        line = line.rstrip(".?!")
    return line
