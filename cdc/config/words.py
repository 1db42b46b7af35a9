"""How findings and logs are worded: lists of words, guesses at what was meant."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def listed(words: Iterable[str], last: str = "and") -> str:
    """``a, b and c``, or ``nothing``."""
    *others, final = list(words) or ["nothing"]
    return f"{', '.join(others)} {last} {final}" if others else final


def nearest(word: str, known: Iterable[str]) -> str:
    """The word that was probably meant, as a question; empty when none comes near."""
    near = get_close_matches(word.lower(), list(known), n=1)
    return f"did you mean {near[0]}?" if near else ""


def known_words(word: str, known: Iterable[str]) -> str:
    """The cure for a word nobody knows: the words there are, and the one that was probably meant."""
    words = list(known)
    return cure(f"known: {', '.join(words)}", nearest(word, words))


def cure(*parts: str) -> str:
    """What would be right, said in several parts; empty ones are left out."""
    return "; ".join(filter(None, parts))
