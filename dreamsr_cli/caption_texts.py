"""What a language model said about a picture, made into a prompt: plain words about what is to be seen.

A prompt steers networks that restore the photo, so it must not ask for the damage: openings ("The image shows"), words
about blur, noise, focus and quality, markup, repetitions and line breaks are taken out, and the length is bounded.
"""

from __future__ import annotations

import re
import unicodedata

LONGEST = 10_000
"""Characters that are looked at; no answer has as many."""
LONGEST_WORD = 40
"""Characters of a word; longer ones are not words."""

_KIND = r"(?:image|photo(?:graph)?|picture|scene|shot|crop|frame|tile|view|snapshot|close-?up)"
_SHOWS = (
    r"(?:shows?|depicts?|features?|displays?|captures?|presents?|portrays?|contains?|includes?|showcases?|consists? of|"
    r"illustrates?|reveals?|seems to show|appears to (?:show|be(?: of)?)|is (?:of|about|focused on|filled with|"
    r"showing)|"
    r"is dominated by|focuses on|gives us|provides|offers)"
)
_NOUN = rf"(?:(?:[\w-]+ ){{0,3}}?{_KIND})"
_OPENING = re.compile(
    rf"^(?:(?:sure|certainly|of course|okay)[,!.:]? *)?(?:"
    rf"(?:here is|this is|it is|it's|there is)? *(?:a|an|the|this|that) {_NOUN} (?:of|which {_SHOWS}|that {_SHOWS}|"
    rf"showing|depicting|featuring|with)\b|"
    rf"(?:a|an|the|this|that) {_NOUN}(?: itself)? (?:also |clearly |mainly |primarily |prominently )?{_SHOWS}\b|"
    rf"(?:a|an|the|this|that) {_NOUN} (?:is|appears to be|seems to be) (?:an? )?{_NOUN}(?: view)? of\b|"
    rf"(?:in|within|across|throughout) (?:the|this|that) {_NOUN}, *(?:there (?:is|are)\b|"
    r"(?:we|you) (?:can )?see\b)?|"
    r"(?:it|this) (?:shows|depicts|features|displays)\b|"
    r"(?:we|you|one) can (?:also )?see\b|"
    r"(?:assistant|caption|description|answer) *:)[ ,:]*",
    re.IGNORECASE,
)
_FILLER = re.compile(r"(?:sure|certainly|of course|okay|yes|no)\W*", re.IGNORECASE)
_DEGREE = r"(?:(?:very|quite|slightly|somewhat|extremely|a bit|a little|rather|heavily) )*"
_DAMAGE_ADJECTIVE = (
    r"(?:blurr?(?:ed|y)|unfocused|defocused|out-of-focus|in-focus|grainy|noisy|pixelated|pixellated|distorted|degraded|"
    r"overexposed|underexposed|(?:low|high|poor|good|bad)[- ](?:resolution|quality|res)|low-?res|hi-?res)"
)
_BEFORE_NOUN = re.compile(
    rf"\b(?P<article>an? )?{_DEGREE}{_DAMAGE_ADJECTIVE}(?:,? (?:and )?{_DEGREE}{_DAMAGE_ADJECTIVE})* "
    r"(?!(?:and|or|but|with|in|on|at|of|to|by|from|due|because|as|so|that|which|making|for|while|the|a|an)\b)(?=\w)",
    re.IGNORECASE,
)
_DAMAGE = re.compile(
    r"\b(?:blur\w*|unfocused|defocus\w*|focus\w*|bokeh|depth of field|grainy|grainines\w*|nois[ey]|noisiness|"
    r"pixelat\w*|pixellat\w*|low-?res|hi-?res|resolution|quality of the|"
    r"(?:image|picture|photo|visual|low|high|poor|good) quality|"
    r"compression|compressed|jpe?g|(?:digital|visual|image) art[ie]facts?|sharpness|overexposed|underexposed|"
    r"exposure|distort\w*|degrad\w*|out[- ]of[- ]focus|"
    r"(?:difficult|hard|impossible) to (?:see|tell|make out|discern|identify|determine)|unclear|"
    r"not (?:clear|clearly visible|sharp))\b",
    re.IGNORECASE,
)
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|approx|vs|mr|mrs|dr|st|no)|\b[A-Z])\.$", re.IGNORECASE)
_LOOP = re.compile(r"\b((?:\S+ ){0,5}\S+?)(?:[ ,]+\1){2,}(?!\w)", re.IGNORECASE)
"""One to six words three times or more in a row: small models get caught so."""
_DANGLING = re.compile(
    r"an?|the|and|or|but|nor|with|without|of|in|on|at|to|from|by|for|as|into|onto|over|under|near|between|behind|beside|"
    r"its|his|her|their|this|that|these|those|which|who|while|where|is|are|was|were|be|being|has|have|very",
    re.IGNORECASE,
)
"""Words that no sentence ends with."""


def clean(text: str, max_words: int) -> str:
    """`text` as a prompt of at most `max_words` words: one line, whole sentences where they fit, first letter upper
    case; "" if nothing is left. Cleaning a second time changes nothing."""
    if max_words < 1:
        raise ValueError(f"a prompt has at least one word, got {max_words}")
    text = text[:LONGEST]
    for _ in range(20):  # what one rule uncovers, another may remove: until nothing changes
        before, text = text, _plain(text)
        text = _bounded(_without_repeats([_finish(_sentence(s)) for s in _sentences(text)]), max_words)
        if text == before:
            break
    return text


# ---------------------------------------------------------------- characters and markup


def _plain(text: str) -> str:
    """No markup, no control characters; lines of a list become sentences."""
    lines = []
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", unicodedata.normalize("NFC", text))
    for line in text.splitlines():
        line = " ".join("".join(c if c.isprintable() else " " for c in line).split())
        item, before = _without_markup(line), line
        while item != before:
            item, before = _without_markup(item), item
        if item and item != line and item[-1].isalnum():
            item += "."
        if item:
            lines.append(item)
    return " ".join(lines)


def _without_markup(line: str) -> str:
    line = re.sub(r"^\s*(?:[-*+•·]|\d{1,3}[.)]|#{1,6}|>+)\s+", "", line)
    line = re.sub(r"!?\[([^\[\]]*)\]\([^()]*\)", r"\1", line)
    line = re.sub(r"<[^<>]{0,60}>|[*_`#|~^\\{}\[\]<>]+", " ", line)
    line = "".join(c if _allowed(c) else " " for c in line)
    return " ".join(word[:LONGEST_WORD] for word in line.split())


def _allowed(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMNPZ" and character != "\ufffd"


# ---------------------------------------------------------------- sentences


def _sentences(text: str) -> list[str]:
    """Sentences with their ends, in order."""
    found, start = [], 0
    for end in re.finditer(r"[.!?]+(?=\s|$)", text):
        if not _ABBREVIATION.search(text[start : end.end()]) or end.end() == len(text):
            found.append(text[start : end.end()].strip())
            start = end.end()
    if rest := text[start:].strip():
        found.append(rest)
    return found


def _sentence(sentence: str) -> str:
    """One sentence without its opening and without what it says of damage; "" if that is all it says."""
    if _FILLER.fullmatch(sentence):
        return ""
    while (shorter := _OPENING.sub("", sentence, count=1).strip()) != sentence:
        sentence = shorter
    sentence = _BEFORE_NOUN.sub(_article, sentence)
    if _DAMAGE.search(sentence):
        clauses = re.split(r"(?<=[,;:])\s+|\s+(?=(?:but|although|though|while|making|and the|and it)\b)", sentence)
        kept: list[str] = []
        dropped = False
        for clause in clauses:
            follows = re.match(r"(?:making|which|giving|creating|due to|because)\b", clause, re.IGNORECASE)
            dropped = bool(_DAMAGE.search(clause)) or (dropped and bool(follows))
            if not dropped:
                kept.append(clause)
        if kept and kept[0] != clauses[0]:
            kept[0] = re.sub(r"^(?:but|although|though|while|and|with)\b[ ,]*", "", kept[0], flags=re.IGNORECASE)
        sentence = " ".join(kept)
    return sentence


def _article(match: re.Match[str]) -> str:
    """The article that suits the word after the adjective that goes away."""
    if not match["article"]:
        return ""
    following = match.string[match.end() : match.end() + 1]
    article = "an " if following.lower() in tuple("aeiou") else "a "
    return article.capitalize() if match["article"][0].isupper() else article


def _finish(sentence: str) -> str:
    """First letter upper case, a sign at the end; "" without a letter."""
    sentence = " ".join(sentence.split()).lstrip(" ,;:.!?-–—'\")")
    sentence = re.sub(r"\s+([,;:.!?])", r"\1", re.sub(r"([,;:])(?:\s*[,;:])+", r"\1", sentence))
    sentence = re.sub(r"[\s,;:\-–—]+([.!?]*)$", r"\1", sentence)
    if not any(c.isalpha() for c in sentence):
        return ""
    if sentence[-1] not in ".!?":  # it was cut off
        sentence = _without_loose_end(sentence.split()) + "."
    return _capital(sentence)


def _without_loose_end(words: list[str]) -> str:
    while len(words) > 1 and _DANGLING.fullmatch(words[-1].strip(",;:")):
        words = words[:-1]
    return " ".join(words).rstrip(" ,;:-–—")


def _capital(sentence: str) -> str:
    first = sentence[0].upper()
    return (first if len(first) == 1 else sentence[0]) + sentence[1:]


def _without_repeats(sentences: list[str]) -> list[str]:
    """Sentences in order, each once; within one, a clause that repeats (the beginning of) one before it goes away."""
    kept: dict[str, str] = {}
    for sentence in sentences:
        sentence = _LOOP.sub(r"\1", sentence)
        clauses: list[str] = []
        for clause in re.split(r"(?<=[,;])\s+", sentence):
            if not any(_bare(before).startswith(_bare(clause)) for before in clauses):
                clauses.append(clause)
        if clauses and (whole := _finish(" ".join(clauses))):
            kept.setdefault(_bare(whole), whole)
    return list(kept.values())


def _bare(text: str) -> str:
    return " ".join(re.findall(r"\w+", re.sub(r"^and ", "", text.lower())))


# ---------------------------------------------------------------- length


def _bounded(sentences: list[str], max_words: int) -> str:
    """As many whole sentences as fit; the first one, if it doesn't fit, up to its last clause that does."""
    kept: list[str] = []
    for sentence in sentences:
        if len(" ".join([*kept, sentence]).split()) > max_words:
            break
        kept.append(sentence)
    if kept or not sentences:
        return " ".join(kept)
    words = sentences[0].split()[:max_words]
    ends = [i + 1 for i, word in enumerate(words) if word[-1] in ",;:"]
    if ends and ends[-1] >= max_words / 2:
        words = words[: ends[-1]]
    return _finish(" ".join(words).rstrip(".!?"))
