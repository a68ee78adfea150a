"""EuroSAT's satellite photographs of land, 64 x 64 pixels in ten classes, as shards.

    python -m tools.data.eurosat SOURCE OUT [--train 400] [--tail 50]

SOURCE is a folder, or a tar, with {train,val,test}/{label}/*.png, the label being a class's number. Fields: the image
as it is; `cls`, its label. OUT/classes.json names the classes. `--tail`: see long_tail.py; val and test stay balanced.
"""

from __future__ import annotations

from tools.data.cifar10 import arguments, load, write

SPLITS = ("train", "val", "test")
CLASSES = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__).parse_args(argv)
    images = load(args.source, SPLITS)
    labels = {key[1] for key in images}
    if labels != {str(label) for label in range(len(CLASSES))}:
        raise ValueError(f"{str(args.source)!r} has the labels {sorted(labels)}; EuroSAT's are 0 to 9")
    write(images, args, CLASSES)


if __name__ == "__main__":
    main()
