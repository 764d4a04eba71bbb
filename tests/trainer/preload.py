"""What the server of ranks has loaded before it forks one. Nothing here may start a thread."""

import torch
import transformers.models.llama.modeling_llama

import tuneward_trainer.train

torch.set_num_threads(1)
LOADED = (transformers.models.llama.modeling_llama, tuneward_trainer.train)
