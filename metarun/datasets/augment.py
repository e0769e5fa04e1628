"""Training images changed at random, on the device, all at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError

TRIES = 10  # of a crop of a random size, as in torchvision
OF_BOX = 2 + 2 * TRIES  # random numbers that a crop of a random size needs


class Augment:
    """Shifts, mirrors, turns and recolours each image by numbers of its own.

    `crop`: pixels an image is moved by at most in each direction, with black behind it (a random
    crop of the padded image). `flip`: mirrored left to right, half of the time. `rotation`: degrees
    it is turned by at most, either way. `colour`: brightness, contrast and saturation are each
    multiplied by up to 1 +- this. `zoom`: its size is multiplied by up to 1 +- this. `shear`: each row
    is moved sideways by up to +- this times its distance from the middle. `drop`: the chance of each
    pixel to become black, before all else. `scale` and `ratio`: the smallest and the largest share of the
    area, and ratio of width to height, of a random crop that is resized to the size of the image
    (`resized_crops`), before the other changes of place.
    """

    unread: ClassVar = {"ratio": "scale=null"}

    def __init__(
        self,
        crop: int = 4,
        flip: bool = True,
        rotation: float = 0.0,
        colour: float = 0.4,
        zoom: float = 0.0,
        drop: float = 0.0,
        shear: float = 0.0,
        scale: Sequence[float] | None = None,
        ratio: Sequence[float] = (3 / 4, 4 / 3),
    ) -> None:
        shares = {"colour": colour, "zoom": zoom, "drop": drop, "shear": shear}
        for name, value in {"crop": crop, "rotation": rotation, **shares}.items():
            if value < 0:
                raise ConfigError(f"augment.{name}={value}: must not be negative")
        for name, value in shares.items():
            if value > 1 or (value == 1 and name != "colour"):
                bound = "at most 1" if name == "colour" else "below 1"
                raise ConfigError(f"augment.{name}={value}: must be {bound}")
        self.crop, self.flip, self.rotation, self.colour = crop, flip, rotation, colour
        for name, pair in {"scale": (1, 1) if scale is None else scale, "ratio": ratio}.items():
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= (1 if name == "scale" else math.inf):
                bounds = " and at most 1" if name == "scale" else ""
                raise ConfigError(
                    f"augment.{name}={list(pair)}: must be two numbers above 0{bounds}, the smaller one first"
                )
        self.zoom, self.drop, self.shear, self.scale, self.ratio = zoom, drop, shear, scale, ratio
        self.box = slice(7 + bool(zoom) + bool(shear), 7 + bool(zoom) + bool(shear) + OF_BOX * bool(scale))
        self.numbers = self.box.stop + bool(drop)  # uniform in [0, 1), for each image

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], changed by as many `numbers` in [0, 1) each, [B, numbers]."""
        if self.drop:
            images = images * (noise(numbers[:, -1], *images.shape[-2:]) >= self.drop)
        numbers = numbers.to(images)
        with torch.autocast(images.device.type, enabled=False):  # the places of pixels need all their digits
            if self.scale:
                images = resized_crops(images, numbers[:, self.box], self.scale, self.ratio)
            return self.recoloured(self.moved(images, numbers), 2 * numbers[:, 4:7] - 1)

    def moved(self, images: Tensor, numbers: Tensor) -> Tensor:
        """By whole pixels, so that an image that is not turned keeps its values."""
        if not (self.crop or self.flip or self.rotation or self.zoom or self.shear):
            return images
        height, width = images.shape[-2:]
        angle = (2 * numbers[:, 0] - 1) * math.radians(self.rotation)
        mirror = torch.where(numbers[:, 1] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        right, down = (torch.floor(numbers[:, i] * (2 * self.crop + 1)) - self.crop for i in (2, 3))
        cos, sin, aspect = angle.cos(), angle.sin(), height / width
        if self.zoom:
            size = 1 + self.zoom * (2 * numbers[:, 7] - 1)
            cos, sin = cos / size, sin / size
        # Where each pixel comes from, in units of half an image (F.affine_grid).
        rows = [
            torch.stack([mirror * cos, -sin * aspect, 2 * right / width], 1),
            torch.stack([mirror * sin / aspect, cos, 2 * down / height], 1),
        ]
        if self.shear:
            slope = self.shear * (2 * numbers[:, 7 + bool(self.zoom)] - 1) * aspect
            rows = [torch.stack([row[:, 0], row[:, 1] + slope * row[:, 0], row[:, 2]], 1) for row in rows]
        grid = F.affine_grid(torch.stack(rows, 1).to(images.dtype), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, align_corners=False)

    def recoloured(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Brightness, contrast about the mean, saturation about grey; numbers [B, 3] in [-1, 1)."""
        if not self.colour:
            return images
        brightness, contrast, saturation = (1 + self.colour * numbers).view(-1, 3, 1, 1, 1).unbind(1)
        images = images * brightness
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + contrast * (images - mean)
        grey = images.mean(1, keepdim=True)
        return (grey + saturation * (images - grey)).clamp(0, 1)


def resized_crops(images: Tensor, numbers: Tensor, scale: Sequence[float], ratio: Sequence[float]) -> Tensor:
    """Random parts of images, resized to the size of the whole, as by torchvision's `RandomResizedCrop`.

    Args:
        images: [B, C, H, W].
        numbers: uniform in [0, 1), [B, OF_BOX].
        scale: the smallest and the largest share of the area.
        ratio: the smallest and the largest ratio of width to height; its logarithm is uniform.
    """
    height, width = images.shape[-2:]
    top, left, rows, columns = boxes(numbers, height, width, scale, ratio)
    return interpolation(top, rows, height) @ images @ interpolation(left, columns, width).mT


def boxes(
    numbers: Tensor, height: int, width: int, scale: Sequence[float], ratio: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The top, left, height and width [B] of random parts of images, in pixels.

    Of `TRIES` random sizes, the first that fits is taken, or the largest part in the middle whose ratio is
    allowed. The arguments are those of `resized_crops`.
    """
    share, place = numbers[:, 2:].view(-1, TRIES, 2).unbind(-1)
    low, high = map(math.log, ratio)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * share)
    aspect = (low + (high - low) * place).exp()
    columns, rows = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
    first, none = fits.int().argmax(1, keepdim=True), ~fits.any(1)
    middle = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
    rows, columns = (
        torch.where(none, each, sizes.gather(1, first).squeeze(1))
        for each, sizes in zip(middle, (rows, columns), strict=True)
    )
    top, left = (numbers[:, 0] * (height - rows + 1)).floor(), (numbers[:, 1] * (width - columns + 1)).floor()
    top = torch.where(none, (height - middle[0]) // 2, top)
    return top, torch.where(none, (width - middle[1]) // 2, left), rows, columns


def interpolation(start: Tensor, size: Tensor, length: int) -> Tensor:
    """Matrices [B, 1, length, length] that resize a part of each row of `length` pixels to the whole row.

    Bilinear between the centres of the pixels of the part, and constant beyond the first and the last one.

    Args:
        start: the first pixel of each part, [B].
        size: its number of pixels, [B].
        length: the number of pixels of a row.
    """
    pixels = torch.arange(length, device=start.device, dtype=start.dtype)
    start, size = start.view(-1, 1, 1, 1), size.view(-1, 1, 1, 1)
    at = ((pixels + 0.5) * size / length - 0.5).clamp_min(0).minimum(size - 1) + start  # [B, 1, 1, length]
    return (1 - (at.mT - pixels).abs()).clamp_min(0)


def noise(seeds: Tensor, height: int, width: int) -> Tensor:
    """A uniform random number in [0, 1) for each pixel, float32 [B, 1, H, W].

    It is a hash of the seed and of the place of the pixel, which is the same on every device: the mixing
    function of 32 bits of C. Wellons ("Prospecting for hash functions", 2018).

    Args:
        seeds: [B], in [0, 1).
    """
    mask = 0xFFFFFFFF
    start = (seeds.double() * 2**32).long().view(-1, 1, 1, 1)
    x = torch.arange(height * width, device=seeds.device).view(1, 1, height, width) * 0x9E3779B1
    x = (x ^ start) & mask
    for shift, factor in ((16, 0x21F0AAAD), (15, 0xD35A2D97)):
        x = ((x ^ (x >> shift)) * factor) & mask
    return ((x ^ (x >> 15)) >> 8).float() / 2**24
