"""Training and hidden states for those who use PyTorch: modules whose blocks run in the swarm."""

from petalctl.torch.adapters import DeepPrompt, RemoteAdapter, RemoteLora
from petalctl.torch.blocks import RemoteBlocks
from petalctl.torch.causal_lm import CausalLMOutput, RemoteCausalLM, load_config
from petalctl.torch.soft_prompt import SoftPrompt

__all__ = [
    "CausalLMOutput",
    "DeepPrompt",
    "RemoteAdapter",
    "RemoteBlocks",
    "RemoteCausalLM",
    "RemoteLora",
    "SoftPrompt",
    "load_config",
]
