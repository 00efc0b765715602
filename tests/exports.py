"""A tiny export in place of a trained model's, whose answers can be worked out by hand."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
INPUT_PX, RESIZE_PX = 32, 40
MEAN, STD = (0.5, 0.4, 0.3), (0.25, 0.2, 0.1)  # unequal, so that a mix-up of channels shows
# Each of its signs would mean something in Markdown or HTML.
NAME = "__top*half*__ <b>&amp; `colour` [1](x) #2 $3$"
METADATA = {
    "format": 1,
    "name": NAME,
    "classes": ["n01", "n02", "n03"],
    "labels": ["red", "green", "blue"],
    "input_px": INPUT_PX,
    "resize_px": RESIZE_PX,
    "mean": MEAN,
    "std": STD,
    "resize_rule": "shorter side to resize_px, bilinear, antialiased; centre crop",
    "weights": "best",
    "epoch": 7,
    "val_top1": 81.25,
    "val_top5": 100.0,
    "val_images": 1234,
}


def top_half_colour(with_maps: bool = True) -> bytes:
    """An ONNX file whose logits are each normalised channel's mean over the picture's top half.

    As in a real export the logits are means of activation maps, which may be left out.
    """
    weight = np.zeros((INPUT_PX, 1), np.float32)
    weight[: INPUT_PX // 2] = 2
    constants = {"weight": weight, "places": np.array([2, 3])}
    maps = helper.make_tensor_value_info("activation_maps", TensorProto.FLOAT, ["n", 3, None, None])
    graph = helper.make_graph(
        [
            helper.make_node("Mul", ["images", "weight"], ["activation_maps"]),
            helper.make_node("ReduceMean", ["activation_maps", "places"], ["logits"], keepdims=0),
        ],
        "top_half_colour",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["n", 3, INPUT_PX, INPUT_PX])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3]),
            *([maps] if with_maps else []),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(proto)
    return proto.SerializeToString()


def write_top_half_colour(folder: Path, with_maps: bool = True) -> None:
    """The export of that model in a folder, with two examples and a file that is none."""
    content = top_half_colour(with_maps)
    described = {"onnx": {"file": "model.onnx", "sha256": hashlib.sha256(content).hexdigest()}}
    (folder / "model.onnx").write_bytes(content)
    (folder / "model.json").write_text(json.dumps({**METADATA, "formats": described}))
    (folder / "examples").mkdir()
    Image.new("RGB", (60, 50), BLUE).save(folder / "examples" / "sea.JPEG")
    Image.new("RGB", (60, 50), GREEN).save(folder / "examples" / "meadow.png")
    (folder / "examples" / "notes.txt").write_text("not an example")
