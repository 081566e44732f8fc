"""Make a data set of glyphs from a folder of fonts: arrays for `data.name: npz/NAME`.

    pip install fonttools
    python benchmarks/universal/glyphs.py FONTS OUT.npz --script latin

FONTS is searched for .ttf, .otf, .ttc and .otc files (of collections the first font is taken); where they can be had
stands in the README beside this file. A font takes part if it has every one of the characters, with ink. Each is drawn
at 44 pixels, bright on dark, its middle and baseline at one place of a square of 64, which is scaled to `--size`.

A font that draws nine in ten characters exactly as an earlier one is left out. A family is what lies in folders of one
name, and families with fonts that draw nearly the same (mean cosine of the images over 0.95: clones, descendants) are
one. Families are taken in the order of the SHA-256 of seed and name, and go to the test part as long as they fit into
`--test_share` of the fonts; all others are trained on. So no font of a test image, nor its bold sister, was seen in
training.
"""

import argparse
import hashlib
import string
import time
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc")
FONT_SIZE, SQUARE, BASELINE = 44, 64, 46  # pixels
SAME, ALIKE = 0.9, 0.95  # of the characters, for one font; cosine, for one family
ROTATION, SCALE, SHIFT = 6.0, 0.1, 3.0  # the largest of jitter: degrees, share, pixels of the square


def list_cjk() -> str:
    """The Chinese characters in the frequent half of each of the Japanese, Chinese and Taiwanese standards."""
    blocks = {"euc_jp": (0xB0A1, 0xCFD3), "gb2312": (0xB0A1, 0xD7F9), "big5": (0xA440, 0xC67E)}

    def is_frequent(character: str, encoding: str) -> bool:
        code = int.from_bytes(character.encode(encoding, "ignore"), "big")
        return blocks[encoding][0] <= code <= blocks[encoding][1]

    characters = map(chr, range(0x4E00, 0xA000))
    return "".join(each for each in characters if all(is_frequent(each, encoding) for encoding in blocks))


def is_accented(character: str) -> bool:
    """Whether it is a letter with an accent, as Unicode takes it apart."""
    parts = unicodedata.decomposition(character)
    return bool(parts) and not parts.startswith("<")


def is_full(character: str) -> bool:
    """Whether it is no small form of another."""
    return "SMALL" not in unicodedata.name(character)


SCRIPTS = {
    "latin": string.digits + string.ascii_letters + string.punctuation + "äöüéèñ",
    "cyrillic": "".join(map(chr, range(0x410, 0x450))) + "Ёё",
    "greek": "".join(map(chr, [*range(0x391, 0x3A2), *range(0x3A3, 0x3AA), *range(0x3B1, 0x3CA)])),
    "cjk": list_cjk(),
    "accents": "".join(filter(is_accented, map(chr, range(0xC0, 0x180)))),
    "kana": "".join(filter(is_full, map(chr, [*range(0x3041, 0x3094), *range(0x30A1, 0x30F5)]))),
}


def draw_font(
    path: Path, characters: str, size: int, copies: int = 0, rng: np.random.Generator | None = None
) -> np.ndarray | None:
    """Draw the characters, uint8 [characters, copies, size, size]; None if the font has not all of them.

    Args:
        path: Of the font.
        characters: To draw.
        size: Pixels, height and width.
        copies: Jittered images of each; 0 for one as it is.
        rng: Draws the jitter.
    """
    drawn = []
    try:
        with TTFont(path, fontNumber=0, lazy=True) as tables:
            known = tables.getBestCmap() or {}
        if any(ord(each) not in known for each in characters):
            return None
        font = ImageFont.truetype(path, FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)
        for each in characters:
            image = Image.new("L", (SQUARE, SQUARE))
            ImageDraw.Draw(image).text((SQUARE / 2, BASELINE), each, fill=255, font=font, anchor="ms")
            if image.getextrema()[1] < 128:
                return None
            versions = [jitter(image, rng) for _ in range(copies)] if rng else [image]
            drawn.append([np.asarray(version.resize((size, size), Image.Resampling.BOX)) for version in versions])
    except Exception as error:  # whatever is wrong with a font, there are others
        print(f"{path.name} is left out: {error}")
        return None
    return np.array(drawn)


def jitter(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Turn, scale and shift an image a little."""
    angle, scale, *shift = rng.uniform(-1, 1, 4) * (np.deg2rad(ROTATION), SCALE, SHIFT, SHIFT)
    cosine, sine = np.array([np.cos(angle), np.sin(angle)]) / (1 + scale)
    turn = np.array([[cosine, -sine], [sine, cosine]])
    x, y = SQUARE / 2 - turn @ (SQUARE / 2 + np.array(shift))
    matrix = (turn[0, 0], turn[0, 1], x, turn[1, 0], turn[1, 1], y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def keep_different(fonts: dict[Path, np.ndarray]) -> dict[Path, np.ndarray]:
    """Leave out fonts that draw most characters exactly as an earlier one; images [characters, copies, size, size]."""
    kept: dict[Path, np.ndarray] = {}
    earlier: dict[tuple[int, bytes], list[Path]] = defaultdict(list)
    for path, images in fonts.items():
        keys = [(number, image.tobytes()) for number, image in enumerate(images)]
        shared = Counter(other for key in keys for other in earlier[key])
        if max(shared.values(), default=0) < SAME * len(keys):
            kept[path] = images
            for key in keys:
                earlier[key].append(path)
    return kept


def name_families(fonts: dict[Path, np.ndarray]) -> list[str]:
    """The family of each font; images [characters, copies, size, size]."""
    cosine = np.zeros((len(fonts), len(fonts)), np.float32)
    characters = len(next(iter(fonts.values())))
    for number in range(characters):
        rows = np.array([images[number].ravel() for images in fonts.values()], np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        cosine += rows @ rows.T
    folders = [path.parent.name for path in fonts]
    joined = {folder: {folder} for folder in folders}
    for first, second in np.argwhere(cosine > ALIKE * characters):
        both = joined[folders[first]] | joined[folders[second]]
        joined.update(dict.fromkeys(both, both))
    return ["+".join(sorted(joined[folder])) for folder in folders]


def choose_test_families(families: list[str], share: float, seed: int) -> set[str]:
    """Families whose fonts are not trained on."""
    counts, chosen, room = Counter(families), set(), share * len(families)
    for family in sorted(counts, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        if counts[family] <= room:
            chosen.add(family)
            room -= counts[family]
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fonts", type=Path, metavar="FONTS")
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument("--script", choices=SCRIPTS, default="latin")
    parser.add_argument("--characters", help="these, in place of a script's")
    parser.add_argument("--classes", type=int, default=0, help="that many of the characters, drawn by the seed; 0: all")
    parser.add_argument("--size", type=int, default=32, help="pixels, height and width")
    parser.add_argument(
        "--copies", type=int, default=0, help="images of each glyph, turned, scaled, shifted; 0: as it is"
    )
    parser.add_argument("--test_share", type=float, default=0.15, help="of the fonts, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started, rng = time.time(), np.random.default_rng(options.seed)
    characters = "".join(sorted(set(options.characters or SCRIPTS[options.script])))
    if options.classes:
        characters = "".join(sorted(rng.choice(list(characters), options.classes, replace=False)))
    paths = sorted(path for path in options.fonts.rglob("*") if path.suffix.lower() in SUFFIXES)
    drawn = {path: draw_font(path, characters, options.size) for path in paths}
    fonts = keep_different({path: images for path, images in drawn.items() if images is not None})
    families = name_families(fonts)
    test_families = choose_test_families(families, options.test_share, options.seed)
    arrays: dict[str, np.ndarray] = {"class_names": np.array(list(characters))}
    for part in ("train", "test"):
        chosen = [
            path for path, family in zip(fonts, families, strict=True) if (family in test_families) == (part == "test")
        ]
        if options.copies:
            images = [draw_font(path, characters, options.size, options.copies, rng) for path in chosen]
        else:
            images = [fonts[path] for path in chosen]
        stacked = np.stack([font for font in images if font is not None], 2)  # [characters, copies, fonts, size, size]
        arrays[f"{part}_images"] = stacked.reshape(-1, options.size, options.size)
        arrays[f"{part}_labels"] = np.repeat(np.arange(len(characters)), stacked.shape[1] * stacked.shape[2])
        count = len(test_families) if part == "test" else len(set(families) - test_families)
        print(f"{part}: {len(arrays[f'{part}_labels']):,} images of {len(chosen)} fonts in {count} families")
    print("test families: " + ", ".join(sorted(test_families)))
    digest = hashlib.sha256(b"".join(arrays[key].tobytes() for key in sorted(arrays))).hexdigest()
    np.savez_compressed(options.out, **arrays)
    print(
        f"{options.out}: {len(characters)} classes, {options.out.stat().st_size / 1e6:.1f} MB, sha256 of the arrays "
        f"{digest[:16]}, {time.time() - started:.0f} s"
    )


if __name__ == "__main__":
    main()
