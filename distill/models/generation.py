"""Several questions at once -> the greedy answers of a MobileVlm, with one KV cache."""

from __future__ import annotations

import torch

from distill.models.mobilevlm import MobileVlm


@torch.no_grad()
def answers(
    vlm: MobileVlm,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    pixel_values: torch.Tensor | None,
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Greedy continuation of every row, each ending with its first id of ``eos_ids`` or at ``max_new_tokens``.

    Args:
        input_ids, attention_mask: [B, T], right-padded, as in ``MobileVlm.logits``.
        pixel_values: [n, 3, S, S] in reading order.
    """
    visual = None if pixel_values is None else vlm.encode_images(pixel_values)  # [n, N, D]
    expanded = vlm.expand(input_ids, attention_mask, visual)
    batch, length = expanded.attention_mask.shape
    # rows are moved to the right end, so that what is generated follows every one of them
    gap = length - expanded.attention_mask.sum(1, keepdim=True)  # [B, 1]
    source = (torch.arange(length, device=gap.device)[None] - gap) % length  # [B, L]
    mask = expanded.attention_mask.gather(1, source)  # [B, L]
    step = expanded.inputs_embeds.gather(1, source[..., None].expand_as(expanded.inputs_embeds))  # [B, L, D]
    position = (mask.cumsum(1) - 1).clamp_min(0)  # [B, L]
    cache, done = None, torch.zeros(batch, dtype=torch.bool, device=gap.device)
    said: list[list[int]] = [[] for _ in range(batch)]
    for _ in range(max_new_tokens):
        out = vlm.language_model(
            inputs_embeds=step, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
        )
        cache = out.past_key_values
        best = vlm.lm_head(out.last_hidden_state[:, -1]).argmax(-1)  # [B]
        for row in (~done).nonzero()[:, 0].tolist():
            said[row].append(int(best[row]))
            done[row] = said[row][-1] in eos_ids
        if bool(done.all()):
            break
        step = vlm.get_input_embeddings()(best)[:, None]  # [B, 1, D]
        mask = torch.cat([mask, mask.new_ones(batch, 1)], 1)
        position = position[:, -1:] + 1
    return said
