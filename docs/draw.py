"""Draw docs/one-block.svg from the presets of conf/model: what fills each slot of the one block, family by family.

    python docs/draw.py            # writes the picture
    python docs/draw.py --check    # fails if the committed picture is another one

A column is a preset. From below to above: the frontend, one layer with its slots (a second one where layers differ), the
head. An encoder stands to the left of the decoder that reads it, a tower beside the one it is compared with. Equal parts
have equal colours in all columns.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import yaml

from conf.typed import from_plain
from model.config import LayerConfig, ModelConfig

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "one-block.svg"
SHOWN = (
    ("transformer-base", "Transformer"),
    ("gpt2-124m", "GPT-2"),
    ("llama-8b", "LLaMA"),
    ("palm-8b", "PaLM"),
    ("bert-base", "BERT"),
    ("t5-small", "T5"),
    ("vit-base", "ViT"),
    ("whisper-small", "Whisper"),
    ("clip-base", "CLIP"),
    ("longformer-base", "Longformer"),
    ("dalle-12b", "DALL-E"),
    ("mixtral-8x7b", "Mixtral"),
    ("mamba-130m", "Mamba"),
    ("hybrid-small", "hybrid"),
)
"""(preset, what it is called); presets that are not there are left out."""

WIDTH, HEIGHT, GAP = 104, 22, 6
COLOURS = {"mixer": "#cfe3f7", "ffn": "#fde2c0", "norm": "#e8e8e8", "cross": "#bfe6d3", "end": "#efd9ef"}


@dataclass(frozen=True)
class Box:
    """One part: what it says and which colour it has."""

    words: str
    colour: str
    beside: bool = False
    """It shares its height with the next one: parallel branches."""


def main() -> int:
    """0 when the picture is written, or is what would be written."""
    drawn = draw([(title, load(ROOT / "conf" / "model" / f"{name}.yaml")) for name, title in SHOWN if there(name)])
    if "--check" in sys.argv[1:]:
        return 0 if PICTURE.exists() and PICTURE.read_text(encoding="utf-8") == drawn else 1
    PICTURE.write_text(drawn, encoding="utf-8")
    return 0


def there(name: str) -> bool:
    """Whether conf/model has that preset."""
    return (ROOT / "conf" / "model" / f"{name}.yaml").exists()


def load(path: Path) -> ModelConfig:
    """A preset as the value that the model room builds from."""
    return from_plain(ModelConfig, yaml.safe_load(path.read_text(encoding="utf-8")), "model")


def column(config: ModelConfig) -> list[list[Box]]:
    """Groups of boxes from the input to the output: frontend, every kind of layer, head."""
    front = [Box(frontend_words(config), COLOURS["end"])]
    kinds = list(dict.fromkeys(config.layers))
    layers = [[*slots(config, layer), Box(times(config, layer), "none")] for layer in kinds]
    heads = [] if config.head.kind == "none" else [[Box(f"{config.head.kind} head", COLOURS["end"])]]
    return [front, *layers, *heads]


def frontend_words(config: ModelConfig) -> str:
    """The frontend's kind and what tells it positions."""
    kind, position = config.frontend.kind, config.position.kind
    return kind if position == "none" else f"{kind} + {position}"


def times(config: ModelConfig, layer: LayerConfig) -> str:
    """How many layers are like this one."""
    return f"× {config.layers.count(layer)}"


def slots(config: ModelConfig, layer: LayerConfig) -> list[Box]:
    """The parts of a layer in the order in which a token meets them."""
    norm = Box({"rms": "RMSNorm", "layer": "LayerNorm"}[config.norm.kind], COLOURS["norm"])
    branches = [Box(mixer_words(layer.mixer), COLOURS["mixer"])]
    if layer.cross is not None:
        branches.append(Box("cross-attention", COLOURS["cross"]))
    if layer.ffn.kind != "none":
        branches.append(Box(ffn_words(layer.ffn), COLOURS["ffn"]))
    if config.layout.startswith("parallel"):
        return [norm, *(replace(branch, beside=branch is not branches[-1]) for branch in branches)]
    before = config.layout == "pre"
    return [box for branch in branches for box in ((norm, branch) if before else (branch, norm))]


def mixer_words(mixer: Any) -> str:
    """What mixes the tokens, in few words."""
    if mixer.kind == "grid":
        return f"image {mixer.pattern}"
    if mixer.kind != "attention":
        return str(mixer.kind).replace("_", " ")
    if mixer.window is not None:
        return f"attention, window {mixer.window}"
    return "attention" if mixer.kv_heads == mixer.n_heads else f"attention {mixer.n_heads}:{mixer.kv_heads}"


def ffn_words(ffn: Any) -> str:
    """What works on each token, in few words."""
    if ffn.kind == "moe":
        return f"{ffn.n_experts} experts, top {ffn.top_k}"
    return f"{ffn.activation} gated" if ffn.gated else str(ffn.activation)


def draw(models: list[tuple[str, ModelConfig]]) -> str:
    """The picture as SVG."""
    towers: list[tuple[str, list[list[Box]]]] = []
    for title, config in models:
        inner = config.encoder or config.tower
        if inner is not None:
            towers.append((f"{title} {'encoder' if config.encoder else 'images'}", column(inner)))
            towers.append((f"{title} {'decoder' if config.encoder else 'text'}", column(config)))
        else:
            towers.append((title, column(config)))
    tallest = max(sum(len(group) * (HEIGHT + 2) + 3 * GAP for group in groups) for _, groups in towers)
    width, height = len(towers) * (WIDTH + 2 * GAP) + GAP, tallest + 3 * HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        f'font-size="10" text-anchor="middle">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, groups) in enumerate(towers):
        x, y = GAP + number * (WIDTH + 2 * GAP), height - HEIGHT - GAP
        parts.append(text(x, y + HEIGHT - 6, title, bold=True))
        y -= GAP
        for group in groups:
            bottom = y
            second = False  # of two branches side by side
            for box in group:
                left, wide = (x + WIDTH // 2 if second else x), (WIDTH // 2 if second or box.beside else WIDTH)
                y -= 0 if second else HEIGHT + 2
                second = box.beside
                if box.colour == "none":
                    y += 6
                    parts.append(text(x, y + HEIGHT - 8, box.words))
                    continue
                parts.append(
                    f'<rect x="{left}" y="{y}" width="{wide}" height="{HEIGHT}" rx="3" fill="{box.colour}" '
                    'stroke="#888"/>'
                )
                parts.append(text(left, y + 14, box.words, wide=wide))
            if len(group) > 1:
                parts.append(
                    f'<rect x="{x - 3}" y="{y - 2}" width="{WIDTH + 6}" height="{bottom - y + 3}" rx="5" fill="none" '
                    'stroke="#555"/>'
                )
            y -= 2 * GAP
    return "\n".join([*parts, "</svg>\n"])


def text(x: int, y: int, words: str, *, bold: bool = False, wide: int = WIDTH) -> str:
    """Words in the middle of a box."""
    style = ' font-weight="bold"' if bold else ' font-size="8"' if wide < WIDTH else ""
    return f'<text x="{x + wide // 2}" y="{y}"{style}>{escape(words)}</text>'


if __name__ == "__main__":
    sys.exit(main())
