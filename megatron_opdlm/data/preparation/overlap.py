"""Whether a question stands in an evaluation set, and whether two questions are the same.

Two questions are the same if they are letter by letter, but for case, Unicode's compatible forms and spaces; signs
count, for 2+3 is not 2-3. A question stands in an evaluation set if it is the same as one there, or shares n words in a
row with one (13, as is usual since GPT-3, arXiv 2005.14165, appendix C). Letters of scripts without spaces count as
words. Runs of words that more than ten different evaluation questions have are boilerplate ("There are 5 houses,
numbered 1 to 5 ..."), and do not count.

    questions = EvaluationQuestions(["What is the sum of all positive divisors of twenty-four ..."], ngram=13)
    questions.holds("what  is THE sum of ...")     # True
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable

import numpy

MAX_QUESTIONS_PER_NGRAM = 10
"""A run of words in more questions than this is boilerplate."""

_WITHOUT_SPACES = "\u0e00-\u0eff\u1000-\u109f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_WITHOUT_SPACES}]|[^\W_{_WITHOUT_SPACES}]+")


def words(text: str) -> list[str]:
    """The words of a text, without case, signs and accents' different spellings."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def same_key(text: str) -> bytes:
    """16 bytes that two texts share if they are the same question."""
    normalised = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(normalised.encode(), digest_size=16).digest()


def ngram_hashes(text: str, ngram: int) -> numpy.ndarray:
    """[m] uint64: the different runs of `ngram` words of a text, sorted; none in a shorter text."""
    found = words(text)
    runs = (" ".join(found[start : start + ngram]) for start in range(len(found) - ngram + 1))
    digests = b"".join(hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs)
    return numpy.unique(numpy.frombuffer(digests, dtype=numpy.uint64))


class EvaluationQuestions:
    """The questions of all evaluation sets, to compare others with."""

    def __init__(self, questions: Iterable[str], ngram: int) -> None:
        """`ngram`: words in a row that make two questions overlap."""
        self.ngram = ngram
        different = {same_key(question): question for question in questions}
        self._keys = frozenset(different)
        hashes = [ngram_hashes(question, ngram) for question in different.values()]
        joined = numpy.concatenate(hashes) if hashes else numpy.empty(0, numpy.uint64)
        runs, num_questions = numpy.unique(joined, return_counts=True)
        self._runs = runs[num_questions <= MAX_QUESTIONS_PER_NGRAM]

    def __len__(self) -> int:
        """Different questions."""
        return len(self._keys)

    def holds(self, question: str) -> bool:
        """Whether the question is one of these, or overlaps with one."""
        if same_key(question) in self._keys:
            return True
        wanted = ngram_hashes(question, self.ngram)
        places = numpy.searchsorted(self._runs, wanted)
        inside = places < len(self._runs)
        return bool((self._runs[places[inside]] == wanted[inside]).any())
