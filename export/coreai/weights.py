"""A float weight -> integers and scales for Core AI; a written .aimodel -> the weights it really holds, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from bundle.errors import VerificationError
from bundle.runtimes.coreai_asset import FLOATS, Constant, Quantized, read_asset
from export.weights.recipe import Storage

FloatDtype: TypeAlias = torch.dtype  # torch.float16 or torch.float32
# Largest magnitudes tried for a group of 4 bits, as parts of its extreme: what is clipped loses less than what all
# others gain. Normal weights in groups of 32: relative error 9.7e-2 with the extreme's own scale, 8.7e-2 with these.
TRIED = (1.0, 0.95, 0.9, 0.85, 0.8)
SCALE = ".scale"


@dataclass(frozen=True)
class PackedWeight:
    """A quantized matrix: codes [N, K] int8, scale [N, groups] in the type that the program computes in."""

    codes: torch.Tensor
    scale: torch.Tensor
    bits: int


def pack(weight: torch.Tensor, storage: Storage, dtype: FloatDtype) -> PackedWeight:
    """Quantize [N, K] symmetrically; at 4 bits the scale of least squared error among a few."""
    rows, columns = weight.shape
    groups = weight.detach().float().reshape(rows, -1, storage.group_size or columns)  # [N, groups, group]
    top = (1 << (storage.bits - 1)) - 1
    extreme = groups.abs().amax(-1)  # [N, groups]
    best_codes = best_scale = least = None
    for part in TRIED if storage.bits == 4 else TRIED[:1]:
        scale = (extreme * (part / top)).to(dtype)
        step = scale.float().clamp_min(torch.finfo(torch.float32).tiny)[..., None]
        codes = torch.round(groups / step).clamp(-top - 1, top)
        error = (codes * step - groups).square().sum(-1)  # [N, groups]
        if best_codes is None or best_scale is None or least is None:
            best_codes, best_scale, least = codes, scale, error
            continue
        better = error < least
        best_codes = torch.where(better[..., None], codes, best_codes)
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, error, least)
    assert best_codes is not None and best_scale is not None
    return PackedWeight(best_codes.to(torch.int8).reshape(rows, columns), best_scale, int(storage.bits))


def read_back(
    asset: Path, floats: Mapping[str, torch.Tensor], packed: Mapping[str, PackedWeight]
) -> tuple[dict[str, NDArray[np.float32]], dict[int, str]]:
    """What a written asset holds of these constants: name -> values, and position in the file -> name.

    A constant is known by its bytes, and scales must stand beside the integers they belong to: what the converter put
    elsewhere, folded away or gave to another layer is missed. The values come from the file alone.

    Raises:
        VerificationError: the program does not hold one of them.
    """
    constants, quantized = read_asset(asset)
    by_digest: dict[str, Constant] = {}
    for constant in constants:
        if constant.kind not in FLOATS:
            continue  # zeros have the same bytes in every type
        by_digest.setdefault(constant.digest, constant)
    pairs: dict[tuple[str, str], Quantized] = {
        (pair.codes.digest, pair.scales.digest): pair for pair in reversed(quantized)
    }
    values: dict[str, NDArray[np.float32]] = {}
    names: dict[int, str] = {}
    for name, wanted in floats.items():
        # the converter keeps the parameters of a layer norm in float32, as the norm computes
        found = by_digest.get(_digest(wanted)) or by_digest.get(_digest(wanted.float()))
        if found is None and not _neutral(wanted):
            raise _missing(asset, name)
        values[name] = wanted.float().numpy() if found is None else found.floats().reshape(wanted.shape)
        if found is not None:
            names.setdefault(found.place, name)
    for name, weight in packed.items():
        pair = pairs.get((sha256(_packed_bytes(weight)).hexdigest(), _digest(weight.scale)))
        if pair is None:
            raise _missing(asset, name)
        values[name] = pair.floats()
        names.setdefault(pair.codes.place, name)
        names.setdefault(pair.scales.place, name + SCALE)
    return values, names


def _digest(values: torch.Tensor) -> str:
    return sha256(values.detach().contiguous().numpy().tobytes()).hexdigest()


def _packed_bytes(weight: PackedWeight) -> bytes:
    """The integers as they lie in the file."""
    codes: NDArray[np.uint8] = weight.codes.numpy().reshape(-1).view(np.uint8)
    if weight.bits == 8:
        return codes.tobytes()
    return np.bitwise_or(codes[0::2] & 15, codes[1::2] << 4).tobytes()


def _neutral(wanted: torch.Tensor) -> bool:
    """The converter may drop a product with ones and a sum with zeros, such as a norm that was never trained."""
    return bool((wanted == 1).all() or (wanted == 0).all())


def _missing(asset: Path, name: str) -> VerificationError:
    return VerificationError(f"{asset.name}: the converted program does not hold '{name}' as it was given")
