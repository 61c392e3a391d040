"""``nasdet arch export``: a card as a Python file, or a trained detector as a program or an ONNX model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from nasdet.spaces.assemble import ModelConfig

HELP = "a NATS card as a Python file; a trained detector for torch.export or ONNX; all without nasdet"

_DESCRIPTION = """\
Write a file that needs no nasdet.

--format python: a NATS card as a Python file, torch its only import, with the card's GENOTYPE and transform(network,
GENOTYPE), which gives a network's convolutions their dilations: your own ResNet, torchvision's, timm's. Weights and
their names stay those of the network.

--format torch, --format onnx: a trained detector, whole: backbone, pyramid, towers or heads, RPN, RoI pooling, decoding
and suppression, of PyTorch's own operators (file.pt2, for torch.export.load) or as an ONNX model (opset 18 or later;
onnx, onnxscript and onnxruntime must be installed: pip install 'nasdet[onnx]'). Every shape in it is fixed.
"""

_EPILOG = """\
examples:
  nasdet arch export runs/nats/card.json --out my_backbone.py
  nasdet arch export runs/net --out net.onnx                              a training run
  nasdet arch export runs/net --out net.pt2 --size 480x640 --batch 4
  nasdet arch export fad-paper --weights runs/fad/weights.safetensors --format onnx --out fad.onnx

a trained detector takes, in this order,
  images     float32 [N, 3, H, W]: RGB, (value - mean) / std, zero-padded at the bottom and right; mean and std are
             among the file's facts
  sizes      int64 [N, 2]: height and width of each picture within the padding; boxes stay inside
  threshold  float32 []: the score (FCOS: class probability) that a detection must be above; training used 0.05

and gives, best first, for at most D objects (100)
  boxes      float32 [N, D, 4]: x1, y1, x2, y2 in pixels of the padded picture
  scores     float32 [N, D]
  labels     int64 [N, D]: place in the categories; -1, with a score and a box of 0, where there is no further object
  mask_logits [N, D, 28, 28] over each box, and mask_scores [N, D], from the detectors that have them
  and what these came from: maps such as cls_p3; proposals, probabilities and deltas of two-stage detectors

Before the file is written, the exported model runs, ONNX by onnxruntime on the CPU, and every output is compared with
the detector's own; a model that differs is not written. Facts (categories, mean, std, shapes) are the ONNX file's
metadata, or nasdet.json among the extra files of the program.
"""

_SUFFIXES = {".onnx": "onnx", ".pt2": "torch"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the action to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("card", metavar="CARD|NAME|RUN", help="a card, by file or name; 'plain'; or the folder of a training run")
    add("--out", required=True, metavar="FILE", help="the file to write")
    add("--format", choices=("python", "torch", "onnx"), help="(by FILE's name: .pt2 torch, .onnx onnx, else python)")
    add("--weights", type=Path, metavar="W", help="the detector's weights, in the folder of its run (RUN's own)")
    add("--size", metavar="HxW", help="padded picture size in pixels, multiples of 32 (what it was trained for)")
    add("--batch", type=int, default=1, metavar="N", help="pictures at a time (1)")


def run(
    card: str,
    out: str,
    format: str | None = None,
    weights: Path | None = None,
    size: str | None = None,
    batch: int = 1,
) -> int:
    """Write the file, and print where it is and what it takes."""
    format = format or _SUFFIXES.get(Path(out).suffix, "python")
    if format == "python":
        if weights is not None or size is not None or batch != 1:
            raise ValueError("--weights, --size and --batch need --format torch or onnx: a Python file holds none")
        if Path(card).is_dir():
            raise ValueError(f"--out must end in .pt2 or .onnx, or have a --format, for the run {card}, got {out}")
        return _python(card, out)
    from nasdet.cli.arch_info import parse_size
    from nasdet.engine.export import export_detector

    model, config = _trained(card, weights)
    pixels = None if size is None else parse_size(size)
    facts = export_detector(model, config, out, format=format, size=pixels, batch=batch)
    shape = "x".join(map(str, facts["images"]))
    print(f"{out}: {config.detector}, {len(config.categories)} categories, images {shape}; agrees with the original")
    return 0


def _python(card: str, out: str) -> int:
    from nasdet.arch import load_card
    from nasdet.spaces.nats import save_plain_source

    print(save_plain_source(load_card(card), out))
    return 0


def _trained(card: str, weights: Path | None) -> tuple[nn.Module, ModelConfig]:
    """The detector of a run, or the one that ``weights`` belong to, which must be the card's."""
    from nasdet.arch import load_card
    from nasdet.engine.evaluate import load_run

    if Path(card).is_dir():
        return load_run(card, weights=weights)
    if weights is None:
        raise ValueError(f"--weights must name the trained weights of {card}'s detector, got none")
    folders = [weights.resolve().parent, weights.resolve().parent.parent]
    folder = next((folder for folder in folders if (folder / "model.json").is_file()), None)
    if folder is None:
        raise FileNotFoundError(f"{weights}: no model.json beside it: --weights must lie in the folder of a run")
    model, config = load_run(folder, weights=weights)
    wanted = None if card == "plain" else load_card(card)
    if (wanted and wanted.key) != (config.card and config.card.key):
        trained = "plain" if config.card is None else f"{config.card.name} ({config.card.method})"
        raise ValueError(f"--weights must be those of {card}, got {folder}'s of {trained}")
    return model, config
