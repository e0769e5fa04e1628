"""Training images changed at random, on the device, all at once."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError


class Augment:
    """Shifts, mirrors, turns and recolours each image by numbers of its own.

    `crop`: pixels an image is moved by at most in each direction, with black behind it (a random
    crop of the padded image). `flip`: mirrored left to right, half of the time. `rotation`: degrees
    it is turned by at most, either way. `colour`: brightness, contrast and saturation are each
    multiplied by up to 1 +- this.
    """

    numbers = 7  # uniform in [0, 1), for each image

    def __init__(self, crop: int = 4, flip: bool = True, rotation: float = 0.0, colour: float = 0.4) -> None:
        for name, value in (("crop", crop), ("rotation", rotation), ("colour", colour)):
            if value < 0:
                raise ConfigError(f"augment.{name}={value}: must not be negative")
        if colour > 1:
            raise ConfigError(f"augment.colour={colour}: must be at most 1")
        self.crop, self.flip, self.rotation, self.colour = crop, flip, rotation, colour

    def __call__(self, images: Tensor, numbers: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1], changed by numbers [B, 7] in [0, 1)."""
        numbers = numbers.to(images)
        return self.recoloured(self.moved(images, numbers[:, :4]), 2 * numbers[:, 4:] - 1)

    def moved(self, images: Tensor, numbers: Tensor) -> Tensor:
        """By whole pixels, so that an image that is not turned keeps its values."""
        if not (self.crop or self.flip or self.rotation):
            return images
        height, width = images.shape[-2:]
        angle = (2 * numbers[:, 0] - 1) * math.radians(self.rotation)
        mirror = torch.where(numbers[:, 1] < 0.5, -1.0, 1.0) if self.flip else torch.ones_like(angle)
        right, down = (torch.floor(numbers[:, i] * (2 * self.crop + 1)) - self.crop for i in (2, 3))
        cos, sin, aspect = angle.cos(), angle.sin(), height / width
        # Where each pixel comes from, in units of half an image (F.affine_grid).
        rows = [
            torch.stack([mirror * cos, -sin * aspect, 2 * right / width], 1),
            torch.stack([mirror * sin / aspect, cos, 2 * down / height], 1),
        ]
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
