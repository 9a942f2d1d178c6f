"""What lmms-eval reads from our entry point: the name and the place of our model class.

A module of its own because lmms-eval loads it while its model registry is being imported, on which the class depends.
"""

from lmms_eval.models.registry_v2 import ModelManifest

MANIFEST = ModelManifest(model_id="encoder_swap_llava", simple_class_path="eval.answering.lmms_model.EncoderSwapLlava")
