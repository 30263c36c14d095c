"""Online attention accumulation for weakly supervised semantic segmentation.

Primitives of *Integral Object Mining via Online Attention Accumulation* (Jiang et al., ICCV 2019) that go with any
classifier: attention from a class-aware convolution, cumulative attention maps, the hybrid loss, proxy labels.
"""

from oaa_lib import interop
from oaa_lib.accumulator import AttentionAccumulator
from oaa_lib.cam import CAMHead, CAMOutput, normalize_attention
from oaa_lib.drop import AttentionDrop, attention_drop
from oaa_lib.fusion import harmonic_mix
from oaa_lib.gating import Gate, score_gate, topk_gate
from oaa_lib.inference import multi_scale_attention
from oaa_lib.losses import HybridLoss, MultiLabelCrossEntropy, hybrid_loss, multilabel_cross_entropy
from oaa_lib.metrics import ConfusionMatrix
from oaa_lib.pseudo_labels import pseudo_label_from_cues
from oaa_lib.refinement import pixel_adaptive_refinement
from oaa_lib.snapshots import Snapshots
from oaa_lib.statistics import Statistics, attention_similarity
from oaa_lib.strategies import ExponentialMovingAverage, Fusion, LatestFusion, MaxFusion, MeanFusion, NoisyOr
from oaa_lib.thresholds import ThresholdSweep, two_fold
from oaa_lib.views import View
from oaa_lib.wrapping import WrappedClassifier, wrap_classifier

__version__ = "0.1.0"

__all__ = [
    "AttentionAccumulator",
    "AttentionDrop",
    "CAMHead",
    "CAMOutput",
    "ConfusionMatrix",
    "ExponentialMovingAverage",
    "Fusion",
    "Gate",
    "HybridLoss",
    "LatestFusion",
    "MaxFusion",
    "MeanFusion",
    "MultiLabelCrossEntropy",
    "NoisyOr",
    "Snapshots",
    "Statistics",
    "ThresholdSweep",
    "View",
    "WrappedClassifier",
    "attention_drop",
    "attention_similarity",
    "harmonic_mix",
    "hybrid_loss",
    "interop",
    "multi_scale_attention",
    "multilabel_cross_entropy",
    "normalize_attention",
    "pixel_adaptive_refinement",
    "pseudo_label_from_cues",
    "score_gate",
    "topk_gate",
    "two_fold",
    "wrap_classifier",
]
