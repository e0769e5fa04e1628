"""tieredImageNet: not redistributable, so users supply their own copy.

608 classes of ImageNet under 34 higher-level nodes, split 351, 97 and 160 so that no node is in two
splits (Ren et al. 2018).
"""

from __future__ import annotations

from typing import ClassVar

from metarun.datasets.class_folders import Entry
from metarun.datasets.mini_imagenet import MiniImageNet


class TieredImageNet(MiniImageNet):
    """tieredImageNet, in the layouts of miniImageNet except those with CSV files."""

    name: ClassVar[str] = "tiered_imagenet"
    images_per_class: ClassVar[tuple[int, int]] = (732, 1300)
    layouts: ClassVar[str] = (
        "it may hold train, val and test folders of class folders named by WordNet id (n01530575), in zips "
        "or not; ImageNet's own train folder has them all"
    )

    def _listed(self, files: list[Entry]) -> dict[str, str]:
        return {}
