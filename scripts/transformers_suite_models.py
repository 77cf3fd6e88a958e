"""The common model tests of Hugging Face transformers for the models of docs/integrations.md.

`run_transformers_suite.py` puts this file beside the tests of transformers' source distribution and
runs it there. It has no tests of its own: what a test does is in `test_modeling_common.py` and
`test_training_mixin.py`, written by the authors of transformers; here are eight small models.
"""

import unittest

import torch
import transformers
from transformers.testing_utils import torch_device

from .generation.test_utils import GenerationTesterMixin
from .test_modeling_common import ModelTesterMixin
from .test_training_mixin import TrainingTesterMixin

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
DENSE_FIRST = {
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
MODELS = {
    "Mixtral": {"intermediate_size": 16, "num_local_experts": 4, "head_dim": 8},
    "Qwen3Moe": {"moe_intermediate_size": 16, "num_experts": 8, "head_dim": 8},
    "Olmoe": {"intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 4, "head_dim": 8},
    "DeepseekV3": {**DENSE_FIRST, **LATENT},
    "Glm4Moe": {**DENSE_FIRST, "head_dim": 8},
    "GptOss": {"intermediate_size": 16, "num_local_experts": 4, "head_dim": 8},
    "Llama4": {
        "intermediate_size": 16,
        "intermediate_size_mlp": 40,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 1,
        "head_dim": 8,
    },
    "Phimoe": {"intermediate_size": 16, "num_local_experts": 4, "head_dim": 8},
}


class Tester:
    """What the common tests ask about a model: its configuration and a batch."""

    is_training = True
    batch_size = 3
    seq_length = 7
    encoder_seq_length = 7
    hidden_size = SIZES["hidden_size"]
    num_hidden_layers = SIZES["num_hidden_layers"]
    num_attention_heads = SIZES["num_attention_heads"]

    def __init__(self, config_class, options, causal_lm_class):
        self.config_class = config_class
        self.options = options
        self.causal_lm_class = causal_lm_class

    def get_config(self):
        return self.config_class(**{**SIZES, **self.options})

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(1, SIZES["vocab_size"], shape, device=torch_device)
        mask = torch.ones(shape, dtype=torch.long, device=torch_device).tril()
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


def _tests(name, options):
    """The test class of one model."""
    llama4 = name == "Llama4"  # its Llama4Model is one of text and images
    config_class = getattr(transformers, f"{name}TextConfig" if llama4 else f"{name}Config")
    causal_lm = getattr(transformers, f"{name}ForCausalLM")
    classes = (causal_lm,) if llama4 else (getattr(transformers, f"{name}Model"), causal_lm)

    def set_up(self):
        self.model_tester = Tester(config_class, options, causal_lm)

    members = {
        "setUp": set_up,
        "all_model_classes": classes,
        "pipeline_model_mapping": {},
        # Not every expert is chosen in one small batch.
        "test_all_params_have_gradient": False,
    }
    bases = (ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase)
    return type(f"{name}ModelTest", bases, members)


for _name, _options in MODELS.items():
    globals()[f"{_name}ModelTest"] = _tests(_name, _options)
