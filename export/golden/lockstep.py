"""A model, in memory or streamed, and all golden questions -> what each stage computes; weights are read once for all.

The questions go through the decoder side by side, layer by layer: of a model that does not fit into memory, reading the
weights takes most of the time, and so it takes no more for four questions than for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from bundle.golden import GREEDY_TOKENS
from bundle.manifest import ModelShape, Stage
from bundle.prompt import splice, text_ids
from bundle.runtimes.contract import Floats
from distill.models.mobilevlm import MobileVlm
from export.golden.record import Outputs, Probe, worst_errors
from export.model.shape import model_shape
from export.model.streamed import LoadedModel

Advance = Callable[[int], None]  # told of the work done, in rows through one decoder layer
# Reading a layer's weights takes as long as this many rows through it: 24 ms against 0.6 ms (2048 wide, one thread).
READING_ROWS = 40


def golden_work(vlm: MobileVlm, questions: Sequence[Probe], greedy_rounds: int, forced_rounds: int) -> int:
    """The work of so many calls of ``run_stages_together`` and ``run_forced_together``, as told to ``advance``."""
    prompts = sum(len(p.prompt.token_ids) + (vlm.config.visual_tokens - 1) * (p.pixels is not None) for p in questions)
    answers = (GREEDY_TOKENS - 1) * len(questions)
    greedy = GREEDY_TOKENS * READING_ROWS + prompts + answers
    forced = READING_ROWS + prompts + answers
    return len(vlm.language_model.layers) * (greedy_rounds * greedy + forced_rounds * forced)


class FixedCache:
    """Keys and values of one sequence of known length, as the attention of LLaMA and Qwen2 fills them.

    Caches that grow with every token left the heap full of holes: 2.6 GB for the 0.3 GB of a 1.7B model.
    """

    def __init__(self, model: ModelShape) -> None:
        shape = (model.num_layers, 1, model.num_kv_heads, model.context_length, model.head_dim)
        self._keys, self._values = torch.empty(shape), torch.empty(shape)
        self._lengths = [0] * model.num_layers

    @property
    def length(self) -> int:
        """Rows of the last layer, which is filled last."""
        return self._lengths[-1]

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [1, H, T, d] of a layer -> all of them so far [1, H, L, d]."""
        start, end = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        self._keys[layer, :, :, start:end] = keys
        self._values[layer, :, :, start:end] = values
        self._lengths[layer] = end
        return self._keys[layer, :, :, :end], self._values[layer, :, :, :end]


@torch.no_grad()
def run_stages_together(model: LoadedModel, questions: Sequence[Probe], advance: Advance) -> list[Outputs]:
    """What a runtime does: prefill, then greedy decoding with a KV cache that goes on past EOS."""
    visual, embeddings, rows = _inputs(model, questions)
    caches = [FixedCache(model_shape(model.vlm, prompt.shape[1] + GREEDY_TOKENS - 1)) for prompt in rows]
    logits: list[list[Floats]] = [[] for _ in questions]
    ids: list[list[int]] = [[] for _ in questions]
    for _ in range(GREEDY_TOKENS):
        hidden = _hidden_states(model, rows, caches, advance)
        last = model.vlm.lm_head(torch.cat([states[:, -1] for states in hidden]))  # [questions, V]
        for found, fed, row in zip(logits, ids, last.numpy(), strict=True):
            found.append(row)
            fed.append(int(row.argmax()))
        rows = list(
            model.vlm.get_input_embeddings()(torch.tensor([[fed[-1:]] for fed in ids])).unbind()
        )  # n x [1, 1, D]
    return [
        Outputs(seen, text, np.stack(found), tuple(fed))
        for seen, text, found, fed in zip(visual, embeddings, logits, ids, strict=True)
    ]


@torch.no_grad()
def run_forced_together(
    model: LoadedModel, questions: Sequence[Probe], fed: Sequence[tuple[int, ...]], advance: Advance
) -> list[Outputs]:
    """``run_stages_together`` with given ids after each prompt, in one pass over the weights."""
    visual, embeddings, prompts = _inputs(model, questions)
    answers = model.vlm.get_input_embeddings()(torch.tensor([ids[:-1] for ids in fed]))  # [n, 31, D]
    rows = [torch.cat([prompt, answer[None]], 1) for prompt, answer in zip(prompts, answers, strict=True)]
    hidden = _hidden_states(model, rows, [None] * len(rows), advance)
    answered = [states[0, prompt.shape[1] - 1 :] for states, prompt in zip(hidden, prompts, strict=True)]
    logits = model.vlm.lm_head(torch.stack(answered)).numpy()  # [n, 32, V]
    return [Outputs(*of_one) for of_one in zip(visual, embeddings, logits, fed, strict=True)]


def forced_errors_together(
    model: LoadedModel, questions: Sequence[Probe], wanted: Sequence[Outputs], advance: Advance
) -> dict[Stage, float]:
    """Feed the ids of ``wanted`` to the model as it is now -> the worst relative L2 error of each stage."""
    return worst_errors(run_forced_together(model, questions, [out.fed_ids for out in wanted], advance), wanted)


def _inputs(
    model: LoadedModel, questions: Sequence[Probe]
) -> tuple[list[Floats | None], list[Floats], list[torch.Tensor]]:
    """Per question: visual tokens [1, N, D] or None, text embeddings [1, T, D], what the decoder is fed [1, L, D]."""
    vlm = model.vlm
    pixels = [torch.from_numpy(probe.pixels) for probe in questions if probe.pixels is not None]
    features = iter(vlm.encode_images(torch.cat(pixels)).numpy() if pixels else ())  # of [N, D]
    visual = [None if probe.pixels is None else next(features)[None] for probe in questions]
    ids = [text_ids(probe.prompt.token_ids, vlm.image_token_id) for probe in questions]
    lengths = [len(text) for text in ids]
    table = vlm.get_input_embeddings()(torch.tensor([[token for text in ids for token in text]]))  # [1, all T, D]
    embeddings = [rows.numpy() for rows in table.split(lengths, 1)]
    spliced = [
        torch.from_numpy(splice(probe.prompt.token_ids, vlm.image_token_id, text, seen))
        for probe, text, seen in zip(questions, embeddings, visual, strict=True)
    ]
    return visual, embeddings, spliced


def _hidden_states(
    model: LoadedModel, rows: Sequence[torch.Tensor], caches: Sequence[FixedCache | None], advance: Advance
) -> list[torch.Tensor]:
    """Embeddings [1, L, D] of each sequence -> its last hidden states after the final norm [1, L, D]."""
    language = model.vlm.language_model
    starts = [0 if cache is None else cache.length for cache in caches]
    positions = [torch.arange(at, at + x.shape[1])[None] for x, at in zip(rows, starts, strict=True)]  # n x [1, L]
    rotary = [language.rotary_emb(x, at) for x, at in zip(rows, positions, strict=True)]
    states = list(rows)
    for layer in language.layers:
        with model.held(layer):
            states = [
                layer(
                    x,  # no mask: the attention of one whole sequence, or of its next row, is causal by itself
                    position_ids=at,
                    past_key_values=cache,
                    use_cache=cache is not None,
                    position_embeddings=angles,
                )
                for x, at, cache, angles in zip(states, positions, caches, rotary, strict=True)
            ]  # n x [1, L, D]
        advance(READING_ROWS + sum(x.shape[1] for x in rows))
    return [language.norm(x) for x in states]
