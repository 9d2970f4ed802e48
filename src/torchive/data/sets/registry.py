"""The list of sample sets: what they are, and the pinned packages they come in.

It imports no torch, so a listing is quick.
"""

from __future__ import annotations

from torchive.data.packages import Package, wheel
from torchive.data.samples import SampleSetInfo
from torchive.data.sets.emoji_names import ACTIVITY_NAMES, EMOJI_NAMES

_STAMPS = Package(
    "apt",
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "tuxpaint-stamps-default_2022.06.04-1_all.deb",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    160.9,
)
_WALLPAPERS = Package(
    "apt",
    "lomiri-wallpapers-16.04",
    "20.04.0-2",
    "lomiri-wallpapers-16.04_20.04.0-2_all.deb",
    "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
    15.8,
)
_FASHION = Package(
    "apt",
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    30.9,
)
_CELLS = wheel(
    "elpv-dataset",
    "1.0.0.post1",
    "elpv_dataset-1.0.0.post1-py3-none-any.whl",
    "85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c",
    90.8,
)
_TREES = wheel(
    "deepforest",
    "2.1.0",
    "deepforest-2.1.0-py3-none-any.whl",
    "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54",
    20.6,
)
_NUCLEI = wheel(
    "stardist",
    "0.9.2",
    "stardist-0.9.2-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023",
    3.1,
    binary=True,
)

_TWITTER = Package(
    "npm",
    "emoji-datasource-twitter",
    "16.0.0",
    "emoji-datasource-twitter-16.0.0.tgz",
    "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    61.7,
)
_GOOGLE = Package(
    "npm",
    "emoji-datasource-google",
    "16.0.0",
    "emoji-datasource-google-16.0.0.tgz",
    "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
    74.3,
)

_SCENE_CLASSES = ("birds", "fish", "flowers", "fruit", "insects", "mammals", "vegetables")
_SCENE_LICENCE = "GPL-2 (cut-outs); CC-BY-4.0, CC-BY-SA-4.0 and CC0-1.0 by photograph (backgrounds)"
_SCENE_ORIGIN = "Tux Paint stamps, Lomiri wallpapers; Debian packages tuxpaint-stamps-default, lomiri-wallpapers-16.04"

_ALL = (
    SampleSetInfo(
        name="solar",
        task="classification",
        classes=("intact", "possibly defective", "probably defective", "defective"),
        size="2,624 photographs, 300 x 300, grey",
        licence="CC-BY-NC-SA-4.0",
        commercial=False,
        origin="ELPV dataset, ZAE Bayern (Buerhop-Lutz et al. 2018; Deitsch et al. 2019), PyPI package elpv-dataset",
        description="Electroluminescence photographs of solar cells; classes are defect probabilities 0, 1/3, 2/3, 1.",
        packages=(_CELLS,),
        module="solar",
    ),
    SampleSetInfo(
        name="fashion-mnist",
        task="classification",
        classes=("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"),
        size="70,000 photographs, 28 x 28, grey",
        licence="MIT",
        commercial=True,
        origin="Zalando Research (Xiao et al. 2017), Debian package dataset-fashion-mnist",
        description="Articles of clothing; the 10,000 published test images are the test split.",
        packages=(_FASHION,),
        module="fashion_mnist",
    ),
    SampleSetInfo(
        name="trees",
        task="detection",
        classes=("tree",),
        size="4 aerial photographs in 56 tiles of up to 400 x 400, colour, 951 boxes",
        licence="MIT",
        commercial=None,
        origin="DeepForest (Weinstein et al. 2020), PyPI package deepforest; photographs by NEON, see its terms",
        description="Tree crowns from the air; test tiles are another photograph, validation tiles another region.",
        packages=(_TREES,),
        module="trees",
    ),
    SampleSetInfo(
        name="nuclei",
        task="segmentation",
        classes=("background", "nucleus"),
        size="1 microscope photograph in 29 tiles of 128 x 128, grey, 125 nuclei",
        licence="BSD-3-Clause",
        commercial=True,
        origin="StarDist (Schmidt et al. 2018), PyPI package stardist",
        description="Fluorescent cell nuclei, a class for each pixel; the splits are regions that share no pixel.",
        packages=(_NUCLEI,),
        module="nuclei",
    ),
    SampleSetInfo(
        name="nuclei-instances",
        task="detection",
        classes=("nucleus",),
        size="1 microscope photograph in 29 tiles of 128 x 128, grey, 125 nuclei",
        licence="BSD-3-Clause",
        commercial=True,
        origin="StarDist (Schmidt et al. 2018), PyPI package stardist",
        description="The tiles of nuclei with a box and a mask for each nucleus.",
        packages=(_NUCLEI,),
        module="nuclei_instances",
    ),
    SampleSetInfo(
        name="scenes",
        task="detection",
        classes=_SCENE_CLASSES,
        size="1,400 scenes of 320 x 320, colour, with boxes, masks and alpha",
        licence=_SCENE_LICENCE,
        commercial=True,
        origin=_SCENE_ORIGIN,
        description="Photographed cut-outs composed on photographs; exact boxes, visible masks and alpha.",
        packages=(_STAMPS, _WALLPAPERS),
        module="scenes",
    ),
    SampleSetInfo(
        name="scene-pairs",
        task="detection",
        classes=_SCENE_CLASSES,
        size="900 scenes and 655 single cut-outs of 166 items, 320 x 320, colour, with boxes, masks and pairs",
        licence=_SCENE_LICENCE,
        commercial=True,
        origin=_SCENE_ORIGIN,
        description="Each photographed cut-out in scenes and alone on white, to be found again: two domains.",
        packages=(_STAMPS, _WALLPAPERS),
        module="scene_pairs",
    ),
    SampleSetInfo(
        name="emoji",
        task="classification",
        classes=EMOJI_NAMES,
        size="1,980 drawings, 64 x 64, colour",
        licence="CC-BY-4.0 (Twemoji drawings); Apache-2.0 (Noto drawings); MIT (names)",
        commercial=True,
        origin="Twemoji, Noto Emoji; npm packages emoji-datasource-twitter and emoji-datasource-google (Cal Henderson)",
        description="Fine-grained: people in 165 roles and six skin tones; one drawing style trains, the other tests.",
        packages=(_TWITTER, _GOOGLE),
        module="emoji",
    ),
    SampleSetInfo(
        name="emoji-activities",
        task="classification",
        classes=ACTIVITY_NAMES,
        size="948 drawings, 64 x 64, colour",
        licence="CC-BY-4.0 (Twemoji drawings); Apache-2.0 (Noto drawings); MIT (names)",
        commercial=True,
        origin="Twemoji, Noto Emoji; npm packages emoji-datasource-twitter and emoji-datasource-google (Cal Henderson)",
        description="People at 79 activities, none in emoji, for comparisons whose settings were chosen there.",
        packages=(_TWITTER, _GOOGLE),
        module="emoji_activities",
    ),
)

#: Every sample set by its name.
SAMPLE_SETS: dict[str, SampleSetInfo] = {info.name: info for info in _ALL}
