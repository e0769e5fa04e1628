"""Where the files of torchvision's datasets are downloaded from, and what they are unpacked to.

torchvision keeps these facts in private attributes or inside its functions, and unpacks archives without
checking their members; so they are written down here, and metarun downloads and unpacks the files itself.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Source(NamedTuple):
    """One file to download."""

    urls: tuple[str, ...]  # of the same file; a later one is tried where an earlier one fails
    md5: str | None  # of the file; None: no checksum is published for it
    folder: str = "."  # where it goes, below the folder that torchvision calls root
    unpack: Literal["tar", "zip", "gzip"] | None = None  # None: the file is used as it is
    inner: str = ""  # a pattern of gzip files in the archive; they are decompressed, and the others deleted

    @property
    def name(self) -> str:
        return self.urls[0].rpartition("/")[2]


def _idx(kind: str, mirrors: tuple[str, ...], sums: tuple[str, str, str, str]) -> list[Source]:
    """The four gzip files of a set in MNIST's format, with their md5 sums."""
    names = [
        f"{part}-{what}-ubyte.gz" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
    ]
    return [
        Source(tuple(mirror + name for mirror in mirrors), md5, f"{kind}/raw", "gzip")
        for name, md5 in zip(names, sums, strict=True)
    ]


_CIFAR = "https://www.cs.toronto.edu/~kriz/"
_VGG = "https://www.robots.ox.ac.uk/~vgg/data/"
_FLOWERS = f"{_VGG}flowers/102/"
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/"
_SVHN = "http://ufldl.stanford.edu/housenumbers/"

# By the name of the class in torchvision.datasets.
SOURCES: dict[str, list[Source]] = {
    "CIFAR10": [Source((f"{_CIFAR}cifar-10-python.tar.gz",), "c58f30108f718f92721af3b95e74349a", ".", "tar")],
    "CIFAR100": [
        Source((f"{_CIFAR}cifar-100-python.tar.gz",), "eb9058c3a382ffc7106e4002c42a8d85", ".", "tar")
    ],
    "DTD": [
        Source((f"{_VGG}dtd/download/dtd-r1.0.1.tar.gz",), "fff73e5086ae6bdbea199a49dfb8a4c1", "dtd", "tar")
    ],
    "EMNIST": [
        Source(
            ("https://biometrics.nist.gov/cs_links/EMNIST/gzip.zip",),
            "58c8d27c78d21e728a6bc7b3cc06412e",
            "EMNIST/raw",
            "zip",
            inner="gzip/emnist-letters-*.gz",
        )
    ],
    "FGVCAircraft": [Source((f"{_VGG}fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz",), None, ".", "tar")],
    "FashionMNIST": _idx(
        "FashionMNIST",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        (
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
    ),
    "Flowers102": [
        Source((f"{_FLOWERS}102flowers.tgz",), "52808999861908f626f3c1f4e79d11fa", "flowers-102", "tar"),
        Source((f"{_FLOWERS}imagelabels.mat",), "e0620be6f572b9609742df49c70aed4d", "flowers-102"),
        Source((f"{_FLOWERS}setid.mat",), "a5357ecc9cb78c4bef273ce3793fc85c", "flowers-102"),
    ],
    "GTSRB": [
        Source((f"{_GTSRB}GTSRB-Training_fixed.zip",), "513f3c79a4c5141765e10e952eaa2478", "gtsrb", "zip"),
        Source((f"{_GTSRB}GTSRB_Final_Test_Images.zip",), "c7e4e6327067d32654124b0fe9e82185", "gtsrb", "zip"),
        Source((f"{_GTSRB}GTSRB_Final_Test_GT.zip",), "fe31e9c9270bbcd7b84b7f21a9d9d9e5", "gtsrb", "zip"),
    ],
    "KMNIST": _idx(
        "KMNIST",
        ("http://codh.rois.ac.jp/kmnist/dataset/kmnist/",),
        (
            "bdb82020997e1d708af4cf47b453dcf7",
            "e144d726b3acfaa3e44228e80efcd344",
            "5c965bf0a639b31b8f53240b1b52f4d7",
            "7320c461ea6c1c855c0b718fb2a4b134",
        ),
    ),
    "MNIST": _idx(
        "MNIST",
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "http://yann.lecun.com/exdb/mnist/"),
        (
            "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "d53e105ee54ea40749a09fcbcd1e9432",
            "9fb629c4189551a2d022fa330f9573f3",
            "ec29112dd5afa0611ce80d1b7f02629c",
        ),
    ),
    "SVHN": [
        Source((f"{_SVHN}train_32x32.mat",), "e26dedcc434d2e4c54c9b2d4a06d8373"),
        Source((f"{_SVHN}test_32x32.mat",), "eb5a983be6a315427106f1b164d9cef3"),
    ],
}
