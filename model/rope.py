"""RopeTable: cos and sin of every position, with the scaling of the model.

The formulas are those of transformers' `modeling_rope_utils`, so that both agree to the last bits.
longrope differs on purpose in one thing: its factors are fixed when the model is loaded (long if
the context limit is beyond the original one), not chosen anew by each sequence's length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from model.config import RopeConfig


@dataclass(frozen=True, slots=True)
class RopeFactors:
    """Divisors of the frequencies that a GGUF file keeps as tensors, each [rotary_dim / 2] fp32."""

    freqs: torch.Tensor | None = None
    short: torch.Tensor | None = None
    long: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class RopeTable:
    """cos, sin: [max_model_len, rotary_dim / 2] fp32, already times the attention factor.
    `variant` names everything they were computed from; it belongs in cache keys."""

    cos: torch.Tensor
    sin: torch.Tensor
    rotary_dim: int
    variant: str

    @staticmethod
    def build(
        rope: RopeConfig,
        max_model_len: int,
        device: torch.device | str = "cpu",
        factors: RopeFactors | None = None,
    ) -> RopeTable:
        """The table for positions 0 .. max_model_len - 1.

        Raises ValueError when longrope's factors are missing or have the wrong number of values.
        """
        if max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {max_model_len}")
        inv_freq, attention_factor, variant = inverse_frequencies(rope, max_model_len, factors)
        angles = torch.arange(max_model_len, dtype=torch.float32)[:, None] * inv_freq
        return RopeTable(
            cos=(angles.cos() * attention_factor).to(device),
            sin=(angles.sin() * attention_factor).to(device),
            rotary_dim=rope.rotary_dim,
            variant=variant,
        )


def inverse_frequencies(
    rope: RopeConfig, max_model_len: int, factors: RopeFactors | None = None
) -> tuple[torch.Tensor, float, str]:
    """([rotary_dim / 2] fp32 radians a position, factor on cos and sin, name of the variant)."""
    factors = factors or RopeFactors()
    dim = rope.rotary_dim
    powers = rope.theta ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
    inv_freq = 1.0 / powers
    if factors.freqs is not None:
        inv_freq = inv_freq / _checked("rope_freqs", factors.freqs, dim)
    attention_factor = 1.0
    side = ""
    factor = rope.factor or 1.0
    # A GGUF file says longrope by having its tensors, whatever its metadata names.
    if rope.kind == "longrope" or factors.long is not None or factors.short is not None:
        original = rope.original_max_position_embeddings or max_model_len
        side = "long" if max_model_len > original else "short"
        divisors = _longrope_divisors(rope, factors, side)
        inv_freq = 1.0 / (divisors * powers)
        attention_factor = _longrope_attention_factor(rope, factor, original)
    elif rope.kind == "linear":
        inv_freq = inv_freq / factor
    elif rope.kind == "llama3":
        inv_freq = _llama3(rope, inv_freq, factor)
    elif rope.kind == "yarn":
        inv_freq = _yarn(rope, powers, factor)
        attention_factor = _yarn_attention_factor(rope, factor)
    tensors = [t for t in (factors.freqs, factors.short, factors.long) if t is not None]
    variant = f"{rope!r} {side} {[t.tolist() for t in tensors]}"
    return inv_freq, attention_factor, variant


def _checked(name: str, values: torch.Tensor, dim: int) -> torch.Tensor:
    if values.numel() != dim // 2:
        raise ValueError(f"{name} must have {dim // 2} values, got {values.numel()}")
    return values.reshape(-1).float().cpu()


def _longrope_divisors(rope: RopeConfig, factors: RopeFactors, side: str) -> torch.Tensor:
    tensor = factors.long if side == "long" else factors.short
    values = rope.long_factor if side == "long" else rope.short_factor
    if tensor is None:
        tensor = torch.tensor(values, dtype=torch.float32)
    return _checked(f"the {side} factors of longrope", tensor, rope.rotary_dim)


def _longrope_attention_factor(rope: RopeConfig, factor: float, original: int) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if factor <= 1.0:
        return 1.0
    return math.sqrt(1 + math.log(factor) / math.log(original))


def _llama3(rope: RopeConfig, inv_freq: torch.Tensor, factor: float) -> torch.Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    original = rope.original_max_position_embeddings or 1
    low_wavelength = original / rope.low_freq_factor
    high_wavelength = original / rope.high_freq_factor
    wavelength = 2 * math.pi / inv_freq
    scaled = torch.where(wavelength > low_wavelength, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    smoothed = (1 - smooth) * scaled / factor + smooth * scaled
    between = (wavelength >= high_wavelength) & (wavelength <= low_wavelength)
    return torch.where(between, smoothed, scaled)


def _yarn(rope: RopeConfig, powers: torch.Tensor, factor: float) -> torch.Tensor:
    """YaRN (Peng et al. 2023): interpolate slow dimensions, keep fast ones, a ramp between."""
    dim = rope.rotary_dim
    original = rope.original_max_position_embeddings or 1

    def dimension(rotations: float) -> float:
        ratio = original / (rotations * 2 * math.pi)
        return (dim * math.log(ratio)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # as the original does, against a division by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    extrapolated = 1 - ramp
    return 1.0 / (factor * powers) * (1 - extrapolated) + 1.0 / powers * extrapolated


def _yarn_attention_factor(rope: RopeConfig, factor: float) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return magnitude(rope.mscale) / magnitude(rope.mscale_all_dim)
    return magnitude(1.0)
