"""Draws docs/concepts/one-token.svg: one token through one layer, on a CPU and on a GPU. Standard library only.

python docs/scripts/one_token.py
"""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).parents[1] / "concepts" / "one-token.svg"
WIDTH, HEIGHT = 1120, 800
LEFT = 150  # where lanes begin: their names are left of it
BOX_HEIGHT = 34
# Boxes by what they are: fill, stroke.
COLOURS = {
    "compute": ("#dbeafe", "#2563eb"),
    "decide": ("#fef3c7", "#d97706"),
    "move": ("#dcfce7", "#16a34a"),
    "ahead": ("#f3e8ff", "#9333ea"),
    "store": ("#e5e7eb", "#4b5563"),
}
LEGEND = {
    "compute": "computes",
    "decide": "decides: route, acquire, release",
    "move": "moves what the router chose",
    "ahead": "moves what is predicted",
    "store": "holds experts",
}


class Picture:
    """An SVG that grows: boxes, arrows and text, in pixels from the top left."""

    def __init__(self) -> None:
        self.parts: list[str] = []

    def text(self, x: float, y: float, text: str, *, size: int = 12, anchor: str = "middle", weight: str = "normal") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
        )

    def box(self, x: float, y: float, width: float, kind: str, *lines: str) -> None:
        """A box whose middle line is ``y``, with one or two lines of text in it."""
        fill, stroke = COLOURS[kind]
        self.parts.append(
            f'<rect x="{x:g}" y="{y - BOX_HEIGHT / 2:g}" width="{width:g}" height="{BOX_HEIGHT}" rx="4" fill="{fill}" '
            f'stroke="{stroke}"/>'
        )
        for number, line in enumerate(lines):
            self.text(x + width / 2, y + 4 + 13 * (number - (len(lines) - 1) / 2), line, size=11)

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="#374151" marker-end="url(#tip)"{dash}/>')

    def lane(self, y: float, *names: str) -> None:
        """A horizontal lane: time runs along it."""
        self.parts.append(f'<line x1="{LEFT}" y1="{y:g}" x2="{WIDTH - 20}" y2="{y:g}" stroke="#d1d5db"/>')
        for number, name in enumerate(names):
            self.text(LEFT - 12, y + 4 + 13 * (number - (len(names) - 1) / 2), name, anchor="end")

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" fill="#111827">\n'
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" orient="auto">'
            '<path d="M0,0 L8,4 L0,8 z" fill="#374151"/></marker></defs>\n'
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def token(picture: Picture, y: float) -> None:
    """The whole token in one row: embedding, layers, head."""
    picture.text(20, y + 4, "one token", anchor="start", weight="bold", size=14)
    x = LEFT
    for width, kind, name in (
        (90, "compute", "embedding"),
        (80, "compute", "layer 0"),
        (40, "compute", "..."),
        (80, "decide", "layer l"),
        (90, "compute", "layer l + 1"),
        (40, "compute", "..."),
        (90, "compute", "norm, head"),
        (100, "compute", "next token"),
    ):
        picture.box(x, y, width, kind, name)
        if name != "next token":
            picture.arrow((x + width, y), (x + width + 26, y))
        x += width + 26
    picture.text(LEFT + 2, y + 38, "layer l is enlarged below; time runs to the right", anchor="start")


def on_cpu(picture: Picture, top: float) -> None:
    compute, reads, slots, disk = top + 60, top + 130, top + 200, top + 260
    picture.text(20, top + 14, "CPU: experts come from disk to slots in RAM", anchor="start", weight="bold", size=14)
    picture.lane(compute, "compute threads")
    picture.lane(reads, "reading threads")
    picture.lane(slots, "RAM")
    picture.lane(disk, "disk")
    picture.box(160, compute, 110, "compute", "norm, attention", "KV cache")
    picture.box(284, compute, 66, "decide", "route")
    picture.box(364, compute, 74, "decide", "acquire")
    picture.box(452, compute, 100, "compute", "shared expert")
    picture.box(566, compute, 120, "compute", "experts that", "were resident")
    picture.box(700, compute, 120, "compute", "experts that", "have arrived")
    picture.box(834, compute, 84, "decide", "sum, release")
    picture.box(944, compute, 140, "compute", "layer l + 1")
    picture.box(420, reads, 250, "move", "demand reads: missing experts of layer l")
    picture.box(690, reads, 250, "ahead", "prefetch: predicted experts of layer l + 1")
    picture.box(160, slots, 900, "store", "slots: one expert each; resident, in flight or locked. The policy names the victim.")
    picture.box(160, disk, 900, "store", "expert store: one blob per expert, a checksum per section, O_DIRECT reads")
    picture.arrow((401, compute + 17), (401, reads), (420, reads))
    picture.arrow((500, disk - 17), (500, slots + 17))
    picture.arrow((800, disk - 17), (800, slots + 17), dashed=True)
    picture.arrow((640, reads + 17), (640, slots - 17))
    picture.arrow((860, reads + 17), (860, slots - 17), dashed=True)
    picture.arrow((660, reads - 17), (735, compute + 17))
    picture.arrow((317, compute + 17), (317, top + 96), (680, top + 96), (720, reads - 17), dashed=True)
    picture.text(412, top + 92, "router input, asked by the predictor", anchor="start", size=11)
    picture.arrow((930, reads - 17), (1000, compute + 17), dashed=True)


def on_gpu(picture: Picture, top: float) -> None:
    graph, copies, vram, ram, disk = top + 60, top + 130, top + 190, top + 245, top + 300
    picture.text(20, top + 14, "GPU: experts come from pinned RAM to slots in VRAM", anchor="start", weight="bold", size=14)
    picture.lane(graph, "main stream,", "one CUDA graph")
    picture.lane(copies, "copy streams")
    picture.lane(vram, "VRAM")
    picture.lane(ram, "pinned RAM")
    picture.lane(disk, "disk")
    picture.box(160, graph, 110, "compute", "norm, attention", "KV cache")
    picture.box(284, graph, 100, "decide", "routers of", "l and l + 1")
    picture.box(398, graph, 150, "decide", "lookup, eviction,", "list of misses")
    picture.box(562, graph, 124, "compute", "resident experts,", "shared expert")
    picture.box(700, graph, 120, "compute", "experts that", "were copied")
    picture.box(834, graph, 84, "compute", "sum")
    picture.box(944, graph, 140, "compute", "layer l + 1")
    picture.box(500, copies, 180, "move", "copy of the misses")
    picture.box(700, copies, 240, "ahead", "prefetch of layer l + 1")
    picture.box(160, vram, 900, "store", "slots of each layer; tables of who is where are on the device")
    picture.box(160, ram, 900, "store", "all experts, or as many as fit")
    picture.box(160, disk, 900, "store", "below RAM where experts do not fit: a mailbox asks the host's reading threads")
    picture.arrow((473, graph + 17), (473, copies), (500, copies))
    picture.arrow((590, copies + 17), (590, vram - 17))
    picture.arrow((820, copies + 17), (820, vram - 17), dashed=True)
    picture.arrow((640, copies - 17), (735, graph + 17))
    picture.arrow((930, copies - 17), (1000, graph + 17), dashed=True)
    picture.arrow((500, ram - 17), (500, vram + 17))
    picture.arrow((500, disk - 17), (500, ram + 17))
    picture.arrow((334, graph + 17), (334, top + 96), (690, top + 96), (730, copies - 17), dashed=True)
    picture.text(484, top + 92, "router of l + 1 on the input of layer l", anchor="start", size=11)


def draw() -> str:
    """The picture's text."""
    picture = Picture()
    token(picture, 40)
    on_cpu(picture, 110)
    on_gpu(picture, 410)
    x = float(LEFT)
    for kind, meaning in LEGEND.items():
        fill, stroke = COLOURS[kind]
        picture.parts.append(f'<rect x="{x:g}" y="752" width="16" height="16" rx="3" fill="{fill}" stroke="{stroke}"/>')
        picture.text(x + 22, 765, meaning, anchor="start")
        x += 46 + 6.4 * len(meaning)
    return picture.svg()


if __name__ == "__main__":
    OUT.write_text(draw())
    print(OUT)
