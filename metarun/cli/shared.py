"""Settings that only some jobs of a sweep read: the others run without them.

`metarun train -m algorithm=maml,protonet inner_rate=0.1` is no mistake, although the second job has no inner
steps. A setting that no job reads is one, as outside of a sweep, and stays in the jobs, which refuse it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Sequence

from omegaconf import DictConfig, OmegaConf

from metarun.config.changes import key_of
from metarun.config.schema import FRAMES
from metarun.config.unread import is_option, without_effect

REFUSED = "refused"  # in the config of a job that cannot be composed: the reason
COMMAND = "train"  # of whose settings many belong to one method
Compose = Callable[[list[str]], DictConfig]


def read_by_some(jobs: Sequence[list[str]], compose: Compose) -> frozenset[str]:
    """The settings that at least one of the jobs reads; as few as possible are composed."""
    wanted = {key_of(word) for words in jobs for word in words}
    found: set[str] = set()
    for words in different_first(jobs):
        with contextlib.suppress(Exception):  # of a setting that the job refuses
            kept, config = without_unread(words, wanted, compose)
            found |= set(map(key_of, kept)) if REFUSED not in config else set()
        if found >= wanted:
            break
    return frozenset(found)


def different_first(jobs: Iterable[list[str]]) -> list[list[str]]:
    """The jobs, those first that have other options than the ones before them: another method reads more."""
    seen: set[frozenset[str]] = set()
    first: list[list[str]] = []
    rest: list[list[str]] = []
    for words in jobs:
        options = frozenset(filter(is_option, words))
        (rest if options in seen else first).append(words)
        seen.add(options)
    return first + rest


def without_unread(
    words: list[str], shared: Collection[str], compose: Compose
) -> tuple[list[str], DictConfig]:
    """The overrides of a job without those of `shared` that nothing reads in it, and its config."""
    while True:
        config = compose(words)
        if not shared:
            return words, config
        dropped = [word for word in unread_in(config, words) if key_of(word) in shared]
        if not dropped:
            return words, config
        words = [word for word in words if word not in dropped]


def unread_in(config: DictConfig, words: list[str]) -> list[str]:
    """The overrides of a job that nothing reads, or the one that keeps its config from being composed."""
    if (reason := config.get(REFUSED)) is not None:
        lacking = re.split("[:=]", reason, maxsplit=1)[0]
        return [word for word in words if key_of(word) == lacking and not is_option(word)]
    own = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    return [word for word, _ in without_effect(own, FRAMES[COMMAND], words)]
