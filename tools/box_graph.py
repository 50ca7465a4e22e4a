"""What a model of the box computes, as an ONNX graph in int8 whose weights stay in its file.

python tools/box_graph.py celltyper/box/nuclei

Weights of the matrix products are read from ``model.safetensors``, transposed and quantised when
ONNX Runtime loads the graph; what cannot be found there, convolutions with their normalisation
folded in and position embeddings, lies in the graph. Activations are quantised tile by tile.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from celltyper.atomic import atomic_path
from celltyper.checkpoints import load_model
from celltyper.exported import EXPORTED_FILE, FACTS, ExportedModel
from celltyper.exporting import export_model, made_images
from celltyper.library.files import MODEL_FILE
from celltyper.types import PHENOTYPE

LARGE = 4096
"""Bytes from which on a tensor is read from the file of the model."""

MOST = 0.01
"""Mean difference of probabilities from those of the model that a graph may have."""


def write_graph(folder: Path) -> float:
    """Write ``model.onnx`` beside ``model.safetensors``.

    Parameters
    ----------
    folder : Path
        Of a model.

    Returns
    -------
    float
        Mean absolute difference of the phenotype map from that of the model, on made tissue.

    Raises
    ------
    RuntimeError
        If it is more than `MOST`.
    """
    model = load_model(folder)
    with tempfile.TemporaryDirectory() as temporary:
        plain, small = Path(temporary) / "plain.onnx", Path(temporary) / "small.onnx"
        facts = export_model(model, plain).facts
        quantize_dynamic(
            plain,
            small,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QInt8,
        )
        weights = {i.name: numpy_helper.to_array(i) for i in onnx.load(plain).graph.initializer}
        graph = _with_weights_outside(onnx.load(small), weights, folder / MODEL_FILE)
    facts["precision"] = "int8"
    del graph.metadata_props[:]
    helper.set_model_props(graph, {FACTS: json.dumps(facts)})
    with atomic_path(folder / EXPORTED_FILE) as draft:
        draft.write_bytes(graph.SerializeToString())
    found, own = (m.predict_tiles(_tissue(model.tile)) for m in (
        ExportedModel(folder / EXPORTED_FILE), model
    ))  # fmt: skip
    difference = float(np.abs(found.maps[PHENOTYPE] - own.maps[PHENOTYPE]).mean())
    if not difference <= MOST:
        (folder / EXPORTED_FILE).unlink()
        raise RuntimeError(f"{folder}: int8 differs by {difference:.2g} in the mean")
    return difference


def _with_weights_outside(
    graph: ModelProto, weights: dict[str, NDArray[Any]], file: Path
) -> ModelProto:
    """Put in place of weights how they follow from those of a file."""
    halves = _halves(file)
    kept, steps = [], []
    for tensor in graph.graph.initializer:
        source = tensor.name.removesuffix("_quantized")
        is_int8 = source != tensor.name
        value = weights[source] if is_int8 else numpy_helper.to_array(tensor)
        name = _name_of(value.T if is_int8 else value, halves)
        if name is None:
            kept.append(tensor)
            continue
        kept.append(_reference(name, *halves[name], file.name))
        if not is_int8:
            steps.append(helper.make_node("Cast", [name], [source], to=TensorProto.FLOAT))
            continue
        steps += [
            helper.make_node("Cast", [name], [f"{source}_wide"], to=TensorProto.FLOAT),
            helper.make_node("Transpose", [f"{source}_wide"], [source], perm=[1, 0]),
            helper.make_node(
                "QuantizeLinear",
                [source, f"{source}_scale", f"{source}_zero_point"],
                [tensor.name],
                axis=1,
            ),
        ]
    nodes = [*steps, *graph.graph.node]
    for node in nodes:
        # where in torch it came from: more bytes than the graph itself
        node.doc_string = ""
        del node.metadata_props[:]
    for rest, new in ((graph.graph.initializer, kept), (graph.graph.node, nodes)):
        del rest[:]
        rest.extend(new)
    del graph.graph.value_info[:]
    return graph


def _halves(file: Path) -> dict[str, tuple[NDArray[np.float16], int]]:
    """Large tensors of a file in half precision, and at which byte they begin."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    found = {}
    for name, entry in json.loads(content[8:start]).items():
        begin, end = (start + offset for offset in entry.get("data_offsets", (0, 0)))
        if entry.get("dtype") == "F16" and end - begin >= LARGE:
            values = np.frombuffer(content[begin:end], np.float16).reshape(entry["shape"])
            found[name] = (values, begin)
    return found


def _name_of(value: NDArray[Any], halves: dict[str, tuple[NDArray[np.float16], int]]) -> str | None:
    """Which tensor of the file it is, if any."""
    equal = (n for n, (half, _) in halves.items() if half.shape == value.shape)
    return next((name for name in equal if np.array_equal(halves[name][0], value)), None)


def _reference(name: str, values: NDArray[np.float16], begin: int, location: str) -> TensorProto:
    tensor = TensorProto(
        name=name,
        data_type=TensorProto.FLOAT16,
        dims=values.shape,
        data_location=TensorProto.EXTERNAL,
    )
    for key, value in (("location", location), ("offset", begin), ("length", values.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def _tissue(side: int) -> NDArray[np.uint8]:
    """Three tiles in the colors of haematoxylin and eosin, (3, side, side, 3)."""
    *_, images = made_images(side)
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def main() -> None:
    """Write the graph of one model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the model")
    folder = parser.parse_args().model
    difference = write_graph(folder)
    size = (folder / EXPORTED_FILE).stat().st_size / 1e6
    print(f"{folder / EXPORTED_FILE}: {size:.1f} MB, differs by {difference:.4f} in the mean")


if __name__ == "__main__":
    main()
