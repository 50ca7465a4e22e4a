"""A trained model as one file for other programs: ONNX, TorchScript or torch.export.

The file holds everything between pixels and maps: normalisation, encoder with its adapters merged,
decoder, heads and activations. Cutting cells out of the maps stays in Python (`cells_of_maps`).
"""

from __future__ import annotations

import copy
import json
import logging
import math
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.nn import functional as F

from celltyper import __version__
from celltyper.calibration import calibration_of
from celltyper.cells.colors import colors_of
from celltyper.checkpoints import load_model
from celltyper.domain import packed_domain
from celltyper.encoders.adapt import Adapted
from celltyper.encoders.lora import is_lora, merge_lora, save_lora
from celltyper.encoders.trainability import fingerprint, parameter_digest
from celltyper.errors import CheckpointError, ConfigError, DataError, RunError, unknown_name
from celltyper.exported import EMBEDDING, FACTS
from celltyper.instances import METHODS, build_instances
from celltyper.labels import mean_in_labels
from celltyper.library.shelf import find_model
from celltyper.models import CellTyper, Ensemble
from celltyper.types import PHENOTYPE, Maps, Prediction

logger = logging.getLogger("celltyper")

SUFFIXES = {"onnx": ".onnx", "torchscript": ".pt", "torch-export": ".pt2"}
"""Formats by name, each with the suffix of its files."""

TOLERANCE = 1e-3
"""Largest difference to the model itself, over all pixels of all maps, that a file may have."""

_INPUT = "images"
_ONNX_PACKAGES = ("onnx", "onnxscript")
_OPSET = 18  # the first in which maps are shrunk with anti-aliasing, and read by most programs


class Exported(NamedTuple):
    """What `export_model` wrote."""

    path: Path
    largest_difference: float
    facts: dict[str, Any]


def export_model(
    source: CellTyper | str | Path,
    path: str | Path,
    format: str = "onnx",
    *,
    tile: int | None = None,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
) -> Exported:
    """Write a model as one file, after comparing what the file computes with the model.

    The file takes ``images``, float32 (B, 3, N, N) RGB in [0, 1] for any B, and gives the
    activated maps of `CellTyper.activate`, each float32 (B, C, N, N), in the order of
    ``model.maps``. It runs on images of fixed and made-up noise and stained tissue, alone and
    three at a time, before it gets its name.

    Parameters
    ----------
    source : CellTyper, str or Path
        A model, or the run folder or checkpoint of one. A model is not changed.
    path : str or Path
        File to write, with the suffix of its format (`SUFFIXES`). Weights of more than 2 GB do not
        fit into an ONNX file: they are written beside it, as ``NAME.onnx.data``.
    format : {"onnx", "torchscript", "torch-export"}
        See ``docs/export.md``.
    tile : int or None
        Side N of the images in pixels; None takes ``model.tile``.
    overwrite : bool
        Replace a file that is there.
    encoder_weights, allow_code
        See `celltyper.load_model`.

    Returns
    -------
    Exported
        With the largest difference, and the facts that the file holds as JSON: classes, colors,
        mpp, tile, maps, instance method and its options, versions and fingerprints of the source.

    Raises
    ------
    ConfigError
        If the format is unknown, its packages are not installed, or `path` does not fit.
    CheckpointError
        If the source cannot be loaded.
    RunError
        If the model cannot be written in this format, or the file computes something else.
    """
    path = Path(path)
    if not isinstance(source, CellTyper) and not (source := find_model(source)).exists():
        raise CheckpointError(f"no model at {source}: give a run that 'celltyper train' wrote")
    _check_target(path, format, overwrite=overwrite)
    if isinstance(source, CellTyper):
        model = copy.deepcopy(source).to("cpu").eval()
    else:
        # unmerged, because the fingerprint is that of the base weights
        model = load_model(
            source, encoder_weights=encoder_weights, allow_code=allow_code, merge=False
        )
    _check_single(model, source)
    size = model.tile if tile is None else tile
    facts = _facts_of(model, size, format)
    # torch-export copies weights that are not laid out plainly, and warns of each
    whole = WholeModel(model).to(memory_format=torch.contiguous_format).eval()
    logger.info("export: capturing the model at %d x %d px", size, size)
    program = _captured(whole, size)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=path.parent) as folder:
        draft = Path(folder) / path.name
        logger.info("export: writing %s", path.name)
        write = _writer(program, _outputs(model), format)
        write(draft, facts)
        logger.info("export: comparing it with the model")
        facts["largest_difference"] = difference = _difference_of_file(whole, draft, format, size)
        if not difference <= TOLERANCE:
            raise RunError(
                f"{path.name} was not written: its maps differ from the model's by up to "
                f"{difference:.2g}, more than {TOLERANCE:g}; try another --format"
            )
        write(draft, facts)
        _move(draft, path)
    return Exported(path, difference, facts)


def export_adapter(
    source: CellTyper | str | Path,
    folder: str | Path,
    *,
    overwrite: bool = False,
    encoder_weights: str | None = None,
    allow_code: bool = False,
) -> Path:
    """Write the encoder's adapters in peft's own format; see `celltyper.encoders.lora.save_lora`.

    Parameters
    ----------
    source : CellTyper, str or Path
        A model whose adapters are not merged, or the run folder or checkpoint of one.
    folder : str or Path
        Gets ``adapter_config.json`` and ``adapter_model.safetensors``.
    overwrite : bool
        Write into a folder that is there.
    encoder_weights, allow_code
        See `celltyper.load_model`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ConfigError
        If the model has no adapters, or the folder is there.
    CheckpointError
        If the source cannot be loaded.
    """
    folder = Path(folder)
    check_folder(folder, overwrite=overwrite)
    if isinstance(source, CellTyper):
        model = source
    else:
        model = load_model(
            source, encoder_weights=encoder_weights, allow_code=allow_code, merge=False
        )
    _check_single(model, source)
    encoder = model.encoder
    return save_lora(encoder.encoder if isinstance(encoder, Adapted) else encoder, folder)


def _check_single(model: CellTyper, source: object) -> None:
    if isinstance(model, Ensemble):
        raise ConfigError(f"{source} is an ensemble of {len(model.models)} models: export one")


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there, unless it may be written into."""
    if folder.exists() and not (overwrite and folder.is_dir()):
        raise ConfigError(f"{folder} is there already; pass --overwrite or another folder")


def _check_target(path: Path, format: str, *, overwrite: bool) -> None:
    """Refuse a file that cannot be written, before the work."""
    if format not in SUFFIXES:
        raise unknown_name("export format", format, SUFFIXES)
    missing = [name for name in _ONNX_PACKAGES if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"export to onnx needs {', '.join(missing)}: pip install 'celltyper[export]'"
        )
    if path.suffix != SUFFIXES[format]:
        fitting = path.with_suffix(SUFFIXES[format]).name if path.name else f"m{SUFFIXES[format]}"
        raise ConfigError(f"{path} does not end in {SUFFIXES[format]}, as {format} does: {fitting}")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: {path.parent} is not a folder; create it first")
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; give another name")
    if path.exists() and not overwrite:
        raise ConfigError(f"{path} is there already; pass --overwrite or another name")


def read_facts(path: str | Path) -> dict[str, Any]:
    """Read the facts that an exported file holds; see `export_model`.

    Parameters
    ----------
    path : str or Path
        File that `export_model` wrote.

    Returns
    -------
    dict

    Raises
    ------
    CheckpointError
        If it is not such a file.
    """
    path = Path(path)
    try:
        text = _READERS[path.suffix](path)
        facts = json.loads(text)
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} was not written by 'celltyper export'") from error
    return dict(facts)


def cells_of_maps(maps: Maps, facts: Mapping[str, Any], name: str = "") -> Prediction:
    """Cut the cells out of the maps that an exported file gave for one image.

    Parameters
    ----------
    maps : mapping of str to ndarray of float32, each (C, H, W)
        By the names of the file's outputs. Of any size: maps of tiles may be joined first.
    facts : mapping
        What `read_facts` gives.
    name : str
        Carried into the prediction.

    Returns
    -------
    Prediction
        As `celltyper.predict_image` gives it, at the model's resolution.

    Raises
    ------
    DataError
        If a map is missing or has another number of channels.
    ConfigError
        If the instance method is code that is not there.
    """
    for key, spec in facts["maps"].items():
        got = np.shape(maps[key]) if key in maps else None
        if got is None or len(got) != 3 or got[0] != spec["channels"]:
            raise DataError(f"map {key!r} must be ({spec['channels']}, H, W), got {got}")
    method = build_instances(facts["instances"]["method"], **(facts["instances"]["options"] or {}))
    probabilities = np.asarray(maps[PHENOTYPE])
    labels = method.decode({key: maps[key] for key in method.maps})
    return Prediction(
        labels,
        probabilities,
        mean_in_labels(labels, probabilities),
        tuple(facts["classes"]),
        facts["mpp"],
        name,
        tuple(facts["colors"]),
        # files of earlier versions say nothing of it
        calibration_of(facts.get("calibration")),
    )


class WholeModel(nn.Module):
    """The model from pixels to activated maps, adapters merged, nothing frozen around it."""

    def __init__(self, model: CellTyper) -> None:
        super().__init__()
        self.model = model
        if isinstance(model.encoder, Adapted):
            model.encoder = model.encoder.encoder
        if any(is_lora(name) for name, _ in model.encoder.named_parameters()):
            merge_lora(model.encoder)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Maps in the order of the model's, then the embedding if the model knows its domain."""
        features = list(self.model.encoder(images))
        maps = tuple(self.model.activate(self.model(images, features)).values())
        if self.model.domain is None:
            return maps
        return *maps, features[-1].mean(dim=(2, 3))


def _facts_of(model: CellTyper, tile: int, format: str) -> dict[str, Any]:
    method = model.instances
    kind = type(method)
    known = {cls: name for name, cls in METHODS.items()}
    card = getattr(model.encoder, "card", None)
    return {
        "celltyper": __version__,
        "torch": torch.__version__,
        "format": format,
        "classes": list(model.classes),
        "colors": list(colors_of(model)),
        "calibration": None if model.calibration is None else model.calibration.facts(),
        "mpp": model.mpp,
        "tile": tile,
        "overlap": model.overlap,
        "symmetries": model.symmetries,
        "input": {"name": _INPUT, "shape": ["batch", 3, tile, tile], "range": "RGB in [0, 1]"},
        "maps": {
            name: {"channels": spec.channels, "activation": spec.activation}
            for name, spec in model.maps.items()
        },
        "instances": {
            "method": known.get(kind, f"{kind.__module__}:{kind.__qualname__}"),
            # None says that the options of the author's own class are not known
            "options": asdict(method) if is_dataclass(method) else None,
        },
        "domain": packed_domain(model.domain),
        "encoder": getattr(card, "name", None),
        "encoder_fingerprint": fingerprint(model.encoder),
        "digests": parameter_digest(model),
    }


def _outputs(model: CellTyper) -> list[str]:
    """Names of what the file gives."""
    return [*model.maps, *([EMBEDDING] if model.domain is not None else [])]


def _captured(whole: nn.Module, size: int) -> ExportedProgram:
    """Capture the model as a graph for any batch of one size, constants computed."""
    example = (torch.rand(2, 3, size, size),)
    shapes = ({0: Dim("batch")},)
    try:
        with _quiet(), torch.no_grad():
            program = torch.export.export(whole, example, dynamic_shapes=shapes, strict=False)
            folded = _folded(program.module())
            return torch.export.export(folded, example, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        text = str(error)
        if "specialized" in text:
            raise RunError(
                "cannot export: the model's code fixes the size of the batch; take it from "
                "x.shape[0], not len(x), and keep it out of int()"
            ) from error
        raise RunError(f"cannot export: {_first_line(text)}") from error


def _folded(module: fx.GraphModule) -> fx.GraphModule:
    """Compute whatever does not depend on the images, once and for all.

    Position embeddings are resampled to the tile's grid this way, which other programs could not
    do or would do otherwise, and tables made on the fly move with the weights to a device.
    """
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            found = operator.attrgetter(node.target)(module)
            if isinstance(found, Tensor):
                values[node] = found
        elif (
            node.op == "call_function"
            and (isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem)
            and all(inner in values for inner in node.all_input_nodes)
        ):
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    computed = [node for node in values if node.op == "call_function"]
    for node in computed:
        users = [user for user in node.users if user not in values]
        if users and isinstance(values[node], Tensor):
            name = f"constant_{node.name}"
            # a copy: parts of one table would be written as often as the table
            module.register_buffer(name, values[node].detach().clone())
            with module.graph.inserting_before(node):
                constant = module.graph.get_attr(name)
            for user in users:
                user.replace_input_with(node, constant)
    for node in reversed(computed):
        if not node.users:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    return module


def _writer(program: ExportedProgram, outputs: list[str], format: str) -> Any:
    """Convert a program; give the function that writes it with facts, as often as wanted."""
    try:
        with _quiet(), torch.no_grad():
            if format == "onnx":
                return _onnx_writer(program, outputs)
            if format == "torchscript":
                return _torchscript_writer(program)
    except Exception as error:
        raise RunError(f"cannot export as {format}: {_first_line(str(error))}") from error

    def write(path: Path, facts: Mapping[str, Any]) -> None:
        torch.export.save(program, path, extra_files={FACTS: json.dumps(facts)})

    return write


def _onnx_writer(program: ExportedProgram, outputs: list[str]) -> Any:
    converted = torch.onnx.export(
        program,
        dynamo=True,
        verbose=False,
        input_names=[_INPUT],
        output_names=outputs,
        opset_version=_OPSET,
    )
    assert converted is not None

    def write(path: Path, facts: Mapping[str, Any]) -> None:
        converted.model.metadata_props[FACTS] = json.dumps(facts)
        with _quiet():
            converted.save(path)

    return write


def _torchscript_writer(program: ExportedProgram) -> Any:
    scripted = torch.jit.script(_plain(program.module()))

    def write(path: Path, facts: Mapping[str, Any]) -> None:
        with _quiet():
            torch.jit.save(scripted, str(path), _extra_files={FACTS: json.dumps(facts)})

    return write


def _plain(module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite a captured graph in the words of TorchScript, which knows no overloads by name."""
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            module.graph.erase_node(node)  # checks of the input's shape, in Python
        elif node.target is torch.ops.aten.sym_size.int:
            node.op, node.target = "call_method", "size"
        elif isinstance(node.target, torch._ops.OpOverload):
            node.target = node.target.overloadpacket
    module.graph.set_codegen(fx.graph.CodeGen())
    return fx.GraphModule(module, module.graph)


def _difference_of_file(whole: nn.Module, path: Path, format: str, size: int) -> float:
    """Largest difference between file and model."""
    try:
        return largest_difference(whole, _LOADERS[format](path), size)
    except Exception as error:
        raise RunError(f"{format} file does not run: {_first_line(str(error))}") from error


def largest_difference(whole: nn.Module, run: Callable[[Tensor], Any], size: int) -> float:
    """Largest difference between two models on images that neither was captured with."""
    largest = 0.0
    for images in made_images(size):
        with torch.no_grad():
            pairs = list(zip(whole(images), run(images), strict=True))
        for own, other in pairs:
            if own.shape != other.shape:
                raise ValueError(f"shape {tuple(other.shape)} instead of {tuple(own.shape)}")
            difference = float((own - other).abs().max())
            # NaN must not pass for a small difference
            largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def made_images(size: int) -> Iterator[Tensor]:
    """Noise, and smooth blobs in the colors of haematoxylin and eosin; one and three at a time."""
    generator = torch.Generator().manual_seed(0)
    pink, violet = torch.tensor([[231, 190, 215], [92, 64, 140]]).view(2, 1, 3, 1, 1) / 255
    for count in (1, 3):
        yield torch.rand(count, 3, size, size, generator=generator)
        coarse = torch.rand(count, 1, size // 8 + 2, size // 8 + 2, generator=generator)
        cells = F.interpolate(coarse, (size, size), mode="bicubic").sub(0.5).mul(12).sigmoid()
        yield pink + (violet - pink) * cells


def _load_onnx(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: [torch.from_numpy(y) for y in session.run(None, {_INPUT: x.numpy()})]


def _load_torchscript(path: Path) -> Any:
    with _quiet():
        return torch.jit.load(str(path)).eval()  # type: ignore[no-untyped-call]


def _load_program(path: Path) -> Any:
    return torch.export.load(path).module()


_LOADERS = {"onnx": _load_onnx, "torchscript": _load_torchscript, "torch-export": _load_program}


def _onnx_text(path: Path) -> str:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return str({entry.key: entry.value for entry in model.metadata_props}[FACTS])


def _torchscript_text(path: Path) -> str:
    extra: dict[str, Any] = {FACTS: ""}
    with _quiet():
        torch.jit.load(str(path), _extra_files=extra)  # type: ignore[no-untyped-call]
    text = extra[FACTS]
    return text.decode() if isinstance(text, bytes) else str(text)


def _program_text(path: Path) -> str:
    extra: dict[str, Any] = {FACTS: ""}
    torch.export.load(path, extra_files=extra)
    return str(extra[FACTS])


_READERS = {".onnx": _onnx_text, ".pt": _torchscript_text, ".pt2": _program_text}


def _move(draft: Path, path: Path) -> None:
    """Give the files of a draft their place; weights first, so that the model never lacks them."""
    beside = path.with_name(f"{path.name}.data")
    weights = draft.with_name(beside.name)
    if weights.is_file():
        path.unlink(missing_ok=True)
        weights.replace(beside)
    elif path.suffix == ".onnx":
        beside.unlink(missing_ok=True)
    draft.replace(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporters' own notes from the user: they speak of their inner workings."""
    loggers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir", "torch.onnx")]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
