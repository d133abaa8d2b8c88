"""The networks: layers in permutator.py, the table of sizes in variants.py, foreign checkpoints in weights.py."""

from vip.models.permutator import Mixer, Stage, VisionPermutator
from vip.models.weights import load_weights, unwrap_state_dict

__all__ = ["Mixer", "Stage", "VisionPermutator", "load_weights", "unwrap_state_dict"]
