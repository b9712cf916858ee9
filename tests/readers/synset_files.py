import io
from pathlib import Path

from PIL import Image

IMAGENET10 = [
    "n02056570",
    "n02085936",
    "n02128757",
    "n02690373",
    "n02692877",
    "n03095699",
    "n04254680",
    "n04285008",
    "n04467665",
    "n07747607",
]
DOGS = [
    "n02085936",
    "n02086646",
    "n02088238",
    "n02091467",
    "n02097130",
    "n02099601",
    "n02101388",
    "n02101556",
    "n02102177",
    "n02105056",
    "n02105412",
    "n02105855",
    "n02107142",
    "n02110958",
    "n02112137",
]


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (64, 64), value).save(buffer, "JPEG")
    return buffer.getvalue()


def put(root: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(jpeg(value))
    return root


def put_tiny_imagenet(root: Path) -> Path:
    put(
        root,
        "train/n02124075/images/n02124075_0.JPEG",
        "train/n02124075/images/n02124075_1.JPEG",
        "train/n01443537/images/n01443537_0.JPEG",
        "val/images/val_0.JPEG",
        "val/images/val_1.JPEG",
        "test/images/test_0.JPEG",
    )
    (root / "wnids.txt").write_text("n02124075\nn01443537\n")
    (root / "words.txt").write_text("n01443537\tgoldfish, Carassius auratus\nn02124075\tEgyptian cat\n")
    (root / "train/n02124075/n02124075_boxes.txt").write_text("n02124075_0.JPEG\t0\t10\t63\t58\n")
    (root / "val/val_annotations.txt").write_text(
        "val_0.JPEG\tn01443537\t0\t32\t44\t62\nval_1.JPEG\tn02124075\t52\t55\t57\t59\n"
    )
    return root


def put_imagenet(root: Path, synsets: list[str], splits: tuple[str, ...] = ("train", "val")) -> Path:
    put(root, *[f"{split}/{synset}/{synset}_{row}.JPEG" for split in splits for synset in synsets for row in (7, 10)])
    return root
