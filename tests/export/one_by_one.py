"""One golden question after the other through the model as transformers runs it: what the lockstep must equal."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from bundle.golden import GREEDY_TOKENS
from bundle.manifest import Stage
from bundle.prompt import splice, text_ids
from bundle.runtimes.contract import Floats
from distill.models.mobilevlm import MobileVlm
from export.golden.record import Outputs, Probe, worst_errors


@torch.no_grad()
def run_stages(vlm: MobileVlm, probe: Probe) -> Outputs:
    """Run the model in eager torch as a runtime does, with a KV cache; greedy decoding goes on past EOS."""
    visual, embeddings, step = _inputs(vlm, probe)
    cache, rows, ids = None, [], []
    for _ in range(GREEDY_TOKENS):
        out = vlm.language_model(inputs_embeds=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        rows.append(vlm.lm_head(out.last_hidden_state[:, -1])[0].numpy())  # [V]
        ids.append(int(rows[-1].argmax()))
        step = vlm.get_input_embeddings()(torch.tensor([[ids[-1]]]))  # [1, 1, D]
    return Outputs(visual, embeddings, np.stack(rows), tuple(ids))


@torch.no_grad()
def run_forced(vlm: MobileVlm, probe: Probe, fed_ids: tuple[int, ...]) -> Outputs:
    """``run_stages`` with given ids after the prompt, in one pass."""
    visual, embeddings, prompt = _inputs(vlm, probe)
    answer = vlm.get_input_embeddings()(torch.tensor([fed_ids[:-1]]))  # [1, 31, D]
    hidden = vlm.language_model(inputs_embeds=torch.cat([prompt, answer], 1), use_cache=False).last_hidden_state
    logits = vlm.lm_head(hidden[0, prompt.shape[1] - 1 :]).numpy()  # [32, V]
    return Outputs(visual, embeddings, logits, fed_ids)


def _inputs(vlm: MobileVlm, probe: Probe) -> tuple[Floats | None, Floats, torch.Tensor]:
    """Visual tokens [1, N, D] or None, text embeddings [1, T, D], and what the decoder is fed [1, T + N, D]."""
    visual = None if probe.pixels is None else vlm.encode_images(torch.from_numpy(probe.pixels)).numpy()
    ids = text_ids(probe.prompt.token_ids, vlm.image_token_id)
    embeddings = vlm.get_input_embeddings()(torch.tensor([ids])).numpy()
    return visual, embeddings, torch.from_numpy(splice(probe.prompt.token_ids, vlm.image_token_id, embeddings, visual))


def forced_errors(vlm: MobileVlm, questions: Sequence[Probe], wanted: Sequence[Outputs]) -> dict[Stage, float]:
    """Feed the ids of ``wanted`` to the model as it is now -> the worst relative L2 error of each stage."""
    found = (run_forced(vlm, probe, outputs.fed_ids) for probe, outputs in zip(questions, wanted, strict=True))
    return worst_errors(found, wanted)
