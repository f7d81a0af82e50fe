"""Two pictures for the docs: how data flows through ppo_atari.py, and the ring in which dqn_atari.py stores frames.

    pip install -r benchmarks/requirements.txt
    python benchmarks/diagrams.py

It draws data_flow.png and ring_buffer.png into docs/images. What is set in typewriter letters stands in the code. A
test looks it up there, compares the sizes with the defaults, and plays the example of the ring on the real buffer.
"""

from pathlib import Path

import matplotlib
import tyro

matplotlib.use("Agg")  # draws into files, also where there is no display
from matplotlib import pyplot
from PIL import Image  # comes with matplotlib

OUT = Path(__file__).resolve().parents[1] / "docs/images"
BLUE, YELLOW, GREEN, GRAY, WHITE, INK = "#d3e4f5", "#fae6a6", "#cfe9c9", "#e4e4e4", "#ffffff", "#222222"
AROUND = dict(facecolor=WHITE, edgecolor=WHITE, pad=2)  # of a word that interrupts a line

# The defaults of ppo_atari.py
NUM_STEPS, NUM_ENVS, NUM_MINIBATCHES, UPDATE_EPOCHS, SAVE_FREQ = 128, 8, 4, 4, 500_000

# The ring's example: the frames of one game in each row, oldest first. Game a was truncated, game b goes on.
FRAMES = "a10 a11 a12 a13 a14 a15 a16 a17 a18 a19 b0 b1 b2 b3 b4 b5 b6".split()
NUM_EARLIER = [3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 0, 1, 2, 3, 3, 3, 3]
TRUNCATED, FINAL_FRAME = 9, "a20"  # the row at whose step game a was truncated, and what was seen then
SPARE, STACKS_ONLY, SAMPLED = 2, 3, 11  # numbers of rows, oldest first; behind them, the one without an action
DEFAULT_ROWS, DEFAULT_SAMPLED = 187_505, 125_000  # with the defaults of dqn_atari.py
SAMPLES = {  # row -> the 5 frames that sample() returns for it, and what to see in them
    5: ("a12 a13 a14 a15 a16", "Row 5 is the oldest that is sampled.", "Its stack needs the 3 rows before it."),
    9: (
        "a16 a17 a18 a19 a20",
        "In row 9 game a was truncated. Row 10 is",
        "game b's: the last frame of a is put aside.",
    ),
    11: ("0 0 b0 b1 b2", "In row 11, num_earlier is 1: of the frames", "before it, the other 2 count as zeros."),
    15: ("b2 b3 b4 b5 b6", "Row 15 is the newest that is sampled:", "what was seen next is in the row after it."),
}


def canvas(height):
    """A figure whose unit is a pixel of a picture that is shown 900 wide. y points down."""
    figure, axes = pyplot.subplots(figsize=(9, height / 100), dpi=150)
    figure.subplots_adjust(0, 0, 1, 1)
    axes.set(xlim=(0, 900), ylim=(height, 0))
    axes.axis("off")
    return figure, axes


def write(axes, x, y, words, size=11, align="left", **style):
    """One line of text; if in `backquotes`, in typewriter letters."""
    family = "monospace" if words.startswith("`") else "sans-serif"
    axes.text(x, y, words.strip("`"), size=size, ha=align, va="center", family=family, color=INK, **style)


def rectangle(axes, x, y, width, height, color, edge=1.2):
    """With its upper left corner at (x, y)."""
    axes.add_patch(pyplot.Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=edge))


def box(axes, x, y, width, height, title, *lines):
    """A part of the program, and what is to be said of it."""
    rectangle(axes, x, y, width, height, WHITE)
    write(axes, x + 12, y + 20, title, size=12.5, weight="bold")
    for i, words in enumerate(lines):
        write(axes, x + 12, y + 46 + 21 * i, words)


def arrow(axes, *points):
    """A line through `points` with a head at the last."""
    axes.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.6)
    style = dict(arrowstyle="-|>", mutation_scale=16, color=INK, linewidth=1.6, shrinkA=0, shrinkB=0)
    axes.annotate("", points[-1], points[-2], arrowprops=style)


def draw_data_flow():
    figure, axes = canvas(height=590)
    write(axes, 10, 22, "How data flows through ppo_atari.py, with its defaults", size=14, weight="bold")
    rectangle(axes, 10, 46, 628, 370, BLUE, edge=0)  # the parts of train(), by their comments
    write(axes, 24, 64, f"`# Collect: T = {NUM_STEPS} steps of N = {NUM_ENVS} games`")
    rectangle(axes, 652, 46, 238, 134, YELLOW, edge=0)
    write(axes, 662, 64, "`# Estimate`")
    rectangle(axes, 652, 246, 238, 170, GREEN, edge=0)
    write(axes, 696, 264, "`# Learn`")

    box(axes, 24, 82, 290, 110, "`AtariGames`", "`from make_envs`", "N games in lockstep", "rewards of −1, 0 or 1")
    arrow(axes, (44, 192), (44, 284))
    write(axes, 56, 220, "`obs (N, 4, 84, 84) uint8`")
    agent = ["one CNN, two heads; A actions", "`logits (N, A), values (N,)`", "`sample(logits)`"]
    box(axes, 24, 284, 290, 112, "`Agent`", *agent)
    arrow(axes, (294, 284), (294, 192))
    write(axes, 282, 252, "`actions (N,) int64`", align="right")

    arrow(axes, (314, 136), (352, 136))
    arrow(axes, (314, 312), (604, 312), (604, 236))
    write(axes, 326, 298, "`actions, logprobs, values`")
    fields = ["`actions, logprobs, values,`", "`rewards, terminated,`", "`truncated, final_values`"]
    box(axes, 352, 82, 274, 154, "`Rollout`", "`obs (T, N, 4, 84, 84) uint8`", *fields, "(T, N) each")

    batch_size = NUM_STEPS * NUM_ENVS
    arrow(axes, (626, 126), (662, 126))
    box(axes, 662, 82, 218, 88, "`compute_gae`", "`advantages (T, N)`", "`returns (T, N)`")
    arrow(axes, (682, 170), (682, 282))
    write(axes, 696, 200, "`Rollout.flatten`")
    write(axes, 696, 224, f"`B = T * N = {batch_size:,}`")
    minibatches = f"in {NUM_MINIBATCHES} minibatches of {batch_size // NUM_MINIBATCHES}."
    update = [f"{UPDATE_EPOCHS} passes over the B rows,", minibatches, "For each an Adam step on", "`ppo_loss`"]
    box(axes, 662, 282, 218, 124, "`ppo_update`", *update)
    arrow(axes, (662, 372), (314, 372))
    write(axes, 488, 358, "new weights, for the next rollout", align="center")

    arrow(axes, (44, 396), (44, 470))
    write(axes, 56, 442, f"every {SAVE_FREQ:,} steps, and at the end")
    contents = ["`runs/<run>/checkpoints/`", "model, optimizer, arguments:", "what --resume continues from"]
    box(axes, 24, 470, 290, 110, "`Run.save`", *contents)
    arrow(axes, (314, 525), (352, 525))
    use = ["plays whole games with the", "newest checkpoint, and prints", "the mean score"]
    box(axes, 352, 470, 274, 110, "`evaluate.py`", *use)
    arrow(axes, (682, 406), (682, 470))
    write(axes, 696, 442, "`metrics`")
    box(axes, 662, 470, 218, 110, "`Run.log`", "curves for TensorBoard", "`charts/...`", "`losses/...`")
    return figure


def draw_ring_buffer():
    figure, axes = canvas(height=736)
    left, width = 136, 44.3  # of row 0; of every row
    newest = len(FRAMES) - 1

    def frame(row, y, name, color):
        rectangle(axes, left + width * row, y, width, 28, color)
        write(axes, left + width * (row + 0.5), y + 14, name, align="center")

    def bracket(first, last, y, words, tick):
        """Over (tick > 0) or under the rows from first to last, with words in its middle."""
        x1, x2 = left + width * first + 3, left + width * (last + 1) - 3
        axes.plot([x1, x1, x2, x2], [y + tick, y, y, y + tick], color=INK, linewidth=1.2)
        write(axes, (x1 + x2) / 2, y, words, align="center", bbox=AROUND)

    write(axes, 10, 22, "ReplayBuffer in dqn_atari.py: a ring that stores each frame once", size=14, weight="bold")
    write(
        axes,
        10,
        50,
        "A row is one step of all N games; here is one of them. a10 is frame 10 of game a. At the thick line b begins.",
    )

    # The ring, cut open between its newest and its oldest row
    x1, x2 = left + width * 0.5, left + width * (newest + 0.5)
    arrow(axes, (x2, 102), (x2, 82), (x1, 82), (x1, 102))
    sizes = f"{len(FRAMES)} rows here, {DEFAULT_ROWS:,} by default"
    write(axes, (x1 + x2) / 2, 82, f"the next row is written over the oldest: {sizes}", align="center", bbox=AROUND)
    for y, label in ((114, "row"), (142, "`frame`"), (170, "action, outcome"), (194, "`num_earlier`")):
        write(axes, 10, y, label)
    colors = [GRAY] * SPARE + [YELLOW] * STACKS_ONLY + [BLUE] * SAMPLED + [WHITE]
    for row, name in enumerate(FRAMES):
        x = left + width * (row + 0.5)
        write(axes, x, 114, str(row), align="center")
        frame(row, 128, name, colors[row])
        write(axes, x, 170, "✓" if row < newest else "–", align="center")
        write(axes, x, 194, str(NUM_EARLIER[row]), align="center")
    boundary = left + width * (TRUNCATED + 1)
    axes.plot([boundary, boundary], [106, 204], color=INK, linewidth=3)
    bracket(0, SPARE - 1, 218, "spare", tick=-6)
    bracket(SPARE, SPARE + STACKS_ONLY - 1, 218, "for stacks", tick=-6)
    sizes = f"{SAMPLED} rows here, {DEFAULT_SAMPLED:,} by default"
    bracket(SPARE + STACKS_ONLY, newest - 1, 218, f"sampled: {sizes}", tick=-6)
    write(axes, x2, 218, "new", align="center")
    write(axes, 10, 250, "New: what was seen last. Its action is not chosen yet.")
    write(axes, 10, 272, "For stacks: too old to be sampled, kept to complete the stacks of the rows after them.")
    write(axes, 10, 294, "Spare: older still, kept for the last checkpoint, from which a run that was killed goes on.")

    write(axes, 10, 332, "What sample() returns for a row", size=12.5, weight="bold")
    write(axes, 10, 357, "5 frames: the first 4 are s, what was seen; the last 4 are s', what was seen next.")
    for i, (row, (names, *lines)) in enumerate(SAMPLES.items()):
        y = 390 + 88 * i
        bracket(row - 3, row, y, "s", tick=6)
        for k, name in enumerate(names.split(), row - 3):
            frame(k, y + 15, name, GREEN if name == FINAL_FRAME else WHITE if name == "0" else colors[k])
        bracket(row - 2, row + 1, y + 58, "s'", tick=-6)
        for j, words in enumerate(lines):
            write(axes, left + width * 7.4 if row == 5 else 10, y + 18 + 22 * j, words)
        if row == TRUNCATED:
            arrow(axes, (left + width * 11.7, y + 29), (left + width * 11.1, y + 29))
            write(axes, left + width * 11.9, y + 29, f"`final_frames[{row}, n]`")
    return figure


def save(figure, name):
    """With 64 colors: a third of the bytes, and looks the same."""
    figure.canvas.draw()
    picture = Image.frombuffer("RGBA", figure.canvas.get_width_height(), figure.canvas.buffer_rgba())
    picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(OUT / name, optimize=True)


def main():
    save(draw_data_flow(), "data_flow.png")
    save(draw_ring_buffer(), "ring_buffer.png")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
