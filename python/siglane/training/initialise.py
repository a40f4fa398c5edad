"""Fresh weights for models that are trained from scratch."""

from __future__ import annotations

from torch import nn

from siglane.nn.norm import RMSNorm


def initialise(model: nn.Module) -> None:
    """Matrices normal with deviation 1 / (2 sqrt(fan in)), norms at one, biases at zero.

    The token table gets 1 / sqrt(width), so that a token's embedding outweighs what the first blocks add at random and
    the tied head's first logits are of order one.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1]
            nn.init.normal_(parameter, std=fan_in**-0.5 if "embed_tokens" in name else fan_in**-0.5 / 2)
        elif name.endswith("bias") and "word_bias" not in name:
            nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | RMSNorm):
            nn.init.ones_(module.weight)
