"""The teacher cache: what is recorded, that training from it is training with the teacher, what is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

import distill
from bundle.errors import UsageError
from bundle.tokenizer import open_tokenizer
from distill.align_kd.module import AlignKD
from distill.batches.collator import Collator
from distill.batches.dataset import Example, LlavaDataset
from distill.batches.image_store import ImageStore
from distill.data.rows import read_rows
from distill.models import load_vlm
from distill.models.mobilevlm import MobileVlm
from distill.models.processing import read_processing
from distill.settings.recording import CacheConfig, CacheStorage
from distill.settings.terms import DIVERGENCE_TERMS, TermSettings, TermWeights
from distill.settings.training import DistillConfig
from distill.teacher_cache.identity import checkpoint_sha256
from distill.teacher_cache.image_digests import ImageDigests
from distill.teacher_cache.parts import NEEDS
from distill.teacher_cache.question import recording_command
from distill.teacher_cache.record import Recorded, record
from distill.teacher_cache.search import CacheSearch
from distill.teacher_cache.shards import ShardReader, shard_faults
from distill.training.run import train

MakeData = Callable[..., Path]
DEFAULT = CacheStorage()
WHOLE = CacheStorage(words=512, precision="float32")  # the tiny models' whole vocabulary
EVERY_TERM = TermWeights(**{name: 1.0 for name in NEEDS})  # type: ignore[arg-type]
QUIET = Console(quiet=True)


@pytest.fixture
def config(reference: Path, make_data: MakeData, tmp_path: Path) -> DistillConfig:
    return DistillConfig(
        student=reference / "student",
        teacher=reference / "teacher",
        cache=tmp_path / "cache",
        data=make_data(),
        output=tmp_path / "trained",
        batch_size=3,
        max_steps=10,
        log_steps=1,
        grad_norm_steps=0,
        learning_rate=1e-4,
    )


def recording_for(config: DistillConfig, storage: CacheStorage = DEFAULT, **changes: Any) -> CacheConfig:
    assert config.cache is not None
    return CacheConfig(
        cache=config.cache, teacher=config.teacher, student=config.student, data=config.data, losses=config.losses,
        weights=config.weights, temperature=config.temperature, mask=config.mask, top_k=config.top_k, storage=storage,
        batch_size=4, **changes,
    )  # fmt: skip


def do_record(config: DistillConfig, storage: CacheStorage = DEFAULT, **changes: Any) -> Recorded:
    return record(recording_for(config, storage, **changes), QUIET)


def terms_of(output: Path) -> list[dict[str, float]]:
    log = json.loads((output / "training_log.json").read_text())["log"]
    return [{k: v for k, v in entry.items() if k.startswith("term/")} for entry in log if "loss" in entry]


def examples_of(config: DistillConfig) -> tuple[list[Example], Collator, MobileVlm]:
    student, processing = load_vlm(config.student), read_processing(config.student)
    tokenizer = open_tokenizer(processing.tokenizer, config.student)
    rows = read_rows(config.data, config.image_folder)
    dataset = LlavaDataset(rows, processing, tokenizer, 2048, student.config.visual_tokens)
    examples = [dataset[i] for i in range(len(dataset))]
    collator = Collator(processing.tokenizer.pad_id, ImageStore(processing.image, 1 << 30))
    if config.cache is not None:
        search = CacheSearch(config, student, processing)
        collator.recording = search.chosen(search.lacking(examples))
    return examples, collator, student


def refused(config: DistillConfig) -> str:
    with pytest.raises(UsageError) as error:
        examples_of(config)
    return str(error.value)


def test_ten_steps_from_the_whole_recording_are_ten_steps_with_the_teacher(config: DistillConfig) -> None:
    done = do_record(config, WHOLE)
    assert (done.conversations, done.recorded) == (6, 6)
    live = terms_of(train(replace(config, cache=None, output=config.output.with_name("live"))))
    hidden = config.student.parent / "nowhere"  # the teacher may be away
    cached = terms_of(train(replace(config, teacher=hidden)))
    assert len(live) == len(cached) == 10
    for ours, theirs in zip(cached, live, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-6)
    adapters = load_file(config.output / "adapters.safetensors")
    assert {name.split(".")[0] for name in adapters} == {"head_map", "visual_map"}


@pytest.mark.parametrize("mask", ["answer", "answer+vision", "all"])
def test_every_term_is_read_as_the_teacher_says_it(config: DistillConfig, mask: Any, teacher: MobileVlm) -> None:
    config = replace(config, weights=EVERY_TERM, mask=mask, temperature=2.0)
    done = do_record(config, WHOLE)
    assert done.shard_bytes == pytest.approx(done.estimated_bytes, rel=0.05)
    examples, collator, student = examples_of(config)
    settings = TermSettings(temperature=2.0, mask=mask)
    assert collator.recording is not None
    cached = AlignKD(student, None, config.term_weights, settings, recorded_teacher=collator.recording.shape)  # type: ignore[attr-defined]
    live = AlignKD(student, teacher, config.term_weights, settings)
    for some in (examples, examples[::-1][:4], [examples[1], examples[4]]):  # the last are text alone
        batch = collator(some)
        found = cached(**batch)
        del batch["recorded"]
        expected = live(**batch)
        assert {n: v.item() for n, v in found.items()} == pytest.approx(
            {n: v.item() for n, v in expected.items()}, rel=2e-5, abs=1e-6
        )


def test_the_default_storage_errs_little(config: DistillConfig) -> None:
    """On a trained teacher: docs/teacher_cache.md has the curve over sizes."""
    demo = Path(distill.__file__).parent
    weights = TermWeights(attention_kl=1.0, forward_kl=1.0, relation=1.0)
    config = replace(config, teacher=demo / "demo_teacher", student=demo / "demo_student", weights=weights)
    do_record(config)
    examples, collator, student = examples_of(config)
    batch = collator(examples)
    assert collator.recording is not None and config.teacher is not None
    gradients = []
    for owner in (load_vlm(config.teacher), None):
        module = AlignKD(student, owner, config.term_weights, recorded_teacher=collator.recording.shape)  # type: ignore[attr-defined]
        module.zero_grad()
        kept = batch if owner is None else {name: value for name, value in batch.items() if name != "recorded"}
        module.total(module(**kept)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]))
    error = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert 0 < error < 0.01, error


def test_features_replace_pictures_and_tower(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    do_record(config, replace(WHOLE, features=True))
    examples, collator, student = examples_of(config)
    expected = student.tower_features(torch.stack([collator.images.decode(examples[i]["row"]) for i in (0, 2)]))
    batch = collator([examples[2], examples[1], examples[0]])
    assert "pixel_values" not in batch
    torch.testing.assert_close(batch["image_features"], expected.flip(0), atol=1e-5, rtol=1e-4)
    assert collator([examples[1]])["image_features"].shape == (1, 576, 32)  # one blank image
    monkeypatch.setattr(ImageStore, "decode", lambda *_: pytest.fail("a picture was decoded"))
    monkeypatch.setattr(MobileVlm, "tower_features", lambda *_: pytest.fail("the tower ran"))
    assert len(terms_of(train(replace(config, max_steps=2)))) == 2


def test_batches_are_made_in_other_processes_too(config: DistillConfig) -> None:
    do_record(config, WHOLE)
    here = terms_of(train(replace(config, max_steps=2)))
    there = terms_of(train(replace(config, max_steps=2, workers=1, output=config.output.with_name("workers"))))
    assert here == there


def test_content_decides_what_is_recorded_again(config: DistillConfig, make_data: MakeData, tmp_path: Path) -> None:
    first = do_record(config)
    assert do_record(config).recorded == 0
    moved = tmp_path / "moved"
    shutil.copytree(config.data.parent, moved)
    rows = json.loads(config.data.read_text())
    (moved / "train.json").write_text(json.dumps(rows[::-1]))
    assert config.teacher is not None
    shutil.copytree(config.teacher, tmp_path / "renamed")
    shutil.copytree(config.teacher.parent / "clip-tiny", tmp_path / "clip-tiny")
    same = replace(config, data=moved / "train.json", teacher=tmp_path / "renamed")
    assert do_record(same).recorded == 0  # reordered, elsewhere, under another name
    rows[0]["conversations"][1]["value"] = "violet"
    (moved / "train.json").write_text(json.dumps(rows))
    assert do_record(same).recorded == 1  # another answer
    picture = moved / "images" / "2.png"
    shutil.copyfile(moved / "images" / "3.png", picture)
    assert do_record(same).recorded == 1  # another picture
    more = do_record(config, CacheStorage(words=16))
    assert more.recorded == 6 and more.shard_bytes < first.shard_bytes / 5  # the words alone
    colder = do_record(replace(config, temperature=2.0))
    assert colder.recorded == 6 and colder.shard_bytes < first.shard_bytes / 3


def test_an_identity_is_of_weights_and_config(reference: Path, tmp_path: Path) -> None:
    for name in ("teacher", "clip-tiny"):
        shutil.copytree(reference / name, tmp_path / name)
    before = checkpoint_sha256(tmp_path / "teacher")
    assert before == checkpoint_sha256(reference / "teacher")
    weights = load_file(tmp_path / "teacher" / "model.safetensors")
    for name in weights:
        changed = {**weights, name: weights[name] + 0.001}
        save_file(changed, tmp_path / "teacher" / "model.safetensors", metadata={"format": "pt"})
        assert checkpoint_sha256(tmp_path / "teacher") != before
        break
    save_file(weights, tmp_path / "teacher" / "model.safetensors")  # other bytes of the file, the same tensors
    assert checkpoint_sha256(tmp_path / "teacher") == before
    raw = json.loads((tmp_path / "teacher" / "config.json").read_text())
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(raw | {"rms_norm_eps": 1e-4}))
    assert checkpoint_sha256(tmp_path / "teacher") != before


def test_several_processes_record_one_cache(config: DistillConfig) -> None:
    shares = [do_record(config, WHOLE, rank=rank, ranks=3) for rank in range(3)]
    assert sum(share.conversations for share in shares) == 6 and max(share.conversations for share in shares) < 6
    assert do_record(config, WHOLE).recorded == 0
    alone = replace(config, cache=config.output.with_name("alone"))
    do_record(alone, WHOLE)
    batches = []
    for one in (config, alone):
        examples, collator, _ = examples_of(one)
        batch = collator(examples)["recorded"]
        words = batch.pop("row_ids").long()  # words of like probability may change places
        batches.append(batch | {"row_log_p": torch.zeros(words.shape).scatter(1, words, batch["row_log_p"])})
    for name, tensor in batches[0].items():
        torch.testing.assert_close(tensor, batches[1][name], atol=1e-3, rtol=1e-4)


def test_a_killed_recording_goes_on(config: DistillConfig, tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from distill.teacher_cache import shards\n"
        "from distill import cli\n"
        "flush = shards.ShardWriter.flush\n"
        "def slow(self):\n    flush(self)\n    time.sleep(30)\n"
        "shards.ShardWriter.flush = slow\n"
        "add = shards.ShardWriter.add\n"
        "def one_shard_each(self, part, key, entry):\n    self.shard_bytes = 1\n    add(self, part, key, entry)\n"
        "shards.ShardWriter.add = one_shard_each\n"
        "sys.argv = ['alignkd-distill', 'cache', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    words = ["--teacher", config.teacher, "--student", config.student, "--data", config.data, "--cache", config.cache]
    child = subprocess.Popen(
        [sys.executable, script, *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    assert config.cache is not None
    shards = config.cache / "shards"
    deadline = time.monotonic() + 60
    while not list(shards.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (shards / ".0-of-1.part").write_bytes(b"half a shard")
    (shards / f"{'0' * 64}.safetensors").write_bytes(b"renamed, never declared whole")
    assert len(ShardReader(shards)) == 1
    done = do_record(config)
    assert done.recorded == 6 and not list(shards.glob(".*")) and not (shards / f"{'0' * 64}.safetensors").exists()
    assert do_record(config).recorded == 0 and shard_faults(shards) == []


def test_verify_names_missing_truncated_and_altered_shards(config: DistillConfig) -> None:
    for number in range(4):
        do_record(replace(config, top_k=number + 1))
    assert config.cache is not None
    shards = sorted((config.cache / "shards").glob("*.safetensors"))
    assert len(shards) == 4 and shard_faults(config.cache / "shards") == []
    data = bytearray(shards[0].read_bytes())
    data[-1] ^= 1
    shards[0].write_bytes(data)
    shards[1].write_bytes(shards[1].read_bytes()[:-5])
    shards[2].unlink()
    faults = shard_faults(config.cache / "shards")
    for path, fault, said in zip(shards, faults, ("was altered", "is truncated", "is missing"), strict=False):
        assert str(path) in fault and said in fault
    assert len(faults) == 3
    assert str(shards[3]) not in " ".join(faults)
    line = refused(replace(config, top_k=4))
    assert "truncated" in line and "--verify" in line and "--mend" in line
    for number in range(4):
        do_record(replace(config, top_k=number + 1), mend=True)
    assert shard_faults(config.cache / "shards") == []
    examples_of(replace(config, top_k=2))


def test_lines_say_what_does_not_fit(config: DistillConfig, make_data: MakeData) -> None:
    assert "is no teacher cache; make it: alignkd-distill cache --teacher" in refused(config)
    do_record(replace(config, weights=TermWeights(attention=0.0, attention_kl=1.0, focus=0.0)))
    line = refused(config)
    assert "no attention as attention needs it: recorded was its mean over heads" in line
    assert "alignkd-distill cache" in line and "\n" not in line
    do_record(config)
    examples_of(config)
    for change, said in (
        ({"temperature": 2.0}, "rows as reverse_kl needs it: recorded were temperature 1.0, this run asks for 2.0"),
        ({"mask": "all"}, "recorded were mask answer, this run asks for all"),
        ({"top_k": 5}, "focus as focus needs it: recorded were top_k 16, this run asks for 5"),
        ({"weights": TermWeights(attention_groups=1.0)}, "groups as attention_groups needs it: none was ever recorded"),
    ):
        line = refused(replace(config, **change))  # type: ignore[arg-type]
        assert said in line, line
        flag = next(iter(change)).replace("_", "-")
        assert f"--{flag}" in line
    with pytest.raises(UsageError, match="published_logits.*from a running teacher only"):
        examples_of(replace(config, losses="published_code"))
    other = replace(config, teacher=config.student)
    assert "was recorded with another teacher" in refused(other)
    make_data(lambda rows: rows[3]["conversations"][1].update(value="mauve"))
    line = refused(config)
    assert "lacks rows of 1, attention of 1, focus of 1 of 6 conversations; complete it: alignkd-distill cache" in line


def test_another_template_is_another_recording(config: DistillConfig, reference: Path, tmp_path: Path) -> None:
    do_record(config)
    plain = tmp_path / "plain"
    shutil.copytree(reference / "student", plain)
    shutil.copytree(reference / "clip-tiny", tmp_path / "clip-tiny")
    raw = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(raw | {"prompt_template": "plain"}))
    line = refused(replace(config, student=plain))
    assert "recorded were template" in line and '"plain"' in line
    do_record(replace(config, student=plain))
    examples_of(replace(config, student=plain))


def test_the_named_command_records_what_was_missing(config: DistillConfig, capsys: pytest.CaptureFixture[str]) -> None:
    from distill import cli

    config = replace(config, weights=TermWeights(focus=0.0, forward_kl=0.5), mask="all", temperature=2.0)
    words = recording_command(config).split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [*words, "--json"])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code
        shown = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert shown["recorded"] == 6 and shown["shard_bytes"] > 0
        examples_of(config)
        patch.setattr(sys, "argv", ["alignkd-distill", "cache", "--verify", "--cache", str(config.cache)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert not left.value.code and "1 of 1 shards are whole" in capsys.readouterr().out
        assert config.cache is not None
        next((config.cache / "shards").glob("*.safetensors")).unlink()
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 3 and "is missing" in capsys.readouterr().out


def test_wrong_flags_are_one_line(tmp_path: Path) -> None:
    for flags, said in (
        ({}, "--teacher DIR and --data FILE"),
        ({"verify": True, "storage": CacheStorage(words=0)}, "--words 0 must be above 0"),
        ({"verify": True, "rank": 2, "ranks": 2}, "--rank 2 must be from 0 up to below --ranks 2"),
        ({"teacher": tmp_path, "data": tmp_path, "losses": "ce"}, "nothing to record"),
    ):
        with pytest.raises(UsageError, match=said):
            CacheConfig(cache=tmp_path, **flags)  # type: ignore[arg-type]


def test_a_disk_that_is_too_small_is_refused_with_numbers(
    config: DistillConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"needs \d+\.\d MB more, its disk has 0\.0 MB left"):
        do_record(config)


def test_numbers_beyond_float16_are_refused(config: DistillConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    features = MobileVlm.tower_features
    monkeypatch.setattr(MobileVlm, "tower_features", lambda self, pixels: features(self, pixels) * 1e6)
    storage = CacheStorage(features=True)
    with pytest.raises(UsageError, match="features of the teacher.*--precision float32"):
        do_record(config, storage)


def test_pictures_are_hashed_once(tmp_path: Path) -> None:
    image = tmp_path / "a.png"
    image.write_bytes(b"one")
    digests = ImageDigests(tmp_path / "images.sqlite")
    first = digests.digest(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda _: pytest.fail("read again"))
        assert digests.digest(image) == first == pickle.loads(pickle.dumps(digests)).digest(image)
    image.write_bytes(b"another")
    assert digests.digest(image) != first
    with pytest.raises(UsageError, match="cannot be read"):
        digests.digest(tmp_path / "none.png")


def test_every_recordable_divergence_is_asked_for() -> None:
    assert all(NEEDS[name] == ("rows",) for name in DIVERGENCE_TERMS)
