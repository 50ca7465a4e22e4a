"""The model in the box, from openly licensed images alone: fields, teacher, tissue, student, card.

python tools/train_box_model.py --data DATA --weights DINOV2_VITS14 -o work

DATA holds dsb2018-he, ami-br and slides. A teacher (recipe consep) learns from the annotated
fields and annotates tissue that nobody has; the student (recipe box) learns from both. Every step
is kept in the output folder, and a second start goes on where the first one was.

--leave-out dsb2018-he: the same without a source, whose fields then are tested on.
--evaluate NAME=FOLDER: annotated images that the student is tested on, such as another dataset.
--to celltyper/box: write the model there, with its card.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from celltyper import load_model, open_dataset, train
from celltyper.atomic import make_folder, write_json, write_text
from celltyper.checkpoints import read_tensors, write_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.training import train_patches
from celltyper.config import load_config
from celltyper.datasets import read_image, resample
from celltyper.datasets.writing import write_folder
from celltyper.evaluation import Summary, evaluate
from celltyper.models import CellTyper
from celltyper.patches.reading import open_patches
from celltyper.predict import predict_image
from celltyper.protocols import load_protocol, run_patch_protocol
from celltyper.protocols.patch_writing import report_patch_protocol
from celltyper.publishing import export_half
from celltyper.readers.hgsc import CLASSES, demo_split, fetch_hgsc
from celltyper.slides import open_slide
from celltyper.tiling import Region
from celltyper.types import UNKNOWN, Image, Prediction, Sample

NAME = "nuclei"
MPP = 0.25
NUCLEUS = 25.0
"""Square micrometres of the median nucleus of a field whose resolution nobody knows."""
WINDOWS, SIDE = 1152, 4
"""Windows of AMi-Br that are taken, evenly over its slides; how many make the side of a field."""
CERTAIN = 0.6
"""Class probability below which a nucleus that the teacher found has no class for the student."""
DSB, HGSC, AMIBR, CMU = "DSB 2018", "histolytics fields", "AMi-Br", "CMU-1 region"
SOURCES = {"dsb2018-he": DSB, "hgsc": HGSC}
SCORES = ("detection_f1", "bpq")


def main() -> None:
    """Make what is not there yet, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--leave-out", choices=SOURCES)
    parser.add_argument("--evaluate", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--to", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--teacher", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--student", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = options.output / (f"without-{options.leave_out}" if options.leave_out else "all")
    sources = [name for name in SOURCES if name != options.leave_out]
    weights = f"encoder.weights={options.weights}"

    fields = _kept(work / "fields", lambda: annotated(options.data, sources, options.output))
    teaching = [f"data.root={fields}", weights, "train.steps=600", "infer.symmetries=1"]
    teacher = train(
        load_config("consep", [*teaching, *options.teacher]),
        work / "teacher",
        device=options.device,
        resume=True,
    )
    tissue = _kept(work / "tissue", lambda: found_by(load_model(teacher), unlabelled(options.data)))
    everything = _kept(work / "everything", lambda: [*open_dataset(fields), *open_dataset(tissue)])
    student = train(
        load_config("box", [f"data.root={everything}", weights, *options.student]),
        work / "student",
        device=options.device,
        resume=True,
    )

    tests = {name: Path(folder) for name, _, folder in map(_pair, options.evaluate)}
    if options.leave_out:
        left = [options.leave_out]
        name = SOURCES[options.leave_out]
        tests[name] = _kept(work / "left", lambda: annotated(options.data, left, options.output))
    model = load_model(student)
    found = {name: tested(model, folder) for name, folder in tests.items()}
    for name, summary in found.items():
        scores = ((score, summary.scores[score]) for score in SCORES)
        text = "  ".join(f"{s} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for s, e in scores)
        print(f"{name}: {len(summary.images)} images  {text}")
    rows = [row for name, summary in found.items() for row in figures(name, summary)]
    write_json(work / "figures.json", rows)
    if options.to is not None:
        ship(student, fields, tissue, _figures_of(options.output), options.to / NAME)
        mitosis(options.data / "ami-br", options.to, work, options.device)


def annotated(data: Path, sources: Sequence[str], work: Path) -> list[Sample]:
    """Read the fields of the sources, all at `MPP`."""
    fields = []
    if "dsb2018-he" in sources:
        fields += [_of_typical_size(sample) for sample in open_dataset(data / "dsb2018-he")]
    if "hgsc" in sources:
        # what `make demo` validates and tests on stays apart
        fields += list(open_dataset(demo_split(fetch_hgsc(), work / "hgsc").train))
    return [resample(sample, MPP) for sample in fields]


def _of_typical_size(sample: Sample) -> Sample:
    """State the resolution at which the median nucleus of a field has a typical size."""
    areas = np.bincount(sample.labels.ravel())[1:]
    phenotypes = np.where(sample.phenotypes > 0, UNKNOWN, 0).astype(np.uint8)
    mpp = float(np.sqrt(NUCLEUS / np.median(areas[areas > 0])))
    return replace(sample, phenotypes=phenotypes, mpp=mpp, name=f"dsb-{sample.name[:16]}")


def unlabelled(data: Path) -> Iterable[tuple[str, str, Image]]:
    """Yield name, source and pixels, at `MPP`, of tissue without annotated nuclei."""
    with (data / "ami-br" / "ami-br.csv").open(encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: (row["slide"], int(row["uid"])))
    chosen = [rows[i] for i in np.linspace(0, len(rows) - 1, WINDOWS).astype(int)]
    files = {path.name: path for path in (data / "ami-br").glob("*/*.png")}
    windows = [read_image(files[row["dataset_uid"]]).image for row in chosen]
    for start in range(0, WINDOWS, SIDE * SIDE):
        square = np.array(windows[start : start + SIDE * SIDE])
        square = square.reshape(SIDE, SIDE, *square.shape[1:]).swapaxes(1, 2)
        side = SIDE * square.shape[1]
        yield f"amibr-{start:04d}", AMIBR, square.reshape(side, side, 3)
    slide = open_slide(data / "slides" / "cmu-1-small-region.svs")
    for row, col in np.ndindex(2, 2):
        region = Region(600 + 2200 * row, 600 + 1500 * col, 1200, 1200)
        yield f"cmu-{row}{col}", CMU, slide.read(region, MPP)


def found_by(teacher: CellTyper, images: Iterable[tuple[str, str, Image]]) -> Iterable[Sample]:
    """Annotate images by a model; where it is not sure of the class, there is none."""
    for name, source, image in images:
        prediction = predict_image(teacher, image, MPP, name=name)
        sure = prediction.class_probabilities.max(axis=1, initial=0) >= CERTAIN
        phenotypes = prediction.phenotypes
        phenotypes[1:][~sure] = UNKNOWN
        yield Sample(image, prediction.labels, phenotypes, name, source, MPP)


def tested(model: CellTyper, folder: Path) -> Summary:
    """Score the nuclei that are found on annotated images, whatever their class."""
    predictions, references = [], []
    for sample in open_dataset(folder):
        prediction = predict_image(model, sample.image, sample.mpp, name=sample.name)
        predictions.append(_of_one_class(prediction))
        nuclei = (sample.phenotypes > 0).astype(np.uint8)
        references.append(replace(sample, phenotypes=nuclei, unannotated=()))
    return evaluate(predictions, references)


def _of_one_class(prediction: Prediction) -> Prediction:
    maps, cells = prediction.probabilities, prediction.cell_probabilities
    return replace(
        prediction,
        probabilities=np.stack([maps[0], maps[1:].sum(axis=0)]),
        cell_probabilities=np.stack([cells[:, 0], cells[:, 1:].sum(axis=1)], axis=1),
        classes=("nucleus",),
        colors=(),
        calibration=None,
    )


def figures(name: str, summary: Summary) -> list[dict[str, Any]]:
    """Rows of a card."""
    return [
        {
            "source": name,
            "images": len(summary.images),
            "score": score,
            **{key: round(getattr(summary.scores[score], key), 3) for key in _ESTIMATE},
            "apart": "source",
        }
        for score in SCORES
    ]


_ESTIMATE = ("value", "low", "high")


def ship(run: Path, fields: Path, tissue: Path, rows: list[dict[str, Any]], to: Path) -> None:
    """Write the model in half precision, without the paths of this machine, and its card."""
    export_half(run, to, whole=True, overwrite=True)
    (to / "config.yaml").unlink()
    _publish(to, to, {}, card(fields, tissue, rows))


def mitosis(data: Path, box: Path, work: Path, device: str) -> None:
    """Fit the patch head on embeddings of the model in the box, and write it beside that."""
    own = [
        f"data.root={data}",
        f"encoder.weights={box / NAME / 'model.safetensors'}",
        f"encoder.options={json.dumps(load_config('box').encoder.options)}",
    ]
    config = load_config("mitosis-probe", own, PatchConfig)
    folds = run_patch_protocol(
        config, load_protocol("cv"), work / "mitosis-folds", device=device, resume=True
    )
    row = report_patch_protocol(folds).rows[0]
    patches = len(open_patches(data))
    rows = [
        {
            "source": AMIBR,
            "images": patches,
            "score": score,
            "value": round(row.scores[score].mean, 3),
            "low": round(row.scores[score].low, 3),
            "high": round(row.scores[score].high, 3),
            "apart": "patients",
        }
        for score in ("balanced_accuracy", "auroc")
    ]
    run = train_patches(config, work / "mitosis", device=device, resume=True)
    facts = {"encoder": config.encoder.model_dump(mode="json") | {"weights": f"model:{NAME}"}}
    about = {
        "summary": "Says of a window of 64 px at 0.25 micrometres per pixel around a mitotic "
        f"figure whether it is atypical or normal, on embeddings of {NAME}.",
        "licence": "Apache-2.0",
        "trained_on": [
            {
                "source": AMIBR,
                "licence": "MIT",
                "what": f"{patches:,} mitotic figures of 146 slides",
                "labels": "votes of three experts",
            }
        ],
        "figures": rows,
        "limits": [
            "It does not find mitoses: windows must hold one in the middle.",
            "An encoder trained for mitoses is much better: recipe mitosis.",
            "Human breast cancer, scanners of three makers.",
        ],
        "not_for": ["diagnosis", "grading", "any decision about a patient"],
    }
    _publish(run, box / "mitosis", facts, about)


def _publish(run: Path, to: Path, config: dict[str, Any], about: dict[str, Any]) -> None:
    """Write model, facts and card, without the paths of this machine."""
    tensors, header = read_tensors(run / "model.safetensors")
    header["config"] |= config
    for key in ("root", "split", "taxonomy", "images"):
        if key in header["config"]["data"]:
            header["config"]["data"][key] = None
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    for part in facts["data"].values():
        part["path"] = part["path"] and Path(part["path"]).name
    make_folder(to)
    write_tensors(to / "model.safetensors", tensors, header)
    write_json(to / "run.json", facts)
    write_text(to / "card.yaml", yaml.safe_dump(about, sort_keys=False))


def card(fields: Path, tissue: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a user must know of the model."""
    by_hand, by_model = _counts(fields), _counts(tissue)
    return {
        "summary": "Finds nuclei in H&E at 0.25 to 0.5 micrometres per pixel, outlines them, and "
        "calls them neoplastic, inflammatory or connective.",
        "licence": "Apache-2.0",
        "trained_on": [
            _data(DSB, "CC0-1.0", by_hand, "outlines by hand, no classes"),
            _data(HGSC, "BSD-3-Clause", by_hand, "outlines and classes by a model"),
            _data(AMIBR, "MIT", by_model, "by a teacher, trained on the first two"),
            _data(CMU, "CC0-1.0", by_model, "by a teacher, trained on the first two"),
            {
                "source": "LVD-142M",
                "licence": "weights of DINOv2 under Apache-2.0",
                "what": "natural images: the encoder starts from DINOv2 ViT-S/14",
                "labels": "none",
            },
        ],
        "figures": rows,
        "limits": [
            "All classes come from two fields of one ovarian carcinoma, labelled by a model: "
            "elsewhere they are a first guess, and benign epithelium is called neoplastic.",
            "Of small dense nuclei some are missed, crowded ones are joined.",
            "Ink, folds and burnt tissue are taken for nuclei here and there.",
            "Trained on H&E of a few scanners; nothing is known of other stains.",
        ],
        "not_for": ["diagnosis", "any decision about a patient", "fluorescence", "cytology"],
    }


def _counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Count images and nuclei by source."""
    found: dict[str, tuple[int, int]] = {}
    for sample in open_dataset(folder):
        source = sample.group if sample.group in (AMIBR, CMU) else None
        source = source or (DSB if sample.name.startswith("dsb-") else HGSC)
        images, nuclei = found.get(source, (0, 0))
        found[source] = images + 1, nuclei + len(np.unique(sample.labels)) - 1
    return found


def _data(source: str, licence: str, counts: dict[str, tuple[int, int]], by: str) -> dict[str, str]:
    images, nuclei = counts.get(source, (0, 0))
    what = f"{images} images, {nuclei:,} nuclei"
    return {"source": source, "licence": licence, "what": what, "labels": by}


def _figures_of(output: Path) -> list[dict[str, Any]]:
    """Figures of the model, then those of the models that left a source out."""
    files = sorted(output.glob("*/figures.json"))
    return [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def _kept(folder: Path, make: Any) -> Path:
    """Write a folder of samples at `MPP`, unless it is there."""
    if not folder.is_dir():
        write_folder(folder, make(), CLASSES, MPP)
    return folder


def _pair(text: str) -> tuple[str, str, str]:
    return text.partition("=")


if __name__ == "__main__":
    main()
