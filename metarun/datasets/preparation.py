"""How image files become pixels: decided over a whole set, and the same in every command."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image

from metarun.datasets.drawings import Ink, balance, other, strokes
from metarun.datasets.images import Resize, to_array
from metarun.errors import DataError
from metarun.reporting.console import inform

Source = Callable[[], AbstractContextManager[Image.Image]]  # opens an image, see `images.opened`
InkSetting = Literal["none", "auto", "dark", "light"]
Background = Literal["white", "black"]

SAMPLE = 200  # the most images, evenly spaced in a set, that are looked at to decide on the set
LOOKED_AT = 20  # images, to see whether they may be drawings
CLEAR = 0.5  # the mean balance of a set's drawings above which its polarity is certain
DRAWN = 0.95  # the mean balance of images above which they look like drawings
REVERSED = 0.8  # the balance of a drawing above which it is certain to be of the other polarity


@dataclass(frozen=True)
class Preparation:
    """What is done to the images of a set. A setting that is None is decided by `with_levels`.

    Args:
        resize: how other proportions are fitted, see `images.resized`. None: "pad".
        ink: of drawings, which become bright strokes on a dark ground, see `drawings.strokes`. "auto": that
            of most drawings of the set, decided by `with_ink`. None or "none": the images are not drawings.
        background: what is behind transparent images. None: white.
        white: the value that is white in images of more than 8 bits a channel. None: 65535, or 1 for floats.
        majority: the ink of most drawings of the set, if that is decided.
    """

    resize: Resize | None = None
    ink: InkSetting | None = None
    background: Background | None = None
    white: float | None = None
    majority: Ink | None = None

    @property
    def draws(self) -> bool:
        """Whether the images are drawings."""
        return self.ink not in (None, "none")

    def or_like(self, trained: Preparation) -> Preparation:
        """This preparation, with what it leaves open as in the one that a model was trained with.

        The polarity of the other set's drawings is its own: only that they are drawings is taken over.
        """
        return Preparation(
            resize=self.resize or trained.resize,
            ink=self.ink or ("auto" if trained.draws else "none"),
            background=self.background or trained.background,
            white=self.white or trained.white,
        )

    def with_levels(self, sources: Sequence[Source], name: str, skip: bool = False) -> Preparation:
        """With the background and the white level of a set, if its images need them.

        Args:
            sources: the images of the whole set.
            name: of the set, for messages.
            skip: whether images that cannot be read are ignored, because their decoding reports them.

        Raises:
            DataError: an image cannot be read, unless `skip`.
        """
        tops, lightness, floats = [], [], False
        for source in sample(sources):
            with suppress(*[DataError] * skip), source() as image:
                if is_deep(image):
                    tops.append(float(np.nan_to_num(np.asarray(image)).max()))
                    floats = floats or image.mode == "F"
                elif (level := opaque_level(image)) is not None:
                    lightness.append(level)
        background, white = self.background, self.white
        if lightness and background is None:
            background = "black" if np.mean(lightness) > 127 else "white"
            inform(f"{name}: transparent images are laid on {background}, as suits most of them")
        if tops and white is None:
            levels = (1.0, 255.0, 65535.0) if floats else (255.0, 4095.0, 65535.0)
            white = next((level for level in levels if level >= max(tops)), max(tops))
            inform(f"{name}: in images of more than 8 bits, {white:g} is white")
        return replace(self, background=background, white=white)

    def with_ink(
        self,
        sources: Sequence[Source],
        name: str,
        setting: str = "dataset.ink",
        like: Ink | None = None,
        skip: bool = False,
    ) -> Preparation:
        """With the ink of a set of drawings; itself if the images are not drawings.

        Args:
            sources, name, skip: see `with_levels`.
            setting: the name of the setting that has precedence, for messages.
            like: the ink to assume where the drawings do not show it clearly.

        Raises:
            DataError: see `with_levels`.
        """
        if not self.draws:
            return self
        majority, how = self.ink, "as set"
        turned = 0
        if self.ink == "auto":
            found = []
            for source in sample(sources):
                with suppress(*[DataError] * skip):
                    found.append(self.balance_of(source))
            mean = float(np.mean(found)) if found else 0.0
            majority = "light" if mean < 0 else "dark"
            if like is not None and abs(mean) < CLEAR:
                majority = like
            turned = sum(is_reversed(value, majority) for value in found)
            how = f"detected from most of them; set {setting}=dark or {setting}=light to override"
        ground = "light" if majority == "dark" else "dark"
        inform(f"{name}: {majority} ink on a {ground} background ({how})")
        if turned:
            inform(f"{name}: {turned} of {len(found)} drawings are of the other polarity, and are inverted")
        return replace(self, majority=majority)  # type: ignore[arg-type]

    def suggest_ink(self, sources: Sequence[Source], name: str) -> None:
        """Print a hint if it is open whether the images are drawings, and they look as if they were."""
        if self.ink is not None:
            return
        found = []
        for source in sample(sources, LOOKED_AT):
            with suppress(DataError):
                found.append(self.balance_of(source))
        if found and abs(np.mean(found)) > DRAWN:
            inform(
                f"{name}: looks like drawings; dataset.ink=auto cleans their paper, dataset.ink=none does not"
            )

    def balance_of(self, source: Source) -> float:
        """The `drawings.balance` of a drawing."""
        with source() as image:
            image.draft("L", (256, 256))  # a large JPEG is decoded in a smaller size
            return balance(self.flat(image).convert("L"))

    def array(self, image: Image.Image, item_shape: tuple[int, ...]) -> np.ndarray:
        """An upright image of any mode as uint8 [C, H, W], of shape `item_shape`."""
        image = self.flat(image)
        if not self.draws:
            return to_array(image, item_shape, self.resize or "pad")
        channels, height, width = item_shape
        grey = image.convert("L")
        ink = self.majority or ("light" if self.ink == "light" else "dark")
        if self.ink == "auto" and is_reversed(balance(grey), ink):
            ink = other(ink)
        return np.repeat(strokes(grey, ink, height, width, self.resize or "pad")[None], channels, 0)

    def flat(self, image: Image.Image) -> Image.Image:
        """Convert to mode L or RGB: more than 8 bits to 8, palettes and CMYK to RGB, without transparency."""
        if is_deep(image):
            white = self.white or (1.0 if image.mode == "F" else 65535.0)
            values = np.nan_to_num(np.asarray(image, np.float64))
            return Image.fromarray((values / white * 255).clip(0, 255).astype(np.uint8))
        if is_transparent(image):
            image = image.convert("RGBA")
            below = Image.new("RGBA", image.size, self.background or "white")
            return Image.alpha_composite(below, image).convert("RGB")
        return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def sample(sources: Sequence[Source], most: int = SAMPLE) -> Sequence[Source]:
    """At most `most` of the images, evenly spaced."""
    count = min(len(sources), most)
    return [sources[i * len(sources) // count] for i in range(count)]


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits a channel."""
    return image.mode.startswith("I") or image.mode == "F"


def is_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def opaque_level(image: Image.Image) -> float | None:
    """The mean grey level of the opaque pixels; None if all pixels are opaque, or none is."""
    if not is_transparent(image):
        return None
    image = image.convert("RGBA")
    opacity = np.asarray(image.getchannel("A"), np.float64)
    if opacity.min() == 255 or opacity.max() == 0:
        return None
    return float((np.asarray(image.convert("L"), np.float64) * opacity).sum() / opacity.sum())


def is_reversed(balance: float, majority: Ink) -> bool:
    """Whether a drawing is certain to be of the other polarity than most of its set."""
    return -balance > REVERSED if majority == "dark" else balance > REVERSED
