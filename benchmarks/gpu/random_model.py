"""A model with random weights, made where it will run: speed does not depend on what was learnt."""

from __future__ import annotations

import torch
from torch import nn

from engine.config import ModelConfig
from engine.models.transformer import DecoderLayer, Transformer
from kernels.backend import Kernels
from kernels.linear.weight import QuantizedWeight, quantize


def random_model(config: ModelConfig, dtype: torch.dtype, device: torch.device, kernels: Kernels, seed: int = 0) -> Transformer:
    """The model on its device, with no second copy anywhere. Norms scale by 1, biases are 0.

    Zeros would be no substitute: a GPU draws less power on them and runs faster.
    """
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Transformer(config, kernels)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        if "norm" not in name and "bias" not in name:
            nn.init.normal_(parameter, std=0.02)
    return model.requires_grad_(False).eval()


def quantized(model: Transformer) -> Transformer:
    """The model with its large weights in eight bits, quantised in place, one layer after the other."""
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        before = layer.linear_weights()
        layer.make_room_for_fp8()
        for weight, room in zip(before, layer.linear_weights(), strict=True):
            assert isinstance(weight, torch.Tensor)
            assert isinstance(room, QuantizedWeight)
            values = quantize(weight)
            room.values.copy_(values.values)
            room.scale.copy_(values.scale)
    return model
