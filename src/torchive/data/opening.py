"""Opening data by one string: the name of a sample set, or a format and its paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchive.data.check import check_index
from torchive.data.faults import DataError
from torchive.data.fetching import load_sample_set
from torchive.data.files import file_samples
from torchive.data.readers import parse_source, read_index
from torchive.data.samples import SPLITS

if TYPE_CHECKING:
    from torchive.data.samples import SampleSet


def open_data(source: str, split: str = "train", *, skip_faulty: bool = False, seed: int = 0) -> SampleSet:
    """One split of a source.

    Args:
        source: a sample set's name ("solar"), "folder:PATH", "csv:FILE", "coco:ANNOTATIONS.json,IMAGES/",
            "panoptic:ANNOTATIONS.json,IMAGES/,SEGMENTS/", "voc:PATH", "masks:IMAGES/,MASKS/", "deepfashion2:PATH", or a
            bare path whose format is recognised. A path may hold ``{split}`` where each split has its own.
        split: train, val or test. Where the data bring no split, it is a fixed function of the sample's id and the
            seed.
        skip_faulty: leave faulty samples out instead of refusing; ``left_out`` of the result lists the faults.
        seed: of the split. The sample sets' own splits do not depend on it.

    Raises:
        DataError: the source is unknown or faulty, in one line.
    """
    if split not in SPLITS:
        raise DataError(f"{source}: split must be one of {', '.join(SPLITS)}, got {split!r}")
    place = parse_source(source)
    if place is None:
        return load_sample_set(source, split)
    index = read_index(place, SPLITS)
    return file_samples(source, index, check_index(source, index), split, skip_faulty=skip_faulty, seed=seed)
