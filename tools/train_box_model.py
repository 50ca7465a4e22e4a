"""The model in the box, from openly licensed images alone: fields, two trainings, figures, card.

python tools/train_box_model.py --data DATA --weights DINOV2_VITS14 -o work

DATA holds dsb2018-he, ami-br and slides/cmu-1-small-region.svs; the histolytics fields are fetched.
A first model, the teacher, learns from the annotated fields. It labels tissue that nobody has
annotated, which it sees in the stain of the fields it knows; the second model goes on from the
first with both, and sees the tissue as it is and in many other stains (Xie 2020,
doi:10.1109/CVPR42600.2020.01070). Every step is kept in the output folder, and a second start goes
on where the first one was.

--leave-out dsb2018-he: the same without a source, whose fields then are tested on.
--evaluate NAME=FOLDER: annotated images that the model is tested on, such as another dataset.
--to celltyper/box: write the model there, with its card.
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from box_graph import write_graph
from numpy.typing import NDArray
from skimage.color import lab2rgb, rgb2lab
from skimage.io import imread

from celltyper import load_model, open_dataset, train
from celltyper.atomic import make_folder, write_json, write_text
from celltyper.checkpoints import read_tensors, write_tensors
from celltyper.classification.config import PatchConfig
from celltyper.classification.training import train_patches
from celltyper.config import load_config
from celltyper.datasets import resample
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
HGSC_MPP = 0.35
"""Of the histolytics fields, which do not say: lymphocytes of 15 px are then 5 micrometres wide."""
LEAST = 196
"""Pixels that no field is made smaller than."""
WINDOWS, IN_A_ROW = 2048, 4
"""Windows of AMi-Br, evenly over its slides, and how many side by side make an image."""
CERTAIN = 0.6
"""Probability of its class with which a nucleus found by the teacher has one."""
BLACK = 25
"""Value below which all channels of a pixel are so only where a window left its slide."""
STUDENT = ("augment.scale=0.45", "train.lr=5.0e-4")
"""How the second training differs from the recipe; nuclei of 5 to 12 micrometres look the same."""
DSB, HGSC, AMIBR, CMU = "DSB 2018", "histolytics fields", "AMi-Br", "CMU-1 region"
BY_PREFIX = {"dsb": DSB, "amibr": AMIBR, "cmu": CMU}
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
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    work = options.output / (f"without-{options.leave_out}" if options.leave_out else "all")
    sources = [name for name in SOURCES if name != options.leave_out]
    fields = _kept(work / "fields", lambda: annotated(options.data, sources, options.output))
    own = [f"data.root={fields}", f"encoder.weights={options.weights}", *options.overrides]
    teacher = train(load_config("box", own), work / "teacher", device=options.device, resume=True)
    tissue = _kept(work / "tissue", lambda: labelled(options.data, teacher, fields))
    both = _kept(work / "both", lambda: [*open_dataset(fields), *open_dataset(tissue)])
    own = [f"data.root={both}", f"start={teacher}", *STUDENT, *options.overrides]
    run = train(load_config("box", own), work / "run", device=options.device, resume=True)
    tests = {name: Path(folder) for name, _, folder in map(_pair, options.evaluate)}
    if options.leave_out:
        left = [options.leave_out]
        name = SOURCES[options.leave_out]
        tests[name] = _kept(work / "left", lambda: annotated(options.data, left, options.output))
    model = load_model(run)
    found = {name: tested(model, folder) for name, folder in tests.items()}
    for name, summary in found.items():
        scores = ((score, summary.scores[score]) for score in SCORES)
        text = "  ".join(f"{s} {e.value:.3f} ({e.low:.3f} to {e.high:.3f})" for s, e in scores)
        print(f"{name}: {len(summary.images)} images  {text}")
    # elsewhere the model itself is tested, not one without a part of its data
    of_card = {SOURCES[options.leave_out]} if options.leave_out else found.keys()
    apart = "left out" if options.leave_out else "source"
    rows = [row for name in of_card for row in figures(name, found[name], apart)]
    write_json(work / "figures.json", rows)
    if options.to is not None:
        ship(run, both, _figures_of(options.output), options.to / NAME)
        write_graph(options.to / NAME)
        mitosis(options.data / "ami-br", options.to, work, options.device)


def annotated(data: Path, sources: Sequence[str], work: Path) -> list[Sample]:
    """Read the fields of the sources, all at `MPP`."""
    fields = []
    if "dsb2018-he" in sources:
        fields += [_of_typical_size(sample) for sample in open_dataset(data / "dsb2018-he")]
    if "hgsc" in sources:
        # what `make demo` validates and tests on stays apart
        hgsc = open_dataset(demo_split(fetch_hgsc(), work / "hgsc").train)
        fields += [replace(sample, mpp=HGSC_MPP) for sample in hgsc]
    return [resample(sample, MPP) for sample in fields]


def _of_typical_size(sample: Sample) -> Sample:
    """State the resolution at which the median nucleus of a field has a typical size."""
    areas = np.bincount(sample.labels.ravel())[1:]
    phenotypes = np.where(sample.phenotypes > 0, UNKNOWN, 0).astype(np.uint8)
    mpp = float(np.sqrt(NUCLEUS / np.median(areas[areas > 0])))
    mpp = max(mpp, MPP * LEAST / min(sample.labels.shape))
    return replace(sample, phenotypes=phenotypes, mpp=mpp, name=f"dsb-{sample.name[:16]}")


def labelled(data: Path, teacher: Path, fields: Path) -> list[Sample]:
    """Label what nobody has annotated, seen in the stain of a histolytics field if there is one."""
    known = sorted(open_dataset(fields), key=lambda sample: sample.name.startswith("dsb-"))
    model, stain = load_model(teacher), colors(known[0].image)
    return [_labelled(model, sample, stain) for sample in unannotated(data)]


def unannotated(data: Path) -> Iterator[Sample]:
    """Images of tissue without labels, black where there is none."""
    table = open_patches(data / "ami-br")
    seen: Counter[str] = Counter()
    turns = np.zeros(len(table), int)
    for i in np.random.default_rng(0).permutation(len(table)):
        turns[i] = seen[table.groups[i]]
        seen[table.groups[i]] += 1
    chosen = np.argsort(turns, kind="stable")[:WINDOWS]
    np.random.default_rng(1).shuffle(chosen)
    for number, part in enumerate(np.split(chosen, WINDOWS // IN_A_ROW**2)):
        windows = [imread(table.files[i])[..., :3] for i in part]
        rows = [np.hstack(windows[k : k + IN_A_ROW]) for k in range(0, len(part), IN_A_ROW)]
        yield _unlabelled(np.vstack(rows), f"amibr-{number:03d}", MPP)
    slide = open_slide(data / "slides" / "cmu-1-small-region.svs")
    assert slide.mpp is not None
    yield _unlabelled(slide.read(Region(0, 0, *slide.size)), "cmu-1", slide.mpp[0])


def _unlabelled(image: Image, name: str, mpp: float) -> Sample:
    return Sample(image, np.zeros(image.shape[:2], np.int32), np.zeros(1, np.uint8), name, mpp=mpp)


def _labelled(teacher: CellTyper, sample: Sample, stain: Colors) -> Sample:
    """Label the nuclei of an image, of class unknown where the teacher is in doubt.

    The teacher is shown every window of AMi-Br, and the whole of others, in a stain it knows.
    """
    parts = IN_A_ROW if sample.name.startswith("amibr") else 1
    rows = np.split(sample.image, parts)
    windows = [[stained_like(w, stain) for w in np.split(row, parts, axis=1)] for row in rows]
    image = np.vstack([np.hstack(row) for row in windows])
    found = predict_image(teacher, image, sample.mpp, symmetries=8)
    black = (sample.image < BLACK).all(axis=2)
    inside = np.bincount(found.labels.ravel(), ~black.ravel(), len(found.cell_probabilities) + 1)
    areas = np.bincount(found.labels.ravel(), minlength=len(inside))
    classes = found.cell_probabilities[:, 1:]
    certain = classes.max(axis=1) >= CERTAIN * classes.sum(axis=1)
    phenotypes = np.zeros(len(inside), np.uint8)
    phenotypes[1:] = np.where(certain, classes.argmax(axis=1) + 1, UNKNOWN)
    if sample.name.startswith("amibr"):
        phenotypes[_in_the_middle(found.labels)] = CLASSES.index("neoplastic") + 1
    phenotypes[inside < areas / 2] = 0
    labels = np.where(phenotypes[found.labels] > 0, found.labels, 0).astype(np.int32)
    phenotypes = phenotypes[: labels.max() + 1]
    return resample(replace(sample, labels=labels, phenotypes=phenotypes), MPP)


def _in_the_middle(labels: NDArray[np.int32]) -> NDArray[np.intp]:
    """Nuclei within 3 micrometres of the middle of a window: mitotic figures of carcinomas."""
    side, near = len(labels) // IN_A_ROW, round(3 / MPP)
    middles = [slice(m - near, m + near) for m in range(side // 2, len(labels), side)]
    ids = np.unique([labels[rows, cols] for rows in middles for cols in middles])
    return ids[ids > 0]


def stained_like(image: Image, wanted: Colors) -> Image:
    """Give an image the mean and deviation of color that another one has.

    Black pixels stay (Reinhard 2001, doi:10.1109/38.946629).
    """
    found = colors(image)
    lab = (rgb2lab(image) - found.mean) / np.maximum(found.deviation, 1)
    lab = lab * wanted.deviation + wanted.mean
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # colors outside sRGB are clipped
        changed = np.clip(lab2rgb(lab) * 255, 0, 255).round().astype(np.uint8)
    return np.where((image < BLACK).all(axis=2, keepdims=True), image, changed)


class Colors(NamedTuple):
    """Mean and deviation in CIE L*a*b* of what is not black."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]


def colors(image: Image) -> Colors:
    """Measure an image."""
    seen = rgb2lab(image)[~(image < BLACK).all(axis=2)]
    return Colors(seen.mean(axis=0), seen.std(axis=0))


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


def figures(name: str, summary: Summary, apart: str) -> list[dict[str, Any]]:
    """Rows of a card."""
    return [
        {
            "source": name,
            "images": len(summary.images),
            "score": score,
            **{key: round(getattr(summary.scores[score], key), 3) for key in _ESTIMATE},
            "apart": apart,
        }
        for score in SCORES
    ]


_ESTIMATE = ("value", "low", "high")


def ship(run: Path, fields: Path, rows: list[dict[str, Any]], to: Path) -> None:
    """Write the model in half precision, without the paths of this machine, and its card."""
    export_half(run, to, whole=True, overwrite=True)
    _publish(to, to, {"start": None}, card(fields, rows))


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
            "apart": "slides",
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
            "It was tried on the data of its own study alone, by folds of slides; the encoder has "
            f"seen {WINDOWS:,} of the windows, without their class.",
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
    write_text(to / "config.yaml", yaml.safe_dump(header["config"], sort_keys=False))
    write_json(to / "run.json", facts)
    write_text(to / "card.yaml", yaml.safe_dump(about, sort_keys=False))


def card(fields: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a user must know of the model."""
    counts = _counts(fields)
    return {
        "summary": "Finds nuclei in H&E at 0.25 to 0.5 micrometres per pixel, outlines them, and "
        "calls them neoplastic, inflammatory or connective.",
        "licence": "Apache-2.0",
        "trained_on": [
            _data(DSB, "CC0-1.0", counts, "outlines by hand, no classes"),
            _data(HGSC, "BSD-3-Clause", counts, "outlines and classes by a model"),
            _data(AMIBR, "MIT", counts, "all by the teacher but the classes of mitotic figures"),
            _data(CMU, "CC0-1.0", counts, "all by the teacher, a first model on the fields above"),
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
            "elsewhere a first guess, not scored; benign epithelium has no class.",
            "These two fields are also nearly all the annotated tissue with eosin: a model without "
            "them takes fibres of stroma for nuclei.",
            "Pale nuclei are missed, and outlines of small nuclei are poor.",
            "Ink and dyed margins are found as nuclei here and there.",
            "No H&E field was outlined by hand but those of DSB 2018, most with little eosin; "
            "other stains were not tried.",
        ],
        "not_for": ["diagnosis", "any decision about a patient", "fluorescence", "cytology"],
    }


def _counts(folder: Path) -> dict[str, tuple[int, int]]:
    """Count images and nuclei by source."""
    found: dict[str, tuple[int, int]] = {}
    for sample in open_dataset(folder):
        source = BY_PREFIX.get(sample.name.partition("-")[0], HGSC)
        images, nuclei = found.get(source, (0, 0))
        found[source] = images + 1, nuclei + len(np.unique(sample.labels)) - 1
    return found


def _data(source: str, licence: str, counts: dict[str, tuple[int, int]], by: str) -> dict[str, str]:
    images, nuclei = counts.get(source, (0, 0))
    what = f"{images} image{'s' * (images != 1)}, {nuclei:,} nuclei"
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
