"""The quality of samples: on the digits without any weights, and against a reference by the features of a network."""

from .digits import DigitScores, about_digits, describe, digit_scores, measure_digits
from .gaussian import Gaussian, GaussianSums, frechet, frechet_distance
from .images import Images, is_npz, open_images
from .inception_score import inception_score
from .judge import Figures, Judge, judge_for
from .kernel_distance import kernel_distance
from .measurement import AgainstReference, Measure, Measurement, OfDigits, finish_with, labels_in_turn
from .metrics import FEW, Metric, metrics_of
from .neighbours import precision_recall
from .networks import NETWORKS, Extracted, Extractor, RandomFeatures, open_networks
from .times_search import Tried, best_of, search_times

__all__ = [
    "FEW",
    "NETWORKS",
    "AgainstReference",
    "DigitScores",
    "Extracted",
    "Extractor",
    "Figures",
    "Gaussian",
    "GaussianSums",
    "Images",
    "Judge",
    "Measure",
    "Measurement",
    "Metric",
    "OfDigits",
    "RandomFeatures",
    "Tried",
    "about_digits",
    "best_of",
    "describe",
    "digit_scores",
    "finish_with",
    "frechet",
    "frechet_distance",
    "inception_score",
    "is_npz",
    "judge_for",
    "kernel_distance",
    "labels_in_turn",
    "measure_digits",
    "metrics_of",
    "open_images",
    "open_networks",
    "precision_recall",
    "search_times",
]
