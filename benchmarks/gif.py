"""Make a small GIF of a film, for pages that show pictures but no films.

    pip install -r benchmarks/requirements.txt
    python evaluate.py runs/<run> --episodes 1 --video film.mp4
    python benchmarks/gif.py film.mp4 film.gif --start 20 --seconds 10

It shows about 15 pictures a second in at most 32 colors.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import cv2
import tyro
from PIL import Image


@dataclass
class Args:
    film: tyro.conf.Positional[Path]
    gif: tyro.conf.Positional[Path]
    start: float = 0.0  # seconds into the film
    seconds: float = 10.0  # length
    scale: float = 1.0  # size of the picture, 1 as in the film


def main(args):
    film = cv2.VideoCapture(str(args.film))
    fps = film.get(cv2.CAP_PROP_FPS)
    if not film.isOpened():
        sys.exit(f"gif.py: {args.film} is no film that OpenCV can read.")
    film.set(cv2.CAP_PROP_POS_FRAMES, int(args.start * fps))
    step = max(1, round(fps / 15))  # browsers show a GIF at up to 50 pictures a second, but 15 are enough
    pictures = []
    for i in range(int(args.seconds * fps)):
        found, picture = film.read()
        if not found:
            break
        if i % step == 0:
            picture = Image.fromarray(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB))
            size = [round(length * args.scale) for length in picture.size]
            pictures.append(picture.resize(size, Image.Resampling.NEAREST).quantize(32))
    if not pictures:
        sys.exit(f"gif.py: {args.film} has no pictures from {args.start} s on, for {args.seconds} s.")
    duration = round(100 * step / fps) * 10  # milliseconds of a picture: a GIF counts hundredths of a second
    pictures[0].save(args.gif, save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    print(f"{args.gif}: {len(pictures)} pictures, {args.gif.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
