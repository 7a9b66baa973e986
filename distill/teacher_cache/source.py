"""CacheConfig -> teacher and data of a recording, opened, and the identities of the entries that are asked for."""

from __future__ import annotations

from dataclasses import dataclass

from bundle.errors import UsageError
from bundle.staging import sha256_of
from bundle.tokenizer import open_tokenizer
from distill.batches.dataset import LlavaDataset
from distill.data.rows import open_rows
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import Processing, read_processing
from distill.settings.recording import CacheConfig
from distill.teacher.open_teacher import chosen_processing
from distill.teacher_cache.identity import Identity, TeacherFacts, facts_of, processing_identity
from distill.teacher_cache.parts import Asked, demands, features_demand, stored_as
from distill.teacher_cache.question import asked_by

ROW_INDEX = "rows"  # of the cache folder: where the data's rows lie


@dataclass(frozen=True)
class RecordingSource:
    """Teacher and data, opened."""

    teacher: MobileVlm
    facts: TeacherFacts
    processing: Processing
    dataset: LlavaDataset
    asked: Asked
    identities: dict[str, Identity]

    @staticmethod
    def open(config: CacheConfig) -> RecordingSource:
        """Read checkpoints and data.

        Raises:
            UsageError: teacher, student or data is not usable.
        """
        assert config.teacher is not None and config.data is not None
        index = config.cache / ROW_INDEX if config.ranks == 1 else None  # a temporary one for each of several
        rows = open_rows(config.data, config.image_folder, index)
        rows.check(missing_images=config.on_bad_image == "stop")
        teacher = load_vlm(config.teacher).requires_grad_(False)
        processing = chosen_processing(read_processing(config.teacher), config)
        facts = facts_of(teacher, config.teacher, processing)
        context, layers = teacher.config.text_config.max_position_embeddings, 0
        if config.student is not None:
            processing = _agreeing(config, processing)
            text = load_vlm(config.student).config.text_config  # a config alone would have to be read layout by layout
            context, layers = text.max_position_embeddings, text.num_hidden_layers
        asked = asked_by(config, layers)
        if "attention_groups" in asked.terms and not layers:
            raise UsageError("attention_groups compares with every layer of the student: give it by --student DIR")
        tokenizer = open_tokenizer(processing.tokenizer, config.student or config.teacher)
        dataset = LlavaDataset(rows, processing, tokenizer, context, teacher.config.visual_tokens)
        identity = processing_identity(processing)
        wanted = list(demands(asked, facts.sha256, identity).values())
        if config.storage.features:
            wanted.append(features_demand(facts.tower_sha256, identity))
        identities = {demand["part"]: stored_as(asked, config.storage, demand) for demand in wanted}
        return RecordingSource(teacher, facts, processing, dataset, asked, identities)


def _agreeing(config: CacheConfig, theirs: Processing) -> Processing:
    """The student's processing, which training encodes conversations by."""
    assert config.student is not None
    ours = chosen_processing(read_processing(config.student), config)
    if ours.image != theirs.image or sha256_of(ours.tokenizer_path) != sha256_of(theirs.tokenizer_path):
        raise UsageError(
            f"student {config.student} and teacher {config.teacher} have different tokenizers or see images "
            "differently; choose a pair that agrees"
        )
    return ours
