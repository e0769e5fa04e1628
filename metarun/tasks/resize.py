"""Stored images in another size and number of channels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in grey, as in Pillow's mode L
BLOCK = 1024  # images at a time, which bounds the memory


def resized(pixels: Tensor, item_shape: tuple[int, ...]) -> Tensor:
    """Images [B, C, H, W] uint8 resized with antialiasing and stretched to [B, *item_shape].

    Colour is reduced to grey by its luma; grey is repeated in every channel.
    """
    if tuple(pixels.shape[1:]) == tuple(item_shape):
        return pixels
    channels, *size = item_shape
    result = torch.empty(len(pixels), *item_shape, dtype=torch.uint8, device=pixels.device)
    for source, target in zip(pixels.split(BLOCK), result.split(BLOCK), strict=True):
        block = source.float()
        if channels < block.shape[1]:
            block = (block * block.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        if list(block.shape[2:]) != size:
            block = F.interpolate(block, size, mode="bilinear", antialias=True)
        target.copy_(block.round_().clamp_(0, 255))
    return result
