"""Phrases of made-up languages: texts without any file, in any number of classes.

A language has its own sounds, words, endings and word order. A meaning has a few words in every language, of
which some descend from a common ancestor by changes of sounds, as in related languages. A class is a few
meanings, which other classes have in other combinations. A phrase says most of them with one of their
synonyms, each with an ending, in the order of its language, among words that are said everywhere and words of
other meanings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from metarun.datasets.base import Split, at_least
from metarun.datasets.text.base import Reading, TextDataset
from metarun.datasets.text.store import Corpus
from metarun.errors import ConfigError
from metarun.tasks.source import SPLITS

MEANINGS = 240  # that classes are made of
CORE = 3  # meanings of a class
SYNONYMS = 3  # words of a meaning in a language
COMMON = 40  # words of a language that are said in phrases of all classes
SAID = 0.6  # the probability that a phrase says a meaning of its class
RELATED = 0.5  # the probability that a language has a word from the common ancestor
ENDINGS = 5  # of a language
SOUNDS = ("p t k b d g m n s l r v", "a e i o u")  # of the common ancestor
SCRIPTS = (  # the letters of languages, for the sounds in their order; combining marks in the third
    "p t k b d g m n s l r v a e i o u",
    "π τ κ β δ γ μ ν σ λ ρ φ α ε ι ο υ",
    "p t k b d g m n s l r v ạ ẹ̀ ị ọ̀ ụ́",
    "п т к б д г м н с л р в а э и о у",
)
NAMES = ("zun", "ket", "oru", "mal", "vid", "sab", "tel", "rin")  # of languages


class Phrases(TextDataset):
    """Phrases of made-up languages.

    Args:
        train_classes, validation_classes, test_classes: a larger number keeps the existing classes.
        texts_per_class: of each language.
        languages: how many; classes are the same in all of them.
        seed: another one gives other languages.
        ngrams, length, names_as_shots, support_language, query_language: see `Reading`.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        *,
        train_classes: int = 100,
        validation_classes: int = 40,
        test_classes: int = 60,
        texts_per_class: int = 40,
        languages: int = 1,
        seed: int = 0,
        ngrams: list[int] | tuple[int, ...] = (3, 4),
        length: int = 128,
        names_as_shots: bool = False,
        support_language: str | list[str] | None = None,
        query_language: str | list[str] | None = None,
    ) -> None:
        super().__init__(
            Reading(
                ngrams,
                length,
                names_as_shots=names_as_shots,
                support_language=support_language,
                query_language=query_language,
            )
        )
        self.classes = {"train": train_classes, "validation": validation_classes, "test": test_classes}
        at_least(1, **{f"{split}_classes": count for split, count in self.classes.items()})
        at_least(2, texts_per_class=texts_per_class)
        at_least(0, seed=seed)
        at_least(1, languages=languages)
        if languages > len(NAMES):
            raise ConfigError(f"dataset.languages={languages}: there are at most {len(NAMES)}")
        self.texts_per_class, self.languages, self.seed = texts_per_class, languages, seed

    @property
    def title(self) -> str:
        return "phrases"

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"phrases {split}", self.classes[split]

    def corpora(self) -> Mapping[Split, Corpus]:
        return {split: self.corpus(split) for split in SPLITS}  # type: ignore[misc]

    def corpus(self, split: str) -> Corpus:
        return {
            f"{split} {number}": {
                language.name if self.languages > 1 else "": self.phrases(language, split, number)
                for language in self.spoken
            }
            for number in range(self.classes[split])
        }

    def phrases(self, language: Language, split: str, number: int) -> list[str]:
        """The phrases of a class in one language."""
        random = stream(self.seed, f"{split} {number} {language.name}")
        return [language.phrase(self.core(split, number), random) for _ in range(self.texts_per_class)]

    def core(self, split: str, number: int) -> Sequence[int]:
        """The meanings of a class."""
        return stream(self.seed, f"{split} {number}").permutation(MEANINGS)[:CORE].tolist()

    def description_of(self, label: str) -> str:
        """The meanings of a class, each with a word of the first language."""
        split, number = label.split()
        return " ".join(self.spoken[0].words[meaning][0] for meaning in self.core(split, int(number)))

    @cached_property
    def spoken(self) -> list[Language]:
        ancestor = stream(self.seed, "ancestor")
        roots = [root(ancestor) for _ in range(MEANINGS * SYNONYMS)]
        return [
            language_of(name, SCRIPTS[i % len(SCRIPTS)].split(), roots, stream(self.seed, name))
            for i, name in enumerate(NAMES[: self.languages])
        ]


@dataclass(frozen=True)
class Language:
    """A language.

    Args:
        name: of the language.
        words: the synonyms of each meaning.
        common: words that are said everywhere, the most frequent first.
        endings: of words.
        order: the places of the meanings of a class in a phrase.
    """

    name: str
    words: Sequence[Sequence[str]]
    common: Sequence[str]
    endings: Sequence[str]
    order: Sequence[int]

    def phrase(self, core: Sequence[int], random: np.random.Generator) -> str:
        """A phrase that says some of these meanings, at least one."""
        said = random.random(len(core)) < SAID
        said[random.integers(len(core))] = True
        places = self.order if random.random() < 0.8 else random.permutation(len(core)).tolist()
        meanings = [core[i] for i in places if said[i]]
        others = random.integers(
            MEANINGS, size=random.integers(0, 3)
        ).tolist()  # that the class does not have
        phrase = [self.word(meaning, random) for meaning in [*meanings, *others]]
        for _ in range(random.integers(2, 6)):
            rank = int(COMMON ** random.random()) - 1  # the frequency of a word falls with its rank
            phrase.insert(random.integers(len(phrase) + 1), self.common[rank])
        return " ".join(phrase)

    def word(self, meaning: int, random: np.random.Generator) -> str:
        """A word of a meaning; the first synonym is the most frequent."""
        synonym = min(random.geometric(0.5), SYNONYMS) - 1
        return self.words[meaning][synonym] + self.endings[int(random.integers(ENDINGS))]


def language_of(
    name: str, letters: Sequence[str], roots: Sequence[Sequence[int]], random: np.random.Generator
) -> Language:
    """A language whose words partly descend from the roots of a common ancestor.

    Args:
        name: of the language.
        letters: one for each sound.
        roots: of the ancestor, sequences of sounds; SYNONYMS for each meaning.
        random: the only source of randomness.
    """
    consonants, vowels = (len(sounds.split()) for sounds in SOUNDS)
    shift = [*random.permutation(consonants), *(consonants + random.permutation(vowels))]
    kept = random.random(consonants + vowels) < 0.7  # sounds that did not change
    change = [i if keeps else to for i, (keeps, to) in enumerate(zip(kept, shift, strict=True))]

    def written(sounds: Sequence[int]) -> str:
        return "".join(letters[sound] for sound in sounds)

    inherited = random.random(len(roots)) < RELATED
    forms = [
        written([change[sound] for sound in old] if heir else root(random))
        for old, heir in zip(roots, inherited, strict=True)
    ]
    return Language(
        name=name,
        words=[forms[i : i + SYNONYMS] for i in range(0, len(forms), SYNONYMS)],
        common=[written(root(random, 1)) for _ in range(COMMON)],
        endings=["", *(written(root(random, 1)[1:]) for _ in range(ENDINGS - 1))],
        order=random.permutation(CORE).tolist(),
    )


def root(random: np.random.Generator, syllables: int | None = None) -> list[int]:
    """Sounds: two or three syllables of a consonant and a vowel, and possibly a last consonant."""
    consonants, vowels = (len(sounds.split()) for sounds in SOUNDS)
    sounds: list[int] = []
    for _ in range(syllables or random.integers(2, 4)):
        sounds += [int(random.integers(consonants)), consonants + int(random.integers(vowels))]
    return [*sounds, int(random.integers(consonants))] if random.random() < 0.5 else sounds


def stream(seed: int, name: str) -> np.random.Generator:
    """Random numbers that depend on a seed and a name alone; a test holds them for all versions of NumPy."""
    return np.random.Generator(np.random.PCG64([seed, *name.encode()]))
