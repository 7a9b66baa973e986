"""The training step of the published Align-KD code, formulated as there and written anew, on alignkd's own modules.

What it does (facts from running that code on tiny weights): each model runs its own tower and an eager decoder that
returns the attention maps of every layer; logits of all positions are kept in float32; the logits term is a forward
cross entropy over all positions; the attention mask selects vision queries x text keys, which causality makes 0.
Two things are kinder than the original: float32 in place of its float16 softmax, and indexes of the focus term that lie
inside the image.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from distill.align_kd.module import AlignKD
from distill.losses.attention import focus_tokens
from distill.models.mobilevlm import TEXT_KIND, VISION_KIND, Expanded, MobileVlm

TOP_K = 16


def published_loss(module: AlignKD, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One batch -> the sum of the published code's five terms; ``module`` holds both models and the adapters."""
    teacher_vlm, student_vlm = module.teacher, module.student
    assert teacher_vlm is not None and module.head_map is not None and module.visual_map is not None
    with torch.no_grad():
        theirs, their_logits, their_maps = everything(teacher_vlm, batch)
    ours, our_logits, our_maps = everything(student_vlm, batch)
    assert ours.labels is not None and ours.visual_tokens is not None and theirs.visual_tokens is not None
    supervised = F.cross_entropy(our_logits[:, :-1].flatten(0, 1), ours.labels[:, 1:].flatten(), ignore_index=-100)
    soft = (
        -(their_logits.softmax(-1) * our_logits.log_softmax(-1)).sum(-1).mean()
    )  # every position, prompt and image too
    vision, text = ours.kinds == VISION_KIND, ours.kinds == TEXT_KIND
    upper = (vision[:, :, None] & text[:, None, :])[:, None]  # [B, 1, L, L] vision queries, text keys after them: all 0
    attention = F.mse_loss(module.head_map(their_maps[0].float() * upper), our_maps[0] * upper)
    mapped = module.visual_map(theirs.visual_tokens.to(ours.visual_tokens.dtype))  # [n, N, D_S]
    visual = F.mse_loss(mapped, ours.visual_tokens)
    columns = vision.nonzero()[:, 1].view(len(mapped), -1)  # [n, N]
    block = their_maps[0].gather(3, columns[:, None, None].expand(-1, their_maps[0].shape[1], vision.shape[1], -1))
    picked = focus_tokens(block, torch.ones_like(vision), TOP_K)[..., None].expand(-1, -1, mapped.shape[-1])
    focus = F.mse_loss(mapped.gather(1, picked), ours.visual_tokens.gather(1, picked))
    return supervised + soft + attention + visual + focus


def everything(
    vlm: MobileVlm, batch: dict[str, torch.Tensor]
) -> tuple[Expanded, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Expanded batch, logits [B, L, V] in float32, and the attention maps [B, H, L, L] of every layer."""
    visual = vlm.encode_images(batch["pixel_values"])
    expanded = vlm.expand(batch["input_ids"], batch["attention_mask"], visual, batch["labels"])
    vlm.language_model.set_attn_implementation("eager")
    try:
        output = vlm.language_model(
            inputs_embeds=expanded.inputs_embeds,
            attention_mask=expanded.attention_mask,
            use_cache=False,
            output_attentions=True,
        )
    finally:
        vlm.language_model.set_attn_implementation("sdpa")
    assert output.attentions is not None
    return expanded, vlm.lm_head(output.last_hidden_state).float(), output.attentions
