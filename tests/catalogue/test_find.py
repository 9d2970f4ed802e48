"""Words of problems, as a user would type them, and the methods of which one must stand among the first three."""

from __future__ import annotations

import pytest

from torchive.catalogue.search import find

# Written before the search was tuned.
QUESTIONS = {
    "long tail": "eql decoupling",
    "imbalanced classes": "eql decoupling focal_loss",
    "rare categories": "eql decoupling",
    "tiny batch": "mabn",
    "batch size 2": "mabn",
    "hair matting": "semantic_human_matting fast_deep_matting figaro_hair adamatting context_aware_matting",
    "cut out a person from a photo": "semantic_human_matting portrait_fcn_plus fast_deep_matting",
    "recognise curved text": "aster",
    "cheap video model": "tsm lightweight_vtn tin sparse_shift fast3d gst",
    "explain a prediction": "grad_cam",
    "why did my network decide this": "grad_cam network_dissection",
    "find GAN images": "cnn_detection",
    "fake pictures": "cnn_detection",
    "dynamc relu": "dynamic_relu",
    "GC block": "gcnet",
    "few labels": "simclr tri_training",
    "unlabelled photographs": "simclr",
    "which images to label next": "batchbald",
    "domain shift from synthetic to real": "clan",
    "face landmarks": "lab_boundary ts3_landmark",
    "reinforcement learning for captions": "scst",
    "quantise weights": "ternarynet",
    "distil a segmentation network": "structured_kd_segmentation",
    "video object segmentation": "vos_survey",
    "cold start recommendation": "llae_coldstart",
    "architecture search": "nasnet nas_reinforce_controller auto_deeplab cr_nas",
    "metric learning": "circle_loss arcface",
    "raw photos of a phone camera": "pynet_isp",
    "make somebody dance like in another video": "everybody_dance_now",
    "3d face from one photo": "vrn morphable_model_3dmm lsfm",
    "annotate polygons faster": "polygon_rnn_pp curve_gcn",
    "weather radar forecast": "conv_lstm",
    "skip layers to save computation": "skipnet blockdrop convnet_aig",
    "where do people look in a video": "deepvs",
    "few-shot segmentation": "canet_fewshot",
    "segmentation from image labels only": "affinitynet ficklenet",
    "chromosomes": "varifocal_net_chromosome",
    "medical images": "attention_unet unet_plus_plus varifocal_net_chromosome",
    "detector on a phone": "thundernet blazeface ssd ehsod",
    "real-time semantic segmentation": "icnet netnet structured_kd_segmentation",
    "low resolution features in a convolution": "octconv",
    "长尾": "eql decoupling",
    "抠图": "semantic_human_matting fast_deep_matting adamatting context_aware_matting",
    "小批量": "mabn",
}


@pytest.mark.parametrize("words", QUESTIONS)
def test_a_right_method_is_among_the_first_three(words: str) -> None:
    first = [match.card.name for match in find(words, limit=3)]
    assert set(first) & set(QUESTIONS[words].split()), f"{words!r} gave {first}"
