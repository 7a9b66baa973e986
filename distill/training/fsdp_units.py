"""AlignKD under FSDP2 -> each layer a unit of its own, but for those whose weights are read from outside of them."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from distill.align_kd.module import AlignKD


def shard_layer_by_layer(plugin: Any, module: AlignKD) -> None:
    """Make every layer of tower and decoder an FSDP unit of its own, but for the decoder's first.

    AlignKD reads that layer's q and k outside of the layer's own forward pass, so its weights have to be whole from
    the start of AlignKD's forward to the end of the backward pass: as a part of the root unit they are, and so are
    embedding, projector, lm_head and adapters. (The term attention_groups reads every layer's.)
    accelerate picks units by class name, hence the marking classes.
    """
    student = module.student
    borrowed = len(student.language_model.layers) if "attention_groups" in module.weights else 1
    layers = [*student.language_model.layers[borrowed:], *student.vision_tower.encoder.layers]
    names = set()
    for layer in layers:
        marked = type(f"Unit{type(layer).__name__}", (type(layer),), {})
        layer.__class__ = marked
        names.add(marked.__name__)
    plugin.auto_wrap_policy = transformer_auto_wrap_policy
    plugin.transformer_cls_names_to_wrap = sorted(names)
